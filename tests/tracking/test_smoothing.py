"""Smoothing over time: still people tremble less, people who move do not lag, and what is odd."""

import math

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from inspose_d2.tracking import OneEuro, smooth_recorded
from inspose_d2.tracking.smoothing import WINDOW

HEIGHT, NOISE = 400.0, 4.0  # pixels
BODY = np.random.default_rng(5).uniform(0, 1, (17, 2)) * [0.4, 1] * HEIGHT
BODY[:2, 1] = 0, HEIGHT


def frame(xy: np.ndarray, number: int = 1) -> Instances:
    """A pose with keypoints (17, 2) and its track."""
    keypoints = np.concatenate([xy, np.full((len(xy), 1), 0.5)], axis=1)[None]
    return Instances(
        (1000, 1000),
        pred_keypoints=torch.tensor(keypoints),
        pred_boxes=Boxes(torch.zeros(1, 4)),
        scores=torch.ones(1),
        pred_track_ids=torch.tensor([number]),
    )


def live(times: np.ndarray, path: np.ndarray) -> np.ndarray:
    smooth = OneEuro()
    frames = zip(times.tolist(), path, strict=True)
    return np.stack([smooth(frame(xy), t).pred_keypoints[0, :, :2].numpy() for t, xy in frames])


def recorded(times: np.ndarray, path: np.ndarray) -> np.ndarray:
    frames = [(t, frame(xy), n) for n, (t, xy) in enumerate(zip(times.tolist(), path, strict=True))]
    smooth = list(smooth_recorded(frames))
    assert [x[0] for x in smooth] == times.tolist()
    assert [x[2] for x in smooth] == list(range(len(times)))
    return np.stack([x[1].pred_keypoints[0, :, :2].numpy() for x in smooth])


def walk(speed: float, fps: float = 30, seconds: float = 5) -> tuple[np.ndarray, np.ndarray]:
    """Times and true places (T, 17, 2) of a person who moves by some heights a second."""
    times = np.arange(round(fps * seconds)) / fps
    return times, BODY + (times * speed * HEIGHT)[:, None, None] * np.array([1, 0])


def trembling(path: np.ndarray, seed: int = 0) -> np.ndarray:
    return path + np.random.default_rng(seed).normal(0, NOISE, path.shape)


def step(path: np.ndarray) -> float:
    """How far keypoints go from frame to frame, root of the mean square, after two seconds."""
    return float(np.sqrt((np.diff(path[60:], axis=0) ** 2).mean()))


@pytest.mark.parametrize(("smooth", "times_less"), [(live, 5), (recorded, 25)])
def test_a_still_person_trembles_at_least_five_times_less(smooth, times_less) -> None:
    times, path = walk(0)
    found = trembling(path)
    assert step(smooth(times, found)) < step(found) / times_less


def test_places_of_a_still_person_are_nearer_to_the_true_ones() -> None:
    times, path = walk(0)
    found = trembling(path)
    error = [
        np.std((x - path)[60:-20]) for x in (found, live(times, found), recorded(times, found))
    ]
    assert error[1] < error[0] / 2
    assert error[2] < error[0] / 4


@pytest.mark.parametrize("speed", [0.8, 2.0])
def test_live_a_person_who_walks_lags_by_less_than_a_frame(speed: float) -> None:
    times, path = walk(speed)
    behind = (path - live(times, trembling(path)))[60:, :, 0].mean() / HEIGHT
    assert 0 < behind * 30 / speed < 1


def test_recorded_nothing_lags_and_lines_stay_lines() -> None:
    times, path = walk(0.8)
    assert recorded(times, path) == pytest.approx(path, abs=1e-6)
    uneven = np.sort(np.random.default_rng(1).choice(times, 60, replace=False))
    path = BODY + (uneven * 300)[:, None, None] * np.array([1, -0.5])
    assert recorded(uneven, path) == pytest.approx(path, abs=1e-6)


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 1000))
def test_recorded_backwards_is_the_same_backwards(seed: int) -> None:
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.uniform(0.02, 0.1, 30))
    path = BODY + rng.normal(0, 20, (30, 17, 2)).cumsum(axis=0)
    there, back = recorded(times, path), recorded(-times[::-1], path[::-1])
    assert back[::-1] == pytest.approx(there, abs=1e-6)


def test_one_euro_by_hand() -> None:
    # Two keypoints 100 pixels apart; after 0.1 s both are 10 pixels to the right: 1 height a
    # second. Gain of the speed 1 / (1 + 1 / (2 pi 1.5 0.1)) = 0.4852, cutoff 0.2 + 8 * 0.4852 =
    # 4.0815 Hz, gain 0.7194.
    places = np.array([[(0.0, 0.0), (0.0, 100.0)], [(10.0, 0.0), (10.0, 100.0)]])
    assert live(np.array([0.0, 0.1]), places)[1] == pytest.approx(
        np.array([(7.194, 0), (7.194, 100)]), abs=1e-3
    )


def test_boxes_follow_scores_stay_and_the_input_is_not_changed() -> None:
    smooth, first, second = OneEuro(), frame(BODY), frame(BODY + 10)
    smooth(first, 0.0)
    poses = smooth(second, 0.03)
    box = poses.pred_boxes.tensor[0].numpy()
    xy = poses.pred_keypoints[0, :, :2].numpy()
    assert box == pytest.approx([*(xy.min(axis=0) - 0.5), *(xy.max(axis=0) + 0.5)])
    assert torch.equal(poses.pred_keypoints[..., 2], second.pred_keypoints[..., 2])
    assert np.array_equal(second.pred_keypoints[0, :, :2].numpy(), BODY + 10)


@pytest.mark.parametrize("smooth", [live, recorded])
def test_keypoints_that_are_not_finite_stay_so_and_disturb_no_others(smooth) -> None:
    times, path = walk(0)
    torn = path.copy()
    torn[0, 0] = torn[10:20, 3] = math.nan
    result = smooth(times, torn)
    assert np.array_equal(np.isnan(result), np.isnan(torn))
    assert result[~np.isnan(torn)] == pytest.approx(path[~np.isnan(torn)], abs=1e-6)


def test_tracks_are_smoothed_by_themselves_and_after_a_second_anew() -> None:
    smooth = OneEuro()
    smooth(frame(BODY, 1), 0.0)
    other = smooth(frame(BODY + 100, 2), 0.03)
    assert other.pred_keypoints[0, :, :2].numpy() == pytest.approx(BODY + 100)
    later = smooth(frame(BODY + 100, 1), 1.1)
    assert later.pred_keypoints[0, :, :2].numpy() == pytest.approx(BODY + 100)
    numbers = [(0.0, frame(BODY, 1), None), (0.03, frame(BODY + 100, 2), None)]
    for _, poses, _ in smooth_recorded(numbers):
        shift = 0 if poses.pred_track_ids.item() == 1 else 100
        assert poses.pred_keypoints[0, :, :2].numpy() == pytest.approx(BODY + shift)


def test_frames_without_persons_pass() -> None:
    empty = frame(BODY)[torch.tensor([False])]
    assert len(OneEuro()(empty, 0.0)) == 0
    assert [len(x[1]) for x in smooth_recorded([(0.0, empty, 1), (0.1, frame(BODY), 2)])] == [0, 1]


def test_recorded_frames_are_held_no_longer_than_the_window() -> None:
    read = []

    def frames():
        for n in range(100):
            read.append(n)
            yield n / 30, frame(BODY), n

    for _, _, n in smooth_recorded(frames()):
        assert len(read) - n <= WINDOW * 30 + 2
