"""What several processes need: of workers that one of them acts for all, of others to go on."""

import contextlib
import functools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from detectron2.utils import comm
from torch.utils.data import DataLoader

T = TypeVar("T")
logger = logging.getLogger(__name__)


class WorkersEnd(SystemExit):
    """What one worker tried for all has failed; it has logged why. Ends the program: status 1."""

    def __init__(self) -> None:
        super().__init__(1)


def on_one_worker(action: Callable[[], T]) -> T | None:
    """Let the first worker of each machine do something, and the others wait for its end.

    All workers must call it.

    Args:
        action: calls no other worker.

    Returns:
        What the action returns; None on the other workers.

    Raises:
        WorkersEnd: on all of several workers where the action of one has failed. A single worker
            raises what the action does.
    """
    if comm.get_world_size() == 1:
        return action()
    result, said = None, ""
    if comm.get_local_rank() == 0:
        try:
            result = action()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            is_bug = not isinstance(error, OSError | ValueError | RuntimeError)
            logger.error("%s", said, exc_info=is_bug)
    if any(comm.all_gather(said)):
        raise WorkersEnd
    return result


@functools.cache
def stay_usable_after_fork() -> None:
    """Let a model that was used be used in processes that are forked afterwards.

    OpenMP's threads do not come along, and a fork would wait for them for ever: each has one
    thread from then on, as PyTorch's loader processes have.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


def guard_loader(loader: "DataLoader[Any]") -> "DataLoader[Any]":
    """Let a loader's processes leave signals to their parent, and give them files enough to open.

    Args:
        loader: changed in place.

    Returns:
        The same.
    """
    loader.worker_init_fn = leave_signals_to_parent
    if loader.num_workers:
        raise_file_limit()
    return loader


def leave_signals_to_parent(number: int = 0) -> None:  # noqa: ARG001  as DataLoader calls it
    """Hear SIGTERM from the parent alone, and SIGINT not at all; for a loader process.

    A launcher or a terminal sends both to all processes of a run. The parent then finishes its
    step, for which it needs its loaders, and ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS: those sent to the group do not come
        os.setpgid(0, 0)
        return
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in all threads that begin here
    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Finish what must become whole: Ctrl-C and SIGTERM are not heard meanwhile."""
    former = {}
    with contextlib.suppress(ValueError):  # only the main thread hears them, and may do it
        for signum in (signal.SIGINT, signal.SIGTERM):
            former[signum] = signal.signal(signum, signal.SIG_IGN)
    try:
        yield
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


def file_limit() -> int:
    """How many files this process may have open; 0 where nobody knows."""
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 0


def raise_file_limit() -> None:
    """Raise the limit of open files as far as this process may.

    Each tensor that comes from a loader process is a file: the 256 of macOS are soon used up.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = 10240 if hard == resource.RLIM_INFINITY else min(hard, 65536)  # 10240: macOS's own
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
