"""benchmarks/load.py and the limits on what it measures."""

import pytest

from benchmarks import load as benchmark_load

QUICK = "configs/quick/synthetic_people.yaml"


@pytest.mark.fault
def test_evaluation_of_a_crowd_keeps_its_numbers_and_grows_in_proportion() -> None:
    # 100 poses are 22.7 KiB of numbers. In evaluate COCO's records of 20 poses take 75 KiB an
    # image, those of all 100 would take 430.
    few, more = (benchmark_load.evaluation_memory(n) for n in (20, 40))
    for used in (few, more):
        assert 22 < used["kept"] < 25
        assert 22 < used["kept, second half"] < 25
    # Tables of 1 to 2 MiB in all, whatever the number of images, show with so few.
    assert more["figures"] <= few["figures"] < 150


@pytest.mark.slow
@pytest.mark.fault
def test_calls_leave_nothing_behind() -> None:
    added = benchmark_load.memory_of_calls(QUICK, 200)
    assert added["second half"] <= 5, added
