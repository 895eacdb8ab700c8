"""What may be wrong with a file of COCO keypoint annotations, said so that a person can mend it.

`find_problems` walks the loaded json. Training and evaluation stop at the first problem
(`check_annotations`), ``inspose validate`` lists them; both look here, so they agree. Only what is
learned from, or scored by, is looked at. The format is COCO's: https://cocodataset.org/#format-data.
"""

import math
import ntpath
import os
import posixpath
import reprlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .images import ImageError, read_size

NUM_KEYPOINTS = 17  # COCO's persons
MAX_PIXELS = 1_000_000  # no image is as wide; float32 and 64-bit sizes are still exact
PIXELS = f"a finite number within {MAX_PIXELS} pixels"
MAX_PERSONS = 20  # of an image that COCO's evaluation of keypoints looks at
MAX_DOUBTS = 0.1  # share of the persons; what is odd in more of them is a fault of the file
# Without these COCO's keypoint evaluation fails after all images have gone through the model.
READ_BY_EVALUATION = ("area", "bbox", "iscrowd", "keypoints", "num_keypoints")

Finding = tuple[str, str, str]  # key, what is wrong, cure


class AnnotationError(ValueError):
    """Annotations that cannot be used; the message is for whoever made them.

    Ends the programs with exit status 2.
    """


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
        image_root: folder of the images, to look for missing files and other sizes; None does not
            look.
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
    is_sound = True
    for problem in _entry_problems(coco, num_keypoints, image_root, evaluation, class_names):
        is_sound = False
        yield problem
    if is_sound and "annotations" in coco:
        yield from _problems_of_all(coco, evaluation)


def _entry_problems(
    coco: dict[str, Any],
    num_keypoints: int | None,
    image_root: str | None,
    evaluation: bool,
    class_names: Sequence[str] | None,
) -> Iterator[Problem]:
    """What is wrong with entries of the lists, see :func:`find_problems`."""
    images, categories = coco["images"], coco.get("categories", [])
    yield from _check_entries("images", images, _image_checker(image_root))
    learned = learned_categories(coco)
    check_category = _category_checker(num_keypoints)
    yield from _check_entries(
        "categories", categories, lambda x: check_category(x) if x in learned else iter(())
    )
    if "annotations" in coco:
        yield from _check_class_names(learned, class_names)
        check = _annotation_checker(images, categories, num_keypoints, evaluation)
        yield from _check_entries("annotations", coco["annotations"], check)


def _problems_of_all(coco: dict[str, Any], evaluation: bool) -> Iterator[Problem]:
    """What is wrong with sound entries taken together."""
    if not evaluation and not any(map(is_learned_from, coco["annotations"])):
        what, cure = "no person has a labelled keypoint", "there is nothing to learn from"
        yield Problem("", None, None, "annotations", what, cure)
    for count, of, doubt in count_doubts(coco, evaluation=evaluation):
        if count > MAX_DOUBTS * of:
            what = f"{count} of {of} persons: {doubt}"
            yield Problem("", None, None, "annotations", what, "mend the file")


def learned_categories(coco: dict[str, Any]) -> list[dict[str, Any]]:
    """Categories that InsPose is to learn, which should be one.

    Of several those with annotations; where none has, those that name keypoints. So a category that
    only groups others, as some tools write it, does no harm.
    """
    annotations = coco.get("annotations") or []
    categories = [x for x in coco.get("categories") or [] if isinstance(x, dict)]
    used = [x.get("category_id") for x in annotations if isinstance(x, dict)]
    known = {x for x in used if type(x) is int}
    with_annotations = [x for x in categories if type(x.get("id")) is int and x["id"] in known]
    with_names = [x for x in categories if x.get("keypoints")]
    return categories if len(categories) < 2 else with_annotations or with_names or categories


def is_learned_from(annotation: dict[str, Any]) -> bool:
    """Whether a valid annotation is of one person with a labelled keypoint."""
    return not annotation.get("iscrowd") and any(annotation.get("keypoints", ())[2::3])


def is_dropped(annotation: dict[str, Any]) -> bool:
    """Whether a valid annotation tells nothing: no box with an area and no labelled keypoint."""
    return box_of(annotation) is None


def box_of(annotation: dict[str, Any]) -> list[float] | None:
    """Box of a valid annotation, or where it has none, or a flat one, that of its keypoints.

    Returns:
        [x, y, width, height], a pixel wide at least around labelled keypoints; None where there is
        nothing.
    """
    box: list[float] = annotation.get("bbox", [0, 0, 0, 0])
    if box[2] > 0 and box[3] > 0:
        return box
    points = _labelled(annotation)
    if annotation.get("iscrowd") or not points:
        return None
    columns, rows = zip(*points, strict=True)
    x, y = min(columns), min(rows)
    return [x, y, max(max(columns) - x, 1), max(max(rows) - y, 1)]


def count_people(annotations: Iterable[dict[str, Any]]) -> Counter[int]:
    """Persons with labelled keypoints, by the id of their image."""
    return Counter(x["image_id"] for x in annotations if is_learned_from(x))


def _labelled(annotation: dict[str, Any]) -> list[tuple[float, float]]:
    numbers = iter(annotation.get("keypoints", ()))
    return [(x, y) for x, y, v in zip(numbers, numbers, numbers, strict=True) if v > 0]


DOUBTS = {
    "fractions": "keypoints that all lie in the first pixel: are they fractions of the image (0 to "
    "1)? Pixels are needed, as `inspose convert coco` makes them",
    "small box": "bbox smaller than a pixel: is it in fractions of the image (0 to 1)? Pixels are "
    "needed, as `inspose convert coco` makes them",
    "outside": "bbox reaches far out of the image: is it [x0, y0, x1, y1]? It must be [x, y, "
    "width, height] from the upper left corner",
    "far": "bbox has less than half of the person's keypoints in it: is it [x, y, width, height] "
    "from the upper left corner, in the pixels that the keypoints are in?",
    "area": "area is not that of the person, in square pixels: less than a hundredth of the box or "
    "more than one and a half of it. OKS is measured by it",
}


def count_doubts(coco: dict[str, Any], *, evaluation: bool) -> Iterator[tuple[int, int, str]]:
    """Count what is valid number by number, but odd.

    Args:
        coco: without other problems; not changed.
        evaluation: whether ``area`` is read.

    Yields:
        How many persons, of how many, and what is odd, with the first of them.
    """
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    persons = [x for x in coco.get("annotations", []) if not x.get("iscrowd")]
    first: dict[str, int] = {}
    counts: Counter[str] = Counter()
    for person in persons:
        kind = _doubt(person, *sizes[person["image_id"]], evaluation)
        if kind:
            counts[kind] += 1
            first.setdefault(kind, person["id"])
    for kind, count in counts.items():
        yield count, len(persons), f"{DOUBTS[kind]} (first: annotation id {first[kind]})"


def _doubt(person: dict[str, Any], width: int, height: int, evaluation: bool) -> str:
    """Which of `DOUBTS` a person gives, "" for none."""
    points = _labelled(person)
    if points and min(width, height) > 4 and all(0 <= z <= 1 for xy in points for z in xy):
        return "fractions"
    x, y, w, h = person.get("bbox", [0, 0, 0, 0])
    if w == 0 or h == 0:
        return ""
    if max(w, h) <= 1 < min(width, height) / 4:
        return "small box"
    if max(-x, x + w - width) > width / 4 or max(-y, y + h - height) > height / 4:
        return "outside"
    inside = sum(
        x - w / 10 - 1 <= column <= x + 1.1 * w + 1 and y - h / 10 - 1 <= row <= y + 1.1 * h + 1
        for column, row in points
    )
    if inside < len(points) / 2:
        return "far"
    if evaluation and points and not w * h / 100 <= person["area"] <= 1.5 * w * h + 4:
        return "area"
    return ""


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
        elif image_root is not None:
            yield from check_image_file(image, image_root)

    return check


def check_image_file(image: dict[str, Any], image_root: str) -> Iterator[Finding]:
    """Compare an entry of `images` with the header of its file."""
    path = os.path.join(image_root, image["file_name"])
    try:
        size = read_size(path)
    except ImageError as error:
        cure = "add the image, or remove its entry and its annotations"
        yield "file_name", str(error), cure
        return
    said = image.get("width"), image.get("height")
    if {*map(type, said)} == {int} and size != said:
        what = f"{said[0]} x {said[1]} (width x height), but {path} is {size[0]} x {size[1]}"
        cause = "annotate the image that is there, or put the annotated one in its place"
        if size == said[::-1]:
            cause = "most likely annotated without regard to its EXIF orientation: save it without"
        yield "width, height", what, cause


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
        is_list = isinstance(names, list) and names and all(isinstance(x, str) for x in names)
        if not is_list or len(set(names)) != len(names):
            what = _wrong(category, "keypoints", "a list of different names")
            yield "keypoints", what, "name the keypoints, such as ['nose', 'left_eye', 'right_eye']"
        elif num_keypoints is not None and len(names) != num_keypoints:
            what = f"expected {num_keypoints} names, got {len(names)}"
            cure = "set MODEL.INSPOSE.NUM_KEYPOINTS (--num-keypoints) to the number of the file"
            yield "keypoints", what, cure

    return check


def _check_class_names(
    learned: list[dict[str, Any]], expected: Sequence[str] | None
) -> Iterator[Problem]:
    """Check that one category is learned, and is the one that the data set is registered with."""
    names = [x.get("name") for x in learned]
    if len(learned) > 1:
        what = f"InsPose knows one class, but annotations are of {_show(names)}"
        cure = "keep one: `inspose convert coco --category NAME` does"
        yield Problem("", None, None, "categories", what, cure)
    elif expected is not None and names != list(expected):
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
    if keypoints and all(isinstance(x, list) for x in keypoints):
        what = f"must be one flat list of {3 * expected} numbers x, y, v, not a list of lists"
        yield "keypoints", f"{what}; got {_show(keypoints)}", "write them one after the other"
        return
    if len(keypoints) != 3 * expected:
        what = f"expected {3 * expected} numbers ({expected} keypoints), got {len(keypoints)}"
        yield "keypoints", what, cure
        return
    if not _are_pixels(keypoints):  # one line an annotation
        index = next(i for i, value in enumerate(keypoints) if not _are_pixels([value]))
        what = f"{'xyv'[index % 3]} of keypoint {index // 3} must be {PIXELS}"
        yield "keypoints", f"{what}, got {_show(keypoints[index])}", cure
    elif not set(keypoints[2::3]) <= {0, 1, 2}:
        index, v = next((i, v) for i, v in enumerate(keypoints[2::3]) if v not in (0, 1, 2))
        what = f"v of keypoint {index} must be 0, 1 or 2, got {_show(v)}"
        yield "keypoints", what, "write 0 for not labelled, 1 for hidden, 2 for visible"


def _check_scorable(annotation: dict[str, Any]) -> Iterator[Finding]:
    for key in READ_BY_EVALUATION:
        if key not in annotation:
            yield key, "is missing", "COCO's evaluation reads it: write it (keypoints: zeros)"
    for key in ("area", "num_keypoints"):
        value = annotation.get(key, 0)
        if type(value) not in (int, float) or not 0 <= value <= MAX_PIXELS**2:
            yield key, _wrong(annotation, key, "a number, 0 or more"), "write it anew"
        elif key == "area" and annotation.get(key) == 0 and _is_labelled(annotation):
            what = "must be above 0 where keypoints are labelled, got 0: no pose could be right"
            yield key, what, "write the person's area in square pixels (`inspose convert coco`)"


def _is_labelled(annotation: dict[str, Any]) -> bool:
    """Whether keypoints are labelled, of an annotation that may be wrong."""
    keypoints = annotation.get("keypoints")
    return isinstance(keypoints, list) and any(x in (1, 2) for x in keypoints[2::3])


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
