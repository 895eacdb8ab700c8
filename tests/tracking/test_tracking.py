"""Ids over the frames of a video, by scenes whose ids are known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from inspose_d2 import InsPoseTracker, get_cfg
from inspose_d2.modeling.oks import COCO_SIGMAS, object_keypoint_similarity
from inspose_d2.tracking import PoseTracker
from inspose_d2.tracking.tracker import expected_oks

SIGMAS = list(COCO_SIGMAS.values())
# A standing person of height 1 around (0, 0): x and y of the 17 keypoints.
BODY = np.array(
    [
        *((0, -0.5), (0.03, -0.52), (-0.03, -0.52), (0.06, -0.5), (-0.06, -0.5)),
        *((0.12, -0.35), (-0.12, -0.35), (0.18, -0.15), (-0.18, -0.15), (0.2, 0), (-0.2, 0)),
        *((0.08, 0), (-0.08, 0), (0.08, 0.25), (-0.08, 0.25), (0.08, 0.48), (-0.08, 0.48)),
    ]
)


def person(x: float, y: float = 300.0, height: float = 200.0) -> np.ndarray:
    return np.concatenate([BODY * height + [x, y], np.full((17, 1), 0.6)], axis=1)


def poses_of(*persons: np.ndarray, scores: list[float] | None = None) -> Instances:
    keypoints = torch.tensor(np.array(persons)) if persons else torch.zeros(0, 17, 3)
    return Instances(
        (600, 1000),
        pred_keypoints=keypoints.float(),
        pred_boxes=Boxes(torch.zeros(len(persons), 4)),
        scores=torch.tensor(scores or [0.9] * len(persons)),
        pred_classes=torch.zeros(len(persons), dtype=torch.int64),
    )


def ids(tracker: PoseTracker, time: float, *persons: np.ndarray, **kw: list[float]) -> list[int]:
    return tracker.update(poses_of(*persons, **kw), time).pred_track_ids.tolist()


def test_ids_begin_at_one_and_stay_whatever_the_order_of_the_poses() -> None:
    tracker = PoseTracker(SIGMAS)
    assert ids(tracker, 0.0, person(100), person(400)) == [1, 2]
    assert ids(tracker, 0.1, person(410), person(110), person(800)) == [2, 1, 3]
    assert ids(PoseTracker(SIGMAS), 0.0, person(400)) == [1]  # another video


def test_people_who_cross_keep_their_ids() -> None:
    tracker = PoseTracker(SIGMAS)
    for frame in range(61):
        t = frame / 30
        right, left = person(200 + 150 * t), person(500 - 150 * t, 310)
        hidden = abs((200 + 150 * t) - (500 - 150 * t)) < 40  # the right one, behind the other
        found = [left] if hidden else [right, left]
        assert ids(tracker, t, *found) == ([2] if hidden else [1, 2])


@pytest.mark.parametrize(("gap", "same"), [(0.3, True), (0.9, True), (1.1, False)])
def test_an_id_survives_a_gap_of_less_than_a_second_on_the_way_of_the_person(
    gap: float, same: bool
) -> None:
    tracker = PoseTracker(SIGMAS)
    for frame in range(15):
        ids(tracker, frame / 15, person(100 + 10 * frame))
    t = 14 / 15 + gap
    ids(tracker, t - gap / 2)  # a frame without persons
    assert ids(tracker, t, person(100 + 150 * t)) == ([1] if same else [2])


def test_time_is_in_seconds_whatever_the_rate_of_the_frames() -> None:
    times = np.cumsum([0.03, 0.2, 0.01, 0.4, 0.03, 0.3, 0.02])
    tracker = PoseTracker(SIGMAS)
    assert [ids(tracker, t, person(100 + 120 * t)) for t in times.tolist()] == [[1]] * 7


def test_a_cut_gives_new_ids() -> None:
    tracker = PoseTracker(SIGMAS)
    for frame in range(10):
        assert ids(tracker, frame / 30, person(200), person(600)) == [1, 2]
    assert ids(tracker, 10 / 30, person(400), person(800)) == [3, 4]


def test_a_person_of_another_size_at_the_same_place_is_another() -> None:
    tracker = PoseTracker(SIGMAS)
    ids(tracker, 0.0, person(300))
    assert ids(tracker, 1 / 30, person(300, height=60)) == [2]


def test_low_scores_go_on_with_a_track_but_start_none() -> None:
    tracker = PoseTracker(SIGMAS, start_score=0.5)
    assert ids(tracker, 0.0, person(300), person(700), scores=[0.9, 0.3]) == [1]
    assert ids(tracker, 0.1, person(302), person(700), scores=[0.3, 0.3]) == [1]
    # Two poses of one person: that of the high score goes on.
    poses = poses_of(person(304), person(306), scores=[0.3, 0.9])
    assert tracker.update(poses, 0.2).scores.tolist() == pytest.approx([0.9])


def test_keypoints_that_are_not_finite_or_sure_do_not_count() -> None:
    tracker = PoseTracker(SIGMAS)
    ids(tracker, 0.0, person(300))
    torn = person(302)
    torn[:4, 0] = math.nan
    torn[4:8] = 0, 0, 0.001
    assert ids(tracker, 0.1, torn) == [1]
    assert ids(tracker, 0.2, person(304)) == [1]
    nothing = np.full((17, 3), math.nan)
    assert ids(tracker, 0.3, nothing, person(306)) == [2, 1]
    assert ids(tracker, 0.4, nothing, person(308)) == [3, 1]


def test_other_keypoints_with_their_own_sigmas() -> None:
    fish = np.array([(0, 0, 0.5), (50, 0, 0.5), (60, 20, 0.5), (60, -20, 0.5)])
    bent = fish + np.array([(0, 20, 0), (0, -20, 0), (0, 20, 0), (0, -20, 0)])
    for sigma, same in ((0.3, True), (0.01, False)):
        tracker = PoseTracker([sigma] * 4)
        assert ids(tracker, 0.0, fish) == [1]
        assert ids(tracker, 0.01, bent) == ([1] if same else [2])
    with pytest.raises(ValueError, match=r"expected \(N, 4, 3\), got \(1, 17, 3\)"):
        tracker.update(poses_of(person(1)), 0.1)


def test_without_uncertainty_it_is_oks() -> None:
    rng = np.random.default_rng(0)
    poses, found = rng.uniform(0, 100, (2, 17, 2)), rng.uniform(0, 100, (3, 17, 2))
    found[0] = poses[0] + rng.normal(0, 3, (17, 2))
    found[1, 5:] = np.nan
    areas = rng.uniform(2000, 9000, (2, 3))
    expected, fits = expected_oks(poses, np.zeros(2), found, areas, np.array(SIGMAS))
    assert np.array_equal(expected, fits)
    for t in range(2):
        targets = np.concatenate([found, np.isfinite(found[..., :1])], axis=2)
        oks = object_keypoint_similarity(
            torch.from_numpy(poses[t]).expand(3, -1, -1),
            torch.from_numpy(np.nan_to_num(targets)),
            torch.from_numpy(areas[t]),
            torch.tensor(SIGMAS),
        )
        assert expected[t] == pytest.approx(oks.numpy(), abs=1e-7)


def test_with_uncertainty_it_is_the_mean_oks_of_the_places_that_may_be() -> None:
    rng = np.random.default_rng(0)
    pose, found = person(0)[None, :, :2], person(12)[None, :, :2]
    area, spread = np.array([[9000.0]]), 15.0**2
    expected, fits = expected_oks(pose, np.array([spread]), found, area, np.array(SIGMAS))
    places = pose + rng.normal(0, spread**0.5, (100_000, 1, 2))
    each, _ = expected_oks(places, np.zeros(100_000), found, area, np.array(SIGMAS))
    assert expected[0, 0] == pytest.approx(each.mean(), abs=0.005)
    assert fits[0, 0] > expected[0, 0] + 0.1


def test_velocity_is_learned() -> None:
    tracker = PoseTracker(SIGMAS)
    for frame in range(31):
        ids(tracker, frame / 30, person(100 + 3 * frame))
    (track,) = tracker.tracks
    assert track.velocity == pytest.approx([90, 0], abs=5)  # pixels a second
    pose, _ = track.predict(1.5)
    assert pose == pytest.approx(person(100 + 135)[:, :2], abs=3)


def test_what_cannot_be_is_refused_by_name() -> None:
    tracker = PoseTracker(SIGMAS)
    ids(tracker, 1.0, person(1))
    for time in (1.0, 0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be finite and after the last"):
            tracker.update(poses_of(), time)
    with pytest.raises(ValueError, match="sigmas must be numbers above 0"):
        PoseTracker([0.1, 0])
    with pytest.raises(ValueError, match="max_gap must be above 0"):
        PoseTracker(SIGMAS, max_gap=math.nan)
    with pytest.raises(ValueError, match="fps must be finite"):
        InsPoseTracker(SimpleNamespace(cfg=get_cfg("InsPose_R50_3x")), fps=0)


class Predictor:
    """Two people who walk, one of whom trembles."""

    cfg = get_cfg("InsPose_R50_3x")
    calls = 0

    def __call__(self, _: object) -> dict[str, Instances]:
        self.calls += 1
        return {"instances": poses_of(person(100 + self.calls), person(500 + 6 * (self.calls % 2)))}


def test_tracker_of_a_predictor() -> None:
    tracker = InsPoseTracker(Predictor(), fps=10)
    for time in (None, None, 7.0, None):
        poses = tracker(None, time)["instances"]
    assert tracker.tracker.time == pytest.approx(7.1)
    assert poses.pred_track_ids.tolist() == [3, 4]  # the clock went on by more than a second
    smooth = InsPoseTracker(Predictor(), smooth=True)
    x = [smooth(None)["instances"].pred_keypoints[1, 0, 0].item() for _ in range(60)]
    assert np.abs(np.diff(x[30:])).max() < 6 / 5
