"""Copies of COCO keypoint files with some of their keypoints, in any order."""

from collections.abc import Sequence
from typing import Any

from .annotations import learned_categories


def select_keypoints(coco: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Leave all keypoints out but some; a connection stays where both its ends do.

    Args:
        coco: a file in COCO's format, without problems; not changed.
        names: of the keypoints to keep, in their new order.

    Raises:
        ValueError: there are no such keypoints.
    """
    (category,) = learned_categories(coco)
    old = category.get("keypoints")
    if not old:
        raise ValueError(f"categories: {category['name']!r} does not name its keypoints")
    unknown = [name for name in names if name not in old]
    if unknown or len(set(names)) != len(names):
        raise ValueError(f"--keypoints must be different ones of {old}; got {list(names)}")
    numbers = [old.index(name) for name in names]
    new_number = {k + 1: i for i, k in enumerate(numbers, start=1)}  # a skeleton counts from 1
    skeleton = [
        [new_number[i], new_number[j]]
        for i, j in category.get("skeleton") or []
        if {i, j} <= new_number.keys()
    ]
    annotations = []
    for annotation in coco["annotations"]:
        if "keypoints" in annotation:
            points = annotation["keypoints"]
            kept = [value for k in numbers for value in points[3 * k : 3 * k + 3]]
            labelled = sum(v > 0 for v in kept[2::3])
            annotation = {**annotation, "keypoints": kept, "num_keypoints": labelled}
        annotations.append(annotation)
    category = {**category, "keypoints": list(names), "skeleton": skeleton}
    return {**coco, "annotations": annotations, "categories": [category]}
