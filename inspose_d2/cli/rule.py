"""The rule for the ends of all programs: bad input is a line and status 2, never a traceback.

| status | |
|---|---|
| 0 | done |
| 1 | nothing was done, or an error on the way |
| 2 | it could not begin: the line says what is wrong with the command or with what it names |
| 3 | something was left out; each thing is listed |
| 130, 143 | ended by Ctrl-C, by SIGTERM; what was written is whole |

Output whose reader has gone, as in ``inspose models | head -n 1``, is dropped; the work goes on.
"""

import io
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

DONE, NOTHING, USAGE, SOME_LEFT_OUT, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM has come: leave as after Ctrl-C."""


class _Output(io.FileIO):
    """Where a stream goes; what cannot be written there is dropped.

    Attributes:
        error: of the last write that failed, unless its reader had gone.
    """

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write bytes; returns how many, also where they are dropped."""
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except BrokenPipeError:
            pass
        except OSError as error:
            self.error = error
        return memoryview(data).nbytes


def told(name: str, work: Callable[[], int | None]) -> int:
    """Do the work of a program by the rule above.

    Args:
        name: of the program, as its user has called it.
        work: returns the exit status, None for 0.

    Returns:
        The exit status.
    """
    output = _make_robust()
    former = _raise_on_sigterm()
    try:
        status = _status(name, work)
    finally:
        if former is not None:
            signal.signal(signal.SIGTERM, former)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    if output is not None and output.error is not None:
        _say(name, f"the output cannot be written: {output.error.strerror}")
        return status or USAGE
    return status


def _status(name: str, work: Callable[[], int | None]) -> int:
    """Do the work; what ends it early becomes a line and a status."""
    try:
        return work() or DONE
    except KeyboardInterrupt as error:
        _say(name, "interrupted; what was done until now is whole")
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "detectron2":
            raise
        _say(name, "Detectron2 is missing: inspose install-detectron2")
    except (OSError, ValueError) as error:
        _say(name, error)
    except RuntimeError as error:
        from ..checkpoint import CheckpointError

        if not isinstance(error, CheckpointError):
            raise
        _say(name, error)
    return USAGE


def _say(name: str, what: object) -> None:
    print(f"{name}: {what}", file=sys.stderr)


def _make_robust() -> _Output | None:
    """Let both streams of the process survive their readers, and write names in any encoding.

    Returns:
        Where standard output goes; None where it is not the process's own.
    """
    opened = []
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        # Another stands there in tests and notebooks, none where it was closed.
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        stream.flush()
        opened.append(_Output(stream.fileno(), "w", closefd=False))
        text = io.TextIOWrapper(
            io.BufferedWriter(opened[-1]),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=bool(stream.line_buffering),
        )
        setattr(sys, name, text)
    return opened[0] if len(opened) == 2 else None


def _raise_on_sigterm() -> Any:
    """Raise :class:`Terminated` on SIGTERM; returns the former handler, None if it stays."""

    def handle(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb
        raise Terminated

    try:
        return signal.signal(signal.SIGTERM, handle)
    except ValueError:  # only the main thread may
        return None
