"""Ids of persons over the frames of a video, from their poses alone.

Poses are matched with the tracks' predicted ones by the OKS that is to be expected (below), all of
a frame at once, as SORT (Bewley et al., 2016) does with boxes; poses of a low score go on with the
tracks that are left, as in ByteTrack (Zhang et al., 2022). Time is in seconds, never in frames.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances

from ..modeling.oks import oks_sigmas
from ..modeling.postprocess import inner_boxes
from .smoothing import OneEuro, Payload, smooth_recorded

MAX_GAP = 1.0  # seconds for which a track outlives its person's last pose
LEAST_OKS = 0.2  # with the prediction's uncertainty; below, two poses are of two persons
# Of the Kalman filter, in the size of the person: the square root of its area.
NOISE = 0.08  # deviation of a found pose's place
FIRST_SPEED = 1.0  # deviation of the speed of a new track, sizes a second
ACCELERATION = 1.7  # deviation of the speed after a second, sizes a second


@dataclass
class _Track:
    """A person at the time when it was last seen.

    Attributes:
        number: its id.
        time: seconds.
        pose: (K, 2) pixels, filtered.
        counted: (K,) bool, which keypoints are compared.
        area: square pixels.
        velocity: (2,) pixels a second.
        covariance: (2, 2) of place and velocity, the same in x and in y.
    """

    number: int
    time: float
    pose: np.ndarray
    counted: np.ndarray
    area: float
    velocity: np.ndarray
    covariance: np.ndarray

    def predict(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        """Pose (K, 2) at a later time and covariance: a Kalman filter of constant velocity.

        The pose moves as a whole: how limbs swing cannot be told over a gap.
        """
        t = time - self.time
        step = np.array([[1, t], [0, 1]])
        noise = np.array([[t**3 / 3, t**2 / 2], [t**2 / 2, t]]) * ACCELERATION**2 * self.area
        return self.pose + t * self.velocity, step @ self.covariance @ step.T + noise

    def correct(self, time: float, pose: np.ndarray, counted: np.ndarray, area: float) -> None:
        """Take over a found pose. What is measured is the median way of its keypoints."""
        predicted, covariance = self.predict(time)
        both = self.counted & counted
        way = np.median((pose - predicted)[both], axis=0)
        gain = covariance[:, 0] / (covariance[0, 0] + NOISE**2 * area)
        self.velocity = self.velocity + gain[1] * way
        self.covariance = covariance - np.outer(gain, covariance[0])
        self.pose = pose - (1 - gain[0]) * way
        self.time, self.counted, self.area = time, counted, area


def expected_oks(
    poses: np.ndarray, spread: np.ndarray, found: np.ndarray, areas: np.ndarray, sigmas: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """OKS of predicted and found poses, and what the uncertainty of the prediction makes of it.

    The place of a predicted pose is normally distributed. With s^2 = (2 sigma)^2 area of a
    keypoint, its distance d and the variance p of the prediction, the expectation of
    exp(-d^2 / 2 s^2) is s^2 / (s^2 + p) exp(-d^2 / 2 (s^2 + p)) (ours). Sure tracks so go before
    unsure ones, which could be anywhere; whether a pose fits at all is said without the factor.

    Args:
        poses: (T, K, 2) predicted, pixels; NaN where a keypoint does not count.
        spread: (T,) variances p of their places in x and in y, square pixels.
        found: (N, K, 2) pixels; NaN where a keypoint does not count.
        areas: (T, N) square pixels.
        sigmas: (K,) of OKS.

    Returns:
        (T, N) expectations and (T, N) fits, both in [0, 1] and 0 where no keypoint is in both.
    """
    squares = ((poses[:, None] - found) ** 2).sum(axis=3)
    own = (2 * sigmas) ** 2 * areas[..., None]
    variance = own + spread[:, None, None]
    similarity = np.exp(-squares / (2 * variance))
    both = np.isfinite(squares)
    number = np.maximum(both.sum(axis=2), 1)
    fits = np.where(both, similarity, 0)
    return (fits * own / variance).sum(axis=2) / number, fits.sum(axis=2) / number


class PoseTracker:
    """Gives the poses of a video's frames ids: ``pred_track_ids``."""

    def __init__(
        self, sigmas: Sequence[float], *, start_score: float = 0.0, max_gap: float = MAX_GAP
    ) -> None:
        """Begin without persons; a tracker is for one video.

        Args:
            sigmas: (K,) of OKS, :func:`inspose_d2.modeling.oks.oks_sigmas`.
            start_score: poses of a lower score only go on with a track that there is.
            max_gap: seconds for which an id outlives its person's last pose.

        Raises:
            ValueError: a sigma or the gap is not above 0.
        """
        self.sigmas = np.array(sigmas, dtype=np.float64)
        if self.sigmas.ndim != 1 or not (self.sigmas > 0).all():
            raise ValueError(f"sigmas must be numbers above 0, one a keypoint, got {sigmas}")
        if not max_gap > 0:
            raise ValueError(f"max_gap must be above 0 seconds, got {max_gap}")
        self.start_score, self.max_gap = start_score, max_gap
        self.tracks: list[_Track] = []
        self.time = -math.inf
        self.num_tracks = 0

    def update(self, poses: Instances, time: float) -> Instances:
        """Give the poses of the next frame their ids.

        Args:
            poses: N poses with pred_keypoints (N, K, 3), x, y in pixels and a score, and scores
                (N,); not changed. A keypoint counts that is finite and has a tenth of the score
                of its pose's best one, at least.
            time: of the frame, in seconds, after that of the frame before.

        Returns:
            Those with an id, on the CPU, in their order, and pred_track_ids (M,) int64, from 1
            on. Left out are poses below ``start_score`` that go on with no track.

        Raises:
            ValueError: the time is not after the last, or the poses have no K keypoints.
        """
        if not self.time < time < math.inf:
            raise ValueError(f"time {time} s: must be finite and after the last, {self.time} s")
        poses = poses.to("cpu")
        keypoints = poses.pred_keypoints.detach().double().numpy()
        if keypoints.shape[1:] != (len(self.sigmas), 3):
            raise ValueError(
                f"pred_keypoints: expected (N, {len(self.sigmas)}, 3), got {keypoints.shape}"
            )
        self.time = time
        self.tracks = [x for x in self.tracks if time - x.time <= self.max_gap + 1e-6]
        xy, counted, areas = _measured(keypoints)
        ids = np.zeros(len(xy), dtype=np.int64)
        strong = poses.scores.detach().numpy() >= self.start_score
        for stage in (strong, ~strong):
            for track, n in self._matches(xy, counted, areas, stage.nonzero()[0]):
                track.correct(time, xy[n], counted[n], areas[n])
                ids[n] = track.number
        for n in np.flatnonzero(strong & (ids == 0)).tolist():
            self.num_tracks += 1
            ids[n] = self.num_tracks
            covariance = np.diag([NOISE**2, FIRST_SPEED**2]) * areas[n]
            self.tracks.append(
                _Track(self.num_tracks, time, xy[n], counted[n], areas[n], np.zeros(2), covariance)
            )
        tracked = poses[torch.from_numpy(ids > 0)]
        tracked.pred_track_ids = torch.from_numpy(ids[ids > 0])
        return tracked

    def _matches(
        self, xy: np.ndarray, counted: np.ndarray, areas: np.ndarray, numbers: np.ndarray
    ) -> list[tuple[_Track, int]]:
        """Tracks not seen in this frame, each with the pose, one of some numbers, that fits."""
        tracks = [x for x in self.tracks if x.time < self.time]
        if not tracks or not len(numbers):
            return []
        predicted = [x.predict(self.time) for x in tracks]
        expected, fits = expected_oks(
            np.stack(
                [
                    np.where(x.counted[:, None], pose, np.nan)
                    for x, (pose, _) in zip(tracks, predicted, strict=True)
                ]
            ),
            np.array(
                [
                    covariance[0, 0] + NOISE**2 * x.area
                    for x, (_, covariance) in zip(tracks, predicted, strict=True)
                ]
            ),
            np.where(counted[..., None], xy, np.nan)[numbers],
            np.sqrt(np.outer([x.area for x in tracks], areas[numbers])),
            self.sigmas,
        )
        from scipy.optimize import linear_sum_assignment  # a tenth of the start of every program

        expected[fits < LEAST_OKS] = 0
        pairs = zip(*linear_sum_assignment(expected, maximize=True), strict=True)
        return [(tracks[t], numbers[n]) for t, n in pairs if expected[t, n] > 0]


def _measured(keypoints: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places (N, K, 2), which of them count (N, K), and areas (N,) of poses (N, K, 3).

    The area is that of the inner keypoints' box, whose shorter side is taken as a quarter of the
    longer one where it is less: of a person seen from the side (ours).
    """
    finite = np.isfinite(keypoints).all(axis=2)
    score = np.where(finite, keypoints[..., 2], 0)
    counted = finite & (score >= 0.1 * score.max(axis=1, keepdims=True))
    areas = np.ones(len(keypoints))
    for n in counted.any(axis=1).nonzero()[0]:
        low, high = inner_boxes(torch.from_numpy(keypoints[n : n + 1, counted[n], :2]))
        sides = (high - low)[0].numpy()
        areas[n] = max(sides.prod(), sides.max() ** 2 / 4, 1)
    return keypoints[..., :2], counted, areas


def track_frames(
    frames: Iterable[tuple[float, Instances, Payload]],
    sigmas: Sequence[float],
    *,
    start_score: float = 0.0,
    smooth: bool = False,
    live: bool = False,
) -> Iterator[tuple[float, Instances, Payload]]:
    """Give the poses of one video ids, and smooth them if asked for.

    Args:
        frames: time in seconds, rising; poses; and anything that goes with them.
        sigmas: (K,) of OKS.
        start_score: see :class:`PoseTracker`.
        smooth: whether to smooth, with :func:`smooth_recorded`.
        live: whether to smooth with :class:`OneEuro` instead, which holds no frame back.

    Returns:
        The same, in order, with tracked poses.
    """
    tracker, one_euro = PoseTracker(sigmas, start_score=start_score), OneEuro()
    tracked = ((t, tracker.update(poses, t), payload) for t, poses, payload in frames)
    if smooth and live:
        return ((t, one_euro(poses, t), payload) for t, poses, payload in tracked)
    return smooth_recorded(tracked) if smooth else tracked


class InsPoseTracker:
    """A predictor for the frames of one video: poses with ids that stay, smoothed if asked for.

    ``for frame in frames: poses = tracker(frame)["instances"]`` gives them ``pred_track_ids``.
    """

    def __init__(
        self,
        predictor: Callable[..., Any],
        *,
        fps: float = 30.0,
        start_score: float = 0.0,
        max_gap: float = MAX_GAP,
        smooth: bool = False,
    ) -> None:
        """Begin without persons.

        Args:
            predictor: an ``InsPosePredictor``; its config gives the sigmas.
            fps: frames a second, of frames that come without a time.
            start_score: see :class:`PoseTracker`.
            max_gap: the same.
            smooth: whether to smooth with :class:`OneEuro`.

        Raises:
            ValueError: a number is not above 0.
        """
        if not 0 < fps < math.inf:
            raise ValueError(f"fps must be finite and above 0, got {fps}")
        self.predictor, self.fps = predictor, fps
        sigmas = oks_sigmas(predictor.cfg)  # type: ignore[attr-defined]
        self.tracker = PoseTracker(sigmas, start_score=start_score, max_gap=max_gap)
        self.smooth = OneEuro() if smooth else None

    def __call__(self, frame: Any, time: float | None = None) -> dict[str, Instances]:
        """Find the persons of the next frame.

        Args:
            frame: an image, see ``InsPosePredictor``.
            time: seconds; by default 1 / fps after the frame before.

        Returns:
            {"instances": as ``InsPosePredictor`` gives them, on the CPU, and pred_track_ids}.

        Raises:
            ValueError: the time is not after the last; also as ``InsPosePredictor``.
        """
        if time is None:
            time = max(self.tracker.time + 1 / self.fps, 0.0)
        poses = self.tracker.update(self.predictor(frame)["instances"], time)
        return {"instances": self.smooth(poses, time) if self.smooth else poses}
