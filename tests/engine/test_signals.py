"""Signals that ask to stop are remembered until the work at hand is done."""

import signal
import time

import pytest

from inspose_d2.engine.signals import Interrupted, StopRequest, children_may_end

pytestmark = pytest.mark.fault


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_is_remembered_and_handlers_return(signum: int, status: int) -> None:
    former = signal.getsignal(signum)
    stop = StopRequest()
    with stop:
        signal.raise_signal(signum)
        assert stop.signum == signum
        with pytest.raises(Interrupted) as caught, stop.interruptible():
            pytest.fail("work began that may be left half done")
    assert caught.value.code == status
    assert signal.getsignal(signum) is former


def test_work_that_may_be_left_is_left_at_once() -> None:
    stop = StopRequest()
    with stop, pytest.raises(Interrupted), stop.interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert stop.signum == signal.SIGTERM
    with stop:
        signal.raise_signal(signal.SIGTERM)  # other work is finished first
        assert stop.signum == signal.SIGTERM


def test_second_ctrl_c_is_a_keyboard_interrupt_but_not_within_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the launcher's copy
        signal.raise_signal(signal.SIGTERM)
        assert stop.signum == signal.SIGINT
        monkeypatch.setattr(time, "monotonic", lambda: now + 2)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_request_is_forgotten_by_the_next_run() -> None:
    stop = StopRequest()
    with stop:
        signal.raise_signal(signal.SIGTERM)
    with stop:
        assert stop.signum == 0


def test_killed_child_raises_outside_of_a_step_alone() -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed")

    former = signal.signal(signal.SIGCHLD, fail)
    try:
        with children_may_end():
            signal.raise_signal(signal.SIGCHLD)
        with pytest.raises(RuntimeError):
            signal.raise_signal(signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, former)
