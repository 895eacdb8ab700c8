"""Write the annotations of CrowdPose in the form that Detectron2 and COCO's evaluation read.

Reads crowdpose_{train,val,trainval,test}.json, those that are there, and writes files of the same
names into the folder `annotations` beside the input's. They get what COCO's evaluation needs and
CrowdPose's files lack: an `area`, 0.53 of the box as in the API of CrowdPose's authors, so OKS is
theirs; and the names and skeleton of the 14 keypoints. The images are not touched.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import write_json
from .builtin import CROWDPOSE_NAMES, CROWDPOSE_SKELETON
from .coco_file import load_annotations

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


def prepare_folder(folder: Path, output: Path | None = None) -> Iterator[str]:
    """Write completed copies of CrowdPose's files.

    Args:
        folder: with ``crowdpose_{train,val,trainval,test}.json``, those that are there.
        output: folder; by default ``annotations`` beside the other.

    Yields:
        A line for each file written.

    Raises:
        ValueError: there is none, or one that is not CrowdPose's.
    """
    folder = folder.resolve()
    files = [folder / f"crowdpose_{split}.json" for split in SPLITS]
    files = [file for file in files if file.is_file()]
    if not files:
        raise ValueError(f"{folder} has no crowdpose_{{train,val,trainval,test}}.json")
    output = output or folder.parent / "annotations"
    for file in files:
        try:
            coco = prepare(load_annotations(file))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: no file of CrowdPose: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        write_json(output / file.name, coco)
        yield (
            f"{output / file.name}: {len(coco['images'])} images, "
            f"{len(coco['annotations'])} persons"
        )
