"""Poses in COCO's form for results: written, read and checked.

https://cocodataset.org/#format-results
"""

import json
import math
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

from ..files import UNFINISHED, named_errors, read_json

Pose = dict[str, Any]


PERSON = 1  # COCO's category
RESULTS = "coco_instances_results.json"  # as Detectron2 names it


def inference_folder(cfg: CfgNode, dataset_name: str) -> Path:
    """Say where the evaluation of a data set writes.

    Of several test sets each has a folder of its own: in one they would overwrite each other.
    """
    folder = Path(cfg.OUTPUT_DIR, "inference")
    return folder / dataset_name if len(cfg.DATASETS.TEST) > 1 else folder


def to_coco(poses: Instances, image_id: int, **more: Any) -> list[Pose]:
    """Turn the poses of an image into COCO's form.

    Args:
        poses: N of the image; pred_track_ids (N,) and pred_visibility (N, K) if there become
            ``track_id`` and ``visibility``.
        image_id: of the image.
        more: entries of each pose besides, or in the place of Detectron2's, such as category_id.

    Returns:
        One dictionary a pose.
    """
    copy = Instances(poses.image_size, **poses.get_fields())
    if poses.has("pred_keypoints"):
        copy.pred_keypoints = poses.pred_keypoints.clone()  # Detectron2 changes it
    found: list[Pose] = [pose | more for pose in instances_to_coco_json(copy, image_id)]
    if poses.has("pred_track_ids"):
        ids = poses.pred_track_ids.tolist()
        found = [pose | {"track_id": own} for pose, own in zip(found, ids, strict=True)]
    if poses.has("pred_visibility"):
        visibility = poses.pred_visibility.tolist()
        found = [x | {"visibility": own} for x, own in zip(found, visibility, strict=True)]
    return found


class ResultsFile:
    """A JSON list of poses, one a line, in the place of an earlier one once ``with`` is left."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.num_poses = 0

    def __enter__(self) -> "ResultsFile":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._unfinished = self.path.with_name(self.path.name + UNFINISHED)
        self.file = self._unfinished.open("w", encoding="utf-8")
        self.file.write("[")
        return self

    def add(self, poses: Iterable[Pose]) -> None:
        """Write poses.

        Raises:
            OSError: the disk is full.
            ValueError: a number is not finite, which JSON does not know.
        """
        for pose in poses:
            comma = "," if self.num_poses else ""
            with named_errors(self.path):
                self.file.write(f"{comma}\n{json.dumps(pose, allow_nan=False)}")
            self.num_poses += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the list, also after Ctrl-C; after an error an earlier file stays."""
        with named_errors(self.path), self.file:
            self.file.write("\n]\n")
        if kind is not None and issubclass(kind, Exception):
            self._unfinished.unlink()
        else:
            self._unfinished.replace(self.path)


def read_results(
    path: str | os.PathLike[str],
    image_ids: Collection[int],
    category_ids: Collection[int],
    num_keypoints: int,
) -> list[Pose]:
    """Read poses, and refuse what evaluation would refuse or count wrongly.

    Args:
        path: of the file.
        image_ids: of the data set.
        category_ids: the same.
        num_keypoints: K.

    Raises:
        OSError: the file cannot be read.
        ValueError: names the file, how many poses are wrong, and which is the first and why.
    """
    poses = read_json(path)
    if not isinstance(poses, list):
        raise ValueError(f"{path}: expected a list of poses, as COCO defines results")
    wrong = []
    first_of: dict[Any, int] = {}
    for index, pose in enumerate(poses):
        reason = _problem(pose, image_ids, category_ids, num_keypoints)
        if not reason:
            first = first_of.setdefault((pose["image_id"], *pose["keypoints"]), index)
            reason = "" if first == index else f"the same keypoints as entry {first}"
        if reason:
            wrong.append(f"entry {index} (counted from 0): {reason}")
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} of {len(poses)} poses are wrong, first {wrong[0]}")
    return poses


def _problem(
    pose: Any, image_ids: Collection[int], category_ids: Collection[int], num_keypoints: int
) -> str:
    """What is wrong with a pose, in words; "" for nothing."""
    if not isinstance(pose, dict):
        return f"{pose!r} is not an object"
    missing = {"image_id", "category_id", "keypoints", "score"} - pose.keys()
    if missing:
        return f"no {', '.join(sorted(missing))}"
    image_id, category_id, keypoints = pose["image_id"], pose["category_id"], pose["keypoints"]
    if type(image_id) is not int or image_id not in image_ids:
        return f"image_id {image_id!r} is no image of the data set"
    if type(category_id) is not int or category_id not in category_ids:
        return f"category_id is {category_id!r}, not {' or '.join(map(str, category_ids))}"
    if not isinstance(keypoints, list) or len(keypoints) != 3 * num_keypoints:
        return f"keypoints are not a list of {3 * num_keypoints} numbers"
    if not all(map(_is_finite, keypoints)):
        return "a keypoint is not a finite number"
    if not _is_finite(pose["score"]):
        return f"score {pose['score']!r} is not a finite number"
    return ""


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
