"""Turns and stages, by a clock that only moves when it is told to."""

from contextlib import suppress
from types import SimpleNamespace

import pytest

from benchmarks.timing import REST, Seconds, Stage, Stopwatch, by_turns, stage_seconds


class Clock:
    """Stands in for ``time.perf_counter``."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_functions_take_turns_and_warm_up_is_not_counted(clock: Clock) -> None:
    calls = []

    def slow(i: int) -> None:
        calls.append(("slow", i))
        clock.work([50, 1, 4, 2][i])

    def fast(i: int) -> None:
        calls.append(("fast", i))
        clock.work(0.5)

    times = by_turns([slow, fast], repeats=3, warm_up=1, clock=clock)
    assert times == [Seconds(2, 1, 4), Seconds(0.5, 0.5, 0.5)]
    assert calls == [(name, i) for i in range(4) for name in ("slow", "fast")]


def test_a_stage_is_not_charged_for_the_stages_inside_it(clock: Clock) -> None:
    stopwatch = Stopwatch(clock)
    clock.work(7)  # before any stage
    with stopwatch.stage("outer"):
        clock.work(1)
        for _ in range(2):
            with stopwatch.stage("inner"):
                clock.work(10)
        clock.work(2)
    clock.work(7)
    assert stopwatch.seconds == {"outer": 3, "inner": 20}


def test_a_failing_stage_ends(clock: Clock) -> None:
    stopwatch = Stopwatch(clock)
    with suppress(KeyError), stopwatch.stage("first"):
        clock.work(1)
        raise KeyError
    with stopwatch.stage("second"):
        clock.work(2)
    assert stopwatch.seconds == {"first": 1, "second": 2}


class Model:
    """A method that calls two others."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.head = SimpleNamespace(run=lambda: clock.work(5))

    def backbone(self) -> None:
        self.clock.work(3)

    def __call__(self) -> str:
        self.backbone()
        self.clock.work(1)
        self.head.run()
        self.backbone()
        return "poses"


def test_stages_and_rest_add_up_to_the_call_and_the_model_is_what_it_was(clock: Clock) -> None:
    model = Model(clock)
    before, head_before = dict(vars(model)), dict(vars(model.head))
    stages = [Stage("head", model.head, "run"), Stage("backbone", model, "backbone")]
    results = []

    def call(stopwatch: Stopwatch) -> None:
        results.append(model())
        with stopwatch.stage("decoding"):
            clock.work(2)

    seconds = stage_seconds(call, stages, repeats=2, clock=clock)
    assert seconds == {"backbone": 6, "head": 5, "decoding": 2, REST: 1}
    assert list(seconds) == ["head", "backbone", "decoding", REST]  # watched, others, the rest
    assert results == ["poses"] * 3
    assert clock.now == 100 + 3 * sum(seconds.values())
    assert (vars(model), vars(model.head)) == (before, head_before)
