"""``inspose submit``: the zip for COCO's keypoint server, and what it refuses."""

import copy
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from inspose_d2 import cli
from inspose_d2.cli import submit as submit_module

Pose = dict[str, Any]
STEM = "person_keypoints_test-dev2017_InsPose-R50_results"


def pose(image_id: int = 7, score: float = 0.5, shift: float = 0.0, **other: Any) -> Pose:
    """A pose as COCOEvaluator writes it."""
    keypoints = [x for k in range(17) for x in (10.123456 + k + shift, 20.5 + k, 0.25)]
    box = {"bbox": [1, 2, 3, 4]}
    return {"image_id": image_id, "category_id": 1, "keypoints": keypoints, "score": score} | (
        box | other
    )


@pytest.fixture
def submit(tmp_path: Path) -> Callable[..., int]:
    """Run the script in ``tmp_path`` on poses, or on the text of a results file."""

    def run(poses: Any, name: str = "InsPose-R50", info: Any = None) -> int:
        info = info or {"info": {}, "images": [{"id": i} for i in (7, 8, 9)], "licenses": []}
        text = poses if isinstance(poses, str) else json.dumps(poses)
        (tmp_path / "results.json").write_text(text)
        (tmp_path / "info.json").write_text(json.dumps(info))
        paths = [str(tmp_path / "results.json"), "--image-info", str(tmp_path / "info.json")]
        output = ["--output", str(tmp_path / "out")]
        return cli.main(["submit", "--input", *paths, "--name", name, *output])

    return run


def read(folder: Path) -> list[Pose]:
    """Poses in the only file of the only zip of a folder, both with the server's names."""
    assert [path.name for path in folder.iterdir()] == [f"{STEM}.zip"]
    with zipfile.ZipFile(folder / f"{STEM}.zip") as archive:
        assert archive.namelist() == [f"{STEM}.json"]
        return json.loads(archive.read(f"{STEM}.json"))


def test_zip_holds_the_poses_with_nothing_but_what_the_server_reads(
    submit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit([pose(), pose(8, 0.9)]) == 0
    first, second = read(tmp_path / "out")
    assert first.keys() == {"image_id", "category_id", "keypoints", "score"}
    assert (first["image_id"], first["category_id"], first["score"]) == (7, 1, 0.5)
    assert (second["image_id"], second["score"]) == (8, 0.9)
    # Rounded to hundredths; no half pixel moved; the unused third number is 1.
    assert first["keypoints"][:6] == [10.12, 20.5, 1, 11.12, 21.5, 1]
    assert len(first["keypoints"]) == 51
    printed = capsys.readouterr()
    assert "2 poses in 2 images" in printed.out
    assert printed.err.startswith("warning: 1 of 3 images have no pose")


def test_second_run_replaces_the_zip(submit: Callable[..., int], tmp_path: Path) -> None:
    assert submit([pose()]) == submit([pose(9)]) == 0
    assert [p["image_id"] for p in read(tmp_path / "out")] == [9]


def test_twenty_best_poses_of_each_image_stay(submit: Callable[..., int], tmp_path: Path) -> None:
    scores = [((7 * i) % 25) / 25 for i in range(25)]  # 0, 0.04, ... 0.96 out of order
    assert submit([pose(7, s, shift=i) for i, s in enumerate(scores)] + [pose(8, 0.0)]) == 0
    kept = read(tmp_path / "out")
    assert [p["score"] for p in kept if p["image_id"] == 7] == sorted(scores)[:4:-1]
    assert [p["score"] for p in kept if p["image_id"] == 8] == [0.0]


def test_coco_gives_the_same_figures_for_all_poses_and_for_the_kept(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scores = [0.9, 0.5, 0.5, 0.5, 0.4, *(0.3 - k / 100 for k in range(25))]
    shifts = [9, 2, 0, 60, 1, *(3 + 0.31 * k for k in range(25))]
    poses = [pose(i, *both) for i in (7, 8) for both in zip(scores, shifts, strict=True)]
    persons = [pose(image_id, shift=shift) for image_id in (7, 8) for shift in (0, 10, 60)]
    person = {"iscrowd": 0, "area": 2000.0, "num_keypoints": 17}
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 7}, {"id": 8}],
        "categories": [{"id": 1}],
        "annotations": [{**p, **person, "id": i} for i, p in enumerate(persons, start=1)],
    }
    truth.createIndex()

    def figures(results: list[Pose]) -> list[float]:
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "keypoints")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return list(evaluation.stats)

    kept = submit_module.for_server(poses)
    assert (len(poses), len(kept)) == (60, 40)
    assert figures(kept) == figures(poses)
    assert 0.1 < figures(kept)[0] < 0.95
    capsys.readouterr()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (pose(10), "image_id 10 is no image of the data set"),
        (pose(image_id="7"), "image_id '7' is no image of the data set"),
        (pose(category_id=0), "category_id is 0, not 1"),
        (pose(keypoints=[1.0] * 48), "keypoints are not a list of 51 numbers"),
        (pose(keypoints=None), "keypoints are not a list of 51 numbers"),
        (pose(keypoints=[1.0] * 50 + [math.nan]), "a keypoint is not a finite number"),
        (pose(keypoints=[1.0] * 50 + [True]), "a keypoint is not a finite number"),
        (pose(score=math.inf), "score inf is not a finite number"),
        (pose(score=None), "score None is not a finite number"),
        ({"image_id": 7, "category_id": 1, "keypoints": [1.0] * 51}, "no score"),
        (pose(8), "the same keypoints as entry 0"),
        ([], "[] is not an object"),
    ],
)
def test_wrong_pose_is_refused_by_its_number(
    submit: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wrong: Any,
    said: str,
) -> None:
    assert submit([pose(8), pose(9), wrong, wrong]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"results.json: 2 of 4 poses are wrong, first entry 2 (counted from 0): {said}" in (
        printed.err
    )
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("poses", "changes", "said"),
    [
        ("[]", {}, "results.json: has no poses"),
        ('{"annotations": []}', {}, "results.json: expected a list of poses"),
        ('[{"image_id": 7,', {}, "results.json is no JSON in UTF-8, or was cut off"),
        ([pose()], {"name": "../up"}, "--name '../up': use letters, digits and hyphens"),
        ([pose()], {"name": "a_b"}, "--name 'a_b': use letters"),
        ([pose()], {"name": ""}, "--name '': use letters"),
        ([pose()], {"info": [1]}, "info.json lists no images"),
        ([pose()], {"info": {"annotations": []}}, "info.json lists no images"),
    ],
)
def test_wrong_file_or_name_is_refused_in_one_line(
    submit: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    poses: Any,
    changes: dict[str, Any],
    said: str,
) -> None:
    assert submit(poses, **changes) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_failed_write_leaves_the_older_zip(
    submit: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert submit([pose()]) == 0

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    assert submit([pose(9)]) == 2
    assert [p["image_id"] for p in read(tmp_path / "out")] == [7]
    assert len(list((tmp_path / "out").iterdir())) == 1
