"""Bad annotation files: each is refused with what, where and what to do."""

import contextlib
import copy
import functools
import io
import json
import math
import operator
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from inspose_d2 import cli
from inspose_d2.cli import validate
from inspose_d2.data.annotations import find_problems
from inspose_d2.data.coco_file import check_annotations, in_memory, plain
from inspose_d2.data.dataset_mapper import InsPoseDatasetMapper
from inspose_d2.data.synthetic import build_synthetic_people
from inspose_d2.engine.trainer import Trainer
from inspose_d2.evaluation.coco import AP_BY_PEOPLE, METRICS, InsPoseEvaluator

NAN, INF = math.nan, math.inf
VAL = MetadataCatalog.get("synthetic_people_val")
RLE = {"counts": [6, 1, 13], "size": [4, 5]}


def person(annotation_id: int, image_id: int, **others: Any) -> dict[str, Any]:
    keypoints = [x for k in range(17) for x in (k + 1, k + 2, 2)]
    entry = {"id": annotation_id, "image_id": image_id, "category_id": 1, "iscrowd": 0}
    entry |= {"bbox": [1.0, 2.0, 16.0, 16.0], "area": 100.0}
    return {**entry, "num_keypoints": 17, "keypoints": keypoints, **others}


def valid() -> dict[str, Any]:
    """Images 3 (persons 7 and 8), 5 (person 9 and crowd 10) and 6 (nobody)."""
    images = [{"id": i, "file_name": f"{i}.png", "height": 32, "width": 48} for i in (3, 5, 6)]
    crowd = {"iscrowd": 1, "segmentation": RLE, "keypoints": [0] * 51, "num_keypoints": 0}
    annotations = [
        person(7, 3, segmentation=[[1, 1, 9, 1, 9, 9]]),
        person(8, 3),
        person(9, 5, keypoints=[0] * 51, num_keypoints=0),
        person(10, 5, **crowd),
    ]
    names = list(VAL.keypoint_names)
    categories = [{"id": 1, "name": "person", "keypoints": names}]
    coco = {"images": images, "categories": categories, "annotations": annotations}
    return copy.deepcopy(coco)  # tests change it


def keypoints_with(index: int, value: Any) -> list[Any]:
    keypoints: list[Any] = person(0, 0)["keypoints"]
    return [*keypoints[:index], value, *keypoints[index + 1 :]]


@pytest.fixture(scope="module")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for image in valid()["images"]:
        Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(root / image["file_name"])
    return root


def write(folder: Path, coco: Any) -> Path:
    path = folder / "people.json"
    path.write_text(coco if isinstance(coco, str) else json.dumps(coco))
    return path


def replaced(name: str, index: int, /, **values: Any) -> dict[str, Any]:
    coco = valid()
    coco[name][index] |= values
    return coco


def without(name: str, index: int, key: str) -> dict[str, Any]:
    coco = valid()
    del coco[name][index][key]
    return coco


def listed(**values: Any) -> dict[str, Any]:
    return {**valid(), **values}


def test_valid_file_has_no_problem(image_root: Path) -> None:
    coco = valid()
    before = copy.deepcopy(coco)
    for evaluation in (False, True):
        assert not list(find_problems(coco, 17, str(image_root), evaluation=evaluation))
    assert coco == before


BAD_KEYPOINTS = {
    "NaN": (keypoints_with(4, NAN), "y of keypoint 1 must be a finite number.*got nan"),
    "Inf": (keypoints_with(0, -INF), "x of keypoint 0 must be a finite number.*got -inf"),
    "string": (keypoints_with(3, "12"), "x of keypoint 1 must be a finite number.*got '12'"),
    "null value": (keypoints_with(50, None), "v of keypoint 16 must be a finite.*got null"),
    "bool": (keypoints_with(1, True), "y of keypoint 0 .*got true"),
    "list": (keypoints_with(1, [1]), r"y of keypoint 0 .*got \[1\]"),
    "too large for a float": (keypoints_with(1, 10**400), "y of keypoint 0 must be a finite"),
    "far away": (keypoints_with(1, 1e30), r"y of keypoint 0 .*got 1e\+30"),
    "16 of them": (
        person(0, 0)["keypoints"][:48],
        r"expected 51 numbers \(17 keypoints\), got 48;",
    ),
    "18 of them": ([1] * 54, r"expected 51 numbers \(17 keypoints\), got 54;"),
    "50 numbers": ([1] * 50, r"expected 51 numbers \(17 keypoints\), got 50;"),
    "none of them": ([], r"expected 51 numbers \(17 keypoints\), got 0;"),
    "nested": (
        [[1, 2, 2]] * 17,
        "must be one flat list of 51 numbers x, y, v, not a list of lists",
    ),
    "null": (None, "must be a list of 51 numbers, got null"),
    "text": ("1 2 2", "must be a list of 51 numbers, got '1 2 2'"),
    "v = 3": (keypoints_with(2, 3), "v of keypoint 0 must be 0, 1 or 2, got 3"),
    "v = -1": (keypoints_with(5, -1), "v of keypoint 1 must be 0, 1 or 2, got -1"),
    "v = 0.5": (keypoints_with(5, 0.5), "v of keypoint 1 must be 0, 1 or 2, got 0.5"),
}


@pytest.mark.fault
@pytest.mark.parametrize("name", BAD_KEYPOINTS)
def test_bad_keypoints_name_file_annotation_image_and_key(tmp_path: Path, name: str) -> None:
    keypoints, message = BAD_KEYPOINTS[name]
    path = write(tmp_path, replaced("annotations", 1, keypoints=keypoints))
    place = rf"people\.json: annotations\[1\] \(annotation id 8, image id 3\), keypoints: {message}"
    with pytest.raises(ValueError, match=place) as error:
        check_annotations(str(path), 17)
    command = f"inspose validate --input {path} --num-keypoints 17"
    assert str(error.value).endswith(command)


def crowd_with(**values: Any) -> dict[str, Any]:
    return replaced("annotations", 3, **values)


FIRST_IMAGE = valid()["images"][0]
BAD_ENTRIES = {
    "bbox NaN": (crowd_with(bbox=[1, NAN, 2, 2]), "annotations[3]", "bbox"),
    "bbox negative": (crowd_with(bbox=[1, 1, -2, 2]), "annotations[3]", "bbox"),
    "bbox of 5": (crowd_with(bbox=[1] * 5), "annotations[3]", "bbox"),
    "bbox null": (crowd_with(bbox=None), "annotations[3]", "bbox"),
    "image unknown": (crowd_with(image_id=4), "annotations[3]", "image_id"),
    "image as text": (crowd_with(image_id="3"), "annotations[3]", "image_id"),
    "no image": (without("annotations", 3, "image_id"), "annotations[3]", "image_id"),
    "category unknown": (crowd_with(category_id=2), "annotations[3]", "category_id"),
    "annotation id twice": (crowd_with(id=7), "annotations[3]", "id"),
    "no annotation id": (without("annotations", 3, "id"), "annotations[3]", "id"),
    "iscrowd 2": (crowd_with(iscrowd=2), "annotations[3]", "iscrowd"),
    "ignore": (crowd_with(ignore=1), "annotations[3]", "ignore"),
    "annotation null": (listed(annotations=[person(7, 3), None]), "annotations[1]", "entry"),
    "image id twice": (listed(images=[*valid()["images"], FIRST_IMAGE]), "images[3]", "id"),
    "no file name": (without("images", 2, "file_name"), "images[2]", "file_name"),
    "no height": (without("images", 2, "height"), "images[2]", "height"),
    "width 0": (replaced("images", 2, width=0), "images[2]", "width"),
    "no category name": (without("categories", 0, "name"), "categories[0]", "name"),
    "no names": (replaced("categories", 0, keypoints=[]), "categories[0]", "keypoints"),
}


@pytest.mark.fault
@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_bad_entry_is_the_only_problem(name: str) -> None:
    coco, entry, key = BAD_ENTRIES[name]
    (problem,) = find_problems(coco)
    assert (problem.entry, problem.key) == (entry, key)
    assert problem.what
    assert problem.cure


def lacking(key: str) -> dict[str, Any]:
    return {name: entries for name, entries in valid().items() if name != key}


BAD_FILES = {
    "empty": ("", "no JSON"),
    "cut off": (json.dumps(valid())[:-9], "no JSON in UTF-8, or was cut off"),
    "nested without end": ("[" * 100_000, "no JSON"),
    "a list": ([valid()], r"file: must be an object"),
    "no images": (lacking("images"), "images: is missing"),
    "no annotations": (
        lacking("annotations"),
        "annotations: is missing",
    ),
    "no categories": (lacking("categories"), "categories: is missing"),
    "images null": (listed(images=None), "images: must be a list, got null"),
    "images empty": (listed(images=[]), "images: is empty"),
    "categories empty": (listed(categories=[]), "categories: is empty"),
    "nobody labelled": (listed(annotations=valid()["annotations"][2:]), "no person has a labelled"),
    "another class": (replaced("categories", 0, name="cat"), r"names are \['cat'\].*\['person'\]"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused(tmp_path: Path, name: str) -> None:
    coco, message = BAD_FILES[name]
    path = write(tmp_path, coco)
    with pytest.raises(ValueError, match=rf"people\.json.* {message}|people\.json: {message}"):
        check_annotations(str(path), class_names=["person"])


def test_bytes_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "people.json"
    path.write_bytes(b'{"images": "\xff"}')
    with pytest.raises(ValueError, match=r"people\.json is no JSON in UTF-8"):
        check_annotations(str(path))


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../a.png", "a/../../b.png", "..", ".", "C:\\a.png", "..\\a.png", "a\0.png"],
)
def test_file_name_that_may_leave_the_folder_is_refused(name: str) -> None:
    (problem,) = find_problems(replaced("images", 2, file_name=name))
    assert (problem.key, problem.image_id) == ("file_name", 6)
    assert "leads out of the folder" in problem.what


@pytest.mark.parametrize("name", ["a/b.png", "a/../b.png", "..a.png", "./b.png", "a b.png"])
def test_file_name_below_the_folder_is_fine(name: str) -> None:
    assert not list(find_problems(replaced("images", 2, file_name=name)))


def test_missing_image_is_found_where_a_folder_is_given(image_root: Path) -> None:
    coco = replaced("images", 1, file_name="7.png")
    assert not list(find_problems(coco))
    (problem,) = find_problems(coco, image_root=str(image_root))
    assert (problem.entry, problem.image_id, problem.key) == ("images[1]", 5, "file_name")
    assert str(image_root / "7.png") in problem.what


def test_number_of_keypoints_is_what_the_category_lists() -> None:
    names = [f"point {k}" for k in range(16)]
    coco = replaced("categories", 0, keypoints=names)
    assert [p.what for p in find_problems(coco)] == [
        "expected 48 numbers (16 keypoints), got 51"
    ] * 4
    for annotation in coco["annotations"]:
        annotation["keypoints"] = annotation["keypoints"][:48]
    assert not list(find_problems(coco, 16))
    (problem,) = find_problems(coco, 17)  # MODEL.INSPOSE.NUM_KEYPOINTS is another
    assert (problem.entry, problem.what) == ("categories[0]", "expected 17 names, got 16")


def test_number_of_keypoints_is_17_or_as_told_where_the_category_lists_none() -> None:
    coco = without("categories", 0, "keypoints")
    assert not list(find_problems(coco))
    assert [p.what for p in find_problems(coco, 5)] == [
        "expected 15 numbers (5 keypoints), got 51"
    ] * 4


@pytest.mark.fault
@pytest.mark.parametrize("key", ["area", "bbox", "iscrowd", "keypoints", "num_keypoints"])
def test_what_only_scoring_needs_may_be_missing_in_training(key: str) -> None:
    coco = without("annotations", 1, key)
    assert not list(find_problems(coco))
    (problem,) = find_problems(coco, evaluation=True)
    assert (problem.annotation_id, problem.key, problem.what) == (8, key, "is missing")


def test_images_alone_are_enough_to_predict() -> None:
    assert not list(find_problems({"images": valid()["images"]}, evaluation=True))


def run_command(*flags: Any) -> int:
    return cli.main(["validate", *map(str, flags)])


def test_command_says_what_is_used_and_what_is_dropped(
    image_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    coco = valid()
    del coco["annotations"][1]["keypoints"]
    nothing = [0] * 51
    coco["annotations"] += [
        person(11, 6, bbox=[1, 1, 0, 9], keypoints=nothing),
        person(12, 6, bbox=[1, 1, 0, 9], segmentation=[[]]),
    ]
    path = write(tmp_path, coco)
    assert run_command("--input", path, "--images", image_root) == 0
    same = "no pose is learned, their boxes count neither as person nor as background"
    assert capsys.readouterr().out.splitlines() == [
        "images: 3, of which training uses 2",
        "  0 without a person: dropped in training, used in evaluation",
        "  1 with persons of whom none has a labelled keypoint: same",
        "persons: 4, of whom 2 have labelled keypoints",
        f"  2 with no labelled keypoint (1 lack the key `keypoints`): {same}",
        "crowds: 1: their boxes count neither as person nor as background",
        "dropped: 1 annotations with neither a box nor a labelled keypoint",
        "note: 1 of 4 persons lack the key `keypoints`: no pose of theirs is learned, their boxes "
        "count neither as person nor as background",
        "no problem found",
    ]


def plant_ten(coco: dict[str, Any]) -> None:
    images, annotations = coco["images"], coco["annotations"]
    images[0]["file_name"] = "/etc/passwd"
    images[1]["width"] = None
    images[2]["file_name"] = "lost.png"
    annotations += [person(n, 3) for n in range(20, 26)]
    annotations[4]["keypoints"] = keypoints_with(0, NAN)
    annotations[5]["keypoints"] = [0] * 48
    annotations[6]["keypoints"] = keypoints_with(2, 4)
    annotations[7]["bbox"] = [0, 0, -1, 1]
    annotations[8]["image_id"] = 99
    annotations[9]["category_id"] = 99
    annotations.append(person(7, 3))


@pytest.mark.fault
def test_ten_planted_errors_are_ten_lines(
    image_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    coco = valid()
    plant_ten(coco)
    path = write(tmp_path, coco)
    assert run_command("--input", path, "--images", image_root) == 2
    lines = capsys.readouterr().out.splitlines()
    places = [line.split()[1] for line in lines if line.startswith(f"{path}: ")]
    numbers = [*(f"images[{i}]" for i in range(3)), *(f"annotations[{i}]" for i in range(4, 11))]
    assert places == numbers
    assert "not counted: 10 entries with problems" in lines
    assert lines[-1].startswith("10 problems: ")


@pytest.mark.fault
def test_command_groups_what_is_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    people = [person(n, 99 + n, **({"iscrowd": 2} if n == 40 else {})) for n in range(53)]
    path = write(tmp_path, listed(annotations=people))
    assert run_command("--input", path) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:4]] == [
        *("annotations[0]", "annotations[1]", "annotations[2]", "annotations[40]")
    ]
    assert lines[2].endswith(" (x 51, this one and others like it)")
    assert lines[-1].startswith("54 problems: ")


@pytest.mark.fault
def test_command_lists_fifty_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # As many kinds as keypoints with a value of another type, of x, y and v.
    people = [person(i, 3, keypoints=keypoints_with(i, [chr(97 + i % 26)] * i)) for i in range(51)]
    path = write(tmp_path, listed(annotations=[*people, *people, person(99, 98)]))
    assert run_command("--input", path) == 2
    lines = capsys.readouterr().out.splitlines()
    shown = sum(line.startswith(f"{path}: ") for line in lines)
    assert shown <= 50


def test_command_with_num_keypoints_and_for_evaluation(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, {"images": valid()["images"]})
    assert run_command("--input", path) == 2
    assert run_command("--input", path, "--evaluation") == 0
    path = write(tmp_path, without("categories", 0, "keypoints"))
    assert run_command("--input", path, "--num-keypoints", 17) == 0
    assert run_command("--input", path, "--num-keypoints", 16) == 2


@pytest.mark.coco
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_coco_is_clean_and_counted_as_detectron2_loads_it(
    coco_root: Path,
    capsys: pytest.CaptureFixture[str],
    split: str,
) -> None:
    coco = coco_root / "coco"
    json_file = coco / "annotations" / f"person_keypoints_{split}2017.json"
    flags = ("--input", json_file, "--images", coco / f"{split}2017")
    assert run_command(*flags, "--evaluation") == 0
    assert run_command(*flags) == 0
    used = len(get_detection_dataset_dicts([f"keypoints_coco_2017_{split}"], min_keypoints=1))
    assert f", of which training uses {used}\n" in capsys.readouterr().out


@pytest.fixture
def dataset(image_root: Path, tmp_path: Path) -> Any:
    """Register a file as ``bad_people`` and forget it afterwards."""
    name = "bad_people"

    def register(coco: Any) -> str:
        register_coco_instances(name, {}, str(write(tmp_path, coco)), str(image_root))
        keys = ("keypoint_names", "keypoint_flip_map", "keypoint_connection_rules")
        MetadataCatalog.get(name).set(**{key: getattr(VAL, key) for key in keys})
        return name

    yield register
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
    if name in MetadataCatalog:
        MetadataCatalog.remove(name)


@pytest.mark.fault
def test_training_and_evaluation_refuse_a_bad_file(
    dataset: Callable[[Any], str], tiny_cfg: Callable[..., CfgNode]
) -> None:
    name = dataset(replaced("annotations", 1, keypoints=keypoints_with(4, NAN)))
    cfg = tiny_cfg(["DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)])
    message = r"people\.json: annotations\[1\] \(annotation id 8, image id 3\), keypoints: y of"
    with pytest.raises(ValueError, match=message):
        Trainer.build_train_loader(cfg)
    with pytest.raises(ValueError, match=rf"(?s){message}.* --evaluation --images \S+$"):
        Trainer.build_test_loader(cfg, name)


def test_training_and_evaluation_take_a_good_file(
    dataset: Callable[[Any], str], tiny_cfg: Callable[..., CfgNode]
) -> None:
    name = dataset(valid())
    cfg = tiny_cfg(["DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)])
    assert {x["image_id"] for x in next(iter(Trainer.build_train_loader(cfg)))} == {3}
    assert [x["image_id"] for (x,) in Trainer.build_test_loader(cfg, name)] == [3, 5, 6]


@pytest.mark.fault
def test_persons_who_lack_keypoints_are_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    coco = valid()
    for index in (1, 2, 3):  # two persons and a crowd
        del coco["annotations"][index]["keypoints"]
    check_annotations(str(write(tmp_path, coco)), 17)
    (record,) = caplog.records
    assert "people.json: 2 of 3 persons lack the key `keypoints`" in record.getMessage()


@pytest.mark.fault
def test_keypoints_outside_their_images_are_counted_in_one_warning(
    image_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Images of 32 x 48. Detectron2 adds 0.5 pixels: 47.5 is on the border, which is inside.
    inside = [(-0.5, -0.5, 2), (47.5, 31.5, 1), (99, 99, 0)]
    outside = [(47.6, 5, 2), (-0.6, 5, 1), (5, 31.6, 2), (5, -0.6, 2)]
    keypoints = [x for point in inside + outside for x in point] + [0] * 30
    coco = replaced("annotations", 1, keypoints=keypoints)
    path = write(tmp_path, coco)
    check_annotations(str(path), 17)
    (record,) = caplog.records
    message = "4 labelled keypoints lie outside their images: these are not learned"
    assert record.getMessage() == f"{path}: {message}"
    assert run_command("--input", path, "--images", image_root) == 0
    line = "keypoints: 4 labelled ones outside their images: not learned"
    assert line in capsys.readouterr().out.splitlines()
    (image,) = (x for x in load_coco_json(str(path), str(image_root)) if x["image_id"] == 3)
    mapper = mapper_of()
    labelled = mapper({**image, "annotations": image["annotations"][1:]})["instances"].gt_keypoints
    assert (labelled.tensor[0, :7, 2] > 0).tolist() == [True, True, *[False] * 5]


def test_valid_file_gives_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_annotations(str(write(tmp_path, valid())), 17)
    assert not caplog.records


def test_synthetic_people_are_clean(tmp_path: Path) -> None:
    json_file = build_synthetic_people(tmp_path, "val", 4, num_workers=1)
    folder = json_file.parents[1] / "val"
    assert run_command("--input", json_file, "--images", folder) == 0
    check_annotations(str(json_file), 17, evaluation=True, class_names=VAL.thing_classes)


VALUES = st.sampled_from(
    [None, True, "x", "", NAN, INF, -1, 0, 3, 0.5, 1e30, 10**400, [], [1], [[1]], [NAN] * 51, {}]
)


@pytest.mark.fault
@settings(max_examples=150)
@given(data=st.data())
def test_mutated_file_is_refused_or_read_and_scored_by(
    image_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    coco = valid()
    for _ in range(data.draw(st.integers(1, 3))):
        where = list(paths_of(coco))
        if not where:
            break
        *above, key = where[data.draw(st.integers(0, len(where) - 1))]
        container = functools.reduce(operator.getitem, above, coco)
        if data.draw(st.booleans()):
            del container[key]
        else:
            container[key] = copy.deepcopy(data.draw(VALUES))
    path = write(tmp_path_factory.getbasetemp(), coco)
    written = json.loads(path.read_text())
    problems = list(find_problems(written, 17, str(image_root)))
    for problem in problems:
        assert str(problem)
    if not problems:
        read(path, image_root)
    elif all(problem.entry for problem in problems):
        assert validate.summarize(coco, {problem.entry for problem in problems})
    if not any(find_problems(written, 17, evaluation=True)):
        evaluate(path)


@pytest.mark.fault
@settings(max_examples=100)
@given(data=st.data())
def test_one_changed_field_is_refused_by_name_alike_or_trained_on(
    image_root: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    coco = valid()
    paths = list(paths_of(coco))
    path = paths[data.draw(st.integers(0, len(paths) - 1))]
    container = functools.reduce(operator.getitem, path[:-1], coco)
    container[path[-1]] = copy.deepcopy(data.draw(VALUES))
    file = write(tmp_path_factory.getbasetemp(), coco)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = run_command("--input", file, "--num-keypoints", 17, "--images", image_root)
    told = ""
    try:
        check_annotations(str(file), 17, image_root=str(image_root))
    except ValueError as error:
        told = str(error)
    assert status == (2 if told else 0), (path, told, out.getvalue())
    if told:
        field = [key for key in path if isinstance(key, str)][-1]
        # An entry may also be named by those that refer to it.
        referred = {"id": "image_id|category_id", "images": "image_id", "name": "categories"}
        said = f"{field}|{referred.get(field, field)}|entry|{path[0]}"
        assert re.search(said, told), (path, told)
    else:
        read(file, image_root)


def paths_of(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys on the way to each value of a nested json; of long lists the first five."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value[:5])
        for key, below in items:
            yield (*above, key)
            yield from paths_of(below, (*above, key))


def evaluate(path: Path) -> None:
    """Score a pose in each image by a file."""
    name = "mutated_people"
    try:
        with in_memory({}, evaluation=True):
            load_coco_json(str(path), "", name)  # sets the metadata
        MetadataCatalog.get(name).json_file = str(path)
        evaluator = InsPoseEvaluator(name)
        evaluator.reset()
        for image in json.loads(path.read_text())["images"]:
            pose = Instances(
                (32, 48),
                pred_boxes=Boxes(torch.tensor([[1.0, 2.0, 17.0, 18.0]])),
                scores=torch.ones(1),
                pred_classes=torch.zeros(1, dtype=torch.int64),
                pred_keypoints=torch.ones(1, 17, 3),
            )
            evaluator.process([{"image_id": image["id"]}], [{"instances": pose}])
        figures = evaluator.evaluate()
        if evaluator._do_evaluation:
            assert figures["keypoints"].keys() == {*METRICS["keypoints"], *AP_BY_PEOPLE}
    finally:
        MetadataCatalog.remove(name)


def mapper_of() -> InsPoseDatasetMapper:
    return InsPoseDatasetMapper(
        is_train=True,
        augmentations=[],
        image_format="BGR",
        use_keypoint=True,
        keypoint_hflip_indices=np.arange(17),
        max_pixels=10_000,
    )


def read(path: Path, image_root: Path) -> None:
    """Read a file as training does, all images of it."""
    name = "mutated_people"
    DatasetCatalog.register(name, lambda: load_coco_json(str(path), str(image_root), name))
    coco = plain(json.loads(path.read_text()), evaluation=False)
    try:
        with in_memory({str(path): coco}):
            records = get_detection_dataset_dicts([name], min_keypoints=1)
        assert records
        mapper = mapper_of()
        for record in records:
            instances = mapper(record)["instances"]
            assert instances.gt_keypoints.tensor.shape == (len(instances), 17, 3)
            assert instances.gt_keypoints.tensor.isfinite().all()
            assert instances.gt_boxes.tensor.isfinite().all()
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
