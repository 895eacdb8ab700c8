"""What the values of a config must be: refused with the key, the value and the cure.

Keys are read by index, not by attribute: the test that finds unread keys must not count a check.
"""

from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from .files import ConfigError, did_you_mean


class Rule(NamedTuple):
    """What some keys must be; of a list or tuple, each element."""

    keys: str  # full keys, separated by blanks
    holds: Callable[[Any], bool]
    must: str  # the end of "KEY must ..."


# What a model is built from; each holds for every model, in training and at inference.
MODEL_RULES = (
    Rule(
        "MODEL.INSPOSE.NUM_KEYPOINTS MODEL.INSPOSE.NUM_CONVS MODEL.INSPOSE.CONV_DIM "
        "MODEL.INSPOSE.KP_NET.NUM_LAYERS MODEL.INSPOSE.KP_NET.CHANNELS "
        "MODEL.INSPOSE.KEYPOINT_BRANCH.NUM_CONVS MODEL.INSPOSE.KEYPOINT_BRANCH.CONV_DIM "
        "MODEL.INSPOSE.KEYPOINT_BRANCH.OUT_CHANNELS MODEL.INSPOSE.DISK_OFFSET.NUM_CONVS "
        "MODEL.INSPOSE.DISK_OFFSET.CONV_DIM MODEL.INSPOSE.HEATMAP.NUM_CONVS "
        "MODEL.INSPOSE.HEATMAP.CONV_DIM MODEL.INSPOSE.MAP_STRIDE MODEL.FPN.OUT_CHANNELS "
        "MODEL.INSPOSE.TOPK_CANDIDATES_TEST TEST.DETECTIONS_PER_IMAGE",
        lambda x: x >= 1,
        "be at least 1",
    ),
    Rule(
        "MODEL.INSPOSE.SCORE_THRESH_TEST MODEL.INSPOSE.NMS_THRESH_TEST "
        "MODEL.INSPOSE.KEYPOINT_SCORE_WEIGHT_TEST MODEL.INSPOSE.FOCAL_LOSS_ALPHA",
        lambda x: 0 <= x <= 1,
        "be in [0, 1]",
    ),
    Rule(
        "MODEL.INSPOSE.PRIOR_PROB MODEL.INSPOSE.HEATMAP.MIN_OVERLAP",
        lambda x: 0 < x < 1,
        "be in (0, 1), without the ends",
    ),
    Rule(
        "MODEL.INSPOSE.CENTER_SAMPLING_RADIUS MODEL.INSPOSE.DISK_OFFSET.RADIUS "
        "MODEL.INSPOSE.SIZES_OF_INTEREST MODEL.PIXEL_STD",
        lambda x: 0 < x < inf,
        "be above 0",
    ),
    Rule(
        "MODEL.INSPOSE.FOCAL_LOSS_GAMMA MODEL.INSPOSE.LOSS_WEIGHT.CLS "
        "MODEL.INSPOSE.LOSS_WEIGHT.KEYPOINT MODEL.INSPOSE.LOSS_WEIGHT.DISK_OFFSET "
        "MODEL.INSPOSE.LOSS_WEIGHT.HEATMAP MODEL.INSPOSE.LOSS_WEIGHT.BOX "
        "MODEL.INSPOSE.LOSS_WEIGHT.REGRESSION MODEL.INSPOSE.LOSS_WEIGHT.VISIBILITY "
        "MODEL.INSPOSE.HEATMAP.MAX_RADIUS MODEL.PIXEL_MEAN INPUT.MIN_SIZE_TEST",
        lambda x: 0 <= x < inf,
        "be 0 or more",
    ),
    Rule("INPUT.MAX_SIZE_TEST", lambda x: x >= 1, "be at least 1 pixel"),
    Rule("VERSION", lambda x: x == 2, "be 2, the only version of Detectron2's keys known here"),
)

TRAINING_RULES = (
    Rule(
        "SOLVER.IMS_PER_BATCH SOLVER.MAX_ITER SOLVER.CHECKPOINT_PERIOD",
        lambda x: x >= 1,
        "be at least 1",
    ),
    Rule(
        "INPUT.MIN_SIZE_TRAIN INPUT.MAX_SIZE_TRAIN INPUT.CROP_SIZE",
        lambda x: x >= 1,
        "be at least 1 pixel",
    ),
    Rule("INPUT.SCALE_JITTER", lambda x: 0 < x < inf, "be above 0"),
    Rule("INPUT.ROTATION", lambda x: 0 <= x <= 180, "be degrees in [0, 180]"),
    Rule("INPUT.COLOR_JITTER SOLVER.EMA_DECAY", lambda x: 0 <= x < 1, "be in [0, 1)"),
    Rule(
        "SOLVER.BASE_LR SOLVER.GAMMA SOLVER.CLIP_GRADIENTS.CLIP_VALUE SOLVER.STEPS",
        lambda x: 0 < x < inf,
        "be above 0",
    ),
    Rule(
        "SOLVER.WEIGHT_DECAY SOLVER.WEIGHT_DECAY_NORM SOLVER.WARMUP_ITERS "
        "SOLVER.REFERENCE_WORLD_SIZE TEST.EVAL_PERIOD DATALOADER.NUM_WORKERS",
        lambda x: 0 <= x < inf,
        "be 0 or more",
    ),
    Rule("SOLVER.MOMENTUM", lambda x: 0 <= x < 1, "be in [0, 1)"),
    Rule("SOLVER.WARMUP_FACTOR", lambda x: 0 <= x <= 1, "be in [0, 1]"),
)

# Norms that may be "GN", which has 32 groups, and the widths that it then divides.
GROUP_NORM = {
    "MODEL.INSPOSE.NORM": "MODEL.INSPOSE.CONV_DIM MODEL.INSPOSE.KEYPOINT_BRANCH.CONV_DIM "
    "MODEL.INSPOSE.DISK_OFFSET.CONV_DIM MODEL.INSPOSE.HEATMAP.CONV_DIM",
    "MODEL.FPN.NORM": "MODEL.FPN.OUT_CHANNELS",
}

# What the authors' released model has no choice of: its star convolutions know COCO's keypoints.
OFFICIAL = {
    "MODEL.INSPOSE.NUM_KEYPOINTS": 17,
    "MODEL.INSPOSE.MAP_STRIDE": 8,
    "MODEL.INSPOSE.IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
    "MODEL.INSPOSE.KEYPOINT_BRANCH.IN_FEATURE": "p3",
    "MODEL.INSPOSE.BOX_HEAD.ENABLED": False,
    "MODEL.INSPOSE.VISIBILITY.ENABLED": False,
    "MODEL.INSPOSE.KEYPOINT_SCORE_WEIGHT_TEST": 0.0,
    "MODEL.INSPOSE.DECODING_TEST": "peaks",
}

# Keys that name one of several things.
MODEL_CHOICES: dict[str, Sequence[str]] = {
    "MODEL.INSPOSE.UNLABELED_PERSONS": ("ignore", "background"),
    "MODEL.INSPOSE.RESAMPLE": ("predictions", "features"),
    "MODEL.INSPOSE.CLS_LOSS": ("focal", "varifocal"),
    "MODEL.INSPOSE.DECODING_TEST": ("peaks", "expected_oks"),
    "MODEL.INSPOSE.NMS_TYPE_TEST": ("boxes", "poses"),
    "MODEL.INSPOSE.KP_NET.BACKEND": ("auto", "torch", "grouped", "triton"),
    "INPUT.RESIZE": ("pillow", "opencv"),
    "INPUT.FORMAT": ("BGR", "RGB"),
}
TRAINING_CHOICES: dict[str, Sequence[str]] = {
    "SOLVER.OPTIMIZER": ("SGD", "ADAMW"),
    "SOLVER.AMP.PRECISION": ("float16", "bfloat16"),
    "SOLVER.LR_SCHEDULER_NAME": (
        "WarmupMultiStepLR",
        "WarmupCosineLR",
        "WarmupStepWithFixedGammaLR",
    ),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm", "full_model"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("none", "horizontal", "vertical"),
}


def check_model(cfg: CfgNode) -> None:
    """Refuse what a model cannot be built from; :class:`InsPose` does this itself.

    Args:
        cfg: the whole config.

    Raises:
        ConfigError: one line for each problem: the key, its value and the cure.
    """
    refuse(model_problems(cfg))


def doubt_about_sizes(cfg: CfgNode) -> str:
    """Say whether images are larger or smaller in evaluation than they ever are in training.

    Sizes are compared by the longer side of a photograph of 4:3.

    Args:
        cfg: the whole config.

    Returns:
        What to doubt, "" for nothing.
    """
    node = cfg["INPUT"]
    test = min(node["MIN_SIZE_TEST"] * 4 / 3, node["MAX_SIZE_TEST"])
    if node["SCALE_JITTER"]:
        keys = "SCALE_JITTER and CROP_SIZE"
        train = [x * node["CROP_SIZE"] for x in node["SCALE_JITTER"]]
    else:
        keys = "MIN_SIZE_TRAIN and MAX_SIZE_TRAIN"
        train = [min(x * 4 / 3, node["MAX_SIZE_TRAIN"]) for x in node["MIN_SIZE_TRAIN"]]
    # A test size of 0 keeps the images as they are.
    if not cfg["DATASETS"]["TEST"] or test == 0 or min(train) <= test <= max(train):
        return ""
    return (
        f"INPUT.MIN_SIZE_TEST {node['MIN_SIZE_TEST']} and MAX_SIZE_TEST {node['MAX_SIZE_TEST']} "
        f"make a photograph of 4:3 {test:.0f} pixels long; in training it is {min(train):.0f} to "
        f"{max(train):.0f}. What was trained on few images may find nobody at a size that it never "
        f"saw: let INPUT.{keys} reach the test size, or test within them"
    )


def refuse(problems: Iterator[str]) -> None:
    """Raise a :class:`ConfigError` with all problems, one a line, where there are any."""
    lines = list(problems)
    if lines:
        raise ConfigError("\n".join(lines))


def model_problems(cfg: CfgNode) -> Iterator[str]:
    """What is wrong with what a model is built from."""
    yield from _wrong_choices(cfg, MODEL_CHOICES)
    yield from _registered(cfg, "MODEL.META_ARCHITECTURE", META_ARCH_REGISTRY)
    yield from _registered(cfg, "MODEL.BACKBONE.NAME", BACKBONE_REGISTRY)
    yield from _device_problems(cfg)
    broken = list(_broken_rules(cfg, MODEL_RULES))
    yield from broken or _model_relations(cfg)


def _model_relations(cfg: CfgNode) -> Iterator[str]:
    """What is wrong between the keys of a model, each of which is right alone."""
    node = cfg["MODEL"]["INSPOSE"]
    sizes, levels = node["SIZES_OF_INTEREST"], node["IN_FEATURES"]
    if len(sizes) != len(levels) - 1 or list(sizes) != sorted(set(sizes)):
        yield (
            "MODEL.INSPOSE.SIZES_OF_INTEREST must be the growing bounds between the levels of "
            f"IN_FEATURES, {len(levels) - 1} values; got {sizes}"
        )
    for norm, widths in GROUP_NORM.items():
        for key in widths.split() if _value(cfg, norm) == "GN" else ():
            if _value(cfg, key) % 32:
                yield f"{key} must be a multiple of 32 with {norm} 'GN'; got {_value(cfg, key)}"
    if cfg["MODEL"]["META_ARCHITECTURE"] == "InsPoseOfficial":
        for key, value in OFFICIAL.items():
            if _value(cfg, key) != value:
                yield f"{key} must be {value} in InsPoseOfficial; got {_value(cfg, key)}"
    mean, std = cfg["MODEL"]["PIXEL_MEAN"], cfg["MODEL"]["PIXEL_STD"]
    if len(mean) != len(std):
        yield f"MODEL.PIXEL_MEAN {mean} and MODEL.PIXEL_STD {std} must be of the same length"


def _device_problems(cfg: CfgNode) -> Iterator[str]:
    device = cfg["MODEL"]["DEVICE"]
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except (RuntimeError, TypeError):
        yield f"MODEL.DEVICE must be a device of PyTorch such as 'cuda' or 'cpu'; got {device!r}"
        return
    if kind == "cuda" and not torch.cuda.is_available():
        yield f"MODEL.DEVICE is {device!r}, but PyTorch finds no CUDA device: set it to 'cpu'"
        return
    if kind == "cuda":  # not tried: the program that starts the workers must not hold a GPU
        if index >= torch.cuda.device_count():
            number = torch.cuda.device_count()
            yield f"MODEL.DEVICE is {device!r}, but there are {number} GPUs, counted from 0"
        return
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0][:200]
        yield f"MODEL.DEVICE is {device!r}, which PyTorch cannot use: set it to 'cpu' ({reason})"


def training_problems(cfg: CfgNode) -> Iterator[str]:
    """What is wrong with the course of training."""
    yield from _wrong_choices(cfg, TRAINING_CHOICES)
    broken = list(_broken_rules(cfg, TRAINING_RULES))
    yield from broken
    steps, sizes = cfg["SOLVER"]["STEPS"], cfg["INPUT"]["MIN_SIZE_TRAIN"]
    if not broken and list(steps) != sorted(steps):
        yield f"SOLVER.STEPS must grow; got {steps}"
    if not sizes or (cfg["INPUT"]["MIN_SIZE_TRAIN_SAMPLING"] == "range" and len(sizes) != 2):
        yield (
            "INPUT.MIN_SIZE_TRAIN must be sizes to choose from, or exactly two with "
            f"INPUT.MIN_SIZE_TRAIN_SAMPLING 'range'; got {sizes}"
        )
    jitter = cfg["INPUT"]["SCALE_JITTER"]
    if not broken and (len(jitter) not in (0, 2) or list(jitter) != sorted(jitter)):
        yield f"INPUT.SCALE_JITTER must be (lowest, highest), or () for none; got {jitter}"


def _value(cfg: CfgNode, key: str) -> Any:
    value = cfg
    for name in key.split("."):
        value = value[name]
    return value


def _broken_rules(cfg: CfgNode, rules: Sequence[Rule]) -> Iterator[str]:
    for rule in rules:
        for key in rule.keys.split():
            value = _value(cfg, key)
            elements = value if isinstance(value, tuple | list) else [value]
            if not all(_holds(rule, x) for x in elements):
                yield f"{key} must {rule.must}; got {value!r}"


def _holds(rule: Rule, value: Any) -> bool:
    try:
        return rule.holds(value)
    except TypeError:  # text where a number belongs
        return False


def _wrong_choices(cfg: CfgNode, choices: dict[str, Sequence[str]]) -> Iterator[str]:
    for key, words in choices.items():
        value = _value(cfg, key)
        if value not in words:
            yield f"{key} must be one of {', '.join(map(repr, words))}; got {value!r}"


def _registered(cfg: CfgNode, key: str, registry: Any) -> Iterator[str]:
    value = _value(cfg, key)
    if value not in registry:
        names = [name for name, _ in registry]
        yield (
            f"{key} is {value!r}, which is not registered.{did_you_mean(str(value), names)} The "
            "module that registers it must be imported before"
        )
