"""Which pictures the command line of ``inspose predict`` means, and what becomes of each."""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ..data.folders import Listing, is_metadata, list_folder

WRITTEN = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}  # a picture of another becomes name.gif.png


@dataclass(frozen=True)
class Job:
    """An image to do."""

    source: Path
    name: str  # in the tree of the inputs
    image_id: int
    picture: Path  # to be written
    kp_net_picture: Path


def find_images(inputs: Sequence[str], output: Path) -> tuple[list[Path], Path, dict[str, str]]:
    """Find the images of files, folders (with all below) and patterns.

    Args:
        inputs: of the command line.
        output: what lies in this folder is not taken from others: it is ours.

    Returns:
        Absolute paths, each once, the deepest folder above all of them, and why files that look
        like images or videos are not among them.

    Raises:
        ValueError: nothing is there.
    """
    found: dict[Path, None] = {}
    left_out: dict[str, str] = {}
    roots = []
    for text in inputs:
        # A file whose name has brackets is no pattern.
        matches = [text] if os.path.lexists(text) else glob.glob(text, recursive=True)
        listing = Listing()
        for path in sorted(Path(x).absolute() for x in matches):
            if path.is_dir():
                below = list_folder(path, output)
                listing.images += below.images
                listing.left_out |= below.left_out
                roots.append(path)
            elif path == Path(text).absolute() or not is_metadata(path):
                listing.images.append(path)
                roots.append(path.parent)
        if not listing.images and not listing.left_out:
            raise ValueError(f"--input {text}: no such file, or a folder or pattern without images")
        found |= dict.fromkeys(listing.images)
        left_out |= listing.left_out
    return list(found), Path(os.path.commonpath(roots)), left_out


def folder_of(output: Path) -> Path:
    """Folder of what is written: ``--output``, or where it is a picture the folder around it."""
    is_picture = output.suffix.lower() in WRITTEN and not output.is_dir()
    return output.parent if is_picture else output


def make_jobs(sources: Sequence[Path], root: Path, output: Path) -> list[Job]:
    """Say what becomes of each image.

    Args:
        sources: absolute paths.
        root: a folder above all of them.
        output: a folder or, of a single image, the picture.

    Returns:
        Jobs with pictures of different names.

    Raises:
        ValueError: one picture for several images, or one in the place of its source.
    """
    folder = folder_of(output)
    as_file = folder != output
    if as_file and len(sources) > 1:
        raise ValueError(f"--output {output}: {len(sources)} images need a folder")
    numbered = [x.stem for x in sources if x.stem.isascii() and x.stem.isdecimal()]
    by_name = len(set(map(int, numbered))) == len(sources)
    jobs, taken = [], set()
    for place, source in enumerate(sources):
        name = source.relative_to(root)
        file = name
        while file.suffix.lower() not in WRITTEN or file in taken:
            file = file.with_name(f"{file.name}.png")
        taken.add(file)
        picture = output if as_file else folder / "poses" / file
        if picture.absolute() == source:
            raise ValueError(f"--output {output}: {source} would be overwritten")
        image_id = int(source.stem) if by_name else place
        jobs.append(Job(source, name.as_posix(), image_id, picture, folder / "kp_nets" / file))
    return jobs


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write a picture in the format of its suffix.

    Raises:
        OSError: the disk is full, or no such file may be made.
        ValueError: the picture does not fit into the format.
    """
    try:
        _, data = cv2.imencode(path.suffix, picture)
    except cv2.error as error:
        raise ValueError(f"cannot be written as {path.suffix}: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())
