"""Seconds of functions that take turns, and of the stages of a call."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

WARM_UP = 3
REST = "rest"


@dataclass(frozen=True)
class Seconds:
    """What is said of a function's times."""

    median: float
    min: float
    max: float


def by_turns(
    functions: Sequence[Callable[[int], Any]],
    repeats: int,
    warm_up: int = WARM_UP,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Seconds]:
    """Time functions that are called one after another, again and again.

    So what else the machine does falls on all of them.

    Args:
        functions: each takes the number of the round, from 0.
        repeats: timed rounds.
        warm_up: rounds before these.
        clock: what is read; ``time.process_time`` leaves out what else the machine does.

    Returns:
        The seconds of each function.
    """
    seconds: list[list[float]] = [[] for _ in functions]
    for i in range(warm_up + repeats):
        for function, times in zip(functions, seconds, strict=True):
            begin = clock()
            function(i)
            synchronize()
            times.append(clock() - begin)
    timed = [times[warm_up:] for times in seconds]
    return [Seconds(float(np.median(x)), min(x), max(x)) for x in timed]


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Stage:
    """A function of a built model, ``owner.attribute``, that belongs to the stage ``name``."""

    name: str
    owner: Any
    attribute: str


class Stopwatch:
    """Seconds of stages; while a stage runs inside another only the inner one is charged."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge what runs in the ``with`` block to a stage."""
        self._charge()
        self.seconds.setdefault(name, 0.0)
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    @contextmanager
    def watch(self, stages: Sequence[Stage]) -> Iterator[None]:
        """Charge every call of the stages' functions; afterwards they are what they were."""
        with ExitStack() as stack:
            for stage in stages:
                function = self._charged(stage.name, getattr(stage.owner, stage.attribute))
                stack.enter_context(patch.object(stage.owner, stage.attribute, function))
            yield

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def charged(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return charged

    def _charge(self) -> None:
        synchronize()
        now = self.clock()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


def stage_seconds(
    call: Callable[[Stopwatch], Any],
    stages: Sequence[Stage],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of the stages of a call, after one to warm up.

    Args:
        call: gets the stopwatch, for stages that are no functions of a model.
        stages: what to watch.
        repeats: timed calls.
        clock: as for :func:`by_turns`.

    Returns:
        Seconds by stage: those watched, in their order, others as they begin; last, as ``REST``,
        all that no stage is charged for.
    """
    calls = []
    for _ in range(1 + repeats):
        stopwatch = Stopwatch(clock)
        with stopwatch.watch(stages), stopwatch.stage(REST):
            call(stopwatch)
        calls.append(stopwatch.seconds)
    others = (name for name in calls[0] if name != REST)
    names = dict.fromkeys([*(stage.name for stage in stages), *others, REST])
    return {name: float(np.median([x[name] for x in calls[1:]])) for name in names}
