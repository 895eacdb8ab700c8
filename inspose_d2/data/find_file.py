"""Where data lie, and files whose names another system has written."""

import logging
import os
import unicodedata
from functools import lru_cache
from pathlib import Path

from detectron2.utils.logger import log_first_n


def folder_of(variable: str) -> str:
    """Folder that a variable of the environment names, by default ``datasets``; ``~`` is home."""
    return os.path.expanduser(os.environ.get(variable, "datasets"))


def find_file(path: str) -> str:
    """Find the file that a path means.

    Args:
        path: of a file. One that is there is returned as it is.

    Returns:
        The path; where nothing is there, that of the only file whose path differs by no more than
        backslashes for slashes, upper and lower case, or the form of Unicode (macOS takes accents
        apart), if there is one.
    """
    if os.path.lexists(path) or "://" in path:
        return path
    wanted = Path(path.replace("\\", "/"))
    found = Path(wanted.anchor)
    for part in wanted.parts[len(found.parts) :]:
        if (found / part).exists():
            found /= part
            continue
        try:
            names = _names(str(found), found.stat().st_mtime_ns).get(_plain(part), [])
        except OSError:  # no folder
            return path
        if len(names) != 1:
            return path
        found /= names[0]
    log_first_n(
        logging.WARNING,
        f"{path} is not there; {found} is, and taken for it. Other such names are not mentioned",
        name=__name__,
    )
    return str(found)


@lru_cache(maxsize=16)
def _names(folder: str, changed: int) -> dict[str, list[str]]:  # noqa: ARG001  makes it read anew
    names: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        names.setdefault(_plain(name), []).append(name)
    return names


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
