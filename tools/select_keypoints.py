#!/usr/bin/env python
"""Write a copy of a COCO keypoint file with some of its keypoints, in any order.

python tools/select_keypoints.py --json all.json --output two.json --keypoints nose left_eye

The images stay where they are.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def select_keypoints(coco: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Leave all keypoints out but some; a connection stays where both its ends do.

    Args:
        coco: what a file in COCO's format with one category holds; not changed.
        names: of the keypoints to keep, in their new order.

    Raises:
        ValueError: there are other categories, or no such keypoints.
    """
    if len(coco["categories"]) != 1:
        raise ValueError(f"the file must have one category, it has {len(coco['categories'])}")
    (category,) = coco["categories"]
    old = category["keypoints"]
    unknown = [name for name in names if name not in old]
    if unknown or len(set(names)) != len(names):
        raise ValueError(f"--keypoints must be different ones of {old}; got {list(names)}")
    numbers = [old.index(name) for name in names]
    new_number = {k + 1: i for i, k in enumerate(numbers, start=1)}  # a skeleton counts from 1
    skeleton = [
        [new_number[i], new_number[j]]
        for i, j in category.get("skeleton", [])
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


def main() -> int:
    """Write the copy; the exit status is 2 where it cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="file to copy")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--keypoints", nargs="+", required=True, metavar="NAME")
    args = parser.parse_args()
    try:
        coco = select_keypoints(json.loads(args.json.read_text()), args.keypoints)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"select_keypoints.py: {args.json}: {error}\n")
        return 2
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(coco))
    return 0


if __name__ == "__main__":
    sys.exit(main())
