"""``inspose submit``: a zip of poses for COCO's keypoint server, checked."""

import argparse
import json
import re
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from ..evaluation.coco import MAX_DETECTIONS
from ..evaluation.results import PERSON, Pose, read_results
from ..files import read_json, whole_file

NUM_KEYPOINTS = 17
MAX_POSES = MAX_DETECTIONS["keypoints"]


def load_image_ids(path: Path) -> set[int]:
    """Ids of the images that a COCO image-info file lists."""
    info = read_json(path)
    try:
        ids = {image["id"] for image in info["images"]}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} lists no images; --image-info wants COCO's image_info_test-dev2017.json"
        ) from error
    return ids


def for_server(poses: Iterable[Pose]) -> list[Pose]:
    """The best poses of each image, with what COCO reads and nothing else."""
    by_image = defaultdict(list)
    for pose in poses:
        by_image[pose["image_id"]].append(pose)
    return [
        {
            "image_id": image_id,
            "category_id": PERSON,
            "keypoints": [
                1 if i % 3 == 2 else round(value, 2) for i, value in enumerate(pose["keypoints"])
            ],
            "score": pose["score"],
        }
        for image_id, group in by_image.items()
        for pose in sorted(group, key=lambda pose: -pose["score"])[:MAX_POSES]
    ]


def write_zip(poses: list[Pose], folder: Path, name: str) -> Path:
    """Write the zip: one file, strict JSON.

    Args:
        poses: of :func:`for_server`.
        folder: made if it is not there.
        name: of the algorithm.

    Returns:
        The zip's path.
    """
    stem = f"person_keypoints_test-dev2017_{name}_results"
    text = json.dumps(poses, allow_nan=False, separators=(",", ":"))
    path = folder / f"{stem}.zip"
    with (
        whole_file(path, "wb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        archive.writestr(f"{stem}.json", text)
    return path


def make_submission(results: Path, image_info: Path, name: str, folder: Path) -> None:
    """Check, write, and say what was done."""
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9-]*", name):
        raise ValueError(
            f"--name {name!r}: use letters, digits and hyphens; "
            "underscores separate the parts of the file's name"
        )
    image_ids = load_image_ids(image_info)
    poses = read_results(results, image_ids, [PERSON], NUM_KEYPOINTS)
    if not poses:
        raise ValueError(f"{results}: has no poses")
    kept = for_server(poses)
    path = write_zip(kept, folder, name)

    images = len({pose["image_id"] for pose in kept})
    print(f"{path}: {len(kept)} poses in {images} images, {path.stat().st_size / 1e3:.0f} kB")
    if len(poses) > len(kept):
        print(f"left out {len(poses) - len(kept)} poses beyond the {MAX_POSES} best of an image")
    if images < len(image_ids):
        print(
            f"warning: {len(image_ids) - images} of {len(image_ids)} images have no pose "
            "(allowed; many of them mean that not all images were evaluated)",
            file=sys.stderr,
        )


def run(args: argparse.Namespace) -> int:
    """Pack the poses."""
    make_submission(args.input, args.image_info, args.name, args.output or args.input.parent)
    return 0
