"""``inspose convert``: data sets and checkpoints into the forms that are read here."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..checkpoint.opera import CONFIG, convert_opera_checkpoint
from ..data.annotations import find_problems
from ..data.coco_file import load_annotations
from ..data.convert.coco import read_coco
from ..data.convert.common import Changes, Converted, write_json
from ..data.convert.cvat import read_cvat
from ..data.convert.label_studio import read_label_studio
from ..data.convert.labelme import read_labelme
from ..data.convert.yolo import read_yolo, write_yolo
from ..data.crowdpose import prepare_folder
from ..data.select_keypoints import select_keypoints


def run(args: argparse.Namespace) -> int:
    """Convert what the second word names."""
    if args.what in READERS:
        return _write(args.output, READERS[args.what](args))
    return {
        "opera": _opera,
        "select-keypoints": _select,
        "crowdpose": _crowdpose,
        "to-yolo": _to_yolo,
    }[args.what](args)


def _opera(args: argparse.Namespace) -> int:
    done = convert_opera_checkpoint(args.input, args.output)
    known = done.known_as or "not a file that is known by its checksum; its tensors are the model's"
    print(f"{args.input}: sha256 {done.sha256}: {known}")
    print(f"trained for {done.epoch} epochs by its own words")
    print(
        f"{args.output}: {done.num_tensors} tensors for {CONFIG}, {len(done.dropped)} counters of "
        "frozen norms left out"
    )
    return 0


def _select(args: argparse.Namespace) -> int:
    coco = load_annotations(args.input)
    for problem in find_problems(coco):
        raise ValueError(f"{args.input}: {problem}")
    try:
        coco = select_keypoints(coco, args.keypoints)
    except ValueError as error:
        raise ValueError(f"{args.input}: {error}") from error
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(coco))
    return 0


def _crowdpose(args: argparse.Namespace) -> int:
    for line in prepare_folder(args.input, args.output):
        print(line)
    return 0


def _to_yolo(args: argparse.Namespace) -> int:
    changes = write_yolo(args.input, args.images, args.output)
    print(f"{args.output / 'data.yaml'}: its `train` and `val` name all images; split them")
    _print(changes)
    return 0


def _coco(args: argparse.Namespace) -> Converted:
    return read_coco(args.input, **_common(args))


def _common(args: argparse.Namespace) -> dict[str, Any]:
    """Options of all formats."""
    return {"images": args.images, "keypoints": args.keypoints, "category": args.category}


def _yolo(args: argparse.Namespace) -> Converted:
    return read_yolo(args.input, split=args.split, **_common(args))


def _labelme(args: argparse.Namespace) -> Converted:
    return read_labelme(args.input, **_common(args))


def _label_studio(args: argparse.Namespace) -> Converted:
    return read_label_studio(args.input, **_common(args))


def _cvat(args: argparse.Namespace) -> Converted:
    return read_cvat(args.input, **_common(args))


READERS = {
    "coco": _coco,
    "yolo": _yolo,
    "labelme": _labelme,
    "label-studio": _label_studio,
    "cvat": _cvat,
}


def _write(output: Path, done: Converted) -> int:
    """Write a file and say what it is and what was changed."""
    write_json(output, done.coco)
    (category,) = done.coco["categories"]
    names = category["keypoints"]
    print(
        f"{output}: {len(done.coco['images'])} images, {len(done.coco['annotations'])} of "
        f"{category['name']!r}, {len(names)} keypoints: {', '.join(names)}"
    )
    if done.folder is not None:
        print(f"file names are relative to {done.folder}")
    _print(done.changes)
    return 0


def _print(changes: Changes) -> None:
    for what, count in changes.items():
        print(f"  {count} {what}")
