#!/usr/bin/env python
"""Keypoint AP, latency and size of ONNX files, which take turns at each image.

The files take pictures as they are:

inspose export --weights people_lite0 --preprocess --output model.onnx
python -m benchmarks.onnx_ap model.onnx int8.onnx --dataset people_val
"""

import argparse
import os
import time
from collections.abc import Sequence
from statistics import median

import numpy as np
import onnxruntime
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from tabulate import tabulate

import inspose_d2.data  # noqa: F401  registers the data sets
from inspose_d2.data.images import read_image
from inspose_d2.evaluation import InsPoseEvaluator

MAX_PIXELS = 50_000_000


def run(session: onnxruntime.InferenceSession, image: np.ndarray) -> tuple[Instances, float]:
    """Find the poses of an image (H, W, 3) in BGR; also the time in milliseconds."""
    start = time.perf_counter()
    found = session.run(["boxes", "scores", "keypoints"], {"image": image})
    passed = 1000 * (time.perf_counter() - start)
    boxes, scores, keypoints = map(torch.from_numpy, found)
    poses = Instances(image.shape[:2], pred_boxes=Boxes(boxes), scores=scores)
    poses.pred_keypoints, poses.pred_classes = keypoints, torch.zeros(len(scores), dtype=torch.int)
    return poses, passed


def measure(files: Sequence[str], dataset: str, threads: int) -> str:
    """Run all files on each image, one after the other, and report them in a table."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    sessions = [onnxruntime.InferenceSession(file, options) for file in files]
    evaluators = [InsPoseEvaluator(dataset) for _ in files]
    times: list[list[float]] = [[] for _ in files]
    for evaluator in evaluators:
        evaluator.reset()
    for record in DatasetCatalog.get(dataset):
        image = read_image(record["file_name"], "BGR", MAX_PIXELS)
        for session, evaluator, own_times in zip(sessions, evaluators, times, strict=True):
            poses, passed = run(session, image)
            evaluator.process([record], [{"instances": poses}])
            own_times.append(passed)
    rows = []
    for file, evaluator, own_times in zip(files, evaluators, times, strict=True):
        found = evaluator.evaluate()["keypoints"]
        figures = [f"{found[name]:.1f}" for name in ("AP", "AP50", "AP75")]
        size = os.path.getsize(file) / 1e6
        rows.append([file, *figures, f"{median(own_times):.0f}", f"{size:.1f}"])
    headers = ["file", "AP", "AP50", "AP75", "median ms", "MB"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", help="of inspose export --preprocess")
    parser.add_argument("--dataset", required=True, help="a registered data set")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print(measure(args.files, args.dataset, args.threads))


if __name__ == "__main__":
    main()
