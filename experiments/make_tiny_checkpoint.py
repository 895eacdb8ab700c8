#!/usr/bin/env python
"""Train the checkpoint that the package carries, measure it and write it into the manifest.

    python -m experiments.make_tiny_checkpoint --minutes 20

Weights alone, in half precision; the AP in the manifest is that of the file as it is loaded.
"""

import argparse
import sys
from pathlib import Path

from detectron2.utils.logger import setup_logger

from benchmarks.machine import describe
from experiments.demo_synthetic import train
from experiments.package_checkpoint import package
from inspose_d2 import get_cfg
from inspose_d2.cli import told
from inspose_d2.model_zoo import model_zoo

CONFIG = "quick/synthetic_people_tiny"
NAME = "synthetic_people_tiny"


def main() -> None:
    """Train, cast, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="time for training")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("output/synthetic_people_tiny"))
    parser.add_argument("--checkpoints", type=Path, default=model_zoo.CHECKPOINTS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    setup_logger(name="inspose_d2", abbrev_name="inspose")

    cfg = get_cfg(CONFIG, ["OUTPUT_DIR", str(args.output), "SEED", args.seed])
    steps = train(cfg, args.minutes)
    command = (
        f"python -m experiments.make_tiny_checkpoint --minutes {args.minutes:g} --seed {args.seed}"
    )
    training = {"command": command, "steps": steps, "machine": describe(cfg.MODEL.DEVICE)}
    trained, file = args.output / "model_final.pth", args.checkpoints / f"{NAME}.pth"
    package(cfg, CONFIG, trained, file, {"score_threshold": 0.4, "training": training})


if __name__ == "__main__":
    sys.exit(told("make_tiny_checkpoint.py", main))
