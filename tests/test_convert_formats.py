"""Files of annotation tools become COCO keypoint files, and YOLO's folders, and back."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from inspose_d2 import cli
from inspose_d2.data.annotations import AnnotationError
from inspose_d2.data.coco_file import check_annotations
from inspose_d2.data.convert.coco import read_coco
from inspose_d2.data.convert.common import COCO_NAMES, Converted
from inspose_d2.data.convert.yolo import labels_of, read_yolo, write_yolo

NAMES = ["nose", "left_eye", "right_eye"]
SIZES = {"a.png": (64, 48), "b.png": (40, 80)}  # width, height
POINTS = [10, 12, 2, 20, 14, 1, 0, 0, 0]
pytestmark = pytest.mark.fault

Json = dict[str, Any]


def save_images(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (width, height) in SIZES.items():
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return save_images(tmp_path / "images")


def person(**more: Any) -> Json:
    """A sound annotation; a key that is None is left out."""
    own = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 100.0}
    box = {"bbox": [8, 10, 16, 20], "keypoints": POINTS, "num_keypoints": 2}
    return {k: v for k, v in (own | box | more).items() if v is not ...}


def people(*persons: Json, **more: Any) -> Json:
    return {
        "images": [
            {"id": n, "file_name": name, "width": size[0], "height": size[1]}
            for n, (name, size) in enumerate(SIZES.items(), start=1)
        ],
        "categories": [{"id": 1, "name": "person", "keypoints": NAMES, "skeleton": [[1, 2]]}],
        "annotations": list(persons) or [person()],
    } | more


def read(folder: Path, coco: Any, **options: Any) -> Converted:
    path = folder / "in.json"
    path.write_text(json.dumps(coco))
    return read_coco(path, **options)


def first(done: Converted) -> Json:
    return done.coco["annotations"][0]


def is_sound(folder: Path, images: Path, done: Converted) -> None:
    """Validation with the images finds nothing, and training and evaluation read the file."""
    path = folder / "out.json"
    path.write_text(json.dumps(done.coco, allow_nan=False))
    flags = ["--input", str(path), "--images", str(images)]
    assert cli.main(["validate", *flags]) == 0
    assert cli.main(["validate", *flags, "--evaluation"]) == 0
    for evaluation in (False, True):
        check_annotations(str(path), evaluation=evaluation, image_root=str(images))


# COCO


def test_a_sound_file_stays_as_it_is(tmp_path: Path, images: Path) -> None:
    coco = people(person(), person(id=7, iscrowd=1), info={"year": 2024})
    coco["categories"][0]["supercategory"] = "animal"
    done = read(tmp_path, coco, images=images)
    assert done.coco == coco
    assert not done.changes
    is_sound(tmp_path, images, done)


@pytest.mark.parametrize(
    ("changed", "expected", "said"),
    [
        ({"area": ...}, {"area": 0.53 * 16 * 20}, "areas made, 0.53 of the box"),
        ({"area": None}, {"area": 0.53 * 16 * 20}, "areas made, 0.53 of the box"),
        ({"area": 0.02}, {"area": 0.53 * 16 * 20}, "areas made, 0.53 of the box"),
        # A triangle: half of 16 times 20.
        (
            {"area": 0, "segmentation": [[8, 10, 24, 10, 8, 30]]},
            {"area": 160},
            "areas made, of the polygons",
        ),
        ({"bbox": ...}, {"bbox": [10, 12, 10, 2]}, "boxes made, around the labelled keypoints"),
        ({"bbox": None}, {"bbox": [10, 12, 10, 2]}, "boxes made, around the labelled keypoints"),
        (
            {"bbox": [8, 10, -1, 20]},
            {"bbox": [10, 12, 10, 2]},
            "boxes made, around the labelled keypoints",
        ),
        (
            {"bbox": ["8", 10, "16.0", 20]},
            {"bbox": [8, 10, 16, 20]},
            "boxes of text made numbers",
        ),
        ({"num_keypoints": 3}, {"num_keypoints": 2}, "num_keypoints counted"),
        ({"num_keypoints": ...}, {"num_keypoints": 2}, "num_keypoints counted"),
        ({"iscrowd": None}, {"iscrowd": 0}, "iscrowd made 0 or 1"),
        ({"iscrowd": False}, {"iscrowd": 0}, "iscrowd made 0 or 1"),
        ({"ignore": 1}, {"iscrowd": 1}, "persons to ignore made crowds"),
        ({"id": "x"}, {"id": 1}, "ids of annotations given anew"),
        ({"id": ...}, {"id": 1}, "ids of annotations given anew"),
        ({"category_id": None}, {"category_id": 1}, "category_id mended"),
        ({"image_id": "1"}, {"image_id": 1}, None),
        (
            {"keypoints": [10, 12, 2, None, 14, 1, 0, 0, 0]},
            {"keypoints": [10, 12, 2, 0, 0, 0, 0, 0, 0], "num_keypoints": 1},
            "keypoints without a place: not labelled",
        ),
        (
            {"keypoints": [10, 12, 2, float("nan"), 14, 1, 0, 0, 0]},
            {"keypoints": [10, 12, 2, 0, 0, 0, 0, 0, 0]},
            "keypoints without a place: not labelled",
        ),
        (
            {"keypoints": [10.0, 12.0, 2.0, 20.0, 14.0, 1.0, 0.0, 0.0, 0.0]},
            {"keypoints": POINTS},
            None,
        ),
        (
            {"keypoints": [[10, 12, 2], [20, 14, 1], [0, 0, 0]]},
            {"keypoints": POINTS},
            "lists of lists of keypoints made flat",
        ),
        (
            {"keypoints": [10, 12, 20, 14, 0, 0]},
            {"keypoints": [10, 12, 2, 20, 14, 2, 0, 0, 0]},
            "v of keypoints made, 2 where they have a place",
        ),
        (
            {"keypoints": [10, 12, 2, 20, 14, 1, 5, 5, 0]},
            {"keypoints": POINTS},
            "keypoints that are not labelled moved to (0, 0)",
        ),
        (
            {"keypoints": ["10", 12, 2, 20, 14, 1, 0, 0, 0]},
            {"keypoints": POINTS},
            "keypoints of text made numbers",
        ),
        (
            {"keypoints": None},
            {"keypoints": [0] * 9, "num_keypoints": 0},
            "persons without keypoints: none is labelled",
        ),
    ],
)
def test_what_is_missing_or_odd_is_mended_and_counted(
    tmp_path: Path, images: Path, changed: Json, expected: Json, said: str | None
) -> None:
    other = person(id=9, image_id=2)
    done = read(tmp_path, people(person(**changed), other), images=images)
    assert expected.items() <= first(done).items()
    if said is None:
        assert not done.changes
    else:
        assert done.changes[said] >= 1
    is_sound(tmp_path, images, done)


def test_fractions_of_the_image_become_pixels(tmp_path: Path, images: Path) -> None:
    own = {"keypoints": [0.25, 0.5, 2, 0.5, 0.75, 1, 0, 0, 0], "bbox": [0.125, 0.25, 0.5, 0.5]}
    done = read(tmp_path, people(person(**own, area=0.2)), images=images)
    assert first(done)["keypoints"] == [16, 24, 2, 32, 36, 1, 0, 0, 0]
    assert first(done)["bbox"] == [8, 12, 32, 24]
    assert first(done)["area"] == pytest.approx(0.53 * 32 * 24)
    assert done.changes["persons whose keypoints were fractions of the image"] == 1
    assert done.changes["boxes that were fractions of the image"] == 1
    is_sound(tmp_path, images, done)


def test_one_person_in_the_first_pixel_is_no_file_of_fractions(tmp_path: Path) -> None:
    corner = person(id=2, keypoints=[1, 1, 2, 0, 0, 0, 0, 0, 0], bbox=[0, 0, 5, 5], area=20)
    others = [person(id=n) for n in range(3, 14)]
    done = read(tmp_path, people(corner, *others))
    assert first(done)["keypoints"][:3] == [1, 1, 2]


def test_the_group_of_roboflow_is_left_out(tmp_path: Path, images: Path) -> None:
    categories = [
        {"id": 0, "name": "people", "supercategory": "none"},
        {"id": 1, "name": "person", "supercategory": "people", "keypoints": NAMES, "skeleton": []},
    ]
    done = read(tmp_path, people(categories=categories), images=images)
    assert [x["name"] for x in done.coco["categories"]] == ["person"]
    assert done.changes == {"categories left out": 1}
    is_sound(tmp_path, images, done)


def test_one_category_is_chosen_of_several(tmp_path: Path) -> None:
    categories = [
        {"id": 3, "name": "dog", "keypoints": ["tail"]},
        {"id": 5, "name": "person", "keypoints": NAMES},
    ]
    dog = person(id=1, category_id=3, keypoints=[1, 2, 2])
    coco = people(dog, person(id=2, category_id=5), categories=categories)
    with pytest.raises(AnnotationError, match=r"\['dog', 'person'\].*--category"):
        read(tmp_path, coco)
    with pytest.raises(AnnotationError, match="there is no 'cat'"):
        read(tmp_path, coco, category="cat")
    done = read(tmp_path, coco, category="person")
    assert [x["id"] for x in done.coco["annotations"]] == [2]
    assert first(done)["category_id"] == done.coco["categories"][0]["id"] == 1
    assert done.changes["annotations of other categories left out"] == 1


def test_names_of_keypoints_are_given_or_cocos(tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "person"}]
    with pytest.raises(AnnotationError, match="give 3 names in order by --keypoints"):
        read(tmp_path, people(categories=categories))
    done = read(tmp_path, people(categories=categories), keypoints=["a", "b", "c"])
    assert done.coco["categories"][0]["keypoints"] == ["a", "b", "c"]
    with pytest.raises(AnnotationError, match="must be 3 different names, got 2"):
        read(tmp_path, people(), keypoints=["a", "b"])
    whole = person(keypoints=POINTS + [0] * 42)
    done = read(tmp_path, people(whole, categories=[]))
    assert done.coco["categories"][0]["keypoints"] == list(COCO_NAMES)


@pytest.mark.parametrize(
    ("skeleton", "expected"),
    [([[0, 1], [1, 2]], [[1, 2], [2, 3]]), ([[1, 9]], []), ("no", []), (None, [])],
)
def test_skeletons_count_from_1(tmp_path: Path, skeleton: Any, expected: Any) -> None:
    coco = people()
    coco["categories"][0]["skeleton"] = skeleton
    assert read(tmp_path, coco).coco["categories"][0]["skeleton"] == expected


def test_sizes_and_names_of_images_are_mended(tmp_path: Path, images: Path) -> None:
    coco = people(person(image_id="x"), person(id=2, image_id="gone"))
    coco["images"] = [
        {"id": "x", "file_name": "C:\\photos\\A.png", "width": None, "height": None},
        {"id": "y", "file_name": "b.png", "width": 40.0, "height": "80"},
        {"id": "gone", "file_name": "gone.png", "width": 10, "height": 10},
    ]
    with pytest.raises(AnnotationError, match="width, height: unknown; give the folder"):
        read(tmp_path, coco)
    done = read(tmp_path, coco, images=images)
    assert [(x["file_name"], x["width"], x["height"]) for x in done.coco["images"]] == [
        ("a.png", 64, 48),
        ("b.png", 40, 80),
    ]
    assert first(done)["image_id"] == done.coco["images"][0]["id"]
    assert done.changes[f"images left out, missing or unreadable in {images}: gone.png"] == 1
    assert done.changes["annotations left out, their image is not there"] == 1
    is_sound(tmp_path, images, done)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("annotations"), "annotations: must be a list"),
        (lambda c: c.update(images=[]), "images: must be a list"),
        (lambda c: c["images"].append(3), r"images\[2\]: must be an object"),
        (lambda c: c["images"][1].update(id=1), r"images\[1\], id: 1 is the id of 'a.png' too"),
        (lambda c: c["images"][0].pop("id"), r"images\[0\], id: is missing"),
        (lambda c: c["images"][0].update(file_name=7), r"images\[0\], file_name: must be"),
        (lambda c: c["images"][0].update(width=63), "'a.png': width, height: 63 x 48"),
        (lambda c: c["images"][0].update(width=[]), r"images\[0\], width: must be a number"),
        (lambda c: c["categories"][0].update(keypoints=["a", "a"]), "categories, keypoints: "),
        (lambda c: c["categories"][0].update(keypoints=7), "categories, keypoints: must be a l"),
        (
            lambda c: c["annotations"][0].update(keypoints=[1, 2]),
            r"annotations\[0\] \(annotation id 1\), keypoints: must be 3 times x, y, v",
        ),
        (
            lambda c: c["annotations"][0].update(keypoints=[*POINTS[:8], 0.7]),
            r"annotations\[0\].*keypoints, number 2: v must be 0, 1 or 2, got 0.7",
        ),
        (
            lambda c: c["annotations"][0].update(keypoints=[*POINTS[:6], {}, 0, 0]),
            r"annotations\[0\].*keypoints, number 2: must be a number",
        ),
        (lambda c: c["annotations"][0].update(area="big"), r"annotations\[0\].*area: must be"),
        (lambda c: c["annotations"][0].update(iscrowd=3), r"annotations\[0\].*iscrowd: must be 0"),
        (lambda c: c.update(annotations=[person(keypoints=[0] * 9)]), "nothing to learn from"),
    ],
)
def test_what_cannot_be_mended_is_named(
    tmp_path: Path, images: Path, change: Callable[[Json], Any], said: str
) -> None:
    coco = people()
    change(coco)
    with pytest.raises(AnnotationError, match=said) as caught:
        read(tmp_path, coco, images=images)
    assert str(caught.value).startswith(str(tmp_path / "in.json"))


def test_the_wrong_folder_of_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"none of 2 images can be read in .*--images"):
        read(tmp_path, people(), images=tmp_path)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**400, 1e300, float("inf"), float("nan"), "", "7", "x\0", [], {}, [[]]]),
)


@given(st.data())
def test_odd_values_are_mended_or_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    coco = people(person(), person(id=2))
    for _ in range(3):
        entry = data.draw(st.sampled_from([x for key in coco.values() for x in key]))
        entry[data.draw(st.sampled_from(sorted(entry)))] = data.draw(ODD)
    try:
        done = read(tmp_path_factory.getbasetemp(), coco)
    except AnnotationError as error:
        assert len(str(error).splitlines()) == 1
    else:
        path = tmp_path_factory.getbasetemp() / "odd.json"
        path.write_text(json.dumps(done.coco))
        check_annotations(str(path))
        check_annotations(str(path), evaluation=True)
