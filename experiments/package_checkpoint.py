#!/usr/bin/env python
"""Put trained weights into the package: in half precision, measured as they are loaded.

    python -m experiments.package_checkpoint --config-file people/InsPose_Lite0_people \
        --weights output/people/model_final.pth --name people_lite0 --threshold 0.4 \
        --command "python train_net.py --config-file people/InsPose_Lite0_people SEED 1"

Writes NAME.pth and its entry in the manifest: AP on DATASETS.TEST, sha256, how it was trained.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from torch import Tensor, nn

from benchmarks.machine import describe
from inspose_d2 import get_cfg, get_model
from inspose_d2.checkpoint.checkpointer import torch_load
from inspose_d2.cli import told
from inspose_d2.engine.trainer import Trainer
from inspose_d2.model_zoo import model_zoo

MAX_BYTES = 1e7
MAX_LOSS = 0.2  # AP, percent, that half precision may cost
METRICS = ("AP", "AP50", "AP75", "APm", "APl")


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cast the weights to half precision; counters stay."""
    return {k: v.cpu().half() if v.is_floating_point() else v.cpu() for k, v in state.items()}


def evaluate(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """Keypoint AP and more, in percent, on each test set of the config, by metric's name."""
    metrics = {}
    for name in cfg.DATASETS.TEST:
        single = cfg.clone()
        single.DATASETS.TEST = (name,)
        results = Trainer.test(single, model)["keypoints"]
        metrics |= {f"{name}/keypoints/{x}": round(results[x], 2) for x in METRICS}
    return metrics


def write(folder: Path, file: Path, entry: dict[str, Any]) -> None:
    """Put an entry for NAME.pth of the folder into the folder's manifest."""
    manifest = folder / "manifest.json"
    entries = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    entries[file.stem] = {
        **{"config": entry["config"], "location": file.name, "size": file.stat().st_size},
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        **entry,
    }
    manifest.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def package(
    cfg: CfgNode, config: str, weights: Path, file: Path, entry: dict[str, Any]
) -> dict[str, float]:
    """Cast, measure, write; ends the program where half precision costs too much.

    Args:
        cfg: its ``DATASETS.TEST`` are measured.
        config: name of the config.
        weights: a checkpoint of training.
        file: to write, beside the manifest.
        entry: more for the manifest.

    Returns:
        What was measured.
    """
    whole = get_model(config, weights)
    torch.save({"model": half(whole.state_dict())}, file)
    before, metrics = evaluate(cfg, whole), evaluate(cfg, get_model(config, file))
    for key in before:
        if key.endswith("/AP"):
            print(f"{key}: {before[key]:.2f} in single precision, {metrics[key]:.2f} in half")
            if before[key] - metrics[key] >= MAX_LOSS:
                file.unlink()
                sys.exit(f"refused: half precision costs {MAX_LOSS} AP or more")
    if file.stat().st_size > MAX_BYTES:
        size = file.stat().st_size
        file.unlink()
        sys.exit(f"refused: {size / 1e6:.1f} MB are too many for the package")
    write(file.parent, file, {"config": config, "metrics": metrics, **entry})
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")
    return metrics


def main() -> None:
    """Read the command line and package."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="name of a config")
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint of training")
    parser.add_argument("--name", required=True, help="in the model zoo")
    parser.add_argument("--threshold", type=float, default=0.4, help="score from which it is shown")
    parser.add_argument("--command", required=True, help="that trained it")
    parser.add_argument("--checkpoints", type=Path, default=model_zoo.CHECKPOINTS)
    args = parser.parse_args()
    setup_logger(name="inspose_d2", abbrev_name="inspose")
    cfg = get_cfg(args.config_file)
    steps = torch_load(str(args.weights))["iteration"] + 1
    training = {"command": args.command, "steps": steps, "machine": describe(cfg.MODEL.DEVICE)}
    entry = {"score_threshold": args.threshold, "training": training}
    package(cfg, args.config_file, args.weights, args.checkpoints / f"{args.name}.pth", entry)


if __name__ == "__main__":
    sys.exit(told("package_checkpoint.py", main))
