#!/usr/bin/env python
"""Parameters, multiply-adds and seconds of InsPose, part by part, on an image of random noise."""

import argparse
import time
import warnings
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn import parameter_count
from fvcore.nn.jit_handles import bmm_flop_jit

from inspose_d2 import InsPose, add_inspose_config

PARTS = {  # name in the table: prefix of the modules
    "backbone": "backbone.bottom_up",
    "FPN": "backbone",
    "classification head": ("head.cls_subnet", "head.cls_score"),
    "parameter tower": "head.params_subnet",
    "parameter prediction": "head.params_pred",
    "keypoint feature branch": "keypoint_branch",
    "disk offset branch": "disk_offset_branch",
    "heatmap branch (training only)": "heatmap_branch",
}


def build(cfg: CfgNode, num_persons: int) -> InsPose:
    """Build an untrained model that finds ``num_persons`` persons in any image."""
    model = build_model(cfg).eval()
    for module in model.modules():
        if isinstance(module, BottleneckBlock):  # else random weights overflow
            torch.nn.init.zeros_(module.conv3.norm.weight)
    model.score_threshold, model.topk_candidates = -1.0, num_persons
    model.nms_threshold, model.max_poses = 1.0, num_persons
    return model.to(memory_format=torch.channels_last)


def part_sums(by_module: dict[str, float]) -> dict[str, float]:
    """Add up a count by module into the parts of the table."""
    sums = {}
    for name, prefixes in PARTS.items():
        prefixes = (prefixes,) if isinstance(prefixes, str) else prefixes
        sums[name] = sum(by_module.get(prefix, 0) for prefix in prefixes)
    sums["FPN"] -= sums["backbone"]
    return sums


def load(config_file: str) -> CfgNode:
    """Read a config for the CPU."""
    cfg = get_cfg()
    add_inspose_config(cfg)
    cfg.merge_from_file(config_file)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = "none"  # never loaded; "" would download those of a timm backbone
    return cfg


def count(model: InsPose, inputs: list[dict[str, Any]]) -> tuple[dict[str, int], dict[str, float]]:
    """Parameters and multiply-adds by module; those of the whole model under ""."""
    with torch.no_grad():
        flops = FlopCountAnalysis(model, inputs)
    flops.set_op_handle("aten::baddbmm", lambda inputs, out: bmm_flop_jit(inputs[1:3], out))
    flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # Detectron2 traces a wrapper, whose attribute "model" the model is.
    macs = {name.removeprefix("model."): value for name, value in flops.by_module().items()}
    return parameter_count(model), macs


def seconds_of(function: Any, repeats: int) -> float:
    """Median time of a call, after two to warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default="configs/InsPose_R50_3x.yaml")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"))
    parser.add_argument("--persons", type=int, default=20, help="KP-Nets to run")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    model = build(load(args.config_file), args.persons)
    inputs = [{"image": torch.rand(3, *args.size) * 255}]

    params, macs = count(model, inputs)
    params_of, macs_of = part_sums(params), part_sums(macs)
    macs_of[f"{args.persons} KP-Nets and their parameters"] = macs[""] - sum(macs_of.values())
    print(f"{args.config_file} at {args.size[0]}x{args.size[1]}\n")
    print(f"{'part':36s}{'M parameters':>14s}{'GMACs':>10s}")
    for name, value in macs_of.items():
        print(f"{name:36s}{params_of.get(name, 0) / 1e6:14.2f}{value / 1e9:10.2f}")
    print(f"{'total':36s}{params[''] / 1e6:14.2f}{macs[''] / 1e9:10.2f}\n")

    with torch.inference_mode():
        image = model.preprocess_image(inputs).tensor
        backbone = seconds_of(lambda: model.backbone(image), args.repeats)
        whole = seconds_of(lambda: model(inputs), args.repeats)
    threads = torch.get_num_threads()
    print(f"{whole:.2f} s per image with {args.persons} persons, {threads} CPU threads;")
    print(f"{backbone:.2f} s of it, {100 * backbone / whole:.0f} %, are backbone and FPN")


if __name__ == "__main__":
    main()
