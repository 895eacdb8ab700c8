"""Files of annotation tools become COCO keypoint files, and YOLO's folders, and back."""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
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
from inspose_d2.data.convert.cvat import read_cvat
from inspose_d2.data.convert.label_studio import read_label_studio
from inspose_d2.data.convert.labelme import read_labelme
from inspose_d2.data.convert.yolo import labels_of, read_yolo, write_yolo
from inspose_d2.files import write_json

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


def test_corners_become_boxes_where_nearly_all_are_such(tmp_path: Path, images: Path) -> None:
    corners = [person(id=n, bbox=[8, 10, 60, 46], area=900) for n in (1, 2)]  # 64 x 48 pixels
    done = read(tmp_path, people(*corners), images=images)
    assert [x["bbox"] for x in done.coco["annotations"]] == [[8, 10, 52, 36]] * 2
    assert done.changes == {"boxes that were corners [x0, y0, x1, y1]": 2}
    is_sound(tmp_path, images, done)
    done = read(tmp_path, people(*corners, *(person(id=n) for n in range(3, 30))))
    assert first(done)["bbox"] == [8, 10, 60, 46]


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
    coco = deepcopy(people(person(), person(id=2)))
    for _ in range(3):
        where, key = data.draw(st.sampled_from(leaves(coco)))
        where[key] = deepcopy(data.draw(ODD))
    folder = tmp_path_factory.getbasetemp()
    output = folder / "odd.json"
    output.unlink(missing_ok=True)
    try:
        write_json(output, read(folder, coco).coco)
    except AnnotationError:
        assert not output.exists()
    else:
        for evaluation in (False, True):
            check_annotations(str(output), evaluation=evaluation)
        assert read_coco(output).changes == {}  # once is enough


# YOLO


def save_yolo(folder: Path, lines: Sequence[str] = (), **config: Any) -> Path:
    """A data set whose a.png has these lines; returns its data.yaml."""
    save_images(folder / "train" / "images")
    (folder / "train" / "labels").mkdir()
    (folder / "train" / "labels" / "a.txt").write_text("\n".join(lines))
    known = {"train": "../train/images", "kpt_shape": [3, 3], "names": ["person"]}
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(known | config))
    return path


# a.png is 64 x 48: the box is [8, 10, 16, 20], the points (16, 12), hidden (24, 36), none.
LINE = f"0 0.25 {20 / 48} 0.25 {20 / 48} 0.25 0.25 2.000000 0.375 0.75 1 0 0 0"


def test_a_line_of_yolo_is_a_person(tmp_path: Path) -> None:
    done = read_yolo(save_yolo(tmp_path, [LINE, "", LINE]), keypoints=NAMES)
    assert done.folder is not None
    assert done.folder.resolve() == (tmp_path / "train" / "images").resolve()
    a, b = done.coco["images"]
    assert (a["file_name"], a["width"], a["height"]) == ("a.png", 64, 48)
    assert (b["file_name"], b["width"], b["height"]) == ("b.png", 40, 80)  # nobody in it
    assert len(done.coco["annotations"]) == 2
    assert first(done) == {
        **{"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "num_keypoints": 2},
        **{"keypoints": [16, 12, 2, 24, 36, 1, 0, 0, 0], "bbox": [8, 10, 16, 20]},
        "area": pytest.approx(0.53 * 16 * 20),
    }
    assert done.changes == {"areas made, 0.53 of the box": 2}
    is_sound(tmp_path, done.folder, done)


@pytest.mark.fault
def test_folders_of_yolo_may_be_links_and_come_from_a_mac(tmp_path: Path) -> None:
    save_yolo(tmp_path / "real", [LINE])
    images = tmp_path / "real" / "train" / "images"
    (images / "._a.png").write_bytes(b"Mac OS X")
    (images / "c.svg").write_text("<svg/>")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "part").symlink_to(tmp_path / "real" / "train")
    done = read_yolo(tmp_path / "all", keypoints=NAMES)
    names = [x["file_name"] for x in done.coco["images"]]
    assert names == ["part/images/a.png", "part/images/b.png"]
    assert first(done)["bbox"] == [8, 10, 16, 20]
    assert done.changes["files left out, no images that can be read: c.svg"] == 1


@pytest.mark.parametrize("names", [{0: NAMES}, NAMES, [NAMES]])
def test_points_of_yolo_without_v_are_labelled_unless_at_0_0(tmp_path: Path, names: Any) -> None:
    line = f"0 0.25 {20 / 48} 0.25 {20 / 48} 0.25 0.25 0.375 0.75 0 0"
    done = read_yolo(save_yolo(tmp_path, [line], kpt_shape=[3, 2], kpt_names=names))
    assert first(done)["keypoints"] == [16, 12, 2, 24, 36, 2, 0, 0, 0]
    assert done.changes["keypoints without v: 0 at (0, 0), else 2"] == 3


def test_folders_without_yaml(tmp_path: Path) -> None:
    points = " ".join(["0.5 0.5 2"] * 17)
    save_yolo(tmp_path, [f"0 0.5 0.5 0.5 0.5 {points}"])
    (tmp_path / "train" / "labels" / "gone.txt").write_text("")
    (tmp_path / "train" / "labels" / "classes.txt").write_text("person")
    for source in (tmp_path / "train", tmp_path / "train" / "images"):
        done = read_yolo(source, category="swimmer")
        assert done.coco["categories"][0]["keypoints"] == list(COCO_NAMES)
        assert done.coco["categories"][0]["name"] == "swimmer"
        assert done.changes["label files left out, without an image: gone.txt"] == 1
    beside = save_images(tmp_path / "flat")
    (beside / "b.txt").write_text(f"3 0.5 0.5 0.5 0.5 {points}\n")
    done = read_yolo(beside)
    assert first(done)["keypoints"][:3] == [20, 40, 2]  # of 40 x 80
    assert done.coco["categories"][0]["name"] == "person"
    is_sound(tmp_path, beside, done)


def test_one_class_of_yolo_is_chosen(tmp_path: Path) -> None:
    dog = LINE.replace("0 ", "1 ", 1)
    path = save_yolo(tmp_path, [LINE, dog, dog], names={0: "person", 1: "dog"})
    with pytest.raises(AnnotationError, match=r"\['dog', 'person'\]: choose one by --category"):
        read_yolo(path, keypoints=NAMES)
    done = read_yolo(path, keypoints=NAMES, category="dog")
    assert len(done.coco["annotations"]) == 2
    assert done.changes["annotations of other categories left out"] == 1


def test_a_flip_that_the_names_do_not_say_is_told(tmp_path: Path) -> None:
    path = save_yolo(tmp_path, [LINE], flip_idx=[0, 2, 1])
    told = "flip_idx not taken over: left and right follow from the keypoints' names"
    assert told not in read_yolo(path, keypoints=NAMES).changes
    assert read_yolo(path, keypoints=["a", "b", "c"]).changes[told] == 1


@pytest.mark.parametrize(
    ("line", "config", "said"),
    [
        ("0 1 2 x", {}, "a.txt, line 1: must be numbers"),
        ("0.5 0.5", {}, "a.txt, line 1: must be a class"),
        ("0 0.5 0.5 nan 1", {}, "a.txt, line 1: must be a class .* finite"),
        ("0 0.5 0.5 0.5 0.5", {}, "a.txt, line 1: .* 14 in all; got 5"),
        (LINE.replace("0.75 1", "0.75 0.93"), {}, "v of keypoint 1 must be 0, 1 or 2, got 0.93"),
        (LINE.replace("0.75", "36"), {}, "fractions of the image, from 0 to 1, got 36"),
        (LINE, {"kpt_shape": [3, 4]}, "data.yaml: kpt_shape: must be"),
        (LINE, {"kpt_shape": None}, "data.yaml: kpt_shape: must be"),
        (LINE, {"kpt_names": "nose"}, "data.yaml: kpt_names: must be"),
        (LINE, {"names": 3}, "data.yaml: names: must be"),
        (LINE, {"train": ["a", "b"]}, "data.yaml: train: must be a folder"),
        (LINE, {"train": "nowhere"}, "data.yaml: train: 'nowhere' is no folder"),
    ],
)
def test_what_is_wrong_in_yolo_is_named(tmp_path: Path, line: str, config: Json, said: str) -> None:
    names = None if "kpt_names" in config else NAMES
    with pytest.raises(AnnotationError, match=said):
        read_yolo(save_yolo(tmp_path, [line], **config), keypoints=names)


def test_yolo_without_names_or_labels_is_refused(tmp_path: Path) -> None:
    path = save_yolo(tmp_path, [LINE])
    with pytest.raises(AnnotationError, match="give 3 names in order by --keypoints"):
        read_yolo(path)
    with pytest.raises(AnnotationError, match="give them in order by --keypoints"):
        read_yolo(tmp_path / "train")
    (tmp_path / "train" / "labels" / "a.txt").unlink()
    with pytest.raises(AnnotationError, match=r"no image has labels, neither .*labels.a.txt"):
        read_yolo(path)
    with pytest.raises(AnnotationError, match="no images in it, or no folder"):
        read_yolo(tmp_path / "nowhere")
    path.write_text("{")
    with pytest.raises(AnnotationError, match=r"data.yaml: no YAML"):
        read_yolo(path)


def test_labels_lie_in_place_of_the_last_images() -> None:
    assert labels_of(Path("images/x/images/t/images.png")) == Path("images/x/labels/t/images.txt")
    assert labels_of(Path("photos/a.b.png")) == Path("photos/a.b.txt")


def test_to_yolo_writes_what_yolo_reads(tmp_path: Path, images: Path) -> None:
    out = person(id=2, bbox=[-8, 10, 24, 20], keypoints=[-1, 12, 2, 8, 12, 2, 0, 0, 0])
    coco = people(person(bbox=[8, 12, 32, 24]), out, person(id=3, iscrowd=1))
    path = tmp_path / "in.json"
    path.write_text(json.dumps(coco))
    changes = write_yolo(path, images, tmp_path / "out")
    assert changes == {
        "crowds left out": 1,
        "boxes cut at the border of the image": 1,
        "keypoints outside of the image made not labelled": 1,
    }
    config = yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())
    assert config == {
        **{"train": "images", "val": "images", "kpt_shape": [3, 3], "flip_idx": [0, 2, 1]},
        **{"kpt_names": {0: NAMES}, "names": {0: "person"}},
    }
    lines = (tmp_path / "out" / "labels" / "a.txt").read_text().splitlines()
    assert lines[0] == "0 0.375 0.5 0.5 0.5 0.15625 0.25 2 0.3125 0.2916666667 1 0 0 0"
    assert lines[1].startswith("0 0.125 ")
    assert "-" not in lines[1]
    assert (tmp_path / "out" / "labels" / "b.txt").read_text() == ""
    assert (tmp_path / "out" / "images" / "b.png").read_bytes() == (images / "b.png").read_bytes()
    with pytest.raises(AnnotationError, match="is there already"):
        write_yolo(path, images, tmp_path / "out")


def test_to_yolo_writes_nothing_half(tmp_path: Path, images: Path) -> None:
    Image.open(images / "a.png").save(images / "a.jpg")
    coco = people()
    coco["images"].append({"id": 3, "file_name": "a.jpg", "width": 64, "height": 48})
    path = tmp_path / "in.json"
    path.write_text(json.dumps(coco))
    with pytest.raises(AnnotationError, match=r"'a.jpg' and another image.*same labels 'a.txt'"):
        write_yolo(path, images, tmp_path / "out")
    path.write_text(json.dumps(people(person(keypoints=[1]))))
    with pytest.raises(AnnotationError, match=r"in.json: annotations\[0\].*keypoints"):
        write_yolo(path, images, tmp_path / "out")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["images", "in.json"]


INSIDE = st.integers(2_000, 38_000).map(lambda z: z / 1000)
KEYPOINT = st.one_of(st.just([0, 0, 0]), st.tuples(INSIDE, INSIDE, st.sampled_from([1, 2])))
PERSON = st.tuples(
    st.sampled_from([1, 2]),
    st.lists(KEYPOINT, min_size=3, max_size=3).filter(lambda rows: any(v for _, _, v in rows)),
    st.tuples(*[st.integers(0, 2)] * 2, *[st.integers(36, 38)] * 2),
)


@given(st.lists(PERSON, min_size=1, max_size=4))
def test_coco_to_yolo_and_back(tmp_path_factory: pytest.TempPathFactory, drawn: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("there")
    images = save_images(folder / "images")
    coco = drawn_people(drawn)
    path = folder / "before.json"
    path.write_text(json.dumps(coco))
    write_yolo(path, images, folder / "out")
    assert_same_poses(read_yolo(folder / "out" / "data.yaml").coco, coco)


# labelme


def shape(label: str, *points: Any, group: Any = None, kind: str = "point", **more: Any) -> Json:
    own = {"label": label, "points": [list(x) for x in points], "group_id": group}
    return own | {"shape_type": kind, "flags": {}} | more


def save_labelme(folder: Path, *shapes: Json, image: str = "a.png", **more: Any) -> Path:
    save_images(folder)
    labels = {"version": "5.5.0", "flags": {}, "imagePath": image, "imageData": None}
    sizes = {"imageWidth": 64, "imageHeight": 48}
    path = folder / f"{Path(image).stem}.json"
    path.write_text(json.dumps(labels | sizes | {"shapes": shapes} | more))
    return folder


def poses(done: Converted) -> list[list[float]]:
    return [x["keypoints"] for x in done.coco["annotations"]]


def test_shapes_of_a_group_are_a_person(tmp_path: Path) -> None:
    box = shape("person", (40, 30), (10.5, 5), group=1, kind="rectangle")  # from below
    outline = shape("person", (0, 0), (8, 0), (8, 10), (0, 10), group="b", kind="polygon")
    hidden = shape("left_eye", (7, 3), group="b", flags={"Occluded": True})
    folder = save_labelme(
        tmp_path,
        *(box, outline, hidden, shape("nose", (5, 6), group="b")),
        *(shape("nose", (12, 7.25), group=1), shape("arrow", (1, 1), (2, 2), kind="line")),
    )
    done = read_labelme(folder)
    assert done.coco["categories"][0]["keypoints"] == ["nose", "left_eye"]  # COCO's order
    b, one = sorted(done.coco["annotations"], key=lambda x: x["bbox"])
    assert one["keypoints"] == [12, 7.25, 2, 0, 0, 0]
    assert one["bbox"] == [10.5, 5, 29.5, 25]
    assert one["area"] == pytest.approx(0.53 * 29.5 * 25)
    assert b["keypoints"] == [5, 6, 2, 7, 3, 1]
    assert b["bbox"] == [0, 0, 8, 10]
    assert b["area"] == 80
    assert b["segmentation"] == [[0, 0, 8, 0, 8, 10, 0, 10]]
    assert done.changes["shapes of the kind 'line' left out"] == 1
    is_sound(tmp_path, folder, done)


def test_points_without_group_are_of_the_only_person_or_outline(tmp_path: Path) -> None:
    nose, tail = shape("nose", (10, 10)), shape("tail", (30, 20))
    folder = save_labelme(tmp_path / "one", nose, tail)
    assert poses(read_labelme(folder)) == [[10, 10, 2, 30, 20, 2]]
    left = shape("fish", (0, 0), (25, 40), kind="rectangle")
    right = shape("fish", (26, 0), (60, 40), kind="rectangle")
    done = read_labelme(save_labelme(tmp_path / "two", nose, tail, left, right))
    assert poses(done) == [[10, 10, 2, 0, 0, 0], [0, 0, 0, 30, 20, 2]]
    assert done.coco["categories"][0]["name"] == "fish"
    is_sound(tmp_path, tmp_path / "two", done)
    wide = shape("fish", (0, 0), (60, 40), kind="rectangle")
    message = r"a.json: the point 'nose' at \(10, 10\) has no group, and lies in 2 outlines"
    with pytest.raises(AnnotationError, match=message):
        read_labelme(save_labelme(tmp_path / "wide", nose, left, wide))
    with pytest.raises(AnnotationError, match="lies in 0 outlines"):
        read_labelme(save_labelme(tmp_path / "none", nose, shape("nose", (11, 11))))


def test_order_and_choice_of_keypoints(tmp_path: Path) -> None:
    folder = save_labelme(tmp_path, *(shape(x, (10 + n, 9)) for n, x in enumerate("cab")))
    assert read_labelme(folder).coco["categories"][0]["keypoints"] == ["a", "b", "c"]
    done = read_labelme(folder, keypoints=["c", "x", "b"])
    assert poses(done) == [[10, 9, 2, 0, 0, 0, 12, 9, 2]]
    assert done.changes["points 'a' left out, no keypoint is called so"] == 1


def test_the_image_is_found_from_the_json_or_in_a_folder(tmp_path: Path) -> None:
    save_images(tmp_path / "images")
    labels = save_labelme(tmp_path / "labels", shape("nose", (10, 9)), image="..\\images\\a.png")
    for name in SIZES:
        (labels / name).unlink()
    with pytest.raises(AnnotationError, match=r"none of 1 images can be read in .*--images"):
        read_labelme(labels)
    assert read_labelme(tmp_path).coco["images"][0]["file_name"] == "images/a.png"
    done = read_labelme(labels, images=tmp_path / "images")
    assert done.coco["images"][0]["file_name"] == "a.png"
    is_sound(tmp_path, tmp_path / "images", done)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"imagePath": None}, "a.json: imagePath: must be"),
        ({"imageWidth": 63}, "width, height: 63 x 48"),
        ({"shapes": [3]}, r"a.json: shapes\[0\], label: must be text"),
        ({"shapes": [shape("nose")]}, r"shapes\[0\], points: must be a list"),
        ({"shapes": [shape("nose", (1,))]}, r"shapes\[0\], points: must be two numbers"),
        ({"shapes": [shape("nose", (1, None))]}, r"shapes\[0\], points: must be two numbers"),
        ({"shapes": [shape("nose", (1, 2), group=[])]}, r"shapes\[0\], group_id: must be"),
        ({"shapes": [shape("nose", (1, 2), group=4)] * 2}, "'nose' comes twice in the group 4"),
        ({"shapes": []}, "no keypoint of 'person' is labelled"),
    ],
)
def test_what_is_wrong_in_labelme_is_named(tmp_path: Path, change: Json, said: str) -> None:
    with pytest.raises(AnnotationError, match=said):
        read_labelme(save_labelme(tmp_path, **change))


# Label Studio

SHAPE = {"width", "height", "rotation", "points"}  # what stands in the value of a region


def region(kind: str, label: str, x: float, y: float, own_id: str = "", **more: Any) -> Json:
    """A region of JSON, its place in percent of 64 x 48 pixels."""
    value = {"x": x, "y": y, kind: [label]} | {k: more.pop(k) for k in SHAPE & more.keys()}
    size = {"original_width": 64, "original_height": 48, "image_rotation": 0}
    own = {"id": own_id or f"{label}{x}", "type": kind, "from_name": "tag", "to_name": "image"}
    return own | size | {"value": value} | more


def point(label: str, x: float, y: float, **more: Any) -> Json:
    return region("keypointlabels", label, x, y, width=0.3, **more)


def rectangle(label: str, x: float, y: float, width: float, height: float, **more: Any) -> Json:
    return region("rectanglelabels", label, x, y, width=width, height=height, **more)


def save_tasks(folder: Path, *results: Any, image: str = "/data/upload/1/a.png") -> Path:
    tasks = [
        {"id": 10 + n, "annotations": [{"id": n, "result": result}], "data": {"image": image}}
        for n, result in enumerate(results)
    ]
    path = folder / "tasks.json"
    path.write_text(json.dumps(tasks))
    return path


def test_percents_of_label_studio_are_pixels_of_a_person(tmp_path: Path, images: Path) -> None:
    result = [
        point("nose", 25, 50, parentID="r1"),  # (16, 24)
        point("left_eye", 50, 25, parentID="r1", own_id="k2"),  # (32, 12)
        {"id": "k2", "type": "choices", "value": {"choices": ["Occluded"]}},
        rectangle("person", 12.5, 12.5, 50, 75, own_id="r1"),  # [8, 6, 32, 36]
        rectangle("person", 75, 50, 12.5, 25, own_id="r2", rotation=90),  # about (48, 24)
        region("brushlabels", "grass", 0, 0),
    ]
    done = read_label_studio(save_tasks(tmp_path, result), images=images)
    assert done.coco["categories"][0]["keypoints"] == ["nose", "left_eye"]
    one, other = done.coco["annotations"]
    assert one["keypoints"] == [16, 24, 2, 32, 12, 1]
    assert one["bbox"] == [8, 6, 32, 36]
    assert one["area"] == pytest.approx(0.53 * 32 * 36)
    assert other["keypoints"] == [0] * 6
    assert other["bbox"] == [36, 24, 12, 8]  # 8 wide and 12 high, turned to the left
    assert done.changes == {
        "regions of the kind 'brushlabels' left out": 1,
        "turned boxes made upright": 1,
        "areas made, 0.53 of the box": 2,
    }
    is_sound(tmp_path, images, done)


def test_keypoints_belong_to_the_only_region_around_them(tmp_path: Path, images: Path) -> None:
    boxes = [rectangle("person", 0, 0, 40, 100), rectangle("person", 50, 0, 50, 100)]
    points = [point("nose", 25, 50), point("nose", 75, 50)]
    done = read_label_studio(save_tasks(tmp_path, boxes + points), images=images)
    assert poses(done) == [[16, 24, 2], [48, 24, 2]]
    corners = [[0, 0], [50, 0], [50, 50]]
    outline = region("polygonlabels", "person", 0, 0, points=corners)
    done = read_label_studio(save_tasks(tmp_path, [outline, point("nose", 25, 25)]))
    assert first(done)["segmentation"] == [[0, 0, 32, 0, 32, 24]]
    assert first(done)["area"] == 32 * 24 / 2


def test_json_min_says_the_same(tmp_path: Path, images: Path) -> None:
    size = {"original_width": 64, "original_height": 48}
    task = {
        **{"image": "/data/upload/1/a.png", "id": 3, "annotator": 1, "annotation_id": 5},
        "kp": [{"x": 25, "y": 50, "width": 0.3, "keypointlabels": ["nose"], **size}],
        "box": [{"x": 0, "y": 0, "width": 50, "height": 100, "rectanglelabels": ["dog"], **size}],
        "lead_time": 7.5,
    }
    path = tmp_path / "min.json"
    path.write_text(json.dumps([task, {"image": "b.png", "id": 4}]))
    done = read_label_studio(path, images=images)
    assert poses(done) == [[16, 24, 2]]
    assert first(done)["bbox"] == [0, 0, 32, 48]
    assert done.coco["categories"][0]["name"] == "dog"
    assert done.changes["tasks left out, nobody has annotated them"] == 1
    is_sound(tmp_path, images, done)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("/data/upload/1/0a1b2c3d-a.png", "a.png"),
        ("0a1b2c3d-a.png", "a.png"),
        ("/data/local-files/?d=photos%2Fa.png", "a.png"),
        ("s3://bucket/photos/a.png", "a.png"),
        ("https://example.org/x/a.png?token=1", "a.png"),
    ],
)
def test_images_of_label_studio_are_found(
    tmp_path: Path, images: Path, url: str, expected: str
) -> None:
    path = save_tasks(tmp_path, [point("nose", 25, 50)], image=url)
    assert read_label_studio(path, images=images).coco["images"][0]["file_name"] == expected


def test_cancelled_and_further_annotations_are_left_out(tmp_path: Path, images: Path) -> None:
    nose = {"result": [point("nose", 25, 50)]}
    cancelled = {"was_cancelled": True, "result": [point("nose", 0, 0)]}
    tasks = [
        {"id": 1, "data": {"image": "a.png"}, "annotations": [cancelled, nose, nose]},
        {"id": 2, "data": {"image": "b.png"}, "annotations": [{"result": []}]},
        {"id": 3, "data": {"image": "c.png"}, "annotations": [cancelled]},
    ]
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(tasks))
    with pytest.raises(AnnotationError, match=r"image 'b.png': width, height: unknown"):
        read_label_studio(path)
    done = read_label_studio(path, images=images)
    assert poses(done) == [[16, 24, 2]]
    assert [x["file_name"] for x in done.coco["images"]] == ["a.png", "b.png"]
    assert done.changes["further annotations of a task left out"] == 1
    assert done.changes["tasks left out, nobody has annotated them"] == 1


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (None, "task 10, result: must be a list"),
        ([3], "task 10, result: must be a list of objects"),
        ([point("nose", 1, 1) | {"value": None}], r"result\[0\], keypointlabels: must be one"),
        ([point("nose", 1, None)], r"result\[0\], value: must be two numbers"),
        ([point("nose", 1, 1, original_width=None)], r"result\[0\], original_width"),
        ([point("nose", 1, 1, image_rotation=90)], "task 10, image_rotation: turned"),
        ([point("nose", 1, 1, parentID=[])], r"result\[0\], id, parentID: must be text"),
        ([rectangle("a", 1, 1, 1, 1, rotation="x")], r"result\[0\], rotation: must be"),
        ([point("nose", 1, 1), point("nose", 2, 2)], "task 10: the point 'nose' at .* no group"),
        ([point("nose", 1, 1, parentID="r")] * 2, "task 10: .*'nose' comes twice"),
    ],
)
def test_what_is_wrong_in_label_studio_is_named(tmp_path: Path, result: Any, said: str) -> None:
    with pytest.raises(AnnotationError, match=said):
        read_label_studio(save_tasks(tmp_path, result))


def test_other_json_is_not_label_studios(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_text("{}")
    with pytest.raises(AnnotationError, match=r"in\.json: must be a list of tasks"):
        read_label_studio(path)
    with pytest.raises(AnnotationError, match="task 10, data: has no name of an image"):
        read_label_studio(save_tasks(tmp_path, [], image="video.mp4"))


# CVAT

LABELS = """<meta><job><labels>
<label><name>horse</name><type>skeleton</type><svg>&lt;line data-type="edge" data-node-from="1"
data-node-to="3"&gt;&lt;/line&gt;&lt;circle data-node-id="1" data-label-name="nose"&gt;
&lt;/circle&gt;&lt;circle data-node-id="3" data-label-name="tail"&gt;&lt;/circle&gt;</svg></label>
<label><name>nose</name><type>points</type><parent>horse</parent></label>
<label><name>ear</name><type>points</type><parent>horse</parent></label>
<label><name>tail</name><type>points</type><parent>horse</parent></label>
<label><name>horse box</name><type>rectangle</type></label>
</labels></job></meta>"""
SKELETON = """<skeleton label="horse" source="manual" z_order="0" group_id="2">
<points label="tail" outside="0" occluded="1" points="20.50,10.25"/>
<points label="nose" outside="0" occluded="0" points="30,40"/>
<points label="ear" outside="1" occluded="0" points="3,4"/></skeleton>"""


def save_cvat(folder: Path, *shapes: str, labels: str = LABELS, size: str = "64") -> Path:
    path = folder / "annotations.xml"
    image = f'<image id="0" name="a.png" width="{size}" height="48">{"".join(shapes)}</image>'
    text = f"<annotations><version>1.1</version>{labels}{image}</annotations>"
    path.write_text(f'<?xml version="1.0" encoding="utf-8"?>{text}')
    return path


def cvat_box(label: str, *corners: float, more: str = "") -> str:
    keys = zip(("xtl", "ytl", "xbr", "ybr"), corners, strict=True)
    places = " ".join(f'{k}="{x}"' for k, x in keys)
    return f'<box label="{label}" occluded="0" {places} {more}/>'


def cvat_points(label: str, points: str, more: str = "") -> str:
    return f'<points label="{label}" occluded="0" points="{points}" {more}/>'


def test_a_skeleton_of_cvat_is_a_person(tmp_path: Path, images: Path) -> None:
    box = cvat_box("horse box", 10, 5, 40, 45, more='group_id="2"')
    done = read_cvat(save_cvat(tmp_path, SKELETON, box, "<cuboid/>"), images=images)
    (category,) = done.coco["categories"]
    assert category["name"] == "horse"
    assert category["keypoints"] == ["nose", "ear", "tail"]
    assert category["skeleton"] == [[1, 3]]
    assert poses(done) == [[30, 40, 2, 0, 0, 0, 20.5, 10.25, 1]]
    assert first(done)["bbox"] == [10, 5, 30, 40]
    assert done.changes["shapes of the kind 'cuboid' left out"] == 1
    is_sound(tmp_path, images, done)


def test_skeletons_of_cvat_without_boxes(tmp_path: Path) -> None:
    other = SKELETON.replace(' group_id="2"', "")
    done = read_cvat(save_cvat(tmp_path, SKELETON, other, other))
    assert poses(done) == [[30, 40, 2, 0, 0, 0, 20.5, 10.25, 1]] * 3
    assert first(done)["bbox"] == [20.5, 10.25, 9.5, 29.75]
    assert done.changes["boxes made, around the labelled keypoints"] == 3


def test_points_of_cvat_are_gathered(tmp_path: Path) -> None:
    turned = cvat_box("dog", 10, 20, 20, 40, more='rotation="90"')  # then [5, 25, 20, 10]
    shapes = [cvat_points("nose", "6,26"), cvat_points("tail", "24,34"), turned]
    done = read_cvat(save_cvat(tmp_path, *shapes, labels=""))
    assert poses(done) == [[6, 26, 2, 24, 34, 2]]
    assert first(done)["bbox"] == pytest.approx([5, 25, 20, 10])
    assert done.coco["categories"][0]["name"] == "dog"
    assert done.changes["turned boxes made upright"] == 1
    grouped = [cvat_points("nose", f"{x},9", f'group_id="{x}"') for x in (5, 9)]
    polygon = '<polygon label="dog" points="0,0;8,0;8,10" group_id="5"/>'
    done = read_cvat(save_cvat(tmp_path, *grouped, polygon, labels=""))
    assert poses(done) == [[5, 9, 2], [9, 9, 2]]
    assert first(done)["area"] == 40


def test_several_points_of_cvat_are_a_person_in_order(tmp_path: Path) -> None:
    path = save_cvat(tmp_path, cvat_points("horse", "6,26;7,8", 'z_order="0"'), labels="")
    with pytest.raises(AnnotationError, match=r"points\[0\]: keypoints: .*give 2 names"):
        read_cvat(path)
    done = read_cvat(path, keypoints=["tail", "nose"])
    assert poses(done) == [[6, 26, 2, 7, 8, 2]]
    assert done.coco["categories"][0] | {"skeleton": []} == {
        **{"id": 1, "name": "horse"},
        **{"keypoints": ["tail", "nose"], "skeleton": []},
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no XML, or cut off"),
        ("<annotations>", "no XML, or cut off"),
        ("<x/>", "must be CVAT's annotations, got <x>"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotations/>', "has a DOCTYPE"),
        ("<annotations><track/></annotations>", "has tracks: export as CVAT for images"),
        ("<annotations/>", "has no image"),
        ("<annotations><image/></annotations>", "image 1, name: is missing"),
        ("<annotations><image name='a' width='-1'/></annotations>", "image 'a', width: must"),
    ],
)
def test_xml_that_is_not_cvats_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "in.xml"
    path.write_text(text)
    with pytest.raises(AnnotationError, match=said) as caught:
        read_cvat(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (cvat_points("nose", "1;2"), r"image 'a.png', points\[0\], points: must be two numbers"),
        (cvat_points("nose", "1,x"), r"points\[0\], points: must be numbers"),
        (cvat_points("nose", "1,inf"), r"points\[0\], points: must be two numbers"),
        ("<box label='a' xtl='1'/>", r"box\[0\], xtl, ytl, xbr, ybr: must be numbers"),
        (cvat_box("a", 1, 2, 3, 4, more="rotation='x'"), r"box\[0\], rotation: must be numbers"),
        (SKELETON.replace("30,40", "30,40;1,1"), r"skeleton\[0\], points: 'nose' must be one"),
        (SKELETON.replace("tail", "nose"), "'nose' comes twice in the group '2'"),
    ],
)
def test_what_is_wrong_in_cvat_is_named(tmp_path: Path, shape: str, said: str) -> None:
    with pytest.raises(AnnotationError, match=said):
        read_cvat(save_cvat(tmp_path, shape))


# All of them


def as_labelme(folder: Path, coco: Json) -> Path:
    for image in coco["images"]:
        own = [x for x in coco["annotations"] if x["image_id"] == image["id"]]
        shapes = [
            *(shape("person", *ends(x), group=x["id"], kind="rectangle") for x in own),
            *(
                shape(name, xy, group=x["id"], flags={"hidden": v == 1})
                for x in own
                for name, xy, v in labelled(x)
            ),
        ]
        sizes = {f"image{k.capitalize()}": image[k] for k in ("width", "height")}
        save_labelme(folder, image=image["file_name"], shapes=shapes, **sizes)
    return folder


def as_label_studio(folder: Path, coco: Json) -> Path:
    tasks = []
    for image in coco["images"]:
        width, height = image["width"], image["height"]
        size = {"original_width": width, "original_height": height}
        result = []
        for x in coco["annotations"]:
            if x["image_id"] != image["id"]:
                continue
            own_id, (left, top, w, h) = f"r{x['id']}", x["bbox"]
            sides = {"width": 100 * w / width, "height": 100 * h / height}
            place = (100 * left / width, 100 * top / height)
            result.append(region("rectanglelabels", "person", *place, own_id, **sides, **size))
            for name, (a, b), v in labelled(x):
                where, k = (100 * a / width, 100 * b / height), f"{own_id}{name}"
                result.append(point(name, *where, own_id=k, parentID=own_id, **size))
                if v == 1:
                    result.append({"id": k, "type": "choices", "value": {"choices": ["hidden"]}})
        data = {"image": image["file_name"]}
        tasks.append({"id": image["id"], "data": data, "annotations": [{"result": result}]})
    path = folder / "tasks.json"
    path.write_text(json.dumps(tasks))
    return path


def as_cvat(folder: Path, coco: Json) -> Path:
    text = ""
    for image in coco["images"]:
        shapes = ""
        for x in coco["annotations"]:
            if x["image_id"] == image["id"]:
                more = f'group_id="{x["id"]}"'
                (x0, y0), (x1, y1) = ends(x)
                shapes += cvat_box("box", x0, y0, x1, y1, more=more)
                parts = (
                    f'<points label="{name}" occluded="{2 - v}" points="{a},{b}"/>'
                    for name, (a, b), v in labelled(x)
                )
                shapes += f'<skeleton label="person" {more}>{"".join(parts)}</skeleton>'
        keys = " ".join(f'{k}="{image[k]}"' for k in ("width", "height"))
        text += f'<image name="{image["file_name"]}" {keys}>{shapes}</image>'
    path = folder / "annotations.xml"
    path.write_text(f"<annotations>{text}</annotations>")
    return path


def ends(annotation: Json) -> tuple[tuple[float, float], tuple[float, float]]:
    x, y, width, height = annotation["bbox"]
    return (x, y), (x + width, y + height)


def labelled(annotation: Json) -> list[tuple[str, tuple[float, float], int]]:
    numbers = annotation["keypoints"]
    rows = zip(NAMES, numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    return [(name, (x, y), v) for name, x, y, v in rows if v]


TOOLS = {
    "labelme": (as_labelme, read_labelme),
    "label-studio": (as_label_studio, read_label_studio),
    "cvat": (as_cvat, read_cvat),
}


def drawn_people(drawn: Sequence[Any]) -> Json:
    return people(
        *(
            person(id=n, image_id=image, keypoints=[z for x in rows for z in x], bbox=[*box])
            | {"area": 0.53 * box[2] * box[3], "num_keypoints": sum(v > 0 for _, _, v in rows)}
            for n, (image, rows, box) in enumerate(sorted(drawn, key=lambda x: x[0]), start=1)
        )
    )


def assert_same_poses(is_now: Json, was: Json) -> None:
    assert is_now["images"] == was["images"]
    assert is_now["categories"][0]["keypoints"] == NAMES
    for new, old in zip(is_now["annotations"], was["annotations"], strict=True):
        for key in ("keypoints", "bbox", "area"):
            assert new[key] == pytest.approx(old[key], abs=2e-3)
        for key in ("id", "image_id", "category_id", "num_keypoints", "iscrowd"):
            assert new[key] == old[key]


@pytest.mark.parametrize("tool", TOOLS)
@given(drawn=st.lists(PERSON, min_size=1, max_size=4))
def test_a_tool_and_back(
    tmp_path_factory: pytest.TempPathFactory, tool: str, drawn: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp(tool)
    save_images(folder)
    coco = drawn_people(drawn)
    make, load = TOOLS[tool]
    assert_same_poses(load(make(folder, coco), images=folder, keypoints=NAMES).coco, coco)


def leaves(value: Any) -> list[tuple[Any, Any]]:
    """Places in nested lists and objects."""
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    return [x for k in keys for x in ((value, k), *leaves(value[k]))]


@pytest.mark.parametrize("tool", TOOLS)
@given(data=st.data())
def test_odd_files_are_read_or_refused_in_a_line(
    tmp_path_factory: pytest.TempPathFactory, tool: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp(tool)
    make, load = TOOLS[tool]
    path = make(folder, people(person(bbox=[8, 10, 16, 20]), person(id=2, image_id=2)))
    file = path / "a.json" if path.is_dir() else path
    if file.suffix == ".json":
        content = json.loads(file.read_text())
        where, key = data.draw(st.sampled_from(leaves(content)))
        where[key] = data.draw(ODD)
        file.write_text(json.dumps(content))
    else:
        text = file.read_text()
        start = data.draw(st.integers(0, len(text)))
        other = data.draw(st.sampled_from(["", "<", "9", "nan", "\0", "-"]))
        file.write_text(text[:start] + other + text[start + data.draw(st.integers(0, 5)) :])
    try:
        load(path)
    except ValueError as error:
        said = str(error)
    else:
        return
    assert str(path) in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("tool", [*TOOLS, "coco", "yolo"])
def test_the_program_writes_and_counts(
    tmp_path: Path, tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images = save_images(tmp_path / "train" / "images")
    coco = people(person(bbox=[8, 10, 16, 20]), person(id=2, image_id=2, area=...))
    if tool in TOOLS:
        path = TOOLS[tool][0](images, coco)
    elif tool == "yolo":
        path = save_yolo(tmp_path / "yolo", [LINE])
        images = tmp_path / "yolo" / "train" / "images"
    else:
        path = tmp_path / "in.json"
        path.write_text(json.dumps(coco))
    output = tmp_path / "new" / "out.json"
    words = ["convert", tool, "--input", str(path), "--output", str(output)]
    assert cli.main([*words, "--images", str(images), "--keypoints", *NAMES]) == 0
    said = capsys.readouterr().out
    assert f"{output}: 2 images, " in said
    assert "3 keypoints: nose, left_eye, right_eye" in said
    assert " areas made, 0.53 of the box" in said
    assert cli.main(["validate", "--input", str(output), "--images", str(images)]) == 0
    assert [x.name for x in output.parent.iterdir()] == ["out.json"]
    there = [str(tmp_path / "back"), "--images", str(images)]
    assert cli.main(["convert", "to-yolo", "--input", str(output), "--output", *there]) == 0
    assert (tmp_path / "back" / "labels" / "a.txt").read_text().startswith("0 ")


@pytest.mark.parametrize("tool", [*TOOLS, "coco", "yolo", "to-yolo"])
def test_bad_input_is_one_line_status_2_and_no_file(
    tmp_path: Path, tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("empty", "nowhere"):
        path = tmp_path / name
        if name == "empty":
            path.write_text("")
        output = tmp_path / "new" / "out.json"
        words = ["convert", tool, "--input", str(path), "--output", str(output)]
        assert cli.main([*words, "--images", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert name in line or str(tmp_path) in line
        assert not output.parent.exists()
