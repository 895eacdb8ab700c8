#!/usr/bin/env python
"""Time the drawing of poses beside Detectron2's Visualizer, on one core.

python -m benchmarks.draw                  10 persons on 1280 x 720
python -m benchmarks.draw --persons 30
"""

import argparse
import sys

import cv2
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer

from benchmarks.timing import by_turns
from inspose_d2.cli import told
from inspose_d2.modeling.postprocess import boxes_of_poses
from inspose_d2.visualization.poses import draw_poses

# A standing person in a box of width 0.5 and height 1: COCO's keypoints as x, y.
FIGURE = [
    *((0.25, 0.08), (0.28, 0.06), (0.22, 0.06), (0.31, 0.08), (0.19, 0.08)),
    *((0.37, 0.2), (0.13, 0.2), (0.45, 0.35), (0.05, 0.35), (0.5, 0.5), (0.0, 0.5)),
    *((0.32, 0.52), (0.18, 0.52), (0.34, 0.75), (0.16, 0.75), (0.35, 1.0), (0.15, 1.0)),
]


def draw_scene(num_persons: int, size: tuple[int, int]) -> tuple[np.ndarray, Instances]:
    """Draw an image of noise and persons of a third to all of its height at random places."""
    rng = np.random.default_rng(0)
    height, width = size
    image = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    scale = rng.uniform(height / 3, height, (num_persons, 1, 1))
    corner = rng.uniform(0, 1, (num_persons, 1, 2)) * ([width, height] - scale * [0.5, 1])
    score = rng.uniform(0.1, 1, (num_persons, len(FIGURE), 1))
    keypoints = torch.from_numpy(np.concatenate([corner + FIGURE * scale, score], axis=2)).float()
    poses = Instances(
        size,
        pred_keypoints=keypoints,
        pred_boxes=Boxes(boxes_of_poses(keypoints)),
        scores=torch.linspace(1, 0.4, num_persons),
        pred_classes=torch.zeros(num_persons, dtype=torch.int64),
    )
    return image, poses


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--persons", type=int, default=10)
    parser.add_argument("--size", type=int, nargs=2, default=[720, 1280], metavar=("H", "W"))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    metadata = MetadataCatalog.get("keypoints_coco_2017_val")
    image, poses = draw_scene(args.persons, tuple(args.size))

    def with_opencv(_: int) -> np.ndarray:
        return draw_poses(image, poses, metadata=metadata, boxes=True, scores=True)

    def with_detectron2(_: int) -> np.ndarray:
        visualizer = Visualizer(image[:, :, ::-1], metadata)
        return visualizer.draw_instance_predictions(poses).get_image()

    ours, theirs = by_turns([with_opencv, with_detectron2], args.repeats)
    print(f"{args.persons} persons on {args.size[1]} x {args.size[0]}, boxes and scores, one core")
    for name, seconds in (("draw_poses", ours), ("Visualizer", theirs)):
        print(
            f"{name}: {seconds.median * 1e3:.1f} ms "
            f"({seconds.min * 1e3:.1f} to {seconds.max * 1e3:.1f})"
        )
    print(f"Visualizer / draw_poses: {theirs.median / ours.median:.1f}")


if __name__ == "__main__":
    sys.exit(told("benchmark_draw.py", main))
