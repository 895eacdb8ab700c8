"""Videos and streams: time stamps, what breaks off, and the two writers."""

import contextlib
import http.server
import logging
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from inspose_d2.data import video
from inspose_d2.data.video import ConstantRateVideo, TimedVideo, VideoSource

SIZE = (48, 80)


def image_of(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Dark, with a bar whose place is the number's last digit."""
    image = np.zeros((*size, 3), np.uint8)
    image[:, 8 * (number % 10) : 8 * (number % 10) + 8] = 200
    return image


def number_of(image: np.ndarray) -> int:
    return int(image[SIZE[0] // 2, :, 1].argmax()) // 8


def read_back(path: Path) -> list[tuple[int, float]]:
    """Number and seconds of each frame."""
    capture, found = cv2.VideoCapture(str(path)), []
    while (image := capture.read()[1]) is not None:
        found.append((number_of(image), capture.get(cv2.CAP_PROP_POS_MSEC) / 1000))
    return found


class MadeUpCapture:
    """Gives an image for each time stamp (ms), then nothing."""

    def __init__(self, stamps: Sequence[float], count: float = 0.0) -> None:
        self.stamps = list(stamps)
        self.values = {cv2.CAP_PROP_FPS: 10.0, cv2.CAP_PROP_FRAME_COUNT: count}
        self.read_so_far = 0

    def isOpened(self) -> bool:  # noqa: N802  OpenCV's name
        return bool(self.stamps)

    def get(self, key: int) -> float:
        if key == cv2.CAP_PROP_POS_MSEC:
            return self.stamps[self.read_so_far - 1]
        return self.values[key]

    def read(self) -> tuple[bool, np.ndarray | None]:
        if self.read_so_far == len(self.stamps):
            return False, None
        self.read_so_far += 1
        return True, image_of(self.read_so_far - 1)

    def release(self) -> None:
        pass


@pytest.mark.fault
@pytest.mark.parametrize(
    ("stamps", "seconds"),
    [
        ([0, 40, 500, 540], [0, 0.04, 0.5, 0.54]),  # as in the file, not at its mean rate
        ([0, 0, 0, 0], [0, 0.1, 0.2, 0.3]),  # a container without
        ([0, 100, 50, 150], [0, 0.1, 0.2, 0.3]),  # they jump back, and go on from there
        ([0, 100, 1e9, 1e9 + 100], [0, 0.1, 0.2, 0.3]),
        ([0, float("nan"), 200, 300], [0, 0.1, 0.2, 0.3]),
    ],
)
def test_frames_have_the_times_of_the_file_and_these_grow(
    stamps: list[float],
    seconds: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "a.mp4").touch()
    monkeypatch.setattr(cv2, "VideoCapture", lambda _: MadeUpCapture(stamps, len(stamps)))
    frames = list(VideoSource(str(tmp_path / "a.mp4")).frames())
    assert [x.seconds for x in frames] == pytest.approx(seconds)
    assert [x.number for x in frames] == [0, 1, 2, 3]


@pytest.mark.fault
def test_camera_is_opened_again_a_bounded_number_of_times_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Three frames; two tries find nothing; two frames; then it is gone.
    opened: list[list[float]] = [[0] * 3, [], [], [0] * 2]
    tries = []

    def open_camera(source: int) -> MadeUpCapture:
        tries.append(source)
        return MadeUpCapture(opened.pop(0) if opened else [])

    waited: list[float] = []
    monkeypatch.setattr(cv2, "VideoCapture", open_camera)
    source = VideoSource("webcam")
    monkeypatch.setattr(source.stopped, "wait", waited.append)
    with caplog.at_level(logging.WARNING):
        frames = list(source.frames())
    assert [x.number for x in frames] == list(range(5))
    assert source.reconnects == 2
    assert waited == [1, 2, 4, *video.WAITS]
    assert len(tries) == 1 + 3 + len(video.WAITS)
    assert source.why_cut_off().startswith("broke off after 5 frames, and 5 tries")
    assert len(caplog.records) == 1


class Camera(http.server.BaseHTTPRequestHandler):
    """Motion JPEG over HTTP that breaks off after ten pictures, and is gone after the second."""

    visits = 0

    def do_GET(self) -> None:
        type(self).visits += 1
        if self.visits > 2:
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=next")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for i in range(10):
                data = cv2.imencode(".jpg", image_of(i))[1].tobytes()
                head = f"--next\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                self.wfile.write(head.encode() + data + b"\r\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def camera() -> Iterator[str]:
    Camera.visits = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://user:secret@127.0.0.1:{server.server_port}/live"
    server.shutdown()
    server.server_close()


@pytest.mark.fault
def test_stream_over_http_is_opened_again(
    camera: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(video, "WAITS", (0, 0))
    source = VideoSource(camera)
    assert source.is_live
    numbers = [number_of(x.image) for x in source.frames()]
    # FFmpeg may keep the last picture of a connection to itself.
    assert 18 <= len(numbers) <= 20
    assert numbers[:9] == list(range(9))
    assert source.reconnects == 2
    assert Camera.visits == 4
    assert "broke off" in source.why_cut_off()
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("source", "name", "is_one"),
    [
        ("a/dance.MP4", "dance.MP4", True),
        ("webcam", "webcam", True),
        ("rtsp://user:secret@10.0.0.7:554/door/front", "front", True),
        ("rtsp://user:secret@10.0.0.7", "10.0.0.7", True),
        ("photos", "photos", False),
    ],
)
def test_names_of_sources_have_no_passwords(source: str, name: str, is_one: bool) -> None:
    assert video.name_of(source) == name
    assert video.is_video(source) == is_one
    assert "secret" not in video.without_password(source)


def test_constant_rate_shows_each_frame_at_its_time(tmp_path: Path) -> None:
    path = tmp_path / "a.webm"
    with ConstantRateVideo(path, 10) as file:
        for i, seconds in enumerate((0.0, 0.1, 0.13, 0.22, 0.5, 0.61)):
            file.add(image_of(i), seconds)
    found = read_back(path)
    # The third frame comes to the place of the second and is dropped from there on.
    assert [x for x, _ in found] == [0, 1, 3, 3, 3, 4, 5]
    assert found[-1][1] == pytest.approx(0.6, abs=0.001)


@pytest.mark.fault
def test_full_disk_is_told_where_opencv_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(video.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(video.shutil, "disk_usage", lambda _: usage(100, 100, 0))
    with (
        pytest.raises(OSError, match=r"No space left on device: .*a\.webm"),
        ConstantRateVideo(tmp_path / "a.webm", 10) as file,
    ):
        file.add(image_of(0), 0)


@pytest.fixture
def av() -> Any:
    return pytest.importorskip("av", reason="the extra `video`")


TIMES = (0.0, 0.04, 0.08, 0.12, 0.5, 0.54, 0.9, 1.3, 1.34, 2.0)


def make_phone_video(av: Any, path: Path, sound_until: float) -> Path:
    """Frames at TIMES; a tone in the first 0.2 s of each second."""
    with av.open(str(path), "w") as file:
        pictures = file.add_stream("mpeg4", rate=25)
        pictures.height, pictures.width = SIZE
        pictures.pix_fmt = "yuv420p"
        pictures.codec_context.time_base = Fraction(1, 1000)
        sound = file.add_stream("aac", rate=44100, layout="mono")
        for i, seconds in enumerate(TIMES):
            frame = av.VideoFrame.from_ndarray(image_of(i), "bgr24")
            frame.pts, frame.time_base = round(1000 * seconds), Fraction(1, 1000)
            file.mux(pictures.encode(frame))
        file.mux(pictures.encode(None))
        t = np.arange(int(44100 * sound_until)) / 44100
        wave = np.sin(2 * np.pi * 440 * t) * 8000 * (t % 1 < 0.2)
        frame = av.AudioFrame.from_ndarray(wave.astype(np.int16)[None], "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 44100, 0, Fraction(1, 44100)
        file.mux(sound.encode(frame))
        file.mux(sound.encode(None))
    return path


def beginnings_of_tones(av: Any, path: Path) -> list[float]:
    """When the sound of a file becomes loud, in s."""
    found, was_loud = [], False
    with av.open(str(path)) as file:
        for sound in file.decode(audio=0):
            is_loud = bool(np.abs(sound.to_ndarray()).max() > 0.1)
            if is_loud and not was_loud:
                found.append(float(sound.time))
            was_loud = is_loud
    return found


@pytest.mark.parametrize("num_frames", [len(TIMES), 8])  # all, and ended by Ctrl-C
def test_times_and_sound_are_kept(av: Any, num_frames: int, tmp_path: Path) -> None:
    source = VideoSource(str(make_phone_video(av, tmp_path / "a.mp4", 2.5)))
    path = tmp_path / "b.webm"
    with video.make_video(path, source) as file:
        assert isinstance(file, TimedVideo)
        for frame in list(source.frames())[:num_frames]:
            file.add(frame.image, frame.seconds)
    found = read_back(path)
    assert [x for x, _ in found] == list(range(num_frames))
    assert [x for _, x in found] == pytest.approx(TIMES[:num_frames], abs=0.001)
    tones = beginnings_of_tones(av, path)
    assert tones == pytest.approx(range(3 if num_frames == len(TIMES) else 2), abs=0.05)


def test_odd_and_changing_sizes_are_written(av: Any, tmp_path: Path) -> None:
    assert av
    with TimedVideo(tmp_path / "a.webm", 10, None) as file:
        file.add(image_of(0, (47, 81)), 0.0)
        file.add(image_of(1, (30, 100)), 0.1)
    capture = cv2.VideoCapture(str(tmp_path / "a.webm"))
    assert [capture.read()[1].shape for _ in range(2)] == [(47, 81, 3)] * 2


@pytest.mark.fault
def test_full_disk_is_told_by_pyav(av: Any, tmp_path: Path) -> None:
    assert av
    (tmp_path / "a.webm").symlink_to("/dev/full")
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)

    def write() -> None:
        with TimedVideo(tmp_path / "a.webm", 10, None) as file:
            for i in range(50):
                file.add(noise, i / 10)

    with pytest.raises(OSError, match=r"No space left on device: .*a\.webm"):
        write()
