#!/usr/bin/env python
"""Time InsPose and Keypoint R-CNN side by side, on any device, with random weights and no data.

    python -m benchmarks            latency against the number of persons, stages, memory
    python -m benchmarks --train    training steps, their parts, memory, the data loader
    python -m benchmarks --kp-net   the KP-Nets alone, beside the least that they can take

Everything that is compared is measured in one process, taking turns, and given as medians. Each
run writes JSON and Markdown, two of them a plot too.
"""

import argparse
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.kp_net import measure_kp_net
from benchmarks.machine import describe, limits, probes
from benchmarks.memory import inference_memory, training_memory
from benchmarks.models import (
    BACKBONE,
    INSPOSE,
    MODELS,
    PEER,
    Setting,
    build_inspose,
    build_one,
    configs,
    images,
    in_evaluation,
    inference,
    multiply_adds,
)
from benchmarks.report import write_kp_net, write_latency, write_training
from benchmarks.timing import Stage, by_turns, stage_seconds
from benchmarks.train import loading_rate, measure_training
from inspose_d2.cli import told
from inspose_d2.modeling import inspose

BACKBONE_STAGES = ("backbone", "FPN")
DENSE_STAGES = ("head towers", "keypoint feature branch", "disk offset branch")
MULTIPLY_ADDS = {  # stage: what analyze.count calls it
    "backbone": "backbone.bottom_up",
    "FPN": "backbone",
    "head towers": "head",
    "keypoint feature branch": "keypoint_branch",
    "disk offset branch": "disk_offset_branch",
    "patches and parameters": "predictions at locations",
    "KP-Nets": "KP-Nets",
}


def inference_stages(model: inspose.InsPose) -> list[Stage]:
    """What inference consists of."""
    stages = [
        Stage("preprocessing", model, "preprocess_image"),
        Stage("backbone", model.backbone.bottom_up, "forward"),
        Stage("FPN", model.backbone, "forward"),
        Stage("head towers", model.head, "forward"),
        Stage("keypoint feature branch", model.keypoint_branch, "forward"),
        Stage("disk offset branch", model.disk_offset_branch, "forward"),
        Stage("selection of candidates", model.pose_inference, "candidates"),
        Stage("patches and parameters", model.head, "at"),
        Stage("KP-Nets", model.kp_net, "peaks"),
        Stage("decoding and NMS", model.pose_inference, "forward"),
    ]
    return [stage for stage in stages if stage.owner is not None]


def measure_stages(setting: Setting, num_persons: int, repeats: int, rate: float) -> dict[str, Any]:
    """Time the stages of InsPose's inference, not compiled; ``rate`` is for their floors."""
    model = build_inspose(replace(setting, compile=False))
    run = inference(setting, model, num_persons)
    seconds = stage_seconds(run, inference_stages(model), repeats)
    dense = [name for name in (*BACKBONE_STAGES, *DENSE_STAGES) if name in seconds]
    outside = 1 - sum(seconds[name] for name in dense) / sum(seconds.values())
    macs = multiply_adds(setting, model, num_persons)
    floors = {name: macs[MULTIPLY_ADDS[name]] / rate for name in seconds if name in MULTIPLY_ADDS}
    floors["FPN"] -= floors["backbone"]  # which is inside it
    return {"persons": num_persons, "seconds": seconds, "floors": floors, "outside": outside}


def find_exactly(run: Callable[..., Any], num_persons: int, name: str) -> None:
    """Make sure that the forced number of persons is what a model finds."""
    found = {len(result["instances"]) for result in run()}
    if found != {num_persons}:
        raise RuntimeError(f"{name} found {found} persons where {num_persons} were forced")


def measure_latency(setting: Setting, persons: list[int], repeats: int) -> dict[str, Any]:
    """Time both models, InsPose's backbone and the machine's limits by turns."""
    models = {name: build_one(setting, name) for name in MODELS}
    cases, calls = [], []
    for n in persons:
        for name, model in models.items():
            calls.append(inference(setting, model, n))
            find_exactly(calls[-1], n, name)
            cases.append({"model": name, "persons": n})
    cases.append({"model": BACKBONE, "persons": None})
    calls.append(backbone_call(setting, models[INSPOSE]))
    of_machine = probes(setting.device)

    calls += [in_evaluation(setting, probe.run) for probe in of_machine]
    times = by_turns(calls, repeats, warm_up=1)
    rates = limits(of_machine, times[len(cases) :])
    rows = [case | asdict(x) for case, x in zip(cases, times, strict=False)]
    add_floors(setting, rows, rates["multiply-adds"]["rate"])
    return {"limits": rates, "latency": rows, "ratios": ratios(rows, persons)}


def backbone_call(setting: Setting, model: inspose.InsPose) -> Callable[..., Any]:
    """Make the function that runs InsPose's backbone and FPN alone."""
    image = model.preprocess_image(images(setting)).tensor
    backbone = torch.compile(model.backbone) if setting.compile else model.backbone
    return in_evaluation(setting, backbone, image)


def add_floors(setting: Setting, rows: list[dict[str, Any]], rate: float) -> None:
    """Put beside each row its multiply-adds and the seconds that they take at the best rate."""
    plain = replace(setting, compile=False)
    models: dict[str, nn.Module] = {name: build_one(plain, name) for name in (INSPOSE, PEER)}

    @cache
    def macs_of(name: str, num_persons: int) -> dict[str, float]:
        return multiply_adds(plain, models[name], num_persons)

    for row in rows:
        if row["model"] == BACKBONE:
            row["GMACs"] = macs_of(INSPOSE, rows[0]["persons"])["backbone"]
        else:
            row["GMACs"] = macs_of(INSPOSE if row["model"] == INSPOSE else PEER, row["persons"])[""]
        row["floor"] = row["GMACs"] / rate


def ratios(rows: list[dict[str, Any]], persons: list[int]) -> list[dict[str, Any]]:
    """Divide InsPose's time by that of the peer in its faster layout, by number of persons."""
    median = {(row["model"], row["persons"]): row["median"] for row in rows}
    result = []
    for n in persons:
        peer = min(MODELS[1:], key=lambda name: median[name, n])
        ratio = median[INSPOSE, n] / median[peer, n]
        result.append({"persons": n, "peer": peer, "ratio": ratio})
    return result


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--train", action="store_true", help="training instead of inference")
    what.add_argument("--kp-net", action="store_true", help="the KP-Nets alone")
    parser.add_argument("--config-file", default="configs/InsPose_R50_3x.yaml")
    parser.add_argument("--peer", default="configs/peer/KeypointRCNN_R50_3x.yaml")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"))
    parser.add_argument(
        "--persons", type=int, nargs="+", help="default: 1 20 100 500; of a training image 5 20"
    )
    parser.add_argument("--stages", type=int, default=100, help="persons of the stage table")
    parser.add_argument("--batch", type=int, default=1, help="images in a call")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, after one to warm up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", choices=("bf16", "fp16"), help="default: float32")
    parser.add_argument("--channels-last", action="store_true", help="InsPose on a GPU too")
    parser.add_argument("--compile", action="store_true", help="what torch.compile can take")
    parser.add_argument(
        "--times-only", action="store_true", help="neither peak memory nor the data loader"
    )
    parser.add_argument("--output", type=Path, default=Path("output/benchmark"))
    args = parser.parse_args(argv)
    args.persons = args.persons or ([5, 20] if args.train else [1, 20, 100, 500])
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is asked for and write the report."""
    args = parse_arguments(argv)
    warnings.filterwarnings("ignore")
    setting = Setting(
        config_file=args.config_file,
        peer=args.peer,
        size=tuple(args.size),
        batch=args.batch,
        device=args.device,
        amp=args.amp,
        channels_last=args.channels_last,
        compile=args.compile,
    )
    command = ["python", "-m", "benchmarks", *(sys.argv[1:] if argv is None else argv)]
    result = {
        "command": shlex.join(command),
        "machine": describe(args.device),
        "setting": asdict(setting),
        "repeats": args.repeats,
    }
    if args.train:
        result |= measure_training(setting, args.persons, args.repeats)
        if not args.times_only:
            result["loading"] = loading_rate(configs(setting)[0])
            result["memory"] = training_memory(setting, [INSPOSE, PEER], args.persons)
        path = write_training(args.output, result)
    elif args.kp_net:
        result |= measure_kp_net(setting, args.persons, args.repeats)
        path = write_kp_net(args.output, result)
    else:
        result |= measure_latency(setting, args.persons, args.repeats)
        rate = result["limits"]["multiply-adds"]["rate"]
        result["stages"] = measure_stages(setting, args.stages, args.repeats, rate)
        if not args.times_only:
            result["memory"] = inference_memory(setting, [INSPOSE, PEER], args.persons)
        path = write_latency(args.output, result)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(told("benchmark.py", main))
