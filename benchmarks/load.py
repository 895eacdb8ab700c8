#!/usr/bin/env python
"""Memory under load: evaluation of many crowded images, and one call after another.

    python -m benchmarks.load

The KP-Nets' memory for 100 to 2000 persons is measured by ``python -m benchmarks``. Linux only.
"""

import argparse
import json
import sys
import tempfile
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from torch import Tensor

from benchmarks.memory import status
from benchmarks.models import SEED, Setting, build_inspose
from inspose_d2.cli import told
from inspose_d2.evaluation import InsPoseEvaluator

KIB, MIB = 1024, 1024**2
SIZE = HEIGHT, WIDTH = (800, 1216)
PERSONS, KEPT = 500, 100  # found in an image, and left by TEST.DETECTIONS_PER_IMAGE
CALL_SIZE = (128, 192)


def poses_of_a_crowd(generator: torch.Generator) -> Instances:
    """Poses cut as the model cuts them; the tensors behind them are those of all persons."""
    keypoints = torch.rand(PERSONS, 17, 3, generator=generator) * torch.tensor([WIDTH, HEIGHT, 1])
    xy = keypoints[..., :2]
    return Instances(
        SIZE,
        pred_boxes=Boxes(torch.cat([xy.amin(dim=1), xy.amax(dim=1)], dim=1)),
        scores=torch.rand(PERSONS, generator=generator),
        pred_classes=torch.zeros(PERSONS, dtype=torch.int64),
        pred_keypoints=keypoints,
    )[:KEPT]


def annotations_of(num_images: int) -> dict[str, Any]:
    """COCO annotations of a person in each image."""
    keypoints = [x for k in range(17) for x in (100 + 10 * k, 100 + 20 * k, 2)]
    person = {"category_id": 1, "iscrowd": 0, "bbox": [100, 100, 160, 320], "area": 51200}
    person |= {"num_keypoints": 17, "keypoints": keypoints}
    images = range(1, num_images + 1)
    return {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in images
        ],
        "annotations": [{**person, "id": i, "image_id": i} for i in images],
        "categories": [{"id": 1, "name": "person"}],
    }


def evaluation_memory(num_images: int) -> dict[str, float]:
    """Measure what an evaluator keeps of an image, and what its figures take.

    Args:
        num_images: with ``PERSONS`` each.

    Returns:
        KiB an image: "kept" while images are processed, by the tensors' storages and Python's own
        objects, over all images and over their second half; "figures", the most that Python
        objects and numpy's arrays take in ``evaluate`` beyond that.
    """
    generator = torch.Generator().manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        json_file = Path(folder) / "annotations.json"
        json_file.write_text(json.dumps(annotations_of(num_images)))
        name = f"load_{num_images}"
        MetadataCatalog.get(name).set(
            json_file=str(json_file),
            thing_classes=["person"],
            thing_dataset_id_to_contiguous_id={1: 0},
        )
        evaluator = InsPoseEvaluator(name, output_dir=folder)
        evaluator.reset()
        tracemalloc.start()
        kept = [tracemalloc.get_traced_memory()[0]]
        storages = 0
        for i in range(1, num_images + 1):
            evaluator.process([{"image_id": i}], [{"instances": poses_of_a_crowd(generator)}])
            storages += _storage_bytes(evaluator._predictions[-1][1])
            kept.append(tracemalloc.get_traced_memory()[0] + storages)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        evaluator.evaluate()
        figures = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
    half = num_images // 2
    return {
        "kept": (kept[-1] - kept[0]) / num_images / KIB,
        "kept, second half": (kept[-1] - kept[half]) / (num_images - half) / KIB,
        "figures": figures / num_images / KIB,
    }


def _storage_bytes(poses: Instances) -> int:
    fields = poses.get_fields().values()
    tensors: list[Tensor] = [x.tensor if isinstance(x, Boxes) else x for x in fields]
    return sum(x.untyped_storage().nbytes() for x in tensors)


def memory_of_calls(config_file: str, num_calls: int) -> dict[str, float]:
    """Measure what one inference after another adds to the process.

    Args:
        config_file: of the model, which has random weights.
        num_calls: images of noise of ``CALL_SIZE`` pixels.

    Returns:
        MiB of resident memory that the first and the second half of the calls add.
    """
    setting = Setting(config_file, config_file, CALL_SIZE, 2, "cpu", None, False, False)
    model = build_inspose(setting).eval()
    generator = torch.Generator().manual_seed(SEED)
    resident = [status("VmRSS")]
    for _ in range(2):
        for _ in range(num_calls // 2):
            image = 255 * torch.rand(3, *CALL_SIZE, generator=generator)
            with torch.inference_mode():
                model([{"image": image}])
        resident.append(status("VmRSS"))
    first, second = ((b - a) / MIB for a, b in pairwise(resident))
    return {"first half": first, "second half": second}


def main() -> None:
    """Measure and print, a JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 250, 500])
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--config-file", default="configs/quick/synthetic_people.yaml")
    args = parser.parse_args()
    results: list[dict[str, Any]] = [
        {"evaluated images": n, **evaluation_memory(n)} for n in args.images
    ]
    results.append({"calls": args.calls, **memory_of_calls(args.config_file, args.calls)})
    for result in results:
        print(json.dumps({k: round(v, 1) for k, v in result.items()}))


if __name__ == "__main__":
    sys.exit(told("benchmark_load.py", main))
