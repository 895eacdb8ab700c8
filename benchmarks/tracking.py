#!/usr/bin/env python
"""Track synthetic people whose ids are known, with our tracker and, where installed, with others.

python -m benchmarks.tracking            poses are the true ones, with a detector's errors
python -m benchmarks.tracking --model    poses of the small model, found in the pictures

Counted with TrackEval (pip install trackeval), similarity OKS, threshold 0.5. The others are
norfair, given the keypoints, and ByteTrack and OC-SORT of the package trackers, given the boxes.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from benchmarks.synthetic_video import SIZE, Video, picture, videos
from inspose_d2.cli import told
from inspose_d2.data import synthetic as people
from inspose_d2.modeling.oks import COCO_SIGMAS, object_keypoint_similarity
from inspose_d2.modeling.postprocess import boxes_of_poses
from inspose_d2.tracking import PoseTracker

SIGMAS = np.array(list(COCO_SIGMAS.values()))
START, LEAST = 0.4, 0.2  # scores that start a track, and of what detectors find
MIN_SEEN = people.MIN_VISIBLE_KEYPOINTS  # of a person whose pose is asked for


@dataclass(frozen=True)
class Frame:
    """A frame: its time in seconds, true ids and poses (N, 17, 3: x, y, v), and found poses."""

    time: float
    ids: np.ndarray
    truth: np.ndarray
    found: Instances


Finder = Callable[[people.Scene, np.ndarray, np.ndarray], Instances]
# Time and poses of a frame to (numbers of poses, their ids).
Tracker = Callable[[float, Instances], tuple[np.ndarray, np.ndarray]]


def frames_of(video: Video, find: Finder) -> Iterator[Frame]:
    """Give the frames of a video. Asked for are persons of whom six keypoints are seen."""
    for time, numbers, scene in video:
        flags = people.visibility(scene, people.paint_labels(scene))
        xy = np.array([x.keypoints for x in scene.figures]).reshape(-1, 17, 2) + 0.5
        seen = (flags == 2).sum(axis=1)
        asked = seen >= MIN_SEEN
        truth = np.concatenate([xy, flags[..., None]], axis=2)[asked]
        yield Frame(time, np.array(numbers, int)[asked], truth, find(scene, xy, flags))


def made_up(seed: int) -> Finder:
    """A detector's errors on true poses.

    Keypoints lie off by half of OKS's deviation, those not seen by one and a half; of persons half
    hidden every second is missed, of others every twentieth; scores fall with what is hidden; a
    twentieth of the frames has a pose where nobody is.
    """
    rng = np.random.default_rng(seed)

    def find(_: people.Scene, xy: np.ndarray, flags: np.ndarray) -> Instances:
        seen = (flags == 2).mean(axis=1)
        found = (flags == 2).sum(axis=1) >= MIN_SEEN // 2
        found &= rng.random(len(xy)) < np.clip(2 * seen, 0, 0.95)
        xy, flags, seen = xy[found], flags[found], seen[found]
        score = np.clip(0.3 + 0.6 * seen + rng.normal(0, 0.1, len(xy)), 0, 1)
        if rng.random() < 0.05:
            ghost = rng.uniform((0, 0), (60, 150), (1, 17, 2)) + rng.uniform((0, 0), SIZE[::-1])
            xy, flags = np.concatenate([xy, ghost]), np.concatenate([flags, np.ones((1, 17))])
            score = np.append(score, rng.uniform(LEAST, 0.6))
        width = SIGMAS * np.sqrt(areas_of(xy))[:, None] * np.where(flags == 2, 1, 3)
        xy = xy + rng.normal(size=xy.shape) * width[..., None]
        points = np.concatenate([xy, np.where(flags == 2, 0.7, 0.3)[..., None]], axis=2)
        keep = score >= LEAST
        return poses_of(points[keep], score[keep])

    return find


def with_model() -> Finder:
    """The small model for synthetic people, of the package."""
    from inspose_d2 import InsPosePredictor

    predictor = InsPosePredictor(
        "quick/synthetic_people_tiny",
        weights="synthetic_people_tiny",
        device="cpu",
        score_threshold=LEAST,
    )
    return lambda scene, *_: predictor(picture(scene))["instances"]


def areas_of(xy: np.ndarray) -> np.ndarray:
    """Areas (N,) of true poses: of the box, at least a quarter of its longer side's square."""
    sides = np.ptp(xy[..., :2], axis=1)
    return np.maximum(sides.prod(axis=1), sides.max(axis=1) ** 2 / 4)


def poses_of(keypoints: np.ndarray, scores: np.ndarray) -> Instances:
    """Instances of poses (N, 17, 3)."""
    points = torch.from_numpy(keypoints).float()
    boxes = boxes_of_poses(points) if len(points) else torch.zeros(0, 4)
    return Instances(
        SIZE,
        pred_keypoints=points,
        scores=torch.from_numpy(scores).float(),
        pred_boxes=Boxes(boxes),
    )


def ours(start: float = START) -> Tracker:
    """Our tracker, which may take low scores to go on with a track."""
    tracker = PoseTracker(SIGMAS.tolist(), start_score=START)

    def track(time: float, poses: Instances) -> tuple[np.ndarray, np.ndarray]:
        poses = Instances(poses.image_size, **poses.get_fields())
        poses.places = torch.arange(len(poses))
        tracked = tracker.update(poses[poses.scores >= start], time)
        return tracked.places.numpy(), tracked.pred_track_ids.numpy()

    return track


def norfair(fps: float) -> Tracker:
    """Norfair's tracker, with its distance for keypoints as its examples have it."""
    from norfair import Detection, Tracker
    from norfair.distances import create_keypoints_voting_distance

    distance = create_keypoints_voting_distance(
        keypoint_distance_threshold=30, detection_threshold=0.1
    )
    tracker = Tracker(
        distance,
        distance_threshold=0.8,
        hit_counter_max=round(fps),
        initialization_delay=0,
        detection_threshold=0.1,
        pointwise_hit_counter_max=4,
    )

    def track(_: float, poses: Instances) -> tuple[np.ndarray, np.ndarray]:
        keypoints = poses.pred_keypoints.numpy()
        detections = [
            Detection(x[:, :2], scores=x[:, 2], data=n)
            for n, x in enumerate(keypoints)
            if poses.scores[n] >= START
        ]
        tracker.update(detections)
        matched = {
            x.last_detection.data: x.id
            for x in tracker.tracked_objects
            if x.id is not None and any(x.last_detection is y for y in detections)
        }
        return np.array(list(matched), int), np.array(list(matched.values()), int)

    return track


def of_boxes(name: str, fps: float) -> Tracker:
    """A tracker of the package trackers."""
    import supervision
    import trackers

    if name == "ByteTrack":
        tracker = trackers.ByteTrackTracker(
            frame_rate=fps,
            track_activation_threshold=START,
            high_conf_det_threshold=START,
            minimum_consecutive_frames=1,
        )
    else:
        tracker = trackers.OCSORTTracker(
            frame_rate=fps, high_conf_det_threshold=START, minimum_consecutive_frames=1
        )

    def track(_: float, poses: Instances) -> tuple[np.ndarray, np.ndarray]:
        found = tracker.update(
            supervision.Detections(
                xyxy=poses.pred_boxes.tensor.numpy(),
                confidence=poses.scores.numpy(),
                data={"places": np.arange(len(poses))},
            )
        )
        ids = found.tracker_id if found.tracker_id is not None else np.zeros(0, int)
        places = np.asarray(found.data.get("places", np.zeros(0)), int)
        return places[ids >= 0], ids[ids >= 0]

    return track


def trackers_for(fps: float) -> dict[str, Tracker]:
    """All trackers that are installed, new."""
    found = {"InsPoseTracker": ours(LEAST), "the same, high scores alone": ours()}
    with suppress(ImportError):
        found["norfair, keypoints"] = norfair(fps)
    for name in ("ByteTrack", "OC-SORT"):
        with suppress(ImportError):
            found[f"{name}, boxes"] = of_boxes(name, fps)
    return found


def similarities(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """OKS (N, M) of true and found poses, over the keypoints inside the picture."""
    if not len(truth) or not len(found):
        return np.zeros((len(truth), len(found)))
    targets = torch.from_numpy(truth).repeat_interleave(len(found), 0)
    poses = torch.from_numpy(found).double().repeat(len(truth), 1, 1)
    sigmas = torch.from_numpy(SIGMAS)
    areas = torch.from_numpy(areas_of(truth)).repeat_interleave(len(found))
    return object_keypoint_similarity(poses, targets, areas, sigmas).numpy().reshape(len(truth), -1)


def count(frames: list[Frame], tracker: Tracker) -> dict[str, float]:
    """Track a video; returns TrackEval's counts."""
    from trackeval.metrics import CLEAR, Identity

    true_ids, track_ids, similar = [], [], []
    for frame in frames:
        places, ids = tracker(frame.time, frame.found)
        true_ids.append(frame.ids)
        track_ids.append(ids)
        similar.append(similarities(frame.truth, frame.found.pred_keypoints.numpy()[places]))
    data: dict[str, Any] = {"num_timesteps": len(frames), "similarity_scores": similar}
    for name, values in (("gt", true_ids), ("tracker", track_ids)):
        known, dense = np.unique(np.concatenate(values), return_inverse=True)
        data[f"{name}_ids"] = np.split(dense, np.cumsum([len(x) for x in values])[:-1])
        data[f"num_{name}_ids"], data[f"num_{name}_dets"] = len(known), len(dense)
    with redirect_stdout(StringIO()):
        return CLEAR().eval_sequence(data) | Identity().eval_sequence(data)


def total(results: list[dict[str, float]]) -> str:
    """Cells of several videos together: id switches, MOTA, IDF1."""
    sums = {k: sum(x[k] for x in results) for k in results[0]}
    mota = (sums["CLR_TP"] - sums["CLR_FP"] - sums["IDSW"]) / (sums["CLR_TP"] + sums["CLR_FN"])
    idf1 = sums["IDTP"] / (sums["IDTP"] + 0.5 * (sums["IDFP"] + sums["IDFN"]))
    return f"{sums['IDSW']:.0f} / {100 * mota:.1f} / {100 * idf1:.1f}"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="store_true", help="find poses in the pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the videos")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each video (8)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    find = with_model() if args.model else None
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for seed in args.seeds:
        for name, video in videos(seed, seconds=args.seconds).items():
            frames = list(frames_of(video, find or made_up(seed)))
            fps = 1 / float(np.diff(video.times).mean())
            for tracker, track in trackers_for(fps).items():
                cells = results.setdefault(name, {}).setdefault(tracker, [])
                cells.append(count(frames, track))
    names = list(next(iter(results.values())))
    print(f"| id switches / MOTA / IDF1 | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for name, row in results.items():
        print(f"| {name} | {' | '.join(total(row[x]) for x in names)} |")
    everything = [total([x for row in results.values() for x in row[n]]) for n in names]
    print(f"| all | {' | '.join(everything)} |")


if __name__ == "__main__":
    sys.exit(told("benchmark_tracking.py", main))
