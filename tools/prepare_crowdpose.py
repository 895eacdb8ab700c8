#!/usr/bin/env python
"""Write the annotations of CrowdPose in the form that Detectron2 and COCO's evaluation read.

    python tools/prepare_crowdpose.py --input datasets/crowdpose/json

Reads crowdpose_{train,val,trainval,test}.json, those that are there, and writes files of the same
names into the folder `annotations` beside the input's. They get what COCO's evaluation needs and
CrowdPose's files lack: an `area`, 0.53 of the box as in the API of CrowdPose's authors, so OKS is
theirs; and the names and skeleton of the 14 keypoints. The images are not touched.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from inspose_d2.data.builtin import CROWDPOSE_NAMES, CROWDPOSE_SKELETON

SPLITS = ("train", "val", "trainval", "test")
AREA_OF_BOX = 0.53


def prepare(coco: dict[str, Any]) -> dict[str, Any]:
    """Complete the annotations of a file; what they have stays.

    Args:
        coco: what a file of CrowdPose holds; not changed.

    Raises:
        ValueError: persons have another number of keypoints.
    """
    annotations = []
    for annotation in coco["annotations"]:
        keypoints = annotation["keypoints"]
        if len(keypoints) != 3 * len(CROWDPOSE_NAMES):
            raise ValueError(
                f"annotation {annotation.get('id')} has {len(keypoints) / 3:g} keypoints, "
                f"CrowdPose has {len(CROWDPOSE_NAMES)}: give the json folder of CrowdPose"
            )
        _, _, width, height = annotation["bbox"]
        known = {
            "area": AREA_OF_BOX * width * height,
            "iscrowd": 0,
            "num_keypoints": sum(v > 0 for v in keypoints[2::3]),
        }
        annotations.append({**known, **annotation})
    category = {
        **{"id": 1, "name": "person", "supercategory": "person"},
        "keypoints": list(CROWDPOSE_NAMES),
        "skeleton": [[i + 1, j + 1] for i, j in CROWDPOSE_SKELETON],
    }
    return {**coco, "annotations": annotations, "categories": [category]}


def main() -> int:
    """Write the files; the exit status is 2 where there are none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--input", type=Path, required=True, help="folder json of CrowdPose")
    folder = parser.parse_args().input.resolve()
    files = [folder / f"crowdpose_{split}.json" for split in SPLITS]
    files = [file for file in files if file.is_file()]
    if not files:
        sys.stderr.write(f"prepare_crowdpose.py: {folder} has no crowdpose_{{train,...}}.json\n")
        return 2
    output = folder.parent / "annotations"
    output.mkdir(exist_ok=True)
    for file in files:
        try:
            coco = prepare(json.loads(file.read_text()))
        except ValueError as error:
            sys.stderr.write(f"prepare_crowdpose.py: {file}: {error}\n")
            return 2
        (output / file.name).write_text(json.dumps(coco))
        sys.stdout.write(
            f"{output / file.name}: {len(coco['images'])} images, "
            f"{len(coco['annotations'])} persons\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
