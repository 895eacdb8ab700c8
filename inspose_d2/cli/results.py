"""The file of poses that ``inspose predict`` and ``inspose web`` write."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances


def to_coco(poses: Instances, image_id: int, file_name: str) -> list[dict[str, Any]]:
    """Turn the poses of an image into COCO's form for results, one dictionary a pose."""
    copy = Instances(poses.image_size, **poses.get_fields())
    copy.pred_keypoints = poses.pred_keypoints.clone()  # Detectron2 changes it
    found: list[dict[str, Any]] = instances_to_coco_json(copy, image_id)
    found = [pose | {"category_id": 1, "file_name": file_name} for pose in found]
    if poses.has("pred_track_ids"):
        ids = poses.pred_track_ids.tolist()
        found = [pose | {"track_id": own} for pose, own in zip(found, ids, strict=True)]
    if poses.has("pred_visibility"):
        visibility = poses.pred_visibility.tolist()
        found = [x | {"visibility": own} for x, own in zip(found, visibility, strict=True)]
    return found


class ResultsFile:
    """A JSON list, written as it grows; whole as soon as the ``with`` block is left."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_poses = 0

    def __enter__(self) -> "ResultsFile":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("w", encoding="utf-8")
        self.file.write("[")
        return self

    def add(self, poses: Instances, image_id: int, file_name: str, **more: float) -> None:
        """Write the poses of an image; ``more`` is added to each."""
        for pose in to_coco(poses, image_id, file_name):
            self.write(pose | more)

    def write(self, pose: dict[str, Any]) -> None:
        """Write a pose, in COCO's form.

        Raises:
            OSError: the disk is full.
        """
        comma = "," if self.num_poses else ""
        with named_errors(self.path):
            self.file.write(f"{comma}\n{json.dumps(pose, allow_nan=False)}")
        self.num_poses += 1

    def __exit__(self, *_: object) -> None:
        with named_errors(self.path), self.file:
            self.file.write("\n]\n")


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Say of errors of the system, such as a full disk, at which file they came."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
