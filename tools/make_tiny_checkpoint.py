#!/usr/bin/env python
"""Train the checkpoint that the package carries, measure it and write it into the manifest.

    python tools/make_tiny_checkpoint.py --minutes 20

Weights alone, in half precision; the AP in the manifest is that of the file as it is loaded.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from demo_synthetic import train
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from machine import describe
from torch import Tensor, nn

from inspose_d2 import get_cfg, get_model
from inspose_d2.engine.trainer import Trainer
from inspose_d2.model_zoo import model_zoo

CONFIG = "quick/synthetic_people_tiny"
NAME = "synthetic_people_tiny"
MAX_BYTES = 5e6
MAX_LOSS = 0.2  # AP, percent, that half precision may cost


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cast the weights to half precision; counters stay."""
    return {k: v.cpu().half() if v.is_floating_point() else v.cpu() for k, v in state.items()}


def evaluate(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """Keypoint AP, AP50 and AP75 in percent on the config's first test set, by metric's name."""
    (results,) = Trainer.test(cfg, model).values()
    names = ("AP", "AP50", "AP75")
    return {f"{cfg.DATASETS.TEST[0]}/keypoints/{x}": round(results[x], 2) for x in names}


def write(folder: Path, file: Path, metrics: dict[str, float], training: dict[str, Any]) -> None:
    """Put an entry for a file of the folder into the folder's manifest."""
    manifest = folder / "manifest.json"
    entries = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    entries[NAME] = {
        "config": CONFIG,
        "location": file.name,
        "size": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "metrics": metrics,
        "training": training,
    }
    manifest.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


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
    trained = args.output / "model_final.pth"
    whole = get_model(CONFIG, trained)
    file = args.checkpoints / f"{NAME}.pth"
    torch.save({"model": half(whole.state_dict())}, file)

    before, metrics = evaluate(cfg, whole), evaluate(cfg, get_model(CONFIG, file))
    key = f"{cfg.DATASETS.TEST[0]}/keypoints/AP"
    print(f"{key}: {before[key]:.2f} in single precision, {metrics[key]:.2f} in half")
    if before[key] - metrics[key] >= MAX_LOSS or file.stat().st_size > MAX_BYTES:
        file.unlink()
        sys.exit(f"refused: half precision costs {MAX_LOSS} AP or more, or the file is too large")
    command = f"python tools/make_tiny_checkpoint.py --minutes {args.minutes:g} --seed {args.seed}"
    training = {"command": command, "steps": steps, "machine": describe(cfg.MODEL.DEVICE)}
    write(args.checkpoints, file, metrics, training)
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB, {steps} steps")


if __name__ == "__main__":
    main()
