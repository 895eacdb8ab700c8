"""Files that are there whole or not at all, and JSON."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from detectron2.utils.file_io import PathManager

UNFINISHED = ".tmp"  # behind the name of a file that is being written


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file for writing beside its place, which it takes at the end of the ``with`` block.

    A crash at any moment leaves the former file or the new one; an exception leaves the former.

    Args:
        path: of the file; folders are made.
        mode: "w" for text in UTF-8, "wb" for bytes.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with unfinished.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON, whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(value))


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON, through Detectron2's `PathManager`; a byte order mark is no fault.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON; names the file.
    """
    with PathManager.open(os.fspath(path), "rb") as file:
        data = file.read()
    try:
        return json.loads(data)  # of bytes: UTF-8, whatever the locale says
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no JSON in UTF-8, or was cut off: {error}; write or copy it anew"
        ) from error


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Checksum of a file, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring renamed files of a folder to the disk; systems without this need none."""
    if hasattr(os, "O_DIRECTORY"):
        number = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Say of errors of the system, such as a full disk, at which file they came."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
