"""``inspose submit``: a zip of poses for COCO's keypoint server, checked."""

import argparse
import json
import re
import sys
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PERSON = 1  # COCO's category
NUM_NUMBERS = 3 * 17
MAX_POSES = 20  # maxDets of COCO's keypoint evaluation

Pose = dict[str, Any]


def load_json(path: Path) -> Any:
    """Read a JSON file; NaN and Infinity come in as Python's."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, or cut off: {error}") from error


def load_image_ids(path: Path) -> set[int]:
    """Ids of the images that a COCO image-info file lists."""
    info = load_json(path)
    try:
        ids = {image["id"] for image in info["images"]}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} lists no images; --image-info wants COCO's image_info_test-dev2017.json"
        ) from error
    return ids


def is_finite(value: Any) -> bool:
    """Whether a JSON value is a number, and neither NaN nor infinite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and float("-inf") < value < float("inf")


def problem(pose: Any, image_ids: set[int]) -> str | None:
    """What is wrong with one pose, in words; None if nothing is."""
    if not isinstance(pose, dict):
        return f"{pose!r} is not an object"
    missing = {"image_id", "category_id", "keypoints", "score"} - pose.keys()
    if missing:
        return f"no {sorted(missing)[0]}"
    image_id, keypoints = pose["image_id"], pose["keypoints"]
    if type(image_id) is not int or image_id not in image_ids:
        return f"image_id {image_id!r} is not in the image info"
    if pose["category_id"] != PERSON:
        return f"category_id is {pose['category_id']!r}, not {PERSON} (person)"
    if not isinstance(keypoints, list) or len(keypoints) != NUM_NUMBERS:
        return f"keypoints are not a list of {NUM_NUMBERS} numbers"
    if not all(map(is_finite, keypoints)):
        return "a keypoint is not a finite number"
    if not is_finite(pose["score"]):
        return f"score {pose['score']!r} is not a finite number"
    return None


def check(poses: Any, image_ids: set[int]) -> None:
    """Refuse results that the server would refuse or count wrongly.

    Raises:
        ValueError: says how many poses are wrong, and which is the first and why.
    """
    if not isinstance(poses, list) or not poses:
        raise ValueError("no list of poses, or an empty one")
    wrong = []
    first_of: dict[Any, int] = {}
    for index, pose in enumerate(poses):
        reason = problem(pose, image_ids)
        if reason is None:
            first = first_of.setdefault((pose["image_id"], *pose["keypoints"]), index)
            reason = None if first == index else f"the same keypoints as entry {first}"
        if reason is not None:
            wrong.append(f"entry {index} (counted from 0): {reason}")
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(poses)} poses are wrong, first {wrong[0]}")


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


def refuse_constant(name: str) -> None:
    """Fail: ``json`` calls this for NaN and Infinity, which Python reads and others do not."""
    raise ValueError(f"{name} is no JSON")


def verify(path: Path, member: str, poses: list[Pose]) -> None:
    """Open a written zip again: one file, no folder, strict JSON, the same poses.

    Raises:
        ValueError: the zip is not what it should be.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            read = json.loads(archive.read(member), parse_constant=refuse_constant)
    except (KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} came out damaged: {error}") from error
    if names != [member] or read != poses:
        raise ValueError(f"{path} came out damaged: it does not hold {member} alone and whole")


def write_zip(poses: list[Pose], folder: Path, name: str) -> Path:
    """Write the zip beside its final name and rename it once it has been verified.

    Args:
        poses: of :func:`for_server`.
        folder: made if it is not there.
        name: of the algorithm.

    Returns:
        The zip's path.
    """
    stem = f"person_keypoints_test-dev2017_{name}_results"
    text = json.dumps(poses, allow_nan=False, separators=(",", ":"))
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{stem}.zip.partial"
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{stem}.json", text)
        verify(partial, f"{stem}.json", poses)
        return partial.replace(folder / f"{stem}.zip")
    finally:
        partial.unlink(missing_ok=True)


def make_submission(results: Path, image_info: Path, name: str, folder: Path) -> None:
    """Check, write, verify, and say what was done."""
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9-]*", name):
        raise ValueError(
            f"--name {name!r}: use letters, digits and hyphens; "
            "underscores separate the parts of the file's name"
        )
    image_ids = load_image_ids(image_info)
    poses = load_json(results)
    try:
        check(poses, image_ids)
    except ValueError as error:
        raise ValueError(f"{results}: {error}") from error
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
