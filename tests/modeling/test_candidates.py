import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inspose_d2.modeling.candidates import candidates_at, select_by_score
from inspose_d2.modeling.geometry import Locations


def two_levels() -> Locations:
    """x, y of the six: (4, 4) (12, 4) (4, 12) (12, 12) at stride 8, (8, 8) (24, 8) at 16."""
    return Locations.of([torch.empty(1, 1, 2, 2), torch.empty(1, 1, 1, 2)], [8, 16])


def test_candidates_are_in_the_order_of_images_and_locations() -> None:
    chosen = torch.zeros(3, 6, dtype=torch.bool)
    chosen[0, [4, 1]] = chosen[2, [0, 5, 3]] = True
    candidates = candidates_at(two_levels(), chosen)
    assert candidates.image.tolist() == [0, 0, 2, 2, 2]
    assert candidates.index.tolist() == [1, 4, 0, 3, 5]
    assert candidates.points.tolist() == [[12, 4], [8, 8], [4, 4], [12, 12], [24, 8]]
    assert candidates.strides.tolist() == [8, 16, 8, 8, 16]


@given(flags=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_slices_cut_candidates_by_image(flags: list[list[bool]]) -> None:
    candidates = candidates_at(two_levels(), torch.tensor(flags))
    slices = candidates.slices()
    assert len(slices) == len(flags)
    for image, own in enumerate(slices):
        assert candidates.index[own].tolist() == [i for i, flag in enumerate(flags[image]) if flag]
        assert (candidates.image[own] == image).all()


def six_scores(*rows: list[float]) -> torch.Tensor:
    """Scores of images with six locations; those that are not given are below any threshold."""
    return torch.tensor([[*row, *[-1.0] * (6 - len(row))] for row in rows])


def test_score_must_be_above_threshold() -> None:
    scores = six_scores([0.25, 0.5, 0.75, 0.5000001])
    assert select_by_score(two_levels(), scores, 0.5, 6).index.tolist() == [2, 3]


def test_best_locations_are_counted_per_image_and_come_best_first() -> None:
    scores = six_scores([0.9, 0.8, 0.7, 0.6], [], [0.1, 0.3, 0.2, 0.0, 0.0, 0.4])
    candidates = select_by_score(two_levels(), scores, 0.15, 2)
    # The third image's best two stay though the first image has four better ones.
    assert candidates.counts == [2, 0, 2]
    assert candidates.image.tolist() == [0, 0, 2, 2]
    assert candidates.index.tolist() == [0, 1, 5, 1]
    assert candidates.points.tolist() == [[4, 4], [12, 4], [24, 8], [12, 4]]
    assert candidates.strides.tolist() == [8, 8, 16, 8]


@pytest.mark.parametrize(("topk", "expected"), [(0, 0), (3, 3), (4, 4), (500, 4)])
def test_topk_beyond_the_number_of_locations(topk: int, expected: int) -> None:
    scores = six_scores([0.9, 0.8, 0.7, 0.6])
    assert select_by_score(two_levels(), scores, 0.1, topk).counts == [expected]


@given(
    scores=st.lists(st.integers(0, 1000), min_size=6, max_size=6, unique=True),
    threshold=st.integers(0, 1000),
    topk=st.integers(0, 8),
)
def test_selection_equals_sorting(scores: list[int], threshold: int, topk: int) -> None:
    best = sorted((s for s in scores if s > threshold), reverse=True)[:topk]
    candidates = select_by_score(two_levels(), torch.tensor([scores]).float(), threshold, topk)
    assert candidates.index.tolist() == [scores.index(s) for s in best]


def test_scores_that_are_not_a_number_are_passed_over_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nan = float("nan")
    scores = six_scores([0.9, nan, 0.7, nan], [0.8, 0.1], [nan] * 6)
    candidates = select_by_score(two_levels(), scores, 0.5, 6)
    assert candidates.counts == [2, 1, 0]
    assert candidates.index.tolist() == [0, 2, 0]
    [message] = caplog.messages
    assert "8 person scores of 2 images are not a number" in message
    select_by_score(two_levels(), scores[1:2], 0.5, 6)
    assert len(caplog.messages) == 1
