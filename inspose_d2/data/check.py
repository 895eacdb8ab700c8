"""All that a run would trip over, known before anything is built: model, solver and data sets."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config.check import model_problems, refuse, training_problems
from ..config.files import did_you_mean
from .keypoint_names import unmirrored_keypoints, wrong_flip_pairs


def check_config(cfg: CfgNode, *, training: bool = True) -> None:
    """Refuse what training or evaluation would trip over, before anything is built.

    Args:
        cfg: the whole config; its data sets are looked up, not loaded.
        training: False for evaluation alone, which reads nothing of ``SOLVER``.

    Raises:
        ConfigError: one line for each problem: the key, its value and the cure.
    """
    refuse(_problems(cfg, training))


def _problems(cfg: CfgNode, training: bool) -> Iterator[str]:
    """What is wrong for a run."""
    yield from model_problems(cfg)
    if training:
        yield from training_problems(cfg)
    yield from _data_problems(cfg, training)
    yield from _output_problems(Path(cfg["OUTPUT_DIR"]))


def _output_problems(folder: Path) -> Iterator[str]:
    """What is wrong with the folder that a run writes into, which need not be there yet."""
    if str(folder).startswith("~"):
        yield f"OUTPUT_DIR is '{folder}', which is no home folder here: write the path in full"
    there = next((x for x in (folder, *folder.parents) if os.path.lexists(x)), Path())
    if not there.is_dir():
        yield f"OUTPUT_DIR is '{folder}', but {there} is no folder: choose another one"


def _data_problems(cfg: CfgNode, training: bool) -> Iterator[str]:
    """What is wrong with the names of data sets and with their keypoints."""
    k = cfg["MODEL"]["INSPOSE"]["NUM_KEYPOINTS"]
    names = {key: cfg["DATASETS"][key] for key in (("TRAIN", "TEST") if training else ("TEST",))}
    if not names["TRAIN" if training else "TEST"]:
        key = "DATASETS.TRAIN" if training else "DATASETS.TEST"
        yield f"{key} must name a data set, such as ('synthetic_people_val',); it is empty"
    for key, name in ((key, name) for key, group in names.items() for name in group):
        if name in DatasetCatalog:
            yield from _metadata_problems(f"DATASETS.{key} {name!r}", name, k)
            yield from _flip_problems(cfg, key, name)
        else:
            hint = did_you_mean(name, DatasetCatalog)
            yield (
                f"DATASETS.{key} names {name!r}, which is not registered.{hint} A data set of "
                "yours stands in DATASETS.REGISTER, or is registered before, by "
                "inspose_d2.register_coco_keypoints"
            )
    own = cfg["TEST"]["KEYPOINT_OKS_SIGMAS"]
    for name in names["TEST"]:
        known = name in DatasetCatalog
        sigmas = own or (MetadataCatalog.get(name).get("keypoint_oks_sigmas") if known else None)
        if not all(isinstance(x, int | float) and 0 < x < math.inf for x in sigmas or ()):
            yield (
                f"TEST.KEYPOINT_OKS_SIGMAS must be numbers above 0, one for each keypoint, as "
                f"must keypoint_oks_sigmas of the metadata of {name!r}; got {sigmas}"
            )
        elif len(sigmas or [0] * 17) != k:
            got = len(sigmas) if sigmas else "none, which means the 17 of COCO"
            yield (
                f"TEST.KEYPOINT_OKS_SIGMAS must be {k} values, one for each of "
                f"MODEL.INSPOSE.NUM_KEYPOINTS, or empty for keypoint_oks_sigmas of the metadata of "
                f"{name!r}; got {got}"
            )
    orders = {
        tuple(MetadataCatalog.get(name).get("keypoint_names") or ()): name
        for group in names.values()
        for name in group
        if name in DatasetCatalog
    }
    orders.pop((), None)
    if len(set(map(len, orders))) == 1 and len(orders) > 1:
        yield (
            f"the data sets {sorted(orders.values())} must have the same keypoint_names in the "
            f"same order; got {[list(order) for order in orders]}"
        )


def _metadata_problems(what: str, name: str, k: int) -> Iterator[str]:
    """What is wrong with the number of keypoints that a data set declares."""
    metadata = MetadataCatalog.get(name)
    keypoints = metadata.get("keypoint_names")
    if keypoints is not None and len(keypoints) != k:
        yield (
            f"MODEL.INSPOSE.NUM_KEYPOINTS is {k}, but {what} has {len(keypoints)} keypoint_names: "
            f"set it to {len(keypoints)}"
        )


def _flip_problems(cfg: CfgNode, split: str, name: str) -> Iterator[str]:
    """What is wrong with the flip pairs of a data set; training cannot do without them."""
    what, metadata = f"DATASETS.{split} {name!r}", MetadataCatalog.get(name)
    keypoints, pairs = metadata.get("keypoint_names"), metadata.get("keypoint_flip_map")
    if keypoints is None or pairs is None:
        if split == "TRAIN":
            yield (
                f"{what} does not say keypoint_names and keypoint_flip_map (pairs of a left and a "
                "right name), which flipped images need: set both by "
                f"MetadataCatalog.get({name!r}).set(...)"
            )
        return
    wrong = list(wrong_flip_pairs(keypoints, pairs))
    yield from (f"{what}: keypoint_flip_map: {problem}" for problem in wrong)
    views = cfg["TEST"]["AUG"]
    cure = {"TRAIN": "INPUT.RANDOM_FLIP 'none'", "TEST": "TEST.AUG.FLIP False"}[split]
    flips = {
        "TRAIN": cfg["INPUT"]["RANDOM_FLIP"] != "none",
        "TEST": views["ENABLED"] and views["FLIP"],
    }
    if flips[split] and not wrong:
        for problem in unmirrored_keypoints(keypoints, pairs):
            yield f"{what}: {problem}. Mend keypoint_flip_map, or flip no images: {cure}"
