"""Videos, cameras and streams: frames with their time stamps, in and out.

OpenCV reads. A WebM is written with PyAV where that is installed (the extra ``video``): each frame
at its own time, with the sound of the source; else with OpenCV, at a constant rate and silent.
"""

import contextlib
import errno
import importlib.util
import logging
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np

from .folders import VIDEOS

# PyAV, or None without the extra `video`.
av: Any = importlib.import_module("av") if importlib.util.find_spec("av") else None
logger = logging.getLogger(__name__)

WEBCAM = "webcam"
MOST_FRAMES = 0.98  # of those that a video's file promises
WAITS = (1, 2, 4, 8, 16)  # s before each try to open a camera or stream again
OPEN_TIMEOUT = 10_000  # ms that a stream may take to begin
READ_TIMEOUT = 5_000  # ms that it may be silent; an end by Ctrl-C waits for it
LONGEST_GAP = 600.0  # s between two frames; more is a clock that jumps
SOUND_RATE = 48_000  # Hz, Opus's own


@dataclass(frozen=True)
class Frame:
    """A picture of a video.

    Attributes:
        number: from 0, of those that were read.
        seconds: since the first frame, growing: by the time stamps of a file; of a camera or a
            live stream by its arrival.
        image: (H, W, 3) uint8, BGR.
    """

    number: int
    seconds: float
    image: np.ndarray


def is_video(source: str) -> bool:
    """Whether the name is one of a video, of a stream (``rtsp://...``) or of the webcam."""
    return source == WEBCAM or "://" in source or Path(source).suffix.lower() in VIDEOS


def name_of(source: str) -> str:
    """What a source is called in results and file names: no folder, no password."""
    url = urlsplit(source) if "://" in source else None
    return Path(url.path).name or url.hostname or "stream" if url else Path(source).name


def without_password(source: str) -> str:
    """The source, as it may stand in messages."""
    return re.sub(r"(?<=://)[^/@]*@", "", source)


class VideoSource:
    """The frames of a video file, of a stream or of the first webcam.

    Attributes:
        is_live: a camera, or a stream without an end: its frames come when they come, and where it
            breaks off it is opened again.
        fps: nominal rate in 1/s; 30 where it is not known.
        num_frames: that a file promises; 0 where it is not known.
        reconnects: how often it was opened again.
        num_read: frames until now.
        stopped: set from another thread, it is not opened again.
    """

    def __init__(self, source: str) -> None:
        """Open it.

        Args:
            source: a file, a URL that FFmpeg knows, or ``WEBCAM``.

        Raises:
            ValueError: it cannot be opened; the message begins with ``--input``.
        """
        self.source = source
        is_url = "://" in source
        if source != WEBCAM and not is_url and not Path(source).is_file():
            raise ValueError(f"--input {source}: no such file")
        self._capture = self._open()
        if not self._capture.isOpened():
            shown = without_password(source)
            raise ValueError(f"--input {shown}: cannot be opened as a video")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < 1000 else 30.0  # devices and damaged files say 0, less or NaN
        total = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.num_frames = int(total) if 0 < total < math.inf else 0
        has_end = self.num_frames or Path(urlsplit(source).path).suffix.lower() in VIDEOS
        self.is_live = source == WEBCAM or (is_url and not has_end)
        self.reconnects = 0
        self.stopped = threading.Event()
        self.num_read = 0
        self._why_ended = ""

    def _open(self) -> cv2.VideoCapture:
        if self.source == WEBCAM:
            return cv2.VideoCapture(0)
        if "://" in self.source:
            limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, OPEN_TIMEOUT]
            limits += [cv2.CAP_PROP_READ_TIMEOUT_MSEC, READ_TIMEOUT]
            return cv2.VideoCapture(self.source, cv2.CAP_FFMPEG, limits)
        return cv2.VideoCapture(self.source)

    def frames(self) -> Iterator[Frame]:
        """Read the frames one at a time, once; the source is closed at the end."""
        begin, seconds, shift = time.monotonic(), -1 / self.fps, 0.0
        try:
            while (image := self._read()) is not None:
                if self.is_live:
                    seconds = time.monotonic() - begin if self.num_read else 0.0
                    begin = begin if self.num_read else time.monotonic()
                else:
                    stamp = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 + shift
                    if not seconds < stamp <= seconds + LONGEST_GAP:  # none, or they jump
                        shift += seconds + 1 / self.fps - stamp if math.isfinite(stamp) else 0.0
                        stamp = seconds + 1 / self.fps
                    seconds = stamp
                self.num_read += 1
                yield Frame(self.num_read - 1, seconds, image)
        finally:
            self._capture.release()

    def _read(self) -> np.ndarray | None:
        """Read an image; None at the end, for a live source after all tries to open it again."""
        image = self._capture.read()[1]
        if image is not None or not self.is_live or self.stopped.is_set():
            return image
        if not self.reconnects:
            logger.warning(
                "%s broke off after %d frames; it is opened again, in up to %d tries each time",
                without_password(self.source),
                self.num_read,
                len(WAITS),
            )
        self.reconnects += 1
        for wait in WAITS:
            self._capture.release()
            if self.stopped.wait(wait):
                return None
            self._capture = self._open()
            if (image := self._capture.read()[1]) is not None:
                return image
        self._why_ended = (
            f"broke off after {self.num_read} frames, and {len(WAITS)} tries to open it again "
            "failed"
        )
        return None

    def why_cut_off(self) -> str:
        """Say what is missing after the last frame; "" where nothing is.

        In some containers the number of frames is the duration times the mean rate, from which
        the true one may differ a little.
        """
        if self._why_ended or not self.num_read:
            return self._why_ended or "no frame could be read"
        total = self.num_frames
        if self.num_read < min(total - 1, MOST_FRAMES * total):
            return (
                f"the file says {total} frames, {self.num_read} could be read: cut off, or "
                "damaged? Copy or download it anew"
            )
        return ""


class ConstantRateVideo:
    """A VP9 WebM by OpenCV, at a constant rate; whole as soon as the ``with`` block is left.

    Frames are repeated or dropped, so that each is shown at its time to half a frame. OpenCV
    writes even sizes only: of an odd one the last column or row is cut off.
    """

    def __init__(self, path: Path, fps: float) -> None:
        """Begin; the file is made with the first frame.

        Args:
            path: of the file.
            fps: in 1/s.
        """
        self.path = path
        self.fps = fps
        self._writer: cv2.VideoWriter | None = None
        self._num_written = 0
        self._last: np.ndarray | None = None

    def __enter__(self) -> "Video":
        return self

    def add(self, image: np.ndarray, seconds: float) -> None:
        """Write a frame.

        Args:
            image: (H, W, 3) uint8, BGR; the first fixes the size, others are resized to it.
            seconds: when it is shown, since the first frame; growing.

        Raises:
            OSError: the disk is full.
            ValueError: the file cannot be written.
        """
        if self._last is None:
            self._last = image
        image = _resized_like(image, self._last)
        place = round(seconds * self.fps)
        for _ in range(self._num_written, place):
            self._write(self._last)
        if place >= self._num_written:
            self._write(image)
        self._last = image

    def _write(self, image: np.ndarray) -> None:
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            vp9 = cv2.VideoWriter.fourcc(*"VP90")
            size = image.shape[1], image.shape[0]
            self._writer = cv2.VideoWriter(str(self.path), vp9, self.fps, size)
            if not self._writer.isOpened():
                raise ValueError(
                    f"{self.path}: cannot be written as VP9; is the folder writable, and OpenCV "
                    "that of PyPI's wheel, which has VP9?"
                )
        self._writer.write(image)
        self._num_written += 1
        if shutil.disk_usage(self.path.parent).free == 0:  # OpenCV does not say it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.release()


class TimedVideo:
    """A VP9 WebM by PyAV, each frame at its own time, with sound; whole once ``with`` is left."""

    def __init__(self, path: Path, fps: float, sound_of: str | None) -> None:
        """Begin; the file is made with the first frame.

        Args:
            path: of the file.
            fps: nominal rate in 1/s: what players are told, and how long the last frame is shown.
            sound_of: file whose sound is written too, as far as there are frames.
        """
        self.path = path
        self.fps = fps
        self._sound_of = sound_of
        self._first: np.ndarray | None = None
        self._container: Any = None
        self._seconds = 0.0

    def __enter__(self) -> "Video":
        return self

    def add(self, image: np.ndarray, seconds: float) -> None:
        """Write a frame.

        Args:
            image: (H, W, 3) uint8, BGR; the first fixes the size, others are resized to it.
            seconds: when it is shown, since the first frame; growing.

        Raises:
            OSError: the file cannot be written, or the disk is full.
        """
        with self._named_errors():
            if self._first is None:
                self._begin(image)
                self._first = image
            frame = av.VideoFrame.from_ndarray(_resized_like(image, self._first), "bgr24")
            frame.pts, frame.time_base = round(seconds * 1000), Fraction(1, 1000)
            self._container.mux(self._stream.encode(frame))
            self._seconds = seconds
            self._add_sound(seconds)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except av.FFmpegError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _begin(self, image: np.ndarray) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self.path), "w", format="webm")
        # libvpx's settings for live video at a constant quality: many times faster than "good".
        options = {"deadline": "realtime", "cpu-used": "8", "row-mt": "1", "crf": "30", "b": "0"}
        rate = Fraction(self.fps).limit_denominator(1001)
        self._stream = self._container.add_stream("libvpx-vp9", rate=rate, options=options)
        self._stream.height, self._stream.width = image.shape[:2]
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, 1000)
        self._sounds = self._read_sound() if self._sound_of else iter(())
        self._sound = next(self._sounds, None)  # the next one to write
        self._sound_stream: Any = None
        if self._sound is not None:
            opus = self._container.add_stream("libopus", rate=SOUND_RATE, layout="stereo")
            self._sound_stream = opus

    def _read_sound(self) -> Iterator[Any]:
        """Decode the first sound track; times are made those since the first frame."""
        try:
            with av.open(self._sound_of) as source:
                if not source.streams.audio:
                    return
                pictures = source.streams.video[0]
                begin = (pictures.start_time or 0) * pictures.time_base
                for sound in source.decode(source.streams.audio[0]):
                    if sound.pts is None:
                        continue
                    sound.pts -= round(begin / sound.time_base)
                    if sound.pts >= 0:
                        yield sound
        except av.FFmpegError as error:
            logger.warning("%s: its sound ends early: %s", self._sound_of, error.strerror)

    def _add_sound(self, until: float) -> None:
        while self._sound is not None and self._sound.time <= until:
            self._container.mux(self._sound_stream.encode(self._sound))
            self._sound = next(self._sounds, None)

    def __exit__(self, *_: object) -> None:
        if self._container is None:
            return
        with self._named_errors(), self._container:
            self._container.mux(self._stream.encode(None))
            self._add_sound(self._seconds + 1 / self.fps)
            if self._sound_stream is not None:
                self._container.mux(self._sound_stream.encode(None))


Video = ConstantRateVideo | TimedVideo


def make_video(path: Path, source: VideoSource) -> Video:
    """Make the writer of a WebM for the frames of a source, with its sound where that can be."""
    if av is None:
        return ConstantRateVideo(path, source.fps)
    return TimedVideo(path, source.fps, None if source.is_live else source.source)


def _resized_like(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A stream that is opened again may have another size."""
    height, width = other.shape[:2]
    return image if image.shape == other.shape else cv2.resize(image, (width, height))
