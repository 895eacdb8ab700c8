#!/usr/bin/env python
"""Split COCO annotations in two, for choosing settings on images that training has not seen.

``python -m experiments.hold_out person_keypoints_train.json`` writes
``person_keypoints_fit.json`` and ``person_keypoints_holdout.json``, every 40th image, into its
folder or into ``--output``.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def split(annotations: dict[str, Any], every: int) -> dict[str, dict[str, Any]]:
    """Hold out every n-th image, in the order of the image ids, with its annotations.

    Args:
        annotations: in COCO's format.
        every: n.

    Returns:
        The annotations by "fit" and "holdout".
    """
    images = sorted(annotations["images"], key=lambda x: x["id"])
    held_out = {x["id"] for x in images[::every]}

    def part(name: str) -> dict[str, Any]:
        def keep(image_id: int) -> bool:
            return (image_id in held_out) == (name == "holdout")

        return annotations | {
            "images": [x for x in images if keep(x["id"])],
            "annotations": [x for x in annotations["annotations"] if keep(x["image_id"])],
        }

    return {name: part(name) for name in ("fit", "holdout")}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("json", type=Path, help="annotations in COCO's format")
    parser.add_argument("--output", type=Path, help="folder of the two files (its own)")
    parser.add_argument("--every", type=int, default=40, help="hold out every n-th image")
    args = parser.parse_args()
    folder = args.output or args.json.parent
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in split(json.loads(args.json.read_text()), args.every).items():
        path = folder / f"person_keypoints_{name}.json"
        path.write_text(json.dumps(part))
        print(f"{path}: {len(part['images'])} images, {len(part['annotations'])} annotations")


if __name__ == "__main__":
    main()
