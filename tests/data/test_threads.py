"""Reading ahead and writing behind: order, bounds, errors, and nobody waits for ever."""

import threading
import time
from collections.abc import Iterator

import pytest

from inspose_d2.data.threads import ReadAhead, WriteBehind


def test_items_come_in_order_and_no_more_are_taken_than_may_wait() -> None:
    taken = []

    def items() -> Iterator[int]:
        for i in range(50):
            taken.append(i)
            yield i

    with ReadAhead(items(), 3) as ahead:
        assert next(ahead) == 0
        time.sleep(0.3)
        assert 2 <= len(taken) <= 5  # one given, three wait, one in the hand
        assert list(ahead) == list(range(1, 50))
        assert list(ahead) == []


@pytest.mark.fault
def test_error_of_the_reader_comes_after_what_it_had_read() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the third sector is bad")

    with ReadAhead(items(), 4) as ahead:
        assert next(ahead) == 1
        for _ in range(2):
            with pytest.raises(ValueError, match="third sector"):
                next(ahead)


def test_camera_drops_its_oldest_pictures() -> None:
    seen_all = threading.Event()

    def items() -> Iterator[int]:
        yield from range(20)
        seen_all.set()

    with ReadAhead(items(), 2, drop_oldest=True) as ahead:
        assert seen_all.wait(5)  # nobody has asked for one, and the camera did not wait
        assert next(ahead) == 18


@pytest.mark.fault
def test_leaving_closes_the_reader_and_does_not_wait_for_a_silent_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("inspose_d2.data.threads.PATIENCE", 0.5)
    closed, silence = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    def silent() -> Iterator[int]:
        silence.wait(60)
        yield 1

    with ReadAhead(items(), 2) as ahead:
        next(ahead)
    assert closed.wait(5)
    begin = time.monotonic()
    with ReadAhead(silent(), 2):
        pass
    assert time.monotonic() - begin < 10
    silence.set()


def test_all_is_written_in_order_before_the_end() -> None:
    written: list[int] = []

    def write(i: int) -> None:
        time.sleep(0.01)
        written.append(i)

    def work() -> None:
        with WriteBehind(2) as writer:
            for i in range(10):
                writer.put(write, i)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert written == list(range(10))


@pytest.mark.fault
def test_error_of_the_writer_ends_the_program_and_nobody_waits() -> None:
    calls = []

    def write(i: int) -> None:
        calls.append(i)
        raise OSError(28, "No space left on device", "out.webm")

    def work() -> None:
        with WriteBehind(1) as writer:
            for i in range(1000):
                writer.put(write, i)
                time.sleep(0.01)

    with pytest.raises(OSError, match=r"No space left on device: 'out\.webm'"):
        work()
    assert calls == [0]  # told once
