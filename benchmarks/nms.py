#!/usr/bin/env python
"""Time NMS of poses beside NMS of boxes and a whole inference, on one core.

    python -m benchmarks.nms
    python -m benchmarks.nms --config-file configs/InsPose_R50_3x.yaml --size 480 736

Random weights that are made to find so many candidates in noise; for NMS alone, as many poses are
planted near persons. The three take turns; what is given are milliseconds of the processor, not of
the clock, so that other work on the machine matters little.
"""

import argparse
import sys
import time
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.analyze import build, force_persons, load
from benchmarks.draw import FIGURE
from benchmarks.models import person_boxes
from benchmarks.timing import by_turns
from inspose_d2.cli import told
from inspose_d2.modeling.oks import oks_sigmas
from inspose_d2.modeling.postprocess import best_poses, boxes_of_poses

CASES = ((100, 5), (500, 20), (500, 100))  # candidates, persons
SPREAD = 0.02  # of the keypoints of a person's candidates, in heights of the person


def planted_poses(candidates: int, persons: int, size: tuple[int, int]) -> Tensor:
    """Draw poses (N, 17, 3) near persons in an image of ``size`` (H, W), pixels."""
    random = torch.Generator().manual_seed(0)
    box = person_boxes(persons, size)[torch.arange(candidates) % persons]
    height = (box[:, 3] - box[:, 1])[:, None, None]
    noise = SPREAD * torch.randn(candidates, 17, 2, generator=random)
    xy = box[:, None, :2] + height * (torch.tensor(FIGURE) * torch.tensor([0.8, 1]) + noise)
    return torch.cat([xy, torch.ones(candidates, 17, 1)], dim=2)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="configs/people/InsPose_Lite0_people.yaml")
    parser.add_argument("--size", type=int, nargs=2, default=(288, 384), metavar=("H", "W"))
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cfg, size = load(args.config_file), tuple(args.size)
    model = build(cfg, num_persons=1)
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) * 255
    sigmas = torch.tensor(oks_sigmas(cfg))

    def infer(candidates: int, _: int) -> Any:
        force_persons(model, candidates)
        with torch.inference_mode():
            return model([{"image": image}])

    def suppress(poses: Tensor, scores: Tensor, of_poses: bool, _: int) -> Any:
        how = {"nms_threshold": 0.5, "sigmas": sigmas} if of_poses else {"nms_threshold": 0.6}
        return best_poses(poses, boxes_of_poses(poses), scores, max_poses=100, **how)

    print("candidates persons   boxes, ms   poses, ms   poses / boxes   of an inference, ms")
    for candidates, persons in CASES:
        poses = planted_poses(candidates, persons, size)
        scores = torch.rand(candidates, generator=torch.Generator().manual_seed(1))
        calls = [partial(suppress, poses, scores, kind) for kind in (False, True)]
        calls.append(partial(infer, candidates))
        times = by_turns(calls, args.repeats, warm_up=1, clock=time.process_time)
        boxes, of_poses, whole = (1e3 * x.median for x in times)
        print(
            f"{candidates:10d}{persons:8d}{boxes:12.2f}{of_poses:12.2f}{of_poses / boxes:16.1f}"
            f"{of_poses / whole:16.1%} of {whole:.0f}"
        )


if __name__ == "__main__":
    sys.exit(told("benchmark_nms.py", main))
