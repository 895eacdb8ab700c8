"""What is odd in a file of annotations is repaired, told or refused before a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from inspose_d2 import cli, register_coco_keypoints
from inspose_d2.data.annotations import find_problems
from inspose_d2.data.check import check_config
from inspose_d2.data.coco_file import check_annotations, load_annotations, plain
from inspose_d2.data.dataset_mapper import InsPoseDatasetMapper
from inspose_d2.data.find_file import find_file
from inspose_d2.engine.trainer import Trainer
from inspose_d2.evaluation import InsPoseEvaluator
from inspose_d2.evaluation import coco as evaluation

NAMES = ["nose", "left_eye", "right_eye"]
SIZE = (64, 48)  # width, height
pytestmark = pytest.mark.fault


def person(annotation_id: int, image_id: int = 1, **more: Any) -> dict[str, Any]:
    x, y = 10 + annotation_id % 5, 12
    keypoints = [x, y, 2, x + 9, y + 2, 2, x + 5, y + 20, 1]
    own = {"id": annotation_id, "image_id": image_id, "category_id": 1, "iscrowd": 0}
    box = {"bbox": [x - 2, y - 2, 14, 26], "area": 200, "num_keypoints": 3}
    return own | box | {"keypoints": keypoints} | more


def people(*persons: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in (1, 2)],
        "categories": [{"id": 1, "name": "person", "keypoints": NAMES}],
        "annotations": list(persons) or [person(1), person(2), person(3, 2)],
    } | more


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for i in (1, 2):
        Image.fromarray(np.full((48, 64, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def write(folder: Path, coco: Any, encoding: str = "utf-8") -> str:
    path = folder / "people.json"
    path.write_text(json.dumps(coco, ensure_ascii=False), encoding=encoding)
    return str(path)


@pytest.fixture
def register(files: Path) -> Any:
    """Register a file and its folder as "odd_people"."""

    def make(coco: Any, **more: Any) -> str:
        register_coco_keypoints("odd_people", write(files, coco), files, **more)
        return "odd_people"

    yield make
    if "odd_people" in DatasetCatalog:
        DatasetCatalog.remove("odd_people")
        MetadataCatalog.remove("odd_people")


def validate(*flags: Any) -> int:
    return cli.main(["validate", "--input", *map(str, flags)])


@pytest.mark.parametrize("odd", [[[]], [[1, 2]], [], "x", None, {"counts": None}, [1]])
def test_segmentation_is_not_looked_at(register: Callable[..., str], odd: Any) -> None:
    records = DatasetCatalog.get(register(people(person(1, segmentation=odd))))
    assert [len(x["annotations"]) for x in records] == [1, 0]


@pytest.mark.parametrize("box", [[5, 5, 0, 9], [5, 5, 9, 0], [0, 0, 0, 0], None])
def test_flat_or_missing_box_is_made_from_the_keypoints(
    register: Callable[..., str], tiny_cfg: Callable[..., CfgNode], box: list[int] | None
) -> None:
    odd = person(1, bbox=box)
    if box is None:
        del odd["bbox"]
    name = register(people(odd))
    cfg = tiny_cfg(
        ["DATASETS.TRAIN", (name,), "MODEL.INSPOSE.NUM_KEYPOINTS", 3, "INPUT.RANDOM_FLIP", "none"]
    )
    mapped = InsPoseDatasetMapper(cfg, True)(DatasetCatalog.get(name)[0])
    scale = mapped["image"].shape[1] / 48
    (made,) = mapped["instances"].gt_boxes.tensor / scale
    assert made.tolist() == pytest.approx([11.5, 12.5, 20.5, 32.5], abs=0.51)


def test_category_that_only_groups_does_no_harm(
    register: Callable[..., str], files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group = {"id": 0, "name": "crew", "supercategory": "none"}
    coco = people(categories=[group, people()["categories"][0]])
    name = register(coco)
    assert MetadataCatalog.get(name).thing_classes == ["person"]
    classes = {a["category_id"] for x in DatasetCatalog.get(name) for a in x["annotations"]}
    assert classes == {0}
    assert validate(files / "people.json", "--images", files) == 0
    assert "no problem found" in capsys.readouterr().out


def test_two_categories_with_annotations_are_refused_alike(files: Path) -> None:
    dog = {"id": 2, "name": "dog", "keypoints": NAMES}
    coco = people(person(1), person(2, category_id=2))
    coco["categories"].append(dog)
    path = write(files, coco)
    assert validate(path) == 2
    with pytest.raises(ValueError, match="inspose convert coco --category NAME"):
        register_coco_keypoints("odd_people", path, files)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_read_whatever_the_locale(
    files: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    coco = people(info={"description": "été"})
    assert load_annotations(write(files, coco, encoding)) == coco


def named(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    coco = people()
    for annotation in coco["annotations"]:
        change(annotation)
    return coco


def fractions(annotation: dict[str, Any]) -> None:
    of = (*SIZE, 1) * 3
    annotation["keypoints"] = [
        value / size for value, size in zip(annotation["keypoints"], of, strict=True)
    ]


ODD = {
    "fractions": (fractions, "fractions of the image"),
    "small boxes": (lambda x: x.update(bbox=[0.1, 0.1, 0.5, 0.5]), "bbox smaller than a pixel"),
    "corners": (lambda x: x.update(bbox=[30, 20, 55, 45]), r"is it \[x0, y0, x1, y1\]"),
    "centres": (lambda x: x.update(bbox=[17, 23, 14, 26]), "less than half of the person's"),
    "of another person": (lambda x: x.update(bbox=[40, 0, 9, 9]), "less than half"),
}


@pytest.mark.parametrize("name", ODD)
def test_other_units_and_boxes_are_refused(files: Path, name: str) -> None:
    change, told = ODD[name]
    with pytest.raises(ValueError, match=told):
        check_annotations(write(files, named(change)))


def test_one_odd_person_of_many_is_a_warning(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = person(50, bbox=[40, 0, 9, 9])
    check_annotations(write(files, people(*(person(i) for i in range(1, 13)), odd)))
    (message,) = set(caplog.messages)
    assert "1 of 13 persons: bbox has less than half" in message
    assert "annotation id 50" in message


@pytest.mark.parametrize(("area", "told"), [(0, "must be above 0"), (0.2, "hundredth of the box")])
def test_area_that_no_pose_can_be_right_for_is_refused(files: Path, area: float, told: str) -> None:
    path = write(files, named(lambda x: x.update(area=area)))
    check_annotations(path)  # to be trained on
    with pytest.raises(ValueError, match=f"area.*{told}"):
        check_annotations(path, evaluation=True)
    assert validate(path, "--evaluation") == 2


def perfect(name: str, coco: dict[str, Any]) -> float:
    """AP of the annotated poses themselves."""
    evaluator = InsPoseEvaluator(name)
    evaluator.reset()
    for image in coco["images"]:
        own = [x for x in coco["annotations"] if x["image_id"] == image["id"]]
        points = torch.tensor([x["keypoints"] for x in own]).float().reshape(len(own), 3, 3)
        points[..., :2] += 0.5
        corners = torch.cat([points[..., :2].amin(1), points[..., :2].amax(1)], dim=1)
        poses = Instances(
            (48, 64),
            pred_keypoints=points,
            scores=torch.linspace(0.9, 0.8, len(own)),
            pred_classes=torch.zeros(len(own), dtype=torch.long),
            pred_boxes=Boxes(corners),
        )
        evaluator.process([{"image_id": image["id"]}], [{"instances": poses}])
    return evaluator.evaluate()["keypoints"]["AP"]


@pytest.mark.parametrize("backend", ["faster", "detectron2"])
@pytest.mark.parametrize("first_id", [-3, -1, 0, 1])
def test_perfect_poses_are_100_whatever_the_ids(
    register: Callable[..., str], monkeypatch: pytest.MonkeyPatch, backend: str, first_id: int
) -> None:
    if backend == "detectron2":
        monkeypatch.setattr(evaluation, "faster_coco_eval", None)
    coco = people(*(person(first_id + i, 1 + i % 2) for i in range(3)))
    assert perfect(register(coco), coco) == pytest.approx(100)


def test_counts_that_contradict_the_labels_are_made_anew(
    register: Callable[..., str], files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = named(lambda x: x.update(num_keypoints=0))
    assert perfect(register(coco), coco) == pytest.approx(100)
    assert validate(files / "people.json", "--evaluation") == 0
    assert "num_keypoints of 3 persons is not what" in capsys.readouterr().out


def test_more_persons_than_the_protocol_looks_at_are_told(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(files, people(*(person(i) for i in range(1, 23))))
    assert validate(path, "--evaluation") == 0
    assert "1 images have more than 20 persons, up to 22" in capsys.readouterr().out


def test_image_of_another_size_is_found_before_the_run(files: Path) -> None:
    coco = people()
    coco["images"][1]["width"] = 128
    path = write(files, coco)
    message = r"images \(image id 2\), width, height: 128 x 48 .*2\.png is 64 x 48"
    with pytest.raises(ValueError, match=message):
        check_annotations(path, image_root=str(files))
    assert validate(path, "--images", files) == 2


def test_folder_without_the_images_is_found_before_the_run(files: Path, tmp_path: Path) -> None:
    path = write(files, people())
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"file_name: .*No such file"):
        check_annotations(path, image_root=str(empty))
    coco = people()
    coco["images"] += [coco["images"][0] | {"id": i} for i in range(3, 101)]
    (files / "2.png").unlink()
    check_annotations(write(files, coco), image_root=str(files))  # training does without a few


def test_bad_set_for_evaluation_ends_training_before_it_begins(
    register: Callable[..., str], tiny_cfg: Callable[..., CfgNode]
) -> None:
    name = register(named(lambda x: x.pop("area")))
    cfg = tiny_cfg(["DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)])
    cfg.MODEL.INSPOSE.NUM_KEYPOINTS = 3
    with pytest.raises(ValueError, match="area: is missing"):
        Trainer(cfg)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), -1.0, "x", [0.05]])
def test_sigmas_that_are_no_numbers_above_0_are_refused(
    tiny_cfg: Callable[..., CfgNode], bad: Any
) -> None:
    cfg = tiny_cfg()
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [bad] * 17
    with pytest.raises(ValueError, match=r"TEST\.KEYPOINT_OKS_SIGMAS must be numbers above 0"):
        check_config(cfg, training=False)


def test_file_names_of_other_systems_are_found(tmp_path: Path) -> None:
    (tmp_path / "Set1").mkdir()
    there = tmp_path / "Set1" / "Caf\u00e9.JPG"
    there.touch()
    for name in ("Set1\\Caf\u00e9.JPG", "set1/caf\u00e9.jpg", "Set1/Cafe\u0301.JPG"):
        assert find_file(f"{tmp_path}/{name}") == str(there)
    missing = f"{tmp_path}/Set1/tea.jpg"
    assert find_file(missing) == missing
    (tmp_path / "Set1" / "CAF\u00c9.jpg").touch()  # now two files are meant
    assert find_file(f"{tmp_path}/set1/caf\u00e9.jpg").endswith("set1/caf\u00e9.jpg")


def test_backslashes_are_trained_on(files: Path) -> None:
    (files / "set1").mkdir()
    coco = people()
    for image in coco["images"]:
        (files / image["file_name"]).rename(files / "set1" / image["file_name"])
        image["file_name"] = "set1\\" + image["file_name"]
    assert validate(write(files, coco), "--images", files) == 0
    check_annotations(write(files, coco), image_root=str(files))


@pytest.mark.parametrize("flip", ["horizontal", "vertical"])
def test_mirrored_eyes_change_places(
    register: Callable[..., str],
    tiny_cfg: Callable[..., CfgNode],
    monkeypatch: pytest.MonkeyPatch,
    flip: str,
) -> None:
    name = register(people())
    options = ["DATASETS.TRAIN", (name,), "MODEL.INSPOSE.NUM_KEYPOINTS", 3]
    cfg = tiny_cfg([*options, "INPUT.RANDOM_FLIP", flip, "INPUT.MIN_SIZE_TRAIN", (48,)])
    mapper = InsPoseDatasetMapper(cfg, True)
    monkeypatch.setattr(np.random, "rand", lambda *_: np.zeros(()))  # flips for sure
    monkeypatch.setattr(np.random, "uniform", lambda low=0, *_: low)
    record = DatasetCatalog.get(name)[0]
    (before, *_) = np.reshape([x["keypoints"] for x in record["annotations"]], (2, 3, 3))
    (after, *_) = mapper(record)["instances"].gt_keypoints.tensor.numpy()
    mirrored = before.copy()
    axis, side = (0, 64) if flip == "horizontal" else (1, 48)
    mirrored[:, axis] = side - before[:, axis]
    assert after == pytest.approx(mirrored[[0, 2, 1]])


@pytest.mark.parametrize(
    "names",
    [
        ["lsho", "rsho", "head"],
        ["wheel_fl", "wheel_fr", "roof"],
        ["auge links", "auge rechts", "nase"],
        ["frontleftwheel", "frontrightwheel", "roof"],
    ],
)
def test_names_that_look_like_a_pair_are_told(
    register: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
    names: list[str],
) -> None:
    categories = [{"id": 1, "name": "thing", "keypoints": names}]
    register(people(categories=categories), sigmas=[0.05] * 3)
    said = "\n".join(caplog.messages)
    assert repr(names[0]) in said
    assert repr(names[1]) in said
    assert repr(names[2]) not in said


def test_plain_changes_nothing_but_what_it_says(files: Path) -> None:
    coco = people()
    assert plain(coco, evaluation=True) == coco
    assert plain(coco, evaluation=False) == coco
    assert not list(find_problems(coco, image_root=str(files)))
