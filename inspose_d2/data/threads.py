"""Reading ahead and writing behind, each in a thread of its own with a bounded queue between.

OpenCV, PyAV, Pillow and PyTorch let go of the interpreter's lock while they work, so that the three
steps of a stream (read, find, write) run at once. An error of a thread is raised in the program's
own, and nothing waits for a thread that has ended.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

from ..workers import undisturbed

T = TypeVar("T")

# s that a reader has to leave, above the limits of streams: a process that ends while a thread is
# in OpenCV is aborted.
PATIENCE = 12.0


class ReadAhead(Iterator[T]):
    """Takes items in a thread, so that the next ones are ready when they are asked for.

    Iterating, within ``with``, gives the items in order; what taking one raises is raised after
    those before it.
    """

    def __init__(self, items: Iterable[T], size: int, *, drop_oldest: bool = False) -> None:
        """Begin at ``with``.

        Args:
            items: taken in the thread; a generator is closed there too.
            size: most items that wait; with that many the thread pauses.
            drop_oldest: the thread does not pause, and the oldest item that waits is dropped: for
                cameras, whose frames come when they come.
        """
        self._items = items
        self._drop_oldest = drop_oldest
        self._waiting: queue.Queue[tuple[T] | Exception | None] = queue.Queue(size)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)

    def __enter__(self) -> "ReadAhead[T]":
        self._thread.start()
        return self

    def __next__(self) -> T:
        entry = self._waiting.get()
        if isinstance(entry, tuple):
            return entry[0]
        self._waiting.put(entry)  # whoever asks again gets the same answer
        raise StopIteration if entry is None else entry

    def _run(self) -> None:
        end: Exception | None = None
        try:
            with contextlib.ExitStack() as stack:
                if isinstance(self._items, Generator):
                    stack.enter_context(contextlib.closing(self._items))
                for item in self._items:
                    if self._drop_oldest and self._waiting.full():
                        with contextlib.suppress(queue.Empty):
                            self._waiting.get_nowait()
                    self._put((item,))
                    if self._stopped.is_set():
                        break
        except Exception as error:  # noqa: BLE001  raised by __next__
            end = error
        self._put(end)

    def _put(self, entry: tuple[T] | Exception | None) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._waiting.put(entry, timeout=0.1)
                return

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(PATIENCE)


class WriteBehind:
    """Calls functions in a thread, in order; all are done once the ``with`` block is left."""

    def __init__(self, size: int) -> None:
        """Begin at ``with``.

        Args:
            size: most calls that wait; :meth:`put` then pauses.
        """
        self._waiting: queue.Queue[tuple[Callable[..., None], Any] | None] = queue.Queue(size)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    def __enter__(self) -> "WriteBehind":
        self._thread.start()
        return self

    def put(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have a function called; raises what an earlier call has raised."""
        if self._error is not None:
            raise self._error
        self._waiting.put((function, arguments))

    def _run(self) -> None:
        while (entry := self._waiting.get()) is not None:
            if self._error is not None:
                continue  # so that nobody waits for a place in the queue
            function, arguments = entry
            try:
                function(*arguments)
            except Exception as error:  # noqa: BLE001  raised by put() or at the end
                self._error = error

    def __exit__(self, *_: object) -> None:
        """Wait for what was put; an error of a call goes before others."""
        with undisturbed():  # a file must not be closed while the thread writes into it
            self._waiting.put(None)
            self._thread.join()
        if self._error is not None:
            raise self._error
