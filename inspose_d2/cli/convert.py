"""``inspose convert``: data sets and checkpoints into the forms that are read here."""

import argparse
from collections.abc import Callable

from ..checkpoint.opera import CONFIG, convert_opera_checkpoint
from ..data.annotations import find_problems
from ..data.coco_file import load_annotations
from ..data.convert.coco import read_coco
from ..data.convert.common import Changes, Converted
from ..data.convert.cvat import read_cvat
from ..data.convert.label_studio import read_label_studio
from ..data.convert.labelme import read_labelme
from ..data.convert.yolo import read_yolo, write_yolo
from ..data.crowdpose import prepare_folder
from ..data.select_keypoints import select_keypoints
from ..files import write_json

READERS: dict[str, Callable[..., Converted]] = {
    "coco": read_coco,
    "yolo": read_yolo,
    "labelme": read_labelme,
    "label-studio": read_label_studio,
    "cvat": read_cvat,
}


def run(args: argparse.Namespace) -> int:
    """Convert what the second word names."""
    if args.what in READERS:
        return _read(args)
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
    write_json(args.output, coco)
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


def _read(args: argparse.Namespace) -> int:
    """Write what a tool's file becomes, and say what was changed."""
    names = {"images", "keypoints", "category", "split"} & vars(args).keys()
    done = READERS[args.what](args.input, **{name: getattr(args, name) for name in names})
    write_json(args.output, done.coco)
    (category,) = done.coco["categories"]
    keypoints = category["keypoints"]
    print(
        f"{args.output}: {len(done.coco['images'])} images, {len(done.coco['annotations'])} of "
        f"{category['name']!r}, {len(keypoints)} keypoints: {', '.join(keypoints)}"
    )
    if done.folder is not None:
        print(f"file names are relative to {done.folder}")
    _print(done.changes)
    return 0


def _print(changes: Changes) -> None:
    for what, count in changes.items():
        print(f"  {count} {what}")
