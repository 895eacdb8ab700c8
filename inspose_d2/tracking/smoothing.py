"""Keypoints of tracked persons over time, smoothed: live, or with a look ahead.

Speeds are in heights of the person (the longer side of its box) a second, so that the same numbers
hold for all sizes, resolutions and frame rates.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from ..modeling.postprocess import boxes_of_poses

MIN_CUTOFF = 0.2  # Hz, of a keypoint that stands still
BETA = 8.0  # Hz more for each height a second
SPEED_CUTOFF = 1.5  # Hz, of the speed
FORGET = 1.0  # seconds after which a person who was not seen begins anew
WINDOW = 2 / 3  # seconds that recorded poses look back and ahead
SLOPE, ABOUT = 0.1, 0.3  # seconds to either side over which speeds are measured, and averaged

Payload = TypeVar("Payload")


class OneEuro:
    """The 1 Euro filter (Casiez et al., CHI 2012) of each track and keypoint, for live video.

    A keypoint that moves is smoothed less, so that it does not lag: the cutoff of its low pass is
    ``MIN_CUTOFF + BETA * speed``. The speed is that in the plane, of x and y together (ours).
    """

    def __init__(self) -> None:
        """Begin without persons."""
        self.states: dict[int, tuple[float, np.ndarray, np.ndarray]] = {}  # time, place, speed

    def __call__(self, poses: Instances, time: float) -> Instances:
        """Smooth the poses of the next frame.

        Args:
            poses: N tracked poses with pred_keypoints (N, K, 3), pred_boxes and pred_track_ids;
                not changed. Keypoints that are not finite stay so and disturb no later ones.
            time: of the frame, in seconds, after that of the frame before.

        Returns:
            The same with other pred_keypoints, whose scores stay, and pred_boxes around these.
        """
        self.states = {k: x for k, x in self.states.items() if time - x[0] <= FORGET}
        keypoints = poses.pred_keypoints.double().numpy().copy()
        for pose, number in zip(keypoints, poses.pred_track_ids.tolist(), strict=True):
            pose[:, :2] = self._next(pose[:, :2], number, time)
        return _with(poses, keypoints)

    def _next(self, xy: np.ndarray, number: int, time: float) -> np.ndarray:
        """Smooth the places (K, 2) of a track's next pose."""
        before, place, speed = self.states.get(number, (time - 1.0, xy, np.zeros_like(xy)))
        step = time - before
        known = np.isfinite(place)
        measured = np.where(known & np.isfinite(xy), (xy - place) / step / _height(xy), 0)
        speed = speed + _gain(SPEED_CUTOFF, step) * (measured - speed)
        cutoff = MIN_CUTOFF + BETA * np.hypot(speed[:, :1], speed[:, 1:])
        smooth = np.where(known, place + _gain(cutoff, step) * (xy - place), xy)
        self.states[number] = time, np.where(np.isfinite(smooth), smooth, place), speed
        return smooth


def smooth_recorded(
    frames: Iterable[tuple[float, Instances, Payload]],
) -> Iterator[tuple[float, Instances, Payload]]:
    """Smooth the poses of a recorded video without any lag (ours).

    A keypoint becomes what a line through its places in the time around says, each weighted by its
    score and by exp(-2 pi cutoff |t|), which is a low pass of that cutoff run forwards and
    backwards; the cutoff is that of :class:`OneEuro`. A video that runs backwards gives the same.

    Args:
        frames: time in seconds, rising; tracked poses as for :class:`OneEuro`; and anything that
            goes with them, such as the picture. ``WINDOW`` seconds of these are held.

    Yields:
        The same, in order, with smoothed poses.
    """
    past, coming = deque[tuple[float, Instances]](), deque[tuple[float, Instances, Payload]]()

    def first() -> tuple[float, Instances, Payload]:
        time, poses, payload = coming.popleft()
        while past and past[0][0] < time - WINDOW - 1e-6:
            past.popleft()
        past.append((time, poses))
        around = [*past, *(x[:2] for x in coming if x[0] <= time + WINDOW + 1e-6)]
        return time, _smooth_among(poses, time, around), payload

    for frame in frames:
        coming.append(frame)
        while coming[0][0] < frame[0] - WINDOW:
            yield first()
    while coming:
        yield first()


def _smooth_among(
    poses: Instances, time: float, around: list[tuple[float, Instances]]
) -> Instances:
    """Smooth the poses of a frame by those of the frames around it, its own among them."""
    series: dict[int, tuple[list[float], list[np.ndarray]]] = {}
    for t, others in around:
        for number, pose in zip(
            others.pred_track_ids.tolist(), others.pred_keypoints.double().numpy(), strict=True
        ):
            times, places = series.setdefault(number, ([], []))
            times.append(t - time)
            places.append(pose)
    keypoints = poses.pred_keypoints.double().numpy().copy()
    for pose, number in zip(keypoints, poses.pred_track_ids.tolist(), strict=True):
        times, places = series[number]
        pose[:, :2] = np.where(
            np.isfinite(pose[:, :2]), _line(np.array(times), np.stack(places)), pose[:, :2]
        )
    return _with(poses, keypoints)


def _line(times: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """Places (K, 2) at time 0 of poses (T, K, 3) at times (T,), -WINDOW to WINDOW."""
    finite = np.isfinite(poses).all(axis=2)
    xy, score = np.where(finite[..., None], poses[..., :2], 0), np.where(finite, poses[..., 2], 0)
    score = score + 1e-9 * finite  # a pose whose scores are all 0 is one too
    # Speed around each time: the slope of the line through what is near.
    apart = times - times[:, None]
    _, slope = _fit(apart, (np.abs(apart) <= SLOPE + 1e-6)[..., None] * score, xy)
    near = (np.abs(times) <= ABOUT + 1e-6)[:, None] * score
    height = np.median([_height(x) for x in poses[..., :2]])
    square = (near * (slope**2).sum(axis=2)).sum(axis=0) / np.maximum(near.sum(axis=0), 1e-12)
    cutoff = MIN_CUTOFF + BETA * np.sqrt(square) / height
    weights = score * np.exp(-2 * np.pi * cutoff * np.abs(times)[:, None])
    return _fit(times[None], weights[None], xy)[0][0]


def _fit(times: np.ndarray, weights: np.ndarray, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lines through points by weighted least squares.

    Args:
        times: (M, T).
        weights: (M, T, K).
        xy: (T, K, 2).

    Returns:
        (M, K, 2) at time 0 and slopes (M, K, 2); the mean and 0 where all is at one time.
    """
    total = np.maximum(weights.sum(axis=1), 1e-12)[..., None]
    time = np.einsum("mt,mtk->mk", times, weights)[..., None] / total
    place = np.einsum("mtk,tkc->mkc", weights, xy) / total
    square = np.einsum("mt,mtk->mk", times**2, weights)[..., None] / total - time**2
    both = np.einsum("mt,mtk,tkc->mkc", times, weights, xy) / total - time * place
    slope = np.where(square > 1e-9, both / np.maximum(square, 1e-9), 0)
    return place - slope * time, slope


def _gain(cutoff: float | np.ndarray, step: float) -> float | np.ndarray:
    """Gain of a low pass of a cutoff in Hz after a step in seconds (the paper's alpha)."""
    return 1 / (1 + 1 / (2 * np.pi * cutoff * step))


def _height(xy: np.ndarray) -> float:
    """Longer side of the box around places (K, 2), pixels, at least 1."""
    finite = xy[np.isfinite(xy).all(axis=1)]
    return max(float(np.ptp(finite, axis=0).max()), 1.0) if len(finite) else 1.0


def _with(poses: Instances, keypoints: np.ndarray) -> Instances:
    """Copy of poses with other keypoints (N, K, 3) and boxes around them."""
    smooth = Instances(poses.image_size, **poses.get_fields())
    smooth.pred_keypoints = torch.from_numpy(keypoints).to(poses.pred_keypoints.dtype)
    smooth.pred_boxes = Boxes(boxes_of_poses(smooth.pred_keypoints))
    return smooth
