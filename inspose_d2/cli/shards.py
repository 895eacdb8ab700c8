"""Pictures shared out among the workers of torchrun, and a run that goes on where it was ended.

Until a run is done, ``unfinished/`` in its output folder holds ``run.json``, which says what run it
is, and of each worker ``0.jsonl``, ``1.jsonl``, ...: a line for each picture that it has finished.
All workers, those of other machines too, must see the same folder.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..checkpoint import CheckpointError
from ..evaluation.results import ResultsFile
from ..files import named_errors, read_json, sha256_of, write_json
from .pictures import Job
from .rule import USAGE

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of some file systems of clusters

T = TypeVar("T")
logger = logging.getLogger(__name__)


def in_step(action: Callable[[], T]) -> T:
    """Do something on all workers; where it fails, one worker says why, and all end.

    Raises:
        OSError: what the action has raised, as below, on the first worker where it has failed.
        ValueError: the same.
        CheckpointError: the same.
        SystemExit: on the other workers, with the status for what cannot begin.
    """
    if comm.get_world_size() == 1:
        return action()
    error: Exception | None = None
    try:
        result = action()
    except (OSError, ValueError, CheckpointError) as caught:
        error = caught
    failed = [rank for rank, bad in enumerate(comm.all_gather(error is not None)) if bad]
    if error is not None and comm.get_rank() == failed[0]:
        raise error
    if failed:
        raise SystemExit(USAGE)
    return result


def identify(cfg: CfgNode, jobs: Sequence[Job], **settings: Any) -> dict[str, Any]:
    """Say what the results of a run depend on.

    Args:
        cfg: of the model; ``MODEL.WEIGHTS`` is a file, whose content counts.
        jobs: the pictures; their names, sizes and times of change count.
        settings: of the command.

    Returns:
        What stands in ``run.json``: two runs with the same give the same.
    """
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.WEIGHTS = plain.MODEL.DEVICE = ""
    pictures = hashlib.sha256()
    for job in jobs:
        stamp: tuple[int, ...] = ()
        with contextlib.suppress(OSError):  # a broken link: reading it says so
            status = job.source.stat()
            stamp = status.st_size, status.st_mtime_ns
        pictures.update(f"{job.name}\0{job.image_id}\0{stamp}\n".encode(errors="surrogateescape"))
    return {
        "config": hashlib.sha256(plain.dump().encode()).hexdigest(),
        "weights": sha256_of(cfg.MODEL.WEIGHTS),
        "input": f"{len(jobs)} pictures, {pictures.hexdigest()}",
        **settings,
    }


class Shards:
    """What is finished of a list of pictures, and which of the others this worker has to do.

    Attributes:
        todo: places in the list, in order: every n-th of those that are left, of n workers.
        num_todo: how many all workers have to do.
    """

    def __init__(self, folder: Path, jobs: Sequence[Job], run: dict[str, Any]) -> None:
        """Begin, or go on; all workers must.

        Args:
            folder: of the output.
            jobs: the pictures.
            run: what :func:`identify` says.

        Raises:
            ValueError: there is unfinished work of another run, another program is at work, or the
                workers do not see the same.
        """
        self.folder = folder / "unfinished"
        self.jobs = jobs
        self.run = run
        in_step(self._compare)
        in_step(self._begin)
        in_step(self._see)
        done = {place for place, _, record in self._records() if "poses" in record}
        left = [place for place in range(len(jobs)) if place not in done]
        self.num_todo = len(left)
        self.todo = left[comm.get_rank() :: comm.get_world_size()]
        if done and comm.is_main_process():
            logger.warning("going on: %d of %d pictures are finished", len(done), len(jobs))
        comm.synchronize()  # nobody finishes a picture before all have counted
        self.file = in_step(self._open)

    def _compare(self) -> None:
        """Refuse workers whose machines see other files."""
        first, *others = comm.all_gather(self.run)
        if other := [x for x in others if x != first]:
            what = ", ".join(key for key in first if first[key] != other[0][key])
            raise ValueError(f"workers see different things ({what}): they need the same files")

    def _begin(self) -> None:
        """Let the first worker make the folder, or compare the one that is there."""
        if not comm.is_main_process():
            return
        path = self.folder / "run.json"
        if not path.is_file():
            write_json(path, self.run)
            return
        before = read_json(path)
        if different := [key for key in self.run if before.get(key) != self.run[key]]:
            raise ValueError(
                f"{self.folder} holds the pictures that an interrupted run has finished, with "
                f"another {' and '.join(different)}: repeat that command to go on with it, or "
                "delete the folder to begin anew"
            )

    def _see(self) -> None:
        """Refuse a machine whose output folder is one of its own."""
        path = self.folder / "run.json"
        if not path.is_file() or read_json(path) != self.run:
            raise ValueError(
                f"{path} is not the first worker's: machines need one --output in common"
            )

    def _open(self) -> Any:
        path = self.folder / f"{comm.get_rank()}.jsonl"
        file = path.open("a", encoding="utf-8")
        try:
            _lock(file)
        except BlockingIOError as error:
            file.close()
            raise ValueError(
                f"{path}: another inspose predict is writing there; for several workers use "
                "torchrun"
            ) from error
        file.write("\n")  # after a kill the last line may be half a line
        return file

    def add(self, place: int, poses: list[dict[str, Any]]) -> None:
        """Note that a picture is finished; its poses in COCO's form."""
        self._write({"place": place, "poses": poses})

    def leave_out(self, place: int, reason: Exception) -> None:
        """Note why a picture cannot be done; a later start tries it again."""
        self._write({"place": place, "left_out": str(reason)})

    def _write(self, record: dict[str, Any]) -> None:
        with named_errors(Path(self.file.name)):
            self.file.write(f"{json.dumps(record, allow_nan=False)}\n")
            self.file.flush()

    def wait_for_others(self) -> None:
        """Wait until what all workers have finished is on the disk, for other machines to read.

        Raises:
            OSError: a worker of another machine has ended.
        """
        with named_errors(Path(self.file.name)):
            os.fsync(self.file.fileno())
        try:
            comm.synchronize()
        except RuntimeError as error:  # of gloo
            raise OSError("another worker has ended: repeat the command to go on") from error

    def _records(self) -> Iterator[tuple[int, tuple[Path, int], dict[str, Any]]]:
        """Read the lines of all workers: place of the picture, where the line is, the line."""
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open("rb") as file:
                begin = 0
                for line in file:
                    with contextlib.suppress(json.JSONDecodeError):  # half a line
                        record = json.loads(line)
                        yield record["place"], (path, begin), record
                    begin += len(line)

    def write_results(self, path: Path) -> tuple[int, int, dict[str, str]]:
        """Put together what all workers have finished until now, in the order of the pictures.

        Args:
            path: of the JSON; it is there whole or not at all.

        Returns:
            The numbers of finished pictures and of poses, and why others were left out, by source.
        """
        where: dict[int, tuple[Path, int]] = {}
        left_out: dict[int, str] = {}
        for place, line, record in self._records():
            if "poses" in record:
                where[place] = line
            else:
                left_out[place] = record["left_out"]
        with contextlib.ExitStack() as stack, ResultsFile(path) as results:
            files = {
                part: stack.enter_context(part.open("rb"))
                for part in {x for x, _ in where.values()}
            }
            for place in sorted(where):
                part, begin = where[place]
                files[part].seek(begin)
                results.add(json.loads(files[part].readline())["poses"])
        reasons = {
            str(self.jobs[place].source): left_out[place]
            for place in sorted(left_out.keys() - where.keys())
        }
        return len(where), results.num_poses, reasons

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_: object) -> None:
        with named_errors(Path(self.file.name)):
            self.file.close()

    def remove(self) -> None:
        """Forget what is noted: the run is done."""
        shutil.rmtree(self.folder)


def _lock(file: Any) -> None:
    """Have a file for this process alone, until it is closed.

    Raises:
        BlockingIOError: another process has it.
    """
    with contextlib.suppress(ImportError):  # Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
