"""The demo tool, in this process and with a made-up predictor where that is enough."""

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image, features

from benchmarks.memory import status
from inspose_d2 import cli
from inspose_d2.cli import predict as demo
from inspose_d2.cli import shards
from inspose_d2.cli.parsers import make_parser
from inspose_d2.cli.pictures import make_jobs

ROOT = Path(__file__).parents[2]
SIZE = (60, 80)  # of the pictures, (H, W)


class MadeUpPredictor:
    """One pose at the place of the brightest pixel, and one of a low score."""

    def __init__(self, cfg: CfgNode, score_threshold: float) -> None:
        pass

    def __call__(self, images: list[np.ndarray], batch_size: int) -> list[dict[str, Instances]]:
        assert len(images) <= batch_size
        return [{"instances": self.poses(image)} for image in images]

    @staticmethod
    def poses(image: np.ndarray) -> Instances:
        row, column = np.unravel_index(image[..., 0].argmax(), image.shape[:2])
        keypoints = torch.full((2, 17, 3), 0.5)
        keypoints[..., :2] += torch.tensor([float(column), float(row)])
        return Instances(
            image.shape[:2],
            pred_boxes=Boxes(torch.tensor([[10.0, 20.0, 30.0, 50.0]] * 2)),
            scores=torch.tensor([0.8, 0.1]),
            pred_classes=torch.zeros(2, dtype=torch.int64),
            pred_keypoints=keypoints,
        )


def parse(*words: str) -> argparse.Namespace:
    return make_parser().parse_args(["predict", *words])


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Run the tool in this process, in ``tmp_path``, with the made-up predictor."""
    monkeypatch.setattr(demo, "InsPosePredictor", MadeUpPredictor)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").touch()

    def run(*arguments: Any) -> int:
        model = ["--config-file", demo.DEFAULT_CONFIG, "--weights", "w.pth"]
        return cli.main(["predict", *(str(x) for x in (*arguments, *model))])

    return run


def picture(path: Path, spot: tuple[int, int] = (5, 7), size: tuple[int, int] = SIZE) -> Path:
    """A dark picture with one bright pixel at (x, y)."""
    image = np.zeros((*size, 3), np.uint8)
    image[spot[1], spot[0]] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return path


def video(path: Path, frames: int = 6, fps: float = 12.5) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, SIZE[::-1])
    for i in range(frames):
        frame = np.zeros((*SIZE, 3), np.uint8)
        frame[:, 8 * i : 8 * i + 8] = 200
        writer.write(frame)
    writer.release()
    return path


def frames_of(path: str) -> list[np.ndarray]:
    """Pictures of a video, (H, W, 3)."""
    capture, frames = cv2.VideoCapture(path), []
    while (frame := capture.read()[1]) is not None:
        frames.append(frame)
    return frames


def results(folder: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads((folder / "results.json").read_text(), parse_constant=refuse)


def files_below(folder: Path) -> set[str]:
    return {x.relative_to(folder).as_posix() for x in folder.rglob("*") if x.is_file()}


def test_folder_gives_its_tree_again_and_a_bad_file_is_listed(
    tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    for name in ("a.png", "a.bmp", "a.tif", "deep/er/a.png"):
        picture(photos / name)
    (photos / "broken.jpg").write_bytes(b"no image")
    (photos / "notes.txt").write_text("not an image, and not named as one")
    assert tool("--input", photos, "--output", "out", "--batch-size", 2) == demo.SOME_LEFT_OUT

    names = {"a.png", "a.bmp", "a.tif.png", "deep/er/a.png"}
    assert files_below(tmp_path / "out") == {"results.json"} | {f"poses/{x}" for x in names}
    assert cv2.imread("out/poses/deep/er/a.png").shape == (*SIZE, 3)
    found = results(tmp_path / "out")
    assert {x["file_name"] for x in found} == {"a.png", "a.bmp", "a.tif", "deep/er/a.png"}
    assert len({x["image_id"] for x in found}) == 4
    captured = capsys.readouterr()
    assert "images: 4, poses: 4" in captured.out
    assert str(photos / "broken.jpg") in captured.err
    assert "notes.txt" not in captured.err


def test_results_are_in_the_form_of_coco(tool: Callable[..., int], tmp_path: Path) -> None:
    picture(tmp_path / "in" / "000000000139.png", spot=(5, 7))
    picture(tmp_path / "in" / "000000000285.png", spot=(70, 50))
    assert tool("--input", "in", "--output", "out") == demo.DONE
    first, second = results(tmp_path / "out")
    assert first.keys() == {
        *("image_id", "category_id", "bbox", "score", "keypoints", "file_name"),
    }
    assert [first["image_id"], second["image_id"]] == [139, 285]
    assert first["file_name"] == "000000000139.png"
    assert first["category_id"] == 1
    assert first["score"] == pytest.approx(0.8)  # the pose of 0.1 is below the threshold
    assert first["bbox"] == [10, 20, 20, 30]  # x, y, width, height
    # The predictor said 5.5, 7.5, the middle of a pixel: COCO calls that 5, 7.
    assert first["keypoints"] == [5, 7, 0.5] * 17
    assert second["keypoints"] == [70, 50, 0.5] * 17


def test_pictures_show_the_poses_where_they_are(tool: Callable[..., int], tmp_path: Path) -> None:
    source = picture(tmp_path / "a.png", spot=(60, 45))
    assert tool("--input", source, "--output", "one/b.png") == demo.DONE
    assert files_below(tmp_path / "one") == {"b.png", "results.json"}
    drawn = cv2.imread("one/b.png")
    assert drawn[44:47, 59:62].max(axis=2).min() > 80
    assert not drawn[:45, :40].any()  # the score stands below


def test_score_threshold(tool: Callable[..., int], tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for threshold, expected in ((0.05, 2), (0.4, 1), (0.9, 0)):
        assert tool("--input", "a.png", "--output", "o", "--score-threshold", threshold) == 0
        assert len(results(tmp_path / "o")) == expected


def test_outputs_of_an_earlier_run_are_no_inputs(tool: Callable[..., int], tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    for _ in range(2):
        assert tool("--input", "in", "--output", "in/out") == demo.DONE
    assert files_below(tmp_path / "in") == {"a.png", "out/poses/a.png", "out/results.json"}


def test_pattern_and_folder_together_each_image_once(
    tool: Callable[..., int], tmp_path: Path
) -> None:
    for name in ("x/1.png", "x/2.png", "y/1.png", "y/[1].png"):
        picture(tmp_path / name)
    inputs = ["x/*.png", "x", "y/[1].png"]  # the last is a file, not the pattern
    assert tool("--input", *inputs, "--output", "out") == demo.DONE
    assert files_below(tmp_path / "out" / "poses") == {"x/1.png", "x/2.png", "y/[1].png"}


def test_names_that_become_the_same_stay_apart(tmp_path: Path) -> None:
    sources = [tmp_path / name for name in ("a.tif", "a.tif.png", "a.tif.png.png")]
    jobs = make_jobs(sources, tmp_path, tmp_path / "out")
    assert len({job.picture for job in jobs}) == 3


@pytest.mark.fault
def test_images_of_all_kinds_are_done_or_listed(
    tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    picture(photos / "a.JPG")
    (photos / "b.jfif").write_bytes((photos / "a.JPG").read_bytes())
    (photos / "no_suffix").write_bytes((photos / "a.JPG").read_bytes())
    (photos / "README").write_text("no image")
    if features.check("avif"):
        Image.open(photos / "a.JPG").save(photos / "c.avif")
    assert tool("--input", "photos", "--output", "out") == demo.DONE
    done = {"a.JPG", "b.jfif.png", "no_suffix.png"}
    done |= {"c.avif.png"} if features.check("avif") else set()
    assert files_below(tmp_path / "out" / "poses") == done

    (photos / "d.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (photos / "e.dng").write_bytes(b"raw")
    (photos / "f.jpg").symlink_to("gone.jpg")
    video(photos / "walk.avi")
    capsys.readouterr()
    assert tool("--input", "photos", "--output", "out") == demo.SOME_LEFT_OUT
    captured = capsys.readouterr()
    assert f"images: {len(done)}, " in captured.out
    assert "left out 4:" in captured.err
    assert "d.HEIC: no image that Pillow knows" in captured.err
    assert "inspose_d2[heic]" in captured.err
    assert "e.dng: .dng cannot be read: save it as JPEG or PNG" in captured.err
    assert "f.jpg: cannot be read: No such file" in captured.err
    assert "walk.avi: a video: give it alone, as --input" in captured.err


@pytest.mark.fault
def test_links_are_followed_and_end(tool: Callable[..., int], tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "far.png")
    picture(tmp_path / "in" / "z" / "deep" / "near.png")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "a").symlink_to(tmp_path / "in" / "z" / "deep")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "z" / "self").symlink_to(".")
    (tmp_path / "in" / "picture.png").symlink_to(tmp_path / "elsewhere" / "far.png")
    expected = {"linked/far.png", "z/deep/near.png", "picture.png"}
    for _ in range(2):
        assert tool("--input", "in", "--output", "in/out") == demo.DONE
        assert files_below(tmp_path / "in" / "out" / "poses") == expected
    assert tool("--input", "in/*", "--output", "out") == demo.DONE  # folders of a pattern too
    assert "linked/far.png" in files_below(tmp_path / "out" / "poses")


@pytest.mark.fault
def test_files_of_macos_are_no_images(tool: Callable[..., int], tmp_path: Path) -> None:
    picture(tmp_path / "in" / "photo.png")
    for name in ("._photo.png", "__MACOSX/photo.png", "__MACOSX/._photo.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0\5\x16\7Mac OS X")
    assert tool("--input", "in", "--output", "out") == demo.DONE
    assert files_below(tmp_path / "out" / "poses") == {"photo.png"}


@pytest.mark.fault
def test_folder_that_cannot_be_looked_into_is_listed(
    tool: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "closed" / "b.png")
    listed = os.listdir

    def refuse(folder: Path) -> list[str]:
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    assert tool("--input", "in", "--output", "out") == demo.SOME_LEFT_OUT
    assert "closed: cannot be looked into: Permission denied" in capsys.readouterr().err


@pytest.mark.fault
def test_image_comes_through_a_pipe(tool: Callable[..., int], tmp_path: Path) -> None:
    data = picture(tmp_path / "a.png").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    assert tool("--input", "pipe", "--output", "out") == demo.DONE
    writer.join()
    assert files_below(tmp_path / "out") == {"poses/pipe.png", "results.json"}


@pytest.mark.fault
def test_video_that_ends_early_is_told(
    tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = video(tmp_path / "walk.avi", frames=60)
    source.write_bytes(source.read_bytes()[: source.stat().st_size * 3 // 4])
    assert tool("--input", source, "--output", "out") == demo.SOME_LEFT_OUT
    assert "walk.avi: the file says 60 frames, " in capsys.readouterr().err
    assert 0 < len(results(tmp_path / "out")) < 60


def test_nothing_done_has_another_status(tool: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"")
    assert tool("--input", "broken.jpg", "--output", "out") == demo.NOTHING
    assert results(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nowhere", "--output", "o"], "--input nowhere: no such file"),
        (["--input", "no.mp4", "--output", "o"], "--input no.mp4: no such file"),
        (["--input", "a.png", "--output", "a.png"], "would be overwritten"),
        (["--input", "a.png", "b.png", "--output", "c.png"], "2 images need a folder"),
        (["--input", "bad.mp4", "--output", "o"], "cannot be opened as a video"),
    ],
)
def test_what_cannot_begin_is_said_in_a_line(
    arguments: list[str],
    message: str,
    tool: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "results.json").write_text("[1]")
    assert tool(*arguments) == cli.USAGE
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert results(tmp_path / "o") == [1]  # of an earlier run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.mp4", "b.mp4"], "one video at a time"),
        (["a.mp4", "--kp-net-view"], "--kp-net-view is for images"),
        (["a.png", "--video-out", "b.webm"], "--video-out is for a video"),
        (["a.mp4", "--video-out", "b.mp4"], "must end with .webm"),
        (["a.png", "--batch-size", "0"], "--batch-size: must be at least 1"),
        (["a.png", "--track"], "--track and --smooth are for a video or a camera"),
        (["a.png", "--smooth"], "--track and --smooth are for a video or a camera"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(["predict", "--output", "o", "--input", *arguments])
    except SystemExit as end:
        status = end.code
    assert status == cli.USAGE
    assert message in capsys.readouterr().err


def test_config_without_weights_is_refused() -> None:
    args = parse("--input", "a", "--output", "o", "--config-file", "x.yaml")
    with pytest.raises(ValueError, match="--config-file needs --weights"):
        demo.make_config(args)


def test_default_is_the_model_in_the_package() -> None:
    cfg = demo.make_config(parse("--input", "a", "--output", "o"))
    assert Path(cfg.MODEL.WEIGHTS).name == "people_lite0.pth"


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("with_pyav", [True, False])
def test_video_keeps_frames_rate_and_size(
    with_pyav: bool,
    batch_size: int,
    tool: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if with_pyav:
        pytest.importorskip("av", reason="the extra `video`")
    else:
        monkeypatch.setattr("inspose_d2.data.video.av", None)
    source = video(tmp_path / "walk.avi")
    extra = ["--batch-size", batch_size, "--video-out", "v/w.webm"]
    assert tool("--input", source, "--output", "out", *extra) == demo.DONE
    capture = cv2.VideoCapture("v/w.webm")
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12.5)
    assert int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little") == b"VP90"
    frames = frames_of("v/w.webm")
    assert [x.shape for x in frames] == [(*SIZE, 3)] * 6
    for i, frame in enumerate(frames):  # in their order
        assert frame[30, :, 1].argmax() // 8 == i
        # With the pose at the first of the brightest pixels: the upper end of the bar.
        assert not np.allclose(frame[1, 8 * i, :], 200, atol=30)
    assert [x["image_id"] for x in results(tmp_path / "out")] == list(range(6))
    assert [x["seconds"] for x in results(tmp_path / "out")] == [0, 0.08, 0.16, 0.24, 0.32, 0.4]
    out = capsys.readouterr().out
    assert "frames: 6, poses: 6, " in out
    assert "frames/s" in out
    assert ("without sound" in out) == (not with_pyav)
    assert {x["file_name"] for x in results(tmp_path / "out")} == {"walk.avi"}


def test_interrupted_video_leaves_whole_files(
    tool: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = MadeUpPredictor.poses

    def interrupted(image: np.ndarray) -> Instances:
        if image[30, :, 1].argmax() // 8 == 3:
            raise KeyboardInterrupt
        return found(image)

    monkeypatch.setattr(MadeUpPredictor, "poses", staticmethod(interrupted))
    source = video(tmp_path / "walk.avi")
    assert tool("--input", source, "--output", "out") == cli.INTERRUPTED
    assert len(results(tmp_path / "out")) == 3
    assert len(frames_of("out/poses/walk.webm")) == 3


def test_webcam_without_a_display_writes_files(
    tool: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = video(tmp_path / "camera.avi")
    opened = cv2.VideoCapture
    plugged = [str(source)]  # once: it is pulled out at the end
    monkeypatch.setattr(cv2, "VideoCapture", lambda _: opened(plugged.pop() if plugged else ""))
    monkeypatch.setattr("inspose_d2.data.video.WAITS", (0, 0))
    monkeypatch.setattr(cv2, "imshow", lambda *_: pytest.fail("there is no display"))
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert tool("--input", "webcam", "--output", "out") == demo.SOME_LEFT_OUT
    assert files_below(tmp_path / "out") == {"poses/webcam.webm", "results.json"}
    assert "webcam: broke off after " in capsys.readouterr().err


@pytest.fixture
def real_model(tiny_cfg: Callable[..., CfgNode], tmp_path: Path) -> list[str]:
    """Arguments for a model that finds persons everywhere, all in ``tmp_path``."""
    cfg = tiny_cfg()
    torch.manual_seed(0)
    model = build_model(cfg)
    torch.nn.init.constant_(model.head.cls_score.bias, 3.0)
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    (tmp_path / "c.yaml").write_text(cfg.dump())
    return ["--config-file", "c.yaml", "--weights", "w.pth", "--score-threshold", "0"]


def test_kp_net_view_is_drawn_by_a_real_model(
    real_model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "in" / "deep" / "a.png")
    picture(tmp_path / "in" / "b.jpg", size=(50, 90))
    arguments = ["--input", "in", "--output", "out", "--kp-net-view", "--batch-size", "2"]
    assert cli.main(["predict", *arguments, *real_model]) == demo.DONE
    expected = {f"{x}/{y}" for x in ("poses", "kp_nets") for y in ("deep/a.png", "b.jpg")}
    assert files_below(tmp_path / "out") == expected | {"results.json"}
    assert cv2.imread("out/kp_nets/b.jpg").shape[1] == 900  # enlarged for the panels
    assert len(results(tmp_path / "out")[0]["keypoints"]) == 3 * 17


def start(real_model: list[str], folder: Path, *launcher: str) -> "subprocess.Popen[str]":
    """Start the command on the images in ``folder / in``, with no display."""
    environment = {k: v for k, v in os.environ.items() if "DISPLAY" not in k}
    environment["PYTHONPATH"] = str(ROOT)
    words = ["-m", "inspose_d2", "predict", "--input", "in", "--output", "out", *real_model]
    command, pipe = [sys.executable, *launcher, *words], subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=pipe, stderr=pipe
    )


def interrupt_at(count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the made-up predictor end the program at a picture; returns a list that counts them."""
    found, seen = MadeUpPredictor.poses, []

    def counted(image: np.ndarray) -> Instances:
        seen.append(1)
        if len(seen) == count:
            raise KeyboardInterrupt
        return found(image)

    monkeypatch.setattr(MadeUpPredictor, "poses", staticmethod(counted))
    return seen


def many_pictures(folder: Path, count: int) -> None:
    """Pictures whose poses differ, and one that cannot be read."""
    for i in range(count):
        picture(folder / f"{'abc'[i % 3]}{i}.png", spot=(3 + i % 70, 5 + i % 50))
    (folder / "broken.jpg").write_bytes(b"no image")


@pytest.mark.fault
def test_interrupted_pictures_go_on_where_they_were(
    tool: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many_pictures(tmp_path / "in", 9)
    assert tool("--input", "in", "--output", "whole") == demo.SOME_LEFT_OUT
    seen = interrupt_at(6, monkeypatch)
    assert tool("--input", "in", "--output", "out") == cli.INTERRUPTED
    assert len(results(tmp_path / "out")) == 5
    part = tmp_path / "out" / "unfinished" / "0.jsonl"
    part.write_bytes(part.read_bytes()[:-20])  # as a kill leaves it
    assert tool("--input", "in", "--output", "out") == demo.SOME_LEFT_OUT
    assert len(seen) == 6 + 4 + 1  # of the torn line too, none of the other four
    assert (tmp_path / "out/results.json").read_text() == (
        tmp_path / "whole/results.json"
    ).read_text()
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole")


@pytest.mark.fault
@pytest.mark.parametrize("what", ["score_threshold", "config", "weights", "input"])
def test_unfinished_pictures_of_another_run_are_not_mixed_in(
    what: str,
    tool: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    many_pictures(tmp_path / "in", 4)
    interrupt_at(3, monkeypatch)
    command = ["--input", "in", "--output", "out"]
    assert tool(*command) == cli.INTERRUPTED
    before = (tmp_path / "out/results.json").read_text()
    changed = list(command)
    if what == "score_threshold":
        changed += ["--score-threshold", "0.05"]
    elif what == "config":
        changed += ["--config-file", "quick/synthetic_people", "--weights", "w.pth"]
    elif what == "weights":
        (tmp_path / "w.pth").write_bytes(b"other")
    else:
        picture(tmp_path / "in" / "a0.png", size=(61, 81))
    run = tool
    if what == "config":  # the fixture adds its own, and the last word counts
        run = lambda *words: cli.main(["predict", *words])  # noqa: E731
    assert run(*changed) == cli.USAGE
    error = capsys.readouterr().err
    assert "out/unfinished holds the pictures that an interrupted run has finished" in error
    assert f"with another {what}: " in error
    assert (tmp_path / "out/results.json").read_text() == before


@pytest.mark.fault
def test_full_disk_ends_pictures_with_one_line(
    tool: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    many_pictures(tmp_path / "in", 6)

    def full(path: Path, _: np.ndarray) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(demo, "write_picture", full)
    assert tool("--input", "in", "--output", "out") == cli.USAGE
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_second_program_in_the_same_folder_is_refused(
    tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "a.png")
    statuses = []

    class Slow(MadeUpPredictor):
        def __call__(self, *arguments: Any, **named: Any) -> list[dict[str, Instances]]:
            if not statuses:
                statuses.append(0)
                statuses.append(tool("--input", "a.png", "--output", "out"))
            return super().__call__(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "InsPosePredictor", Slow)
        assert tool("--input", "a.png", "--output", "out") == demo.DONE
    assert statuses == [0, cli.USAGE]
    assert "another inspose predict is writing there" in capsys.readouterr().err


@pytest.mark.fault
def test_machine_with_an_output_folder_of_its_own_is_refused(
    tool: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture(tmp_path / "a.png")
    monkeypatch.setattr(shards.comm, "is_main_process", lambda: False)
    assert tool("--input", "a.png", "--output", "out") == cli.USAGE
    assert "machines need one --output in common" in capsys.readouterr().err


@pytest.mark.fault
def test_pictures_of_other_workers_that_do_not_arrive_are_missed(
    tool: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    many_pictures(tmp_path / "in", 3)
    with monkeypatch.context() as patch:
        patch.setattr(shards.Shards, "add", lambda *_: None)
        assert tool("--input", "in", "--output", "out") == cli.USAGE
    assert "out/unfinished lacks 3 pictures of other workers" in capsys.readouterr().err
    assert tool("--input", "in", "--output", "out") == demo.SOME_LEFT_OUT
    assert len(results(tmp_path / "out")) == 3


@pytest.mark.fault
def test_worker_that_waits_for_one_that_is_gone_ends_with_one_line(
    tool: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture(tmp_path / "a.png")

    def gone(self: shards.Shards) -> None:
        monkeypatch.setattr(shards.comm, "synchronize", closed)
        wait(self)

    def closed() -> None:
        raise RuntimeError("Connection closed by peer")

    wait = shards.Shards.wait_for_others
    monkeypatch.setattr(shards.Shards, "wait_for_others", gone)
    assert tool("--input", "a.png", "--output", "out") == cli.USAGE
    assert capsys.readouterr().err.endswith(
        "another worker has ended: repeat the command to go on\n"
    )
    assert len(results(tmp_path / "out")) == 1


@pytest.mark.fault
def test_file_system_without_locks_will_do(
    tool: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    picture(tmp_path / "a.png")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert tool("--input", "a.png", "--output", "out") == demo.DONE


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_over_a_long_video(
    tool: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = 240 * 25  # frames of 14 KB: kept, they would be 86 MB
    used = []

    class Long:
        def __init__(self, _: str) -> None:
            self.number = 0

        def get(self, key: int) -> float:
            values = {cv2.CAP_PROP_FPS: 25.0, cv2.CAP_PROP_FRAME_COUNT: float(length)}
            return values.get(key, 40.0 * (self.number - 1))

        def read(self) -> tuple[bool, np.ndarray | None]:
            if self.number == length:
                return False, None
            frame = np.zeros((*SIZE, 3), np.uint8)
            frame[:, self.number % 80] = 200
            self.number += 1
            if self.number % 300 == 0:
                used.append(status("VmRSS") / 2**20)  # MiB
            return True, frame

        def isOpened(self) -> bool:  # noqa: N802  OpenCV's name
            return True

        def release(self) -> None:
            pass

    (tmp_path / "long.mp4").touch()
    opened = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Long)
    assert tool("--input", "long.mp4", "--output", "out") == demo.DONE
    assert len(used) == 20
    assert max(used[4:]) < used[3] + 30, used
    found = results(tmp_path / "out")
    assert len(found) == length
    assert found[-1]["image_id"] == length - 1
    assert found[-1]["seconds"] == pytest.approx(239.96)
    seconds = opened("out/poses/long.webm").get(cv2.CAP_PROP_FRAME_COUNT) / 25
    assert seconds == pytest.approx(240, abs=1)


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_worker_of_two_and_a_second_start_give_what_one_gives(
    real_model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    many_pictures(tmp_path / "in", 150)
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    parts = [tmp_path / "out" / "unfinished" / f"{rank}.jsonl" for rank in range(2)]

    process = start(real_model, tmp_path, *two)
    limit = time.monotonic() + 500
    while not all(x.is_file() and x.stat().st_size > 8_000 for x in parts):
        assert time.monotonic() < limit, process.communicate()
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 1, error
    done = sum(x.read_text().count('"poses"') for x in parts)
    assert 0 < done < 150

    process = start(real_model, tmp_path, *two)
    out, error = process.communicate(timeout=500)
    assert process.returncode == 1, error  # torchrun's own for any worker that ends with 3
    assert f"going on: {done} of 151 pictures are finished" in error
    assert "left out 1:" in error
    assert error.count("broken.jpg: no image that Pillow knows") == 1
    assert "images: 150, " in out
    assert "images/s" in out

    alone = ["predict", "--input", "in", "--output", "alone", *real_model]
    assert cli.main(alone) == demo.SOME_LEFT_OUT
    assert Path("alone/results.json").read_text() == Path("out/results.json").read_text()
    assert files_below(tmp_path / "alone") == files_below(tmp_path / "out")


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, cli.INTERRUPTED), (signal.SIGTERM, cli.TERMINATED)]
)
def test_interrupted_command_leaves_whole_files(
    signum: int, status: int, real_model: list[str], tmp_path: Path
) -> None:
    for i in range(1000):
        picture(tmp_path / "in" / f"{i}.png")
    process = start(real_model, tmp_path)
    poses = tmp_path / "out" / "poses"
    limit = time.monotonic() + 600
    while time.monotonic() < limit and (not poses.is_dir() or len(list(poses.iterdir())) < 5):
        time.sleep(0.05)
    process.send_signal(signum)
    error = process.communicate(timeout=600)[1]
    assert process.returncode == status, error
    assert "Traceback" not in error
    results(tmp_path / "out")
    pictures = list(poses.iterdir())
    assert 5 <= len(pictures) < 1000
    assert all(cv2.imread(str(x)) is not None for x in pictures)


def test_persons_of_a_video_keep_their_numbers(tool: Callable[..., int], tmp_path: Path) -> None:
    source = video(tmp_path / "dance.avi", frames=6, fps=12.5)
    for options in (("--track",), ("--smooth",), ("--track", "--smooth", "--batch-size", 4)):
        assert tool("--input", source, "--output", "out", *options) == demo.DONE
        found = results(tmp_path / "out")
        assert [x["image_id"] for x in found] == list(range(6))
        # Points of a pixel are no person: nothing is told of ids but that they are there.
        assert all(x["track_id"] >= 1 for x in found)
        assert cv2.VideoCapture("out/poses/dance.webm").get(cv2.CAP_PROP_FRAME_COUNT) == 6
    assert tool("--input", source, "--output", "out") == demo.DONE
    assert not any("track_id" in x for x in results(tmp_path / "out"))
