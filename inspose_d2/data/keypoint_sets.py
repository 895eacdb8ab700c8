"""Keypoint sets of any number of keypoints, from files in COCO's format into Detectron2's catalogs.

The metadata of a set carries all that depends on its keypoints: ``keypoint_names``,
``keypoint_flip_map``, ``keypoint_connection_rules`` (all three Detectron2's) and
``keypoint_oks_sigmas`` (ours).
"""

import logging
import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from ..config.files import ConfigError
from ..modeling.oks import COCO_SIGMAS, DEFAULT_SIGMA
from .annotations import learned_categories
from .coco_file import load_annotations, load_keypoints
from .find_file import folder_of
from .keypoint_names import (
    Pairs,
    connection_rules,
    infer_flip_pairs,
    look_like_pair,
    side_of,
    unmirrored_keypoints,
    wrong_flip_pairs,
)

logger = logging.getLogger(__name__)


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
    json_file, image_root = (os.path.expanduser(x) for x in (json_file, image_root))
    category = _category(json_file)
    names = category["keypoints"]
    pairs = infer_flip_pairs(names) if flip_pairs is None else flip_pairs
    problems = list(wrong_flip_pairs(names, pairs))
    if problems:
        raise ValueError(f"flip_pairs of {name!r}: {'; '.join(problems)}")
    for problem in unmirrored_keypoints(names, pairs):
        _warn(f"{name}: {problem}. Flipped images would be learned wrong: see flip_pairs")
    alike = list(look_like_pair(names, pairs)) if flip_pairs is None else []
    if alike:
        said = "; ".join(f"{a!r} and {b!r}" for a, b in alike)
        _warn(
            f"{name}: {said} look like pairs of left and right, but are in no flip pair: in "
            "flipped images they would be learned wrong. Give flip_pairs (in a config the "
            "fourth word of DATASETS.REGISTER), or names with left_ and right_"
        )
    elif flip_pairs is None and not any(side_of(x)[0] for x in names):
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
    DatasetCatalog.register(name, partial(load_keypoints, json_file, image_root, name))
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


def is_registered(
    name: str, json_file: str, image_root: str, flip_pairs: Pairs | None = None
) -> bool:
    """Whether a name stands for these files, and has these flip pairs where they are given."""
    if name not in DatasetCatalog:
        return False
    metadata = MetadataCatalog.get(name)
    if flip_pairs is not None and metadata.get("keypoint_flip_map") != [*map(tuple, flip_pairs)]:
        return False
    return (metadata.get("json_file"), metadata.get("image_root")) == (json_file, image_root)


def _is_entry(entry: Any) -> bool:
    """Whether this is an entry of ``DATASETS.REGISTER``."""

    def are_words(x: Any, number: int) -> bool:
        return isinstance(x, list | tuple) and [*map(type, x)] == [str] * number

    if not isinstance(entry, list | tuple) or not are_words(entry[:3], 3):
        return False
    return len(entry) == 3 or (
        len(entry) == 4
        and isinstance(entry[3], list | tuple)
        and all(are_words(pair, 2) for pair in entry[3])
    )


def register_datasets(cfg: CfgNode, *, training: bool = True) -> None:
    """Register the sets of ``DATASETS.REGISTER`` that a run uses, unless they are already.

    Args:
        cfg: reads ``DATASETS`` and ``TEST.KEYPOINT_OKS_SIGMAS``.
        training: False leaves out ``DATASETS.TRAIN``, whose files evaluation does not need.

    Raises:
        ConfigError: an entry is not [name, json file, folder of images], with flip pairs behind
            or without, or the set cannot be registered.
    """
    used = {*cfg.DATASETS.TEST, *(cfg.DATASETS.TRAIN if training else ())}
    root = folder_of("DETECTRON2_DATASETS")
    for entry in cfg.DATASETS.REGISTER:
        if not _is_entry(entry):
            raise ConfigError(
                "DATASETS.REGISTER must be a list of [name, json file, folder of images], such as "
                "[['my_train', 'my/train.json', 'my/train']], and may have flip pairs behind, "
                f"[['fin_A', 'fin_B']], or [] for none; got the entry {entry!r}"
            )
        name, *paths = entry[:3]
        pairs = entry[3] if len(entry) == 4 else None
        json_file, images = (os.path.join(root, os.path.expanduser(path)) for path in paths)
        if name not in used or is_registered(name, json_file, images, pairs):
            continue
        sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS or None
        try:
            register_coco_keypoints(name, json_file, images, flip_pairs=pairs, sigmas=sigmas)
        except OSError as error:
            raise ConfigError(
                f"DATASETS.REGISTER {name!r}: {error}. Paths are below $DETECTRON2_DATASETS, now "
                f"{root!r}, unless they are absolute"
            ) from error
        except ValueError as error:
            raise ConfigError(f"DATASETS.REGISTER {name!r}: {error}") from error


def _category(json_file: str) -> dict[str, Any]:
    """The one category of a file, with names of keypoints."""
    coco = load_annotations(json_file)
    lists = isinstance(coco, dict) and all(
        isinstance(coco.get(key), list | None) for key in ("categories", "annotations")
    )
    found = learned_categories(coco) if lists else []
    if len(found) != 1:
        raise ValueError(
            f"{json_file}: categories: must be one, for InsPose knows one class; got "
            f"{[x.get('name') for x in found]}. Keep the one with keypoints, and its annotations: "
            "`inspose convert coco --category NAME` does"
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
