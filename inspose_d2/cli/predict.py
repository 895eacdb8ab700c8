"""``inspose predict``: the poses in images, a video or a webcam's frames, drawn and as JSON."""

import argparse
import contextlib
import errno
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from detectron2.utils import comm
from tqdm import tqdm

from ..config import get_cfg
from ..config.check import check_model
from ..data import video
from ..data.images import ImageError, read_image
from ..data.threads import ReadAhead, WriteBehind
from ..data.video import WEBCAM, Frame, VideoSource
from ..engine.launch import under_torchrun
from ..engine.predictor import InsPosePredictor
from ..evaluation.results import PERSON, ResultsFile, to_coco
from ..model_zoo import config_of, find_weights, score_threshold_of
from ..modeling.keypoint_maps import keypoint_maps_of
from ..modeling.oks import oks_sigmas
from ..tracking import track_frames
from ..visualization.poses import draw_keypoint_maps, draw_poses
from ..workers import undisturbed
from .pictures import Job, find_images, folder_of, make_jobs, write_picture
from .rule import DONE, NOTHING, SOME_LEFT_OUT
from .shards import Shards, identify, in_step

# The model of commands that name none.
# In the package, so that the first command finds the people in a photograph.
DEFAULT_CONFIG = "people/InsPose_Lite0_people"
DEFAULT_WEIGHTS = "people_lite0"

FULL = {errno.ENOSPC, errno.EDQUOT}  # the next picture would not fit either
LONGEST_WAIT = timedelta(days=7)  # of a worker for the slowest of the others

# Keypoints with lower scores are not drawn; a score is a probability or an expected OKS.
KEYPOINT_THRESHOLDS = {"peaks": 0.05, "expected_oks": 0.3}

T = TypeVar("T")


class Demo:
    """A model and how its poses are drawn."""

    def __init__(self, cfg: CfgNode, score_threshold: float, batch_size: int) -> None:
        least = max(
            min(score_threshold, cfg.MODEL.INSPOSE.SCORE_THRESH_TEST),
            least_probability(cfg, score_threshold),
        )
        self.cfg = cfg
        self.predictor = InsPosePredictor(cfg, score_threshold=least)
        self.max_pixels = cfg.INPUT.MAX_PIXELS
        self.metadata = MetadataCatalog.get(next(iter(cfg.DATASETS.TEST), "__unused"))
        self.score_threshold = score_threshold
        self.sigmas = oks_sigmas(cfg)
        self.keypoint_threshold = KEYPOINT_THRESHOLDS[cfg.MODEL.INSPOSE.DECODING_TEST]
        self.batch_size = batch_size

    def predict(self, images: list[np.ndarray]) -> list[Instances]:
        """Find the poses above the threshold in (H, W, 3) BGR images."""
        if not images:
            return []
        found = self.predictor(tuple(images), batch_size=self.batch_size)
        poses = [result["instances"].to("cpu") for result in found]
        return [x[x.scores >= self.score_threshold] for x in poses]

    def draw(self, image: np.ndarray, poses: Instances) -> np.ndarray:
        """Draw poses on a copy of the image."""
        return draw_poses(
            image,
            poses,
            metadata=self.metadata,
            keypoint_threshold=self.keypoint_threshold,
            scores=True,
        )

    def draw_kp_net(self, image: np.ndarray, number: int = 0) -> np.ndarray:
        """Draw the keypoint maps of a pose, by default the best, on a copy of the image."""
        maps = keypoint_maps_of(self.predictor.model, self.predictor.prepare(image), [number])
        return draw_keypoint_maps(
            image,
            maps.probs[0].cpu().numpy(),
            cell=maps.cell,
            metadata=self.metadata,
            panels_of=maps.poses.pred_boxes.tensor[0].tolist(),
        )


def least_probability(cfg: CfgNode, score: float) -> float:
    """Person probability that a pose needs to reach a score, 0 where that is not known.

    The score is (1 - w) of the probability and w of a keypoint score of at most 1, as exponents. So
    candidates below cannot be shown, nor, being worse, suppress what is: their KP-Nets need not
    run. Of photographs of people that are half of the candidates.
    """
    weight = cfg.MODEL.INSPOSE.KEYPOINT_SCORE_WEIGHT_TEST
    if cfg.MODEL.META_ARCHITECTURE != "InsPose" or weight == 1:
        return 0.0
    return score ** (1 / (1 - weight))


def batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Take items in lists of a size; the last may be shorter."""
    while batch := list(itertools.islice(items, size)):
        yield batch


def read_pictures(
    jobs: Sequence[Job], places: Sequence[int], max_pixels: int
) -> Iterator[tuple[int, np.ndarray | ImageError]]:
    """Read the pictures at places of the list; an error stands for one that cannot be read."""
    for place in places:
        try:
            yield place, read_image(jobs[place].source, "BGR", max_pixels)
        except ImageError as error:
            yield place, error


def run_images(demo: Demo, jobs: Sequence[Job], shards: Shards, kp_net_view: bool) -> None:
    """Do this worker's share of the images; what becomes of each is noted in ``shards``.

    Images are read in one thread, poses found here, and pictures drawn and written in another.

    Raises:
        OSError: the disk is full.
    """

    def write(place: int, image: np.ndarray, poses: Instances, maps: np.ndarray | None) -> None:
        try:
            write_picture(jobs[place].picture, demo.draw(image, poses))
            if maps is not None:
                write_picture(jobs[place].kp_net_picture, maps)
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) in FULL:
                raise
            shards.leave_out(place, error)
        else:
            job = jobs[place]
            found = to_coco(poses, job.image_id, category_id=PERSON, file_name=job.name)
            shards.add(place, found)

    waiting = 2 * demo.batch_size
    with (
        tqdm(total=len(shards.todo), unit="image", disable=not comm.is_main_process()) as bar,
        WriteBehind(waiting) as writer,
        ReadAhead(read_pictures(jobs, shards.todo, demo.max_pixels), waiting) as pictures,
    ):
        for batch in batches(pictures, demo.batch_size):
            images = {place: x for place, x in batch if isinstance(x, np.ndarray)}
            for place, error in batch:
                if place not in images:
                    writer.put(shards.leave_out, place, error)
            found = demo.predict(list(images.values()))
            for (place, image), poses in zip(images.items(), found, strict=True):
                maps = demo.draw_kp_net(image) if kp_net_view and len(poses) else None
                writer.put(write, place, image, poses, maps)
            bar.update(len(batch))


def run_video(
    demo: Demo,
    source: VideoSource,
    path: Path,
    results: ResultsFile,
    *,
    track: bool = False,
    smooth: bool = False,
) -> int:
    """Do the frames of a video, or of a camera until the user ends it.

    Frames are read in one thread, found here, in order, and drawn and written in another thread.

    Args:
        demo: predicts and draws.
        source: the video.
        path: of the WebM to write.
        results: where poses go.
        track: whether poses get ids.
        smooth: whether they are smoothed too.

    Returns:
        How many frames were done.

    Raises:
        OSError: a file cannot be written, or the disk is full.
        ValueError: the WebM cannot be written.
    """
    shown = source.source == WEBCAM and has_display()
    name = video.name_of(source.source)
    waiting = 2 * demo.batch_size
    num_frames = 0
    picture: np.ndarray | None = None

    def write(frame: Frame, poses: Instances) -> None:
        nonlocal num_frames, picture
        picture = demo.draw(frame.image, poses)
        target.add(picture, frame.seconds)
        more = {"file_name": name, "seconds": round(frame.seconds, 3)}
        results.add(to_coco(poses, frame.number, category_id=PERSON, **more))
        num_frames += 1

    with contextlib.ExitStack() as stack:
        if source.is_live:  # there is no other end
            stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        target: video.Video = stack.enter_context(video.make_video(path, source))
        bar = stack.enter_context(tqdm(total=source.num_frames or None, unit="frame"))
        writer = stack.enter_context(WriteBehind(waiting))
        ahead = ReadAhead(source.frames(), waiting, drop_oldest=source.is_live)
        stack.enter_context(ahead)
        stack.callback(source.stopped.set)  # before the end of the thread is waited for
        found = poses_in(demo, ahead)
        if track or smooth:
            found = track_frames(found, demo.sigmas, smooth=smooth, live=source.is_live)
        for _, poses, frame in found:
            writer.put(write, frame, poses)
            bar.update()
            if shown and picture is not None:
                cv2.imshow("InsPose", picture)
                if cv2.waitKey(1) & 0xFF == ord("q"):
                    break
    return num_frames


def poses_in(demo: Demo, frames: Iterator[Frame]) -> Iterator[tuple[float, Instances, Frame]]:
    """Find the poses of frames; yields time in seconds, poses and frame, in order."""
    for batch in batches(frames, demo.batch_size):
        for frame, poses in zip(batch, demo.predict([x.image for x in batch]), strict=True):
            yield frame.seconds, poses, frame


def has_display() -> bool:
    """Whether a window can be opened. OpenCV ends the process where there is no display."""
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        return False
    try:
        cv2.namedWindow("InsPose")
    except cv2.error:  # the wheel without windows
        return False
    return True


def threshold_of(args: argparse.Namespace) -> float:
    """Score from which poses are shown: the command's, or that of the weights in the zoo."""
    if args.score_threshold is not None:
        return args.score_threshold
    opts = dict(zip(args.opts[::2], args.opts[1::2], strict=False))
    return score_threshold_of(args.weights or opts.get("MODEL.WEIGHTS") or DEFAULT_WEIGHTS)


def make_config(args: argparse.Namespace) -> CfgNode:
    """Read the config, check it and find the weights.

    Raises:
        ValueError: a config that cannot be used or without weights, or weights that are not there.
    """
    opts = dict(zip(args.opts[::2], args.opts[1::2], strict=False))
    weights = args.weights or opts.get("MODEL.WEIGHTS")
    if weights is None:
        if args.config_file is not None:
            raise ValueError("--config-file needs --weights, the checkpoint to use")
        weights = DEFAULT_WEIGHTS
    device = ["MODEL.DEVICE", args.device] if args.device else []
    config = args.config_file or config_of(weights) or DEFAULT_CONFIG
    cfg = get_cfg(config, [*args.opts, *device])
    check_model(cfg)  # before a threshold of the command takes the place of a wrong one
    cfg.MODEL.WEIGHTS = str(find_weights(weights))
    return cfg


def check_arguments(args: argparse.Namespace) -> bool:
    """Refuse options that contradict each other; returns whether the input is a video.

    Raises:
        ValueError: they do.
    """
    is_video = video.is_video(args.input[0])
    if is_video and len(args.input) > 1:
        raise ValueError("--input: one video at a time")
    if is_video and args.kp_net_view:
        raise ValueError("--kp-net-view is for images")
    if (args.track or args.smooth) and not is_video:
        raise ValueError("--track and --smooth are for a video or a camera")
    if is_video and comm.get_world_size() > 1:
        raise ValueError("a video is done by one worker: leave out torchrun")
    if args.video_out is not None and not is_video:
        raise ValueError("--video-out is for a video or the webcam")
    if args.video_out is not None and args.video_out.suffix.lower() != ".webm":
        raise ValueError(f"--video-out {args.video_out}: the name must end with .webm")
    return is_video


def report(what: str, left_out: dict[str, str], any_done: bool) -> int:
    """Say what was done and what was left out, and why; returns the exit status."""
    print(what)
    if left_out:
        print(f"left out {len(left_out)}:", file=sys.stderr)
    for name, reason in left_out.items():
        print(f"  {reason if name in reason else f'{name}: {reason}'}", file=sys.stderr)
    if not any_done:
        return NOTHING
    return SOME_LEFT_OUT if left_out else DONE


def predict_video(args: argparse.Namespace) -> int:
    """Do a video; returns the exit status.

    Raises:
        OSError: a file cannot be written.
        ValueError: it cannot be done.
    """
    name = args.input[0]
    path = args.video_out or args.output / "poses" / f"{Path(video.name_of(name)).stem}.webm"
    if path.absolute() == Path(name).absolute():
        raise ValueError(f"{path} would be overwritten while it is read")
    demo = Demo(make_config(args), threshold_of(args), args.batch_size)
    source = VideoSource(name)  # first: a wrong name must not empty an earlier file of results
    begin = time.monotonic()
    with ResultsFile(args.output / "results.json") as results:
        num_frames = run_video(demo, source, path, results, track=args.track, smooth=args.smooth)
    rate = num_frames / (time.monotonic() - begin)
    what = f"frames: {num_frames}, poses: {results.num_poses}, {rate:.1f} frames/s"
    if source.is_live:
        what += f", dropped: {source.num_read - num_frames}, reconnects: {source.reconnects}"
    elif video.av is None:
        what += ", without sound (pip install 'inspose_d2[video]' keeps it)"
    reason = source.why_cut_off()
    left_out = {video.without_password(name): reason} if reason else {}
    return report(f"{what}, see {results.path}", left_out, num_frames > 0)


def predict_images(args: argparse.Namespace) -> int:
    """Do images, on this worker alone or with others; returns the exit status.

    Raises:
        OSError: a file cannot be written.
        ValueError: it cannot be done.
    """

    def prepare() -> tuple[Demo, list[Job], dict[str, str]]:
        check_arguments(args)
        sources, root, left_out = find_images(args.input, args.output)
        jobs = make_jobs(sources, root, args.output)
        return Demo(make_config(args), threshold_of(args), args.batch_size), jobs, left_out

    demo, jobs, left_out = in_step(prepare)
    settings = {"score_threshold": demo.score_threshold, "kp_net_view": args.kp_net_view}
    folder = folder_of(args.output)
    run = in_step(lambda: identify(demo.cfg, jobs, **settings))
    begin = time.monotonic()
    with Shards(folder, jobs, run) as shards:
        try:
            run_images(demo, jobs, shards, args.kp_net_view)
            shards.wait_for_others()
        finally:
            if comm.is_main_process():
                with undisturbed():
                    done, poses, not_done = shards.write_results(folder / "results.json")
    if not comm.is_main_process():
        return DONE
    if missing := len(jobs) - done - len(not_done):
        raise ValueError(
            f"{shards.folder} lacks {missing} pictures of other workers: is it one of all machines?"
        )
    shards.remove()
    rate = shards.num_todo / (time.monotonic() - begin)
    what = f"images: {done}, poses: {poses}, {rate:.1f} images/s, see {folder / 'results.json'}"
    return report(what, left_out | not_done, done > 0)


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for; returns the exit status.

    Raises:
        OSError: a file cannot be written.
        ValueError: it cannot be done.
    """
    with contextlib.ExitStack() as stack:
        if dist.is_torchelastic_launched():
            stack.enter_context(under_torchrun("gloo", LONGEST_WAIT))
        if video.is_video(args.input[0]):
            in_step(lambda: check_arguments(args))
            return predict_video(args)
        return predict_images(args)
