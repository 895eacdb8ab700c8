"""What may be wrong with a file of COCO keypoint annotations, said so that a person can mend it.

`find_problems` walks the loaded json; training and evaluation stop at the first problem
(`check_annotations`), ``inspose validate`` lists them. A file without problems
is one that Detectron2's `load_coco_json` and `InsPoseDatasetMapper` read without complaint. The
format is COCO's: https://cocodataset.org/#format-data.
"""

import json
import logging
import math
import ntpath
import os
import posixpath
import reprlib
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

logger = logging.getLogger(__name__)

NUM_KEYPOINTS = 17  # COCO's persons
MAX_PIXELS = 1_000_000  # no image is as wide; float32 and 64-bit sizes are still exact
PIXELS = f"a finite number within {MAX_PIXELS} pixels"
# Without these COCO's keypoint evaluation fails after all images have gone through the model.
READ_BY_EVALUATION = ("area", "bbox", "iscrowd", "keypoints", "num_keypoints")

Finding = tuple[str, str, str]  # key, what is wrong, cure


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        entry: where it stands in the json, like ``annotations[7]``; empty for the whole file.
        image_id: id of the image as it stands there, None where there is none.
        annotation_id: the same of the annotation.
        key: the key of the entry whose value is wrong.
        what: what is wrong.
        cure: what to do.
    """

    entry: str
    image_id: Any
    annotation_id: Any
    key: str
    what: str
    cure: str

    def __str__(self) -> str:
        ids = {"annotation id": self.annotation_id, "image id": self.image_id}
        said = ", ".join(f"{name} {_show(x)}" for name, x in ids.items() if x is not None)
        place = f"{self.entry} ({said})" if said else self.entry
        return f"{place}{', ' if place else ''}{self.key}: {self.what}; {self.cure}"


def load_annotations(json_file: str) -> Any:
    """Read a json file as pycocotools does, through Detectron2's `PathManager`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON; names the file.
    """
    if not PathManager.isfile(json_file):
        raise FileNotFoundError(
            f"{json_file} is not there: put the data set where it is registered; built-in ones lie "
            "below $DETECTRON2_DATASETS, by default ./datasets"
        )
    with PathManager.open(json_file) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{json_file} is no JSON in UTF-8, or was cut off: {error}; write or copy it anew"
            ) from error


def check_annotations(
    json_file: str,
    num_keypoints: int | None = None,
    *,
    evaluation: bool = False,
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Refuse a file in which :func:`find_problems` finds one.

    To be trained on, it may have persons or keypoints that are not learned: a warning counts these.

    Args:
        json_file: path, as registered with Detectron2.
        num_keypoints: see :func:`find_problems`, as are the others.
        evaluation: the same.
        class_names: the same.

    Returns:
        What the file holds.

    Raises:
        OSError: the file cannot be read.
        ValueError: its first problem, and the command that lists all.
    """
    coco = load_annotations(json_file)
    problems = find_problems(coco, num_keypoints, evaluation=evaluation, class_names=class_names)
    problem = next(problems, None)
    if problem is not None:
        flags = f" --num-keypoints {num_keypoints}" if num_keypoints else ""
        flags += " --evaluation" if evaluation else ""
        raise ValueError(
            f"{json_file}: {problem}\nAll problems of the file: "
            f"inspose validate --input {shlex.quote(json_file)}{flags}"
        )
    if not evaluation:
        _warn(json_file, coco)
    return coco


@contextmanager
def in_memory(loaded: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Let pycocotools, in the ``with`` block, take annotations from memory instead of their file.

    Who loads a data set in the block changes these annotations, as Detectron2 does: use them once.

    Args:
        loaded: by json file, as registered with Detectron2, what :func:`check_annotations` returns.
    """
    by_path = {PathManager.get_local_path(file): coco for file, coco in loaded.items()}

    class Loaded(COCO):
        def __init__(self, annotation_file: str | None = None) -> None:
            known = by_path.pop(annotation_file or "", None)
            super().__init__(annotation_file if known is None else None)
            if known is not None:
                self.dataset = known
                self.createIndex()

    with patch("pycocotools.coco.COCO", Loaded):
        yield


def _warn(json_file: str, coco: dict[str, Any]) -> None:
    """Say what is not learned of a valid file though its author may think so: one line a kind."""
    persons = [x for x in coco["annotations"] if not x.get("iscrowd") and not is_dropped(x)]
    if without_key := sum("keypoints" not in x for x in persons):
        logger.warning(
            "%s: %d of %d persons lack the key `keypoints`: no pose of theirs is learned, their "
            "boxes count neither as person nor as background",
            json_file,
            without_key,
            len(persons),
        )
    if outside := count_outside(persons, coco["images"]):
        logger.warning(
            "%s: %d labelled keypoints lie outside their images: these are not learned",
            json_file,
            outside,
        )


def find_problems(
    coco: Any,
    num_keypoints: int | None = None,
    image_root: str | None = None,
    *,
    evaluation: bool = False,
    class_names: Sequence[str] | None = None,
) -> Iterator[Problem]:
    """Find what is wrong with a loaded json.

    Args:
        coco: what the file holds; it is not changed.
        num_keypoints: K that a category must list, if it lists keypoints, and a person must have
            where it lists none. By default any number, and 17.
        image_root: folder of the images, to look for missing files; None does not look.
        evaluation: whether poses are to be scored by the file. Then its annotations need all that
            COCO's evaluation reads, and may be missing altogether (COCO's test sets). Else it
            is to be trained on, and one labelled keypoint is the least.
        class_names: names that the categories must have, in the order of their ids; None for any.

    Yields:
        The problems, in the order of the file. Where a top-level list is missing or no list,
        nothing below it is looked at.
    """
    findings = list(_check_lists(coco, evaluation))
    if findings:
        yield from (Problem("", None, None, *finding) for finding in findings)
        return
    images, categories = coco["images"], coco.get("categories", [])
    annotations = coco.get("annotations", [])
    yield from _check_entries("images", images, _image_checker(image_root))
    yield from _check_entries("categories", categories, _category_checker(num_keypoints))
    if "annotations" not in coco:
        return
    if class_names is not None:
        yield from _check_class_names(categories, list(class_names))
    check = _annotation_checker(images, categories, num_keypoints, evaluation)
    are_sound = True
    for problem in _check_entries("annotations", annotations, check):
        are_sound = False
        yield problem
    if are_sound and not evaluation and not any(map(is_learned_from, annotations)):
        what, cure = "no person has a labelled keypoint", "there is nothing to learn from"
        yield Problem("", None, None, "annotations", what, cure)


def is_learned_from(annotation: dict[str, Any]) -> bool:
    """Whether a valid annotation is of one person with a labelled keypoint, and not dropped."""
    if annotation.get("iscrowd") or is_dropped(annotation):
        return False
    return any(annotation.get("keypoints", ())[2::3])


def count_outside(annotations: Iterable[dict[str, Any]], images: Iterable[dict[str, Any]]) -> int:
    """Count labelled keypoints outside their images; the mapper makes them unlabelled.

    Args:
        annotations: valid ones of single persons.
        images: valid ones; annotations of others are not counted.

    Returns:
        The number. Detectron2 adds 0.5 pixels on loading, and a point on the border is inside.
    """
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    count = 0
    for annotation in annotations:
        width, height = sizes.get(annotation["image_id"], (math.inf, math.inf))
        numbers = iter(annotation.get("keypoints", ()))
        for x, y, v in zip(numbers, numbers, numbers, strict=True):
            inside = -0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5
            count += v > 0 and not inside
    return count


def is_dropped(annotation: dict[str, Any]) -> bool:
    """Whether Detectron2 drops a valid annotation without a word.

    It does so where no polygon has three points, and where the box, or the pseudo-box of
    `InsPoseDatasetMapper`, is empty.
    """
    polygons = annotation.get("segmentation")
    if polygons and isinstance(polygons, list):
        usable = any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in polygons)
        if not usable:
            return True
    if "bbox" in annotation:
        return 0 in annotation["bbox"][2:]
    return bool(annotation.get("iscrowd")) or not any(annotation.get("keypoints", ())[2::3])


def _check_lists(coco: Any, evaluation: bool) -> Iterator[Finding]:
    """Check that the file is an object with the lists that it needs."""
    if not isinstance(coco, dict):
        yield "file", f"must be an object {{...}}, got {_show(coco)}", "is it COCO's format?"
        return
    needed = {"images"} if evaluation else {"images", "annotations"}
    needed |= {"categories"} if "annotations" in coco or not evaluation else set()
    for key in ("images", "annotations", "categories"):
        if key not in coco:
            if key in needed:
                yield key, "is missing", "the file needs this list; nothing below was checked"
        elif not isinstance(coco[key], list):
            cure = "make it a list of objects; nothing below was checked"
            yield key, f"must be a list, got {_show(coco[key])}", cure
        elif not coco[key] and key in needed - {"annotations"}:
            yield key, "is empty", "list at least one"


def _check_entries(
    name: str, entries: list[Any], check: Callable[[dict[str, Any]], Iterator[Finding]]
) -> Iterator[Problem]:
    """Check the entries of a top-level list one by one, and that their ids are unique."""
    first_of: dict[int, int] = {}
    for index, entry in enumerate(entries):
        place = f"{name}[{index}]"
        if not isinstance(entry, dict):
            what = f"must be an object {{...}}, got {_show(entry)}"
            yield Problem(place, None, None, "entry", what, "mend or remove it")
            continue
        own_id = entry.get("id")
        image_id = {"images": own_id, "annotations": entry.get("image_id")}.get(name)
        annotation_id = own_id if name == "annotations" else None
        findings = list(check(entry))
        if type(own_id) is not int:
            findings.append(("id", _wrong(entry, "id", "a whole number"), "give it a unique id"))
        elif first_of.setdefault(own_id, index) != index:
            what = f"{own_id} is the id of {name}[{first_of[own_id]}] too"
            findings.append(("id", what, "give each its own id, or remove the copy"))
        for finding in findings:
            yield Problem(place, image_id, annotation_id, *finding)


def _image_checker(image_root: str | None) -> Callable[[dict[str, Any]], Iterator[Finding]]:
    def check(image: dict[str, Any]) -> Iterator[Finding]:
        for key in ("height", "width"):
            size = image.get(key)
            if type(size) is not int or not 0 < size <= MAX_PIXELS:
                what = _wrong(image, key, f"a whole number from 1 to {MAX_PIXELS}")
                yield key, what, "write the size of the image in pixels"
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            what = _wrong(image, "file_name", "a file name")
            yield "file_name", what, "write the path of the image below the folder of images"
        elif _leaves_folder(name):
            what = f"{_show(name)} is absolute or leads out of the folder of images"
            yield "file_name", what, "put the image below that folder, name it relative to it"
        elif image_root is not None and not os.path.isfile(os.path.join(image_root, name)):
            what = f"{os.path.join(image_root, name)!r} is not there"
            yield "file_name", what, "add the image, or remove its entry and its annotations"

    return check


def _leaves_folder(name: str) -> bool:
    """Whether a file name is not surely that of a file below the folder it is joined to.

    Only the name counts: whoever makes a symbolic link in the folder of images, or to it, may let
    it lead where the images are.
    """
    path = posixpath.normpath(name.replace("\\", "/"))
    return (
        path in (".", "..") or path.startswith(("/", "../")) or ntpath.isabs(path) or "\0" in path
    )


def _category_checker(
    num_keypoints: int | None,
) -> Callable[[dict[str, Any]], Iterator[Finding]]:
    def check(category: dict[str, Any]) -> Iterator[Finding]:
        if not isinstance(category.get("name"), str):
            yield "name", _wrong(category, "name", "text"), "name the category"
        if "keypoints" not in category:
            return
        names = category["keypoints"]
        if not isinstance(names, list) or not names:
            what = _wrong(category, "keypoints", "a list of names")
            yield "keypoints", what, "name the keypoints, or leave the key out"
        elif num_keypoints is not None and len(names) != num_keypoints:
            what = f"expected {num_keypoints} names, got {len(names)}"
            cure = "set MODEL.INSPOSE.NUM_KEYPOINTS (--num-keypoints) to the number of the file"
            yield "keypoints", what, cure

    return check


def _check_class_names(categories: list[Any], expected: list[str]) -> Iterator[Problem]:
    """Check the names that Detectron2 compares with those that the data set is registered with."""
    if not all(isinstance(x, dict) and type(x.get("id")) is int for x in categories):
        return  # said already
    names = [x.get("name") for x in sorted(categories, key=lambda x: x["id"])]
    if names != expected:
        what = f"the names are {_show(names)}, the data set is registered with {_show(expected)}"
        yield Problem("", None, None, "categories", what, "rename or remove categories")


def _annotation_checker(
    images: list[Any], categories: list[Any], num_keypoints: int | None, evaluation: bool
) -> Callable[[dict[str, Any]], Iterator[Finding]]:
    image_ids = _ids(images)
    category_ids = _ids(categories)
    keypoints_of = {
        x["id"]: len(x["keypoints"])
        for x in categories
        if isinstance(x, dict) and type(x.get("id")) is int and isinstance(x.get("keypoints"), list)
    }

    def check(annotation: dict[str, Any]) -> Iterator[Finding]:
        yield from _check_reference(annotation, "image_id", image_ids, "images")
        yield from _check_reference(annotation, "category_id", category_ids, "categories")
        if annotation.get("iscrowd", 0) not in (0, 1):
            yield "iscrowd", _wrong(annotation, "iscrowd", "0 or 1"), "write 1 for crowds, else 0"
        if annotation.get("ignore", 0) != 0:
            yield "ignore", "Detectron2 does not know it", "use iscrowd, or remove the annotation"
        if "bbox" in annotation:
            yield from _check_box(annotation["bbox"])
        if "keypoints" in annotation:
            category = annotation.get("category_id")
            own = keypoints_of.get(category) if type(category) is int else None
            expected = own or num_keypoints or NUM_KEYPOINTS
            yield from _check_keypoints(annotation["keypoints"], expected)
        if annotation.get("segmentation"):
            yield from _check_segmentation(annotation["segmentation"])
        if evaluation:
            yield from _check_scorable(annotation)

    return check


def _ids(entries: list[Any]) -> set[int]:
    ids = (x.get("id") for x in entries if isinstance(x, dict))
    return {x for x in ids if type(x) is int}


def _check_reference(
    annotation: dict[str, Any], key: str, known: Collection[int], name: str
) -> Iterator[Finding]:
    value = annotation.get(key)
    if type(value) is not int:
        yield key, _wrong(annotation, key, "a whole number"), f"write an id of `{name}`"
    elif value not in known:
        what = f"{_show(value)} is not in `{name}`"
        yield key, what, "add the entry there, or remove the annotation"


def _check_box(box: Any) -> Iterator[Finding]:
    cure = "write [x, y, width, height] in pixels, or leave bbox out"
    if not isinstance(box, list) or len(box) != 4:
        yield "bbox", f"must be a list of 4 numbers, got {_show(box)}", cure
    elif not _are_pixels(box):
        yield "bbox", f"each must be {PIXELS}, got {_show(box)}", cure
    elif box[2] < 0 or box[3] < 0:
        yield "bbox", f"width and height must not be negative, got {_show(box)}", cure


def _check_keypoints(keypoints: Any, expected: int) -> Iterator[Finding]:
    cure = "write x, y, v of every keypoint, or leave keypoints out where none is labelled"
    if not isinstance(keypoints, list):
        yield "keypoints", f"must be a list of {3 * expected} numbers, got {_show(keypoints)}", cure
        return
    if len(keypoints) != 3 * expected:
        number, rest = divmod(len(keypoints), 3)
        got = f"{number}" if rest == 0 else f"{len(keypoints)} numbers, no multiple of 3"
        yield "keypoints", f"expected {expected}, got {got}", cure
        return
    if not _are_pixels(keypoints):  # one line an annotation
        index = next(i for i, value in enumerate(keypoints) if not _are_pixels([value]))
        what = f"{'xyv'[index % 3]} of keypoint {index // 3} must be {PIXELS}"
        yield "keypoints", f"{what}, got {_show(keypoints[index])}", cure
    elif not set(keypoints[2::3]) <= {0, 1, 2}:
        index, v = next((i, v) for i, v in enumerate(keypoints[2::3]) if v not in (0, 1, 2))
        what = f"v of keypoint {index} must be 0, 1 or 2, got {_show(v)}"
        yield "keypoints", what, "write 0 for not labelled, 1 for hidden, 2 for visible"


def _check_segmentation(segmentation: Any) -> Iterator[Finding]:
    """Check the form that `load_coco_json` takes apart; what is drawn is not used."""
    cure = "write polygons, run lengths {counts, size}, or leave segmentation out"
    if isinstance(segmentation, list):
        if not all(isinstance(polygon, list) for polygon in segmentation):
            yield "segmentation", "must be a list of lists of numbers", cure
    elif not isinstance(segmentation, dict):
        yield "segmentation", f"must be polygons or run lengths, got {_show(segmentation)}", cure
    elif not _is_run_lengths(segmentation):
        what = f"counts and size do not make run lengths: {_show(segmentation)}"
        yield "segmentation", what, cure


def _is_run_lengths(segmentation: dict[str, Any]) -> bool:
    counts, size = segmentation.get("counts"), segmentation.get("size")
    if isinstance(counts, str):
        return True
    if not isinstance(counts, list) or not isinstance(size, list) or len(size) != 2:
        return False
    return all(type(x) is int and 0 <= x < 2**32 for x in (*counts, *size))


def _check_scorable(annotation: dict[str, Any]) -> Iterator[Finding]:
    for key in READ_BY_EVALUATION:
        if key not in annotation:
            yield key, "is missing", "COCO's evaluation reads it: write it (keypoints: zeros)"
    for key in ("area", "num_keypoints"):
        value = annotation.get(key, 0)
        if type(value) not in (int, float) or not 0 <= value <= MAX_PIXELS**2:
            yield key, _wrong(annotation, key, "a number, 0 or more"), "write it anew"


def _are_pixels(values: Collection[Any]) -> bool:
    """Whether all are numbers, finite and no further than `MAX_PIXELS`; COCO has 10 million."""
    return (
        set(map(type, values)) <= {int, float}
        and min(values) >= -MAX_PIXELS
        and max(values) <= MAX_PIXELS
        and not any(map(math.isnan, values))
    )


def _wrong(entry: dict[str, Any], key: str, wanted: str) -> str:
    return f"must be {wanted}, got {_show(entry[key])}" if key in entry else "is missing"


def _show(value: Any) -> str:
    """Write a value as JSON would, shortened."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return reprlib.repr(value)
