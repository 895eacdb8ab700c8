"""``inspose predict``: the poses in images, a video or a webcam's frames, drawn and as JSON."""

import argparse
import contextlib
import glob
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from tqdm import tqdm

from ..config import get_cfg
from ..config.check import check_model
from ..data.folders import VIDEOS, Listing, is_metadata, list_folder
from ..data.images import ImageError, read_image
from ..engine.predictor import InsPosePredictor
from ..model_zoo import config_of, find_weights, score_threshold_of
from ..modeling.keypoint_maps import keypoint_maps_of
from ..visualization.poses import draw_keypoint_maps, draw_poses
from .rule import DONE, NOTHING, SOME_LEFT_OUT

# The model of commands that name none.
# In the package, so that the first command finds the people in a photograph.
DEFAULT_CONFIG = "people/InsPose_Lite0_people"
DEFAULT_WEIGHTS = "people_lite0"

WRITTEN = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}  # a picture of another becomes name.gif.png
WEBCAM = "webcam"
MOST_FRAMES = 0.98  # of those that a video's file promises

T = TypeVar("T")


class Demo:
    """A model and how its poses are drawn."""

    def __init__(self, cfg: CfgNode, score_threshold: float, batch_size: int) -> None:
        least = min(score_threshold, cfg.MODEL.INSPOSE.SCORE_THRESH_TEST)
        self.predictor = InsPosePredictor(cfg, score_threshold=least)
        self.max_pixels = cfg.INPUT.MAX_PIXELS
        self.metadata = MetadataCatalog.get(next(iter(cfg.DATASETS.TEST), "__unused"))
        self.score_threshold = score_threshold
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
        return draw_poses(image, poses, metadata=self.metadata, scores=True)

    def draw_kp_net(self, image: np.ndarray, number: int = 0) -> np.ndarray:
        """Draw the keypoint maps of a pose, by default the best, on a copy of the image."""
        small = self.predictor.resize.get_transform(image).apply_image(image)
        small = small[:, :, ::-1] if self.predictor.cfg.INPUT.FORMAT == "RGB" else small
        inputs = {
            "image": torch.from_numpy(small.transpose(2, 0, 1).copy()),
            "height": image.shape[0],
            "width": image.shape[1],
        }
        maps = keypoint_maps_of(self.predictor.model, inputs, [number])
        return draw_keypoint_maps(
            image,
            maps.probs[0].cpu().numpy(),
            cell=maps.cell,
            metadata=self.metadata,
            panels_of=maps.poses.pred_boxes.tensor[0].tolist(),
        )


class ResultsFile:
    """A JSON list, written as it grows; whole as soon as the ``with`` block is left."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_poses = 0

    def __enter__(self) -> "ResultsFile":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("w", encoding="utf-8")
        self.file.write("[")
        return self

    def add(self, poses: Instances, image_id: int, file_name: str) -> None:
        """Write the poses of an image."""
        copy = Instances(poses.image_size, **poses.get_fields())
        copy.pred_keypoints = poses.pred_keypoints.clone()  # Detectron2 changes it
        for pose in instances_to_coco_json(copy, image_id):
            pose |= {"category_id": 1, "file_name": file_name}
            comma = "," if self.num_poses else ""
            self.file.write(f"{comma}\n{json.dumps(pose, allow_nan=False)}")
            self.num_poses += 1

    def __exit__(self, *_: object) -> None:
        self.file.write("\n]\n")
        self.file.close()


@dataclass(frozen=True)
class Job:
    """An image to do."""

    source: Path
    name: str  # in the tree of the inputs
    image_id: int
    picture: Path  # to be written
    kp_net_picture: Path


def find_images(inputs: Sequence[str], output: Path) -> tuple[list[Path], Path, dict[str, str]]:
    """Find the images of files, folders (with all below) and patterns.

    Args:
        inputs: of the command line.
        output: what lies in this folder is not taken from others: it is ours.

    Returns:
        Absolute paths, each once, the deepest folder above all of them, and why files that look
        like images or videos are not among them.

    Raises:
        ValueError: nothing is there.
    """
    found: dict[Path, None] = {}
    left_out: dict[str, str] = {}
    roots = []
    for text in inputs:
        # A file whose name has brackets is no pattern.
        matches = [text] if os.path.lexists(text) else glob.glob(text, recursive=True)
        listing = Listing()
        for path in sorted(Path(x).absolute() for x in matches):
            if path.is_dir():
                below = list_folder(path, output)
                listing.images += below.images
                listing.left_out |= below.left_out
                roots.append(path)
            elif path == Path(text).absolute() or not is_metadata(path):
                listing.images.append(path)
                roots.append(path.parent)
        if not listing.images and not listing.left_out:
            raise ValueError(f"--input {text}: no such file, or a folder or pattern without images")
        found |= dict.fromkeys(listing.images)
        left_out |= listing.left_out
    return list(found), Path(os.path.commonpath(roots)), left_out


def folder_of(output: Path) -> Path:
    """Folder of what is written: ``--output``, or where it is a picture the folder around it."""
    is_picture = output.suffix.lower() in WRITTEN and not output.is_dir()
    return output.parent if is_picture else output


def make_jobs(sources: Sequence[Path], root: Path, output: Path) -> list[Job]:
    """Say what becomes of each image.

    Args:
        sources: absolute paths.
        root: a folder above all of them.
        output: a folder or, of a single image, the picture.

    Returns:
        Jobs with pictures of different names.

    Raises:
        ValueError: one picture for several images, or one in the place of its source.
    """
    folder = folder_of(output)
    as_file = folder != output
    if as_file and len(sources) > 1:
        raise ValueError(f"--output {output}: {len(sources)} images need a folder")
    numbered = [x.stem for x in sources if x.stem.isascii() and x.stem.isdecimal()]
    by_name = len(set(map(int, numbered))) == len(sources)
    jobs, taken = [], set()
    for place, source in enumerate(sources):
        name = source.relative_to(root)
        file = name
        while file.suffix.lower() not in WRITTEN or file in taken:
            file = file.with_name(f"{file.name}.png")
        taken.add(file)
        picture = output if as_file else folder / "poses" / file
        if picture.absolute() == source:
            raise ValueError(f"--output {output}: {source} would be overwritten")
        image_id = int(source.stem) if by_name else place
        jobs.append(Job(source, name.as_posix(), image_id, picture, folder / "kp_nets" / file))
    return jobs


def batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Take items in lists of a size; the last may be shorter."""
    while batch := list(itertools.islice(items, size)):
        yield batch


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write a picture in the format of its suffix.

    Raises:
        OSError: the disk is full, or no such file may be made.
        ValueError: the picture does not fit into the format.
    """
    try:
        _, data = cv2.imencode(path.suffix, picture)
    except cv2.error as error:
        raise ValueError(f"cannot be written as {path.suffix}: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())


def run_images(
    demo: Demo, jobs: Sequence[Job], results: ResultsFile, kp_net_view: bool
) -> dict[str, str]:
    """Do all images.

    Returns:
        Why files were left out, by name.
    """
    left_out = {}
    with tqdm(total=len(jobs), unit="image") as bar:
        for batch in batches(iter(jobs), demo.batch_size):
            images = {}
            for job in batch:
                try:
                    images[job] = read_image(job.source, "BGR", demo.max_pixels)
                except ImageError as error:
                    left_out[str(job.source)] = str(error)
            found = demo.predict(list(images.values()))
            for (job, image), poses in zip(images.items(), found, strict=True):
                try:
                    write_picture(job.picture, demo.draw(image, poses))
                    if kp_net_view and len(poses):
                        write_picture(job.kp_net_picture, demo.draw_kp_net(image))
                except (OSError, ValueError) as error:
                    left_out[str(job.source)] = str(error)
                    continue
                results.add(poses, job.image_id, job.name)
            bar.update(len(batch))
    return left_out


@contextlib.contextmanager
def video_reader(source: str) -> Iterator[cv2.VideoCapture]:
    """Open a video, or the first webcam, and close it again.

    Raises:
        ValueError: it cannot be opened.
    """
    if source != WEBCAM and not Path(source).is_file():
        raise ValueError(f"--input {source}: no such file")
    capture = cv2.VideoCapture(0 if source == WEBCAM else source)
    try:
        if not capture.isOpened():
            raise ValueError(f"--input {source}: cannot be opened as a video")
        yield capture
    finally:
        capture.release()


def frames_of(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """Read (H, W, 3) BGR frames one at a time, to the end."""
    while (frame := capture.read()[1]) is not None:
        yield frame


class VideoFile:
    """A VP9 WebM, which browsers play; whole as soon as the ``with`` block is left.

    OpenCV writes even sizes only: of an odd one the last column or row is cut off.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.path = path
        self.fps = fps
        self.num_frames = 0
        self.writer: cv2.VideoWriter | None = None

    def __enter__(self) -> "VideoFile":
        return self

    def add(self, frame: np.ndarray) -> None:
        """Write a frame; the first fixes the size."""
        if self.writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            vp9 = cv2.VideoWriter.fourcc(*"VP90")
            size = frame.shape[1], frame.shape[0]
            self.writer = cv2.VideoWriter(str(self.path), vp9, self.fps, size)
            if not self.writer.isOpened():
                raise ValueError(
                    f"{self.path}: cannot be written as VP9; is the folder writable, and OpenCV "
                    "that of PyPI's wheel, which has VP9?"
                )
        self.writer.write(frame)
        self.num_frames += 1

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.release()


def run_video(
    demo: Demo,
    source: str,
    capture: cv2.VideoCapture,
    path: Path,
    results: ResultsFile,
) -> int:
    """Do the frames of a video, or of the webcam until the user ends it.

    Args:
        demo: predicts and draws.
        source: name of the video, or ``WEBCAM``.
        capture: the same, opened.
        path: of the WebM to write.
        results: where poses go.

    Returns:
        How many frames were done.

    Raises:
        ValueError: the WebM cannot be written.
    """
    is_webcam = source == WEBCAM
    shown = is_webcam and has_display()
    with contextlib.ExitStack() as stack:
        if is_webcam:  # there is no other end
            stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        fps = capture.get(cv2.CAP_PROP_FPS)
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        # Devices and damaged files say 0, less or NaN.
        video = stack.enter_context(VideoFile(path, fps if 0 < fps < 1000 else 30.0))
        bar = stack.enter_context(tqdm(total=total if total > 0 else None, unit="frame"))
        for frames in batches(frames_of(capture), demo.batch_size):
            for frame, poses in zip(frames, demo.predict(frames), strict=True):
                picture = demo.draw(frame, poses)
                results.add(poses, video.num_frames, Path(source).name)
                video.add(picture)
                bar.update()
                if shown:
                    cv2.imshow("InsPose", picture)
            if shown and cv2.waitKey(1) & 0xFF == ord("q"):
                break
    return video.num_frames


def why_cut_off(capture: cv2.VideoCapture, frames: int) -> str:
    """Say what is missing of a video that was read to its end; "" where nothing is.

    Args:
        capture: knows how many frames the file should have: in some containers that is the
            duration times the mean rate, from which the number may differ a little.
        frames: that were read.
    """
    if not frames:
        return "no frame could be read"
    total = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    if frames < min(total - 1, MOST_FRAMES * total):
        return (
            f"the file says {total:.0f} frames, {frames} could be read: cut off, or damaged? Copy "
            "or download it anew"
        )
    return ""


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
    is_video = args.input == [WEBCAM] or Path(args.input[0]).suffix.lower() in VIDEOS
    if is_video and len(args.input) > 1:
        raise ValueError("--input: one video at a time")
    if is_video and args.kp_net_view:
        raise ValueError("--kp-net-view is for images")
    if args.video_out is not None and not is_video:
        raise ValueError("--video-out is for a video or the webcam")
    if args.video_out is not None and args.video_out.suffix.lower() != ".webm":
        raise ValueError(f"--video-out {args.video_out}: the name must end with .webm")
    return is_video


def report(done: int, left_out: dict[str, str], results: ResultsFile, unit: str) -> int:
    """Say what was done; returns the exit status."""
    print(f"{unit}: {done}, poses: {results.num_poses}, see {results.path}")
    if left_out:
        print(f"left out {len(left_out)}:", file=sys.stderr)
    for name, reason in left_out.items():
        print(f"  {reason if name in reason else f'{name}: {reason}'}", file=sys.stderr)
    if not done:
        return NOTHING
    return SOME_LEFT_OUT if left_out else DONE


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for; returns the exit status.

    Raises:
        ValueError: it cannot be done.
    """
    if check_arguments(args):
        source = args.input[0]
        name = WEBCAM if source == WEBCAM else Path(source).stem
        path = args.video_out or args.output / "poses" / f"{name}.webm"
        if path.absolute() == Path(source).absolute():
            raise ValueError(f"{path} would be overwritten while it is read")
        demo = Demo(make_config(args), threshold_of(args), args.batch_size)
        # The video first: a wrong name must not empty an earlier file of results.
        with video_reader(source) as video, ResultsFile(args.output / "results.json") as results:
            frames = run_video(demo, source, video, path, results)
            reason = "" if source == WEBCAM else why_cut_off(video, frames)
        return report(frames, {source: reason} if reason else {}, results, "frames")
    sources, root, left_out = find_images(args.input, args.output)
    jobs = make_jobs(sources, root, args.output)
    demo = Demo(make_config(args), threshold_of(args), args.batch_size)
    with ResultsFile(folder_of(args.output) / "results.json") as results:
        not_done = run_images(demo, jobs, results, args.kp_net_view)
    return report(len(jobs) - len(not_done), left_out | not_done, results, "images")
