#!/usr/bin/env python
"""Parameters and multiply-adds of InsPose, part by part, on an image of random noise."""

import argparse
import sys
import warnings
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn import parameter_count
from fvcore.nn.jit_handles import bmm_flop_jit
from torch import nn

from inspose_d2 import InsPose, get_cfg
from inspose_d2.cli import told
from inspose_d2.engine.trainer import Trainer
from inspose_d2.modeling.inference import PoseInference

PARTS = {  # name in the table: what it sums, named as in count()
    "backbone": "backbone.bottom_up",
    "FPN": "backbone",
    "classification head": ("head.cls_subnet", "head.cls_score"),
    "parameter tower": "head.params_subnet",
    "keypoint feature branch": "keypoint_branch",
    "disk offset branch": "disk_offset_branch",
    "heatmap branch (training only)": "heatmap_branch",
    "KP-Net parameters (and boxes) at {} locations": (
        "head.params_pred",
        "head.box_pred",
        "predictions at locations",
    ),
    "{} KP-Nets": "KP-Nets",
}


def build(cfg: CfgNode, num_persons: int) -> InsPose:
    """Build an untrained model that finds ``num_persons`` persons in any image."""
    model = Trainer.build_model(cfg).eval()
    keep_finite(model)
    force_persons(model, num_persons)
    return model


def keep_finite(model: nn.Module) -> None:
    """Start the residual branches of a ResNet at zero, or random weights overflow."""
    for module in model.modules():
        if isinstance(module, BottleneckBlock):
            nn.init.zeros_(module.conv3.norm.weight)


def force_persons(model: InsPose, num_persons: int) -> None:
    """Make a model find so many persons in any image that has as many locations."""
    inference = getattr(model, "pose_inference", model)  # the authors' model has none
    inference.score_threshold, inference.topk_candidates = -1.0, num_persons
    inference.nms_threshold, inference.max_poses = 1.0, num_persons


def part_sums(by_module: dict[str, float]) -> dict[str, float]:
    """Add up a count by module into the parts of the table."""
    sums = {}
    for name, prefixes in PARTS.items():
        prefixes = (prefixes,) if isinstance(prefixes, str) else prefixes
        sums[name] = sum(by_module.get(prefix, 0) for prefix in prefixes)
    sums["FPN"] -= sums["backbone"]
    return sums


def load(config_file: str, device: str = "cpu") -> CfgNode:
    """Read a config, for models with random weights."""
    cfg = get_cfg(config_file)
    cfg.MODEL.DEVICE = device
    cfg.MODEL.WEIGHTS = "none"  # never loaded; "" would download those of a timm backbone
    return cfg


def count(
    model: nn.Module, inputs: list[dict[str, Any]]
) -> tuple[dict[str, int], dict[str, float]]:
    """Count parameters and multiply-adds.

    What InsPose runs at chosen locations is no layer: it is what the whole model does outside its
    layers. There the last layers of the heads are the linear maps, KP-Nets the other products.

    Args:
        model: in evaluation.
        inputs: images as for its ``forward``.

    Returns:
        Both by module, those of the whole model under ""; of the multiply-adds also "predictions at
        locations" and "KP-Nets".
    """
    with torch.no_grad():
        flops = FlopCountAnalysis(model, inputs)
    flops.set_op_handle("aten::baddbmm", lambda inputs, out: bmm_flop_jit(inputs[1:3], out))
    flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # Detectron2 traces a wrapper, whose attribute "model" the model is.
    macs = {name.removeprefix("model."): value for name, value in flops.by_module().items()}
    by_operator = flops.by_module_and_operator()
    own = by_operator["model"].copy()
    for name, child in model.named_children():
        if not isinstance(child, PoseInference):  # which has no layers
            own.subtract(by_operator.get(f"model.{name}", {}))
    macs["predictions at locations"] = own["linear"]
    macs["KP-Nets"] = own["addmm"] + own["baddbmm"] + own["matmul"]
    return parameter_count(model), macs


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default="configs/InsPose_R50_3x.yaml")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"))
    parser.add_argument("--persons", type=int, default=20, help="KP-Nets to run")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    model = build(load(args.config_file), args.persons)
    params, macs = count(model, [{"image": torch.rand(3, *args.size) * 255}])
    params_of, macs_of = part_sums(params), part_sums(macs)
    print(f"{args.config_file} at {args.size[0]}x{args.size[1]}\n")
    print(f"{'part':48s}{'M parameters':>14s}{'GMACs':>10s}")
    for part in PARTS:
        name = part.format(args.persons)
        print(f"{name:48s}{params_of[part] / 1e6:14.2f}{macs_of[part] / 1e9:10.2f}")
    print(f"{'total':48s}{params[''] / 1e6:14.2f}{macs[''] / 1e9:10.2f}")


if __name__ == "__main__":
    sys.exit(told("analyze.py", main))
