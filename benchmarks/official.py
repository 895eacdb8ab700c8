#!/usr/bin/env python
"""CPU seconds of the authors' released model beside InsPose and Keypoint R-CNN, and its stages.

    python -m benchmarks.official --size 800 1216 --persons 20

Random weights, images of noise, one thread. Models take turns; what is given are seconds of the
processor, not of the clock, so that other work on the machine matters little.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.models import Setting, build_inspose, build_peer, inference
from inspose_d2.cli import told
from inspose_d2.modeling.official import decode, inspose_official

OFFICIAL = "InsPose, authors' released model"


def watch(owner: Any, name: str, stage: str, seconds: dict[str, float]) -> None:
    """Replace a function by one that adds its seconds to those of a stage."""
    function: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[stage] += time.process_time() - start

    setattr(owner, name, timed)


def stages_of(model: Any) -> dict[str, float]:
    """Begin to time the stages of the authors' model; the result grows with each call of it."""
    seconds: dict[str, float] = defaultdict(float)
    watch(model.backbone, "forward", "backbone and FPN", seconds)
    watch(model.head, "forward", "towers of classification and poses", seconds)
    watch(inspose_official, "select_poses", "selection and soft-NMS", seconds)
    watch(model.head, "predict_params", "tower of the parameters", seconds)
    watch(model.keypoint_branch, "forward", "shared features of the KP-Nets", seconds)
    watch(inspose_official, "enlarged_peaks", "KP-Nets, peaks of the enlarged maps", seconds)
    watch(decode, "enlarge", "    of these, enlarging", seconds)
    watch(model.dense_branch, "forward", "dense branch", seconds)
    watch(model.dense_branch, "offsets_at", "offsets at the peaks", seconds)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"))
    parser.add_argument("--persons", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds, after one to warm up")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    setting = Setting(
        config_file="configs/InsPose_R50_3x.yaml",
        peer="configs/peer/KeypointRCNN_R50_3x.yaml",
        size=tuple(args.size),
        batch=1,
        device="cpu",
        amp=None,
        channels_last=False,
        compile=False,
    )
    official = build_inspose(replace(setting, config_file="configs/InsPose_R50_Official.yaml"))
    models = {
        "InsPose": build_inspose(setting),
        OFFICIAL: official,
        "Keypoint R-CNN, channels-last": build_peer(setting, channels_last=True),
    }
    calls = {name: inference(setting, model, args.persons) for name, model in models.items()}
    for call in calls.values():
        call()
    stages, times = stages_of(official), defaultdict(list)
    for _ in range(args.repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    print(f"{args.persons} persons, {args.size[0]}x{args.size[1]}, one thread, median CPU seconds")
    for name, values in times.items():
        print(f"{name:50s}{statistics.median(values):8.2f}")
    for name, value in stages.items():
        print(f"  {name:48s}{value / args.repeats:8.3f}")


if __name__ == "__main__":
    sys.exit(told("benchmark_official.py", main))
