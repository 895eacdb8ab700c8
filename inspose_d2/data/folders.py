"""Which files of a folder are images; none is left out in silence."""

import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from .images import SUFFIXES, ImageError, read_size

# Of raw files Pillow would take the thumbnail.
UNKNOWN_IMAGES = {
    *(".arw", ".cr2", ".cr3", ".dng", ".jxl", ".nef", ".orf", ".pef", ".raf", ".raw", ".rw2"),
    *(".srw", ".svg"),
}
VIDEOS = {
    *(".3gp", ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".webm", ".wmv")
}


@dataclass
class Listing:
    """What lies below a folder.

    Attributes:
        images: paths, sorted.
        left_out: why a file or folder is none of them, by its path.
    """

    images: list[Path] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def is_metadata(path: Path) -> bool:
    """Whether macOS has put it there for itself: ``._photo.jpg``, ``__MACOSX``."""
    return path.name.startswith("._") or "__MACOSX" in path.parts


def list_folder(top: Path, ours: Path | None = None) -> Listing:
    """List the images of a folder and of all below, through links too, each folder once.

    Args:
        top: the folder.
        ours: a folder that is not looked into, if any.

    Returns:
        Paths that begin with ``top``.
    """
    listing = Listing()
    seen = {os.path.realpath(ours)} if ours else set()
    waiting = deque([top])
    while waiting:
        folder = waiting.popleft()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            paths = [folder / name for name in os.listdir(folder)]
        except OSError as error:
            listing.left_out[str(folder)] = f"cannot be looked into: {error.strerror}"
            continue
        for path in paths:
            if is_metadata(path.relative_to(top)):
                continue
            if not path.is_dir():
                _sort_in(path, listing)
            elif path.is_symlink():
                waiting.append(path)  # by its own name, where it is also there without a link
            else:
                waiting.appendleft(path)
    listing.images.sort()
    return listing


def _sort_in(path: Path, listing: Listing) -> None:
    suffix = path.suffix.lower()
    if suffix in VIDEOS:
        listing.left_out[str(path)] = "a video: give it alone, as --input"
    elif suffix in UNKNOWN_IMAGES:
        listing.left_out[str(path)] = f"{suffix} cannot be read: save it as JPEG or PNG"
    elif path.exists() and not path.is_file():  # a pipe would be waited for
        pass
    elif suffix in SUFFIXES or (not suffix and _is_image(path)):
        listing.images.append(path)  # of a broken link reading says so


def _is_image(path: Path) -> bool:
    try:
        read_size(path)
    except ImageError:
        return False
    return True
