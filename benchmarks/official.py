#!/usr/bin/env python
"""CPU seconds of the authors' released model beside InsPose and Keypoint R-CNN, and its stages.

    python -m benchmarks.official --size 800 1216 --persons 20

Random weights, images of noise, one thread. Models take turns; what is given are seconds of the
processor, not of the clock, so that other work on the machine matters little.
"""

import argparse
import sys
import time
import warnings
from dataclasses import replace
from typing import Any

import torch

from benchmarks.models import Setting, build_inspose, build_peer, inference
from benchmarks.timing import Stage, by_turns, stage_seconds
from inspose_d2.cli import told
from inspose_d2.modeling.official import decode, inspose_official

OFFICIAL = "InsPose, authors' released model"


def stages_of(model: Any) -> list[Stage]:
    """List the stages of the authors' model."""
    return [
        Stage("backbone and FPN", model.backbone, "forward"),
        Stage("towers of classification and poses", model.head, "forward"),
        Stage("selection and soft-NMS", inspose_official, "select_poses"),
        Stage("tower of the parameters", model.head, "predict_params"),
        Stage("shared features of the KP-Nets", model.keypoint_branch, "forward"),
        Stage("KP-Nets, peaks of the enlarged maps", inspose_official, "enlarged_peaks"),
        Stage("enlarging the maps", decode, "enlarge"),
        Stage("dense branch", model.dense_branch, "forward"),
        Stage("offsets at the peaks", model.dense_branch, "offsets_at"),
    ]


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
    times = by_turns(
        [lambda _, call=call: call() for call in calls.values()], args.repeats, 1, time.process_time
    )
    find = calls[OFFICIAL]
    stages = stage_seconds(
        lambda _: find(), stages_of(official), args.repeats, clock=time.process_time
    )
    print(f"{args.persons} persons, {args.size[0]}x{args.size[1]}, one thread, median CPU seconds")
    for name, seconds in zip(calls, times, strict=True):
        print(f"{name:50s}{seconds.median:8.2f}")
    for name, value in stages.items():
        print(f"  {name:48s}{value:8.3f}")


if __name__ == "__main__":
    sys.exit(told("benchmark_official.py", main))
