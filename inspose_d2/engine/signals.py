"""SIGTERM and SIGINT end training after the step, with its state saved; SIGCHLD never in one."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Interrupted(SystemExit):
    """Training was asked to stop; uncaught it ends the program with 128 + signal number."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class StopRequest:
    """Remembers a signal that asks to stop, until the work at hand is done.

    As a context manager it takes the place of the handlers, where it may: in the main thread. The
    second SIGINT, not within a second of the first, is a KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._since = 0.0
        self._interruptible = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self.signum = 0
        for signum in STOPPING:
            try:
                self._former[signum] = signal.signal(signum, self._handle)
            except ValueError:  # only the main thread may
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for signum, handler in self._former.items():
            signal.signal(signum, handler)
        self._former.clear()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal raise :class:`Interrupted` inside, for work that may be left half done."""
        if self.signum:
            raise Interrupted(self.signum)
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002
        # A terminal and a launcher may both send one to each worker.
        is_second = self.signum and time.monotonic() - self._since > 1
        if signum == signal.SIGINT and is_second:
            raise KeyboardInterrupt
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()
        if self._interruptible:
            raise Interrupted(self.signum)


@contextmanager
def children_may_end() -> Iterator[None]:
    """Let no loader process that is killed raise inside; the loader tells of it at its next batch.

    PyTorch's handler of SIGCHLD raises at any moment, such as in the midst of an update.
    """
    former = None
    with suppress(ValueError):  # only the main thread has handlers
        former = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        if former is not None:
            signal.signal(signal.SIGCHLD, former)
