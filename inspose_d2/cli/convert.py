"""``inspose convert``: data sets and checkpoints into the forms that are read here."""

import argparse
import json

from ..checkpoint.opera import CONFIG, convert_opera_checkpoint
from ..data.annotations import find_problems
from ..data.coco_file import load_annotations
from ..data.crowdpose import prepare_folder
from ..data.select_keypoints import select_keypoints


def run(args: argparse.Namespace) -> int:
    """Convert what the second word names."""
    return {"opera": _opera, "select-keypoints": _select, "crowdpose": _crowdpose}[args.what](args)


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
