"""What one worker does for all, with stand-ins for the other workers."""

import logging
from typing import Any

import pytest
from detectron2.utils import comm

from inspose_d2.workers import WorkersEnd, on_one_worker


def be_worker(monkeypatch: pytest.MonkeyPatch, rank: int, others_say: str = "") -> list[str]:
    """Be one of two workers of a machine; what it tells the other comes back."""
    told: list[str] = []

    def all_gather(said: str) -> list[str]:
        told.append(said)
        return [said, others_say] if rank == 0 else [others_say, said]

    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "get_local_rank", lambda: rank)
    monkeypatch.setattr(comm, "all_gather", all_gather)
    return told


def fail() -> Any:
    raise ValueError("annotations[3] is wrong")


def test_single_worker_does_it_and_fails_as_ever() -> None:
    assert on_one_worker(lambda: 7) == 7
    with pytest.raises(ValueError, match=r"annotations\[3\]"):
        on_one_worker(fail)


@pytest.mark.parametrize(("rank", "result"), [(0, 7), (1, None)])
def test_first_worker_does_it_and_the_other_waits(
    rank: int, result: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, calls = be_worker(monkeypatch, rank), []
    assert on_one_worker(lambda: calls.append(0) or 7) == result
    assert len(calls) == (rank == 0)
    assert told == [""]


def test_failure_of_the_first_ends_both_and_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (message,) = [*be_and_fail(monkeypatch, 0), *be_and_fail(monkeypatch, 1)]
    (record,) = caplog.records
    assert record.getMessage() == message == "ValueError: annotations[3] is wrong"
    assert record.levelno == logging.ERROR
    assert not record.exc_info


def be_and_fail(monkeypatch: pytest.MonkeyPatch, rank: int) -> list[str]:
    told = be_worker(monkeypatch, rank, others_say="" if rank == 0 else "ValueError")
    with pytest.raises(WorkersEnd) as caught:
        on_one_worker(fail)
    assert caught.value.code == 1
    return [x for x in told if x]


def test_fault_of_the_program_is_shown_with_its_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    be_worker(monkeypatch, 0)
    with pytest.raises(WorkersEnd):
        on_one_worker(lambda: {}["x"])
    assert "test_workers.py" in caplog.text
