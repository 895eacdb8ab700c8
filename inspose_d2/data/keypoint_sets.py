"""Keypoint sets of any number of keypoints, from files in COCO's format into Detectron2's catalogs.

The metadata of a set carries all that depends on its keypoints: ``keypoint_names``,
``keypoint_flip_map``, ``keypoint_connection_rules`` (all three Detectron2's) and
``keypoint_oks_sigmas`` (ours).
"""

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from detectron2.utils import comm
from pycocotools.cocoeval import Params

from ..config_files import ConfigError
from .annotations import load_annotations

logger = logging.getLogger(__name__)

Pairs = Sequence[Sequence[str]]

COCO_SIGMAS: dict[str, float] = dict(
    zip(
        COCO_PERSON_KEYPOINT_NAMES,
        Params(iouType="keypoints").kpt_oks_sigmas.tolist(),
        strict=True,
    )
)
DEFAULT_SIGMA = round(sum(COCO_SIGMAS.values()) / len(COCO_SIGMAS), 3)  # 0.067
SIDES = {"l": "left", "r": "right", "left": "left", "right": "right"}
OPPOSITE = {"left": "right", "right": "left"}
# Detectron2's Visualizer wants RGB; draw_poses has its own.
RULE_COLORS = {"left": (40, 130, 255), "right": (255, 140, 0), "": (230, 230, 230)}


def register_coco_keypoints(
    name: str,
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    *,
    flip_pairs: Pairs | None = None,
    sigmas: Sequence[float] | None = None,
) -> None:
    """Register a keypoint set; names and skeleton are those of the file's category.

    Call it in every process, before the config is checked. The file is read at once. A name that
    stands for the same files already is registered anew.

    Args:
        name: for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json_file: annotations in COCO's format, with one category, which lists ``keypoints``.
        image_root: folder of the images.
        flip_pairs: names of keypoints that change places in a mirror, such as
            ``[("left_eye", "right_eye")]``; ``[]`` for none. None infers them from left and right
            in the names, see :func:`side_of`.
        sigmas: of OKS, one for each keypoint. None takes COCO's for keypoints of COCO's names, and
            ``DEFAULT_SIGMA``, the mean of these, for others, with a warning.

    Raises:
        OSError: the file cannot be read.
        ValueError: it, the pairs or the sigmas are wrong; or the name stands for other files.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    category = _category(json_file)
    names = category["keypoints"]
    pairs = infer_flip_pairs(names) if flip_pairs is None else flip_pairs
    problems = list(wrong_flip_pairs(names, pairs))
    if problems:
        raise ValueError(f"flip_pairs of {name!r}: {'; '.join(problems)}")
    for problem in unmirrored_keypoints(names, pairs):
        _warn(f"{name}: {problem}. Flipped images would be learned wrong: see flip_pairs")
    if flip_pairs is None and not any(side_of(x)[0] for x in names):
        _warn(
            f"{name}: no keypoint is called left or right, so all keep their names in flipped "
            "images. If some change places, give flip_pairs, else [], which says so"
        )
    rules = connection_rules(names, _skeleton(name, category))
    oks_sigmas = _sigmas(name, names, sigmas)
    if name in DatasetCatalog:
        if not is_registered(name, json_file, image_root):
            raise ValueError(f"the name {name!r} is taken by other files: choose another one")
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, partial(load_coco_json, json_file, image_root, name))
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=[category["name"]],
        thing_dataset_id_to_contiguous_id={category["id"]: 0},
        keypoint_names=names,
        keypoint_flip_map=[tuple(pair) for pair in pairs],
        keypoint_connection_rules=rules,
        keypoint_oks_sigmas=oks_sigmas,
    )


def oks_sigmas(cfg: CfgNode) -> list[float]:
    """Choose the sigmas of OKS for the keypoints of a config.

    Args:
        cfg: reads ``TEST.KEYPOINT_OKS_SIGMAS``, ``DATASETS`` and ``MODEL.INSPOSE.NUM_KEYPOINTS``.

    Returns:
        K values: the config's; else those of the first of its data sets that has K of them; else
        COCO's where K is 17, ``DEFAULT_SIGMA`` for each where it is not.
    """
    k = cfg.MODEL.INSPOSE.NUM_KEYPOINTS
    names = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
    known = (
        MetadataCatalog.get(x).get("keypoint_oks_sigmas") for x in names if x in DatasetCatalog
    )
    candidates = (cfg.TEST.KEYPOINT_OKS_SIGMAS, *known, COCO_SIGMAS.values(), [DEFAULT_SIGMA] * k)
    return next(list(x) for x in candidates if x is not None and len(x) == k)


def is_registered(name: str, json_file: str, image_root: str) -> bool:
    """Whether a name stands for these files."""
    if name not in DatasetCatalog:
        return False
    metadata = MetadataCatalog.get(name)
    return (metadata.get("json_file"), metadata.get("image_root")) == (json_file, image_root)


def register_datasets(cfg: CfgNode, *, training: bool = True) -> None:
    """Register the sets of ``DATASETS.REGISTER`` that a run uses, unless they are already.

    Args:
        cfg: reads ``DATASETS`` and ``TEST.KEYPOINT_OKS_SIGMAS``.
        training: False leaves out ``DATASETS.TRAIN``, whose files evaluation does not need.

    Raises:
        ConfigError: an entry is not [name, json file, folder of images], or the set cannot be
            registered.
    """
    used = {*cfg.DATASETS.TEST, *(cfg.DATASETS.TRAIN if training else ())}
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    for entry in cfg.DATASETS.REGISTER:
        if not isinstance(entry, list | tuple) or list(map(type, entry)) != [str] * 3:
            raise ConfigError(
                "DATASETS.REGISTER must be a list of [name, json file, folder of images], such as "
                f"[['my_train', 'my/train.json', 'my/train']]; got the entry {entry!r}"
            )
        name, *paths = entry
        files = [os.path.join(root, path) for path in paths]
        if name not in used or is_registered(name, *files):
            continue
        try:
            register_coco_keypoints(name, *files, sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS or None)
        except OSError as error:
            raise ConfigError(
                f"DATASETS.REGISTER {name!r}: {error}. Paths are below $DETECTRON2_DATASETS, now "
                f"{root!r}, unless they are absolute"
            ) from error
        except ValueError as error:
            raise ConfigError(f"DATASETS.REGISTER {name!r}: {error}") from error


def side_of(name: str) -> tuple[str, str]:
    """Side of a keypoint, "left", "right" or "", and what remains of its name.

    The side is a word of its own (``left_eye``, ``Eye-Left``, ``leftEye``, ``lefteye``), or an L or
    R at an end (``l_eye``, ``LEye``, ``eye_r``).
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    parts = re.sub(r"^(left|right)", r"\1_", words)
    found = [x for x in re.split(r"[\W_]+", parts) if x]
    for i, word in enumerate(found):
        is_letter = len(word) == 1
        if word in SIDES and not (is_letter and (0 < i < len(found) - 1 or len(found) == 1)):
            return SIDES[word], " ".join(found[:i] + found[i + 1 :])
    return "", " ".join(found)


def infer_flip_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs (left, right) of names that differ in the side alone."""
    by_side = {side_of(name): name for name in names}
    return [
        (name, by_side["right", rest])
        for (side, rest), name in by_side.items()
        if side == "left" and ("right", rest) in by_side
    ]


def wrong_flip_pairs(names: Sequence[str], pairs: Pairs) -> Iterator[str]:
    """What makes pairs no map that leads back to each keypoint when it is applied twice."""
    odd = [pair for pair in pairs if isinstance(pair, str) or len(set(pair)) != 2]
    if odd:
        yield f"{odd} are no pairs of two different keypoints"
        return
    in_pairs = Counter(name for pair in set(map(frozenset, pairs)) for name in pair)
    unknown = sorted(in_pairs.keys() - set(names))
    if unknown:
        yield f"{unknown} are no keypoint_names"
    several = sorted(name for name, count in in_pairs.items() if count > 1)
    if several:
        yield f"{several} are in several pairs: a keypoint changes places with one other"


def unmirrored_keypoints(names: Sequence[str], pairs: Pairs) -> Iterator[str]:
    """Which left and right keypoints the pairs do not exchange with their counterparts."""
    partner = {a: b for pair in pairs for a, b in (pair, reversed(pair))}
    by_side = {side_of(name): name for name in names}
    for name in names:
        side, rest = side_of(name)
        if not side:
            continue
        other, counterpart = partner.get(name), by_side.get((OPPOSITE[side], rest))
        if other is None:
            cure = f"pair it with {counterpart!r}" if counterpart else "it has no counterpart"
            yield f"{name!r} is in no flip pair: {cure}"
        elif counterpart and other != counterpart:
            yield f"{name!r} is paired with {other!r} instead of {counterpart!r}"
        elif side_of(other)[0] == side:
            yield f"{name!r} is paired with {other!r}, which is {side} too"


def connection_rules(
    names: Sequence[str], skeleton: Sequence[Sequence[int]]
) -> list[tuple[str, str, tuple[int, int, int]]]:
    """Detectron2's form of a skeleton of pairs of indices from 0, coloured by side."""
    rules = []
    for i, j in skeleton:
        sides = {side_of(names[k])[0] for k in (i, j)} - {""}
        color = RULE_COLORS[sides.pop() if len(sides) == 1 else ""]
        rules.append((names[i], names[j], color))
    return rules


def _category(json_file: str) -> dict[str, Any]:
    """The one category of a file, with names of keypoints."""
    coco = load_annotations(json_file)
    categories = coco.get("categories") if isinstance(coco, dict) else None
    found = [x for x in categories or () if isinstance(x, dict)]
    if len(found) != 1:
        raise ValueError(
            f"{json_file}: categories: must be one, for InsPose knows one class; got "
            f"{[x.get('name') for x in found]}. Keep the one with keypoints, and its annotations"
        )
    (category,) = found
    names: Any = category.get("keypoints")
    is_list = isinstance(names, list) and names and all(isinstance(x, str) for x in names)
    if not is_list or len(set(names)) != len(names):
        raise ValueError(
            f"{json_file}: categories[0], keypoints: must be a list of different names, such as "
            f"['nose', 'left_eye', 'right_eye']; got {names!r}"
        )
    if not isinstance(category.get("name"), str) or type(category.get("id")) is not int:
        raise ValueError(f"{json_file}: categories[0]: give it a name and a whole number as its id")
    return category


def _skeleton(name: str, category: dict[str, Any]) -> list[list[int]]:
    """Pairs of indices from 0 of a category; COCO's count from 1."""
    skeleton, number = category.get("skeleton") or [], len(category["keypoints"])
    try:
        skeleton = [[i - 1, j - 1] for i, j in skeleton]
    except (TypeError, ValueError):
        skeleton = [[-1, -1]]
    if not all(0 <= k < number for ends in skeleton for k in ends):
        _warn(
            f"{name}: the skeleton of the file is left out, poses are drawn without limbs: it must "
            f"be pairs of numbers from 1 to {number}"
        )
        return []
    return skeleton


def _sigmas(name: str, names: Sequence[str], sigmas: Sequence[float] | None) -> list[float]:
    if sigmas is None:
        unknown = [x for x in names if x not in COCO_SIGMAS]
        if unknown:
            _warn(
                f"{name}: no OKS sigmas are given; {unknown} get {DEFAULT_SIGMA}, the mean of "
                "COCO's. AP depends on them: give sigmas, or TEST.KEYPOINT_OKS_SIGMAS"
            )
        return [COCO_SIGMAS.get(x, DEFAULT_SIGMA) for x in names]
    if len(sigmas) != len(names) or not all(0 < x < math.inf for x in sigmas):
        raise ValueError(
            f"sigmas of {name!r} must be {len(names)} numbers above 0, one for each of "
            f"{list(names)}; got {list(sigmas)}"
        )
    return list(map(float, sigmas))


def _warn(message: str) -> None:
    if comm.is_main_process():
        logger.warning("%s", message)
