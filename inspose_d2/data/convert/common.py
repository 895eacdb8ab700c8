"""What the formats share: images found, points gathered, persons completed, files written whole."""

import os
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from detectron2.structures.masks import polygon_area

from ..annotations import MAX_PIXELS, AnnotationError, box_of, check_image_file, find_problems
from ..crowdpose import AREA_OF_BOX
from ..find_file import find_file
from ..images import read_size

COCO_NAMES = tuple(COCO_PERSON_KEYPOINT_NAMES)
PERSON = "person"  # name of a category that has none
SHOWN = 3  # names of a list in a message
HIDDEN = {"hidden", "invisible", "occluded"}  # what people call keypoints of v = 1

Changes = Counter[str]
XY = tuple[float, float]


@dataclass(frozen=True)
class Converted:
    """A file of COCO keypoint annotations, and what was changed for it.

    Attributes:
        coco: valid for training and evaluation; one category, of id 1, which names its keypoints.
        changes: how often what was changed, made or left out.
        folder: that file names are relative to; None where no images were looked for.
    """

    coco: dict[str, Any]
    changes: Changes
    folder: Path | None


@dataclass(frozen=True)
class Point:
    """A labelled keypoint: its name, pixels, v (1 hidden, 2 visible) and what it is grouped by.

    `owner` is the class of its person, where the point itself says it.
    """

    label: str
    x: float
    y: float
    v: int
    group: Hashable | None
    owner: str | None = None


@dataclass(frozen=True)
class Outline:
    """A box or polygon around a person: the class, corners in pixels, what it is grouped by."""

    label: str
    corners: Sequence[XY]
    group: Hashable | None
    is_box: bool

    @property
    def box(self) -> list[float]:
        """[x, y, width, height] of the upright box around it."""
        columns, rows = zip(*self.corners, strict=True)
        x, y = min(columns), min(rows)
        return [x, y, max(columns) - x, max(rows) - y]


@dataclass(frozen=True)
class Person:
    """What belongs together in an image, its class None where nothing says it."""

    image_id: int
    label: str | None
    points: Sequence[Point]
    outlines: Sequence[Outline] = ()


def gather(
    image_id: int, points: Sequence[Point], outlines: Sequence[Outline], place: str
) -> list[Person]:
    """Gather the points and outlines of an image into persons.

    Those of one group are one person. Points without a group belong to the outline, of no other
    points, that alone has them inside; where nothing is grouped, there is one outline at most and
    no label comes twice, all are of one person.

    Args:
        image_id: of the image.
        points: labelled in it.
        outlines: drawn in it.
        place: of the image, for messages.

    Raises:
        AnnotationError: it cannot be known whose a point is, or a person has a label twice.
    """
    groups: dict[Hashable, list[Point]] = {}
    for point in points:
        if point.group is not None:
            groups.setdefault(point.group, []).append(point)
    grouped = [x for x in outlines if x.group is not None and x.group in groups]
    free = [x for x in outlines if x not in grouped]
    loose = [x for x in points if x.group is None]
    persons = [
        Person(image_id, None, own, [x for x in grouped if x.group == group])
        for group, own in groups.items()
    ]
    is_one = not groups and len(free) < 2 and len({x.label for x in loose}) == len(loose)
    if loose and is_one:
        persons.append(Person(image_id, None, loose, free))
        free = []
    else:
        around = [_only_outline(point, free, place) for point in loose]
        inside = [
            [p for p, i in zip(loose, around, strict=True) if i == n] for n in range(len(free))
        ]
        persons += [Person(image_id, None, p, [o]) for o, p in zip(free, inside, strict=True)]
    return [_labelled(person, place) for person in persons]


def _only_outline(point: Point, outlines: Sequence[Outline], place: str) -> int:
    """Number of the only outline that a point lies in."""
    around = [n for n, outline in enumerate(outlines) if _is_inside(point, outline)]
    if len(around) != 1:
        raise AnnotationError(
            f"{place}: the point {point.label!r} at ({point.x:g}, {point.y:g}) has no group, and "
            f"lies in {len(around)} outlines: whose it is cannot be known; group it with its person"
        )
    return around[0]


def _is_inside(point: Point, outline: Outline) -> bool:
    x, y, width, height = outline.box
    return -1 <= point.x - x <= width + 1 and -1 <= point.y - y <= height + 1


def _labelled(person: Person, place: str) -> Person:
    """A person with the class of its points, or else of its outlines."""
    twice = [label for label, n in Counter(x.label for x in person.points).items() if n > 1]
    if twice:
        raise AnnotationError(
            f"{place}: the keypoint {twice[0]!r} comes twice in the group "
            f"{person.points[0].group!r}: give each person a group of its own"
        )
    owners = {x.owner for x in person.points if x.owner is not None}
    labels = sorted(owners or {x.label for x in person.outlines})
    if len(labels) > 1:
        raise AnnotationError(f"{place}: one group is of {labels}: label its parts alike")
    label = labels[0] if labels else None
    return Person(person.image_id, label, person.points, person.outlines)


def choose_category(
    found: Collection[str], empty: Collection[str], wanted: str | None, source: object
) -> str:
    """Choose the class to learn.

    Args:
        found: classes with labelled keypoints.
        empty: classes without.
        wanted: the one asked for, or None for the only one.
        source: the file, for messages.

    Raises:
        AnnotationError: there is no such class, or there are several.
    """
    known = sorted({*found, *empty})
    if wanted is not None:
        if known and wanted not in known:
            raise AnnotationError(f"{source}: categories: there is no {wanted!r}, but {known}")
        return wanted
    candidates = sorted(found) or sorted(empty) or [PERSON]
    if len(candidates) > 1:
        raise AnnotationError(
            f"{source}: categories: InsPose knows one class, here are {candidates}: choose one by "
            "--category"
        )
    return candidates[0]


def make_persons(
    persons: Sequence[Person],
    names: Sequence[str] | None,
    category: str | None,
    source: object,
    changes: Changes,
    names_of: Mapping[str, Sequence[str]] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Make rough annotations of gathered persons.

    Args:
        persons: of all images.
        names: of the keypoints, in order. By default those of the class in `names_of`, else all
            labels there are, COCO's in COCO's order, others by the alphabet.
        category: class to keep, or None for the only one.
        source: the file or folder, for messages.
        changes: counts what is left out.
        names_of: names of keypoints, by class.

    Returns:
        Annotations with `image_id`, `keypoints` and, where there are outlines, `bbox` and
        `segmentation`; and the category.
    """
    with_points = {x.label for x in persons if x.label is not None and x.points}
    without = {x.label for x in persons if x.label is not None and not x.points}
    name = choose_category(with_points, without, category, source)
    own = [x for x in persons if x.label in (name, None)]
    changes["annotations of other categories left out"] += len(persons) - len(own)
    labels = {point.label for person in own for point in person.points}
    names = list(names or (names_of or {}).get(name) or sorted(labels, key=_place_of))
    if not names:
        raise AnnotationError(f"{source}: no keypoint of {name!r} is labelled: nothing to learn")
    for label in sorted(labels - set(names)):
        number = sum(point.label == label for person in own for point in person.points)
        changes[f"points {label!r} left out, no keypoint is called so"] += number
    return [_annotation(x, names) for x in own], {"name": name, "keypoints": names}


def _place_of(label: str) -> tuple[int, str]:
    return (COCO_NAMES.index(label) if label in COCO_NAMES else len(COCO_NAMES), label)


def _annotation(person: Person, names: Sequence[str]) -> dict[str, Any]:
    points = {point.label: (point.x, point.y, point.v) for point in person.points}
    annotation: dict[str, Any] = {
        "image_id": person.image_id,
        "keypoints": [z for name in names for z in points.get(name, (0, 0, 0))],
    }
    boxes = [x for x in person.outlines if x.is_box]
    for outline in (boxes or person.outlines)[:1]:
        annotation["bbox"] = outline.box
    polygons = [x for x in person.outlines if not x.is_box and len(x.corners) > 2]
    if polygons:
        annotation["segmentation"] = [[z for xy in x.corners for z in xy] for x in polygons]
    return annotation


def keypoint_names(
    names: Sequence[str] | None, number: int | None, source: object
) -> tuple[str, ...]:
    """Names of keypoints that a file only counts: those given, or COCO's of persons.

    Args:
        names: given, or None.
        number: K of the file, None where it is not known.
        source: the file, for messages.

    Raises:
        AnnotationError: there are none, or of another number.
    """
    if names is None and number == len(COCO_NAMES):
        return COCO_NAMES
    if names is None:
        raise AnnotationError(
            f"{source}: keypoints: their names are not in it; give {number or 'them'}"
            f"{' names' if number else ''} in order by --keypoints"
        )
    if number not in (None, len(names)) or len(set(names)) != len(names):
        raise AnnotationError(
            f"{source}: keypoints: --keypoints must be {number or len(set(names))} different "
            f"names, got {len(names)}: {list(names)}"
        )
    return tuple(names)


def place_images(
    images: Iterable[dict[str, Any]], folder: Path | None, source: object, changes: Changes
) -> list[dict[str, Any]]:
    """Find the files of images, and the sizes that are not known.

    Args:
        images: with `file_name`, as another system may have written it, and `width` and `height`
            (pixels) where known; changed.
        folder: of the images; None looks for nothing.
        source: the file that names them, for messages.
        changes: counts what is changed or left out.

    Returns:
        Those that can be read.

    Raises:
        AnnotationError: none can, a size stays unknown, or is not that of the file.
    """
    placed, lost = [], []
    for image in images:
        name = image["file_name"]
        own = name.replace("\\", "/") if folder is None else find_below(name, folder)
        if own is None or not _has_size({**image, "file_name": own}, folder, source):
            lost.append(name)
            continue
        if not _is_known(image):
            image["width"], image["height"] = read_size(Path(folder or "") / own)
            changes["sizes of images read from their files"] += 1
        changes["names of image files mended"] += own != name
        placed.append({**image, "file_name": own})
    if lost and not placed:
        raise AnnotationError(
            f"{source}: file_name: none of {len(lost)} images can be read in {folder} "
            f"({some(lost)}); give their folder by --images"
        )
    if lost:
        changes[f"images left out, missing or unreadable in {folder}: {some(lost)}"] = len(lost)
    return placed


def _is_known(image: dict[str, Any]) -> bool:
    return bool(image.get("width") and image.get("height"))


def _has_size(image: dict[str, Any], folder: Path | None, source: object) -> bool:
    """Whether an image can be read, where it is looked for; another size is an error."""
    if folder is None:
        if not _is_known(image):
            raise AnnotationError(
                f"{source}: image {image['file_name']!r}: width, height: unknown; give the folder "
                "of the images by --images"
            )
        return True
    for key, what, cure in check_image_file(image, str(folder)):
        if key == "file_name":
            return False
        raise AnnotationError(f"{source}: image {image['file_name']!r}: {key}: {what}; {cure}")
    return True


def find_below(name: str, folder: Path) -> str | None:
    """Path of an image below a folder: its own, or as much of its end as is there."""
    parts = [x for x in PurePosixPath(name.replace("\\", "/")).parts if x not in ("/", "..")]
    for first in range(len(parts)):
        found = find_file(str(folder.joinpath(*parts[first:])))
        if os.path.isfile(found):
            return Path(found).relative_to(folder).as_posix()
    return None


def make_coco(
    images: Sequence[dict[str, Any]],
    persons: Iterable[dict[str, Any]],
    category: dict[str, Any],
    source: object,
    folder: Path | None,
    changes: Changes,
) -> Converted:
    """Make a file of rough annotations, and check it.

    Args:
        images: with `id`, `file_name`, `width`, `height`.
        persons: with `image_id`, `keypoints` (K times x, y in pixels and v) and what else is known;
            those of other images are left out.
        category: `name`, `keypoints` and, where known, `skeleton`.
        source: what was read, for messages.
        folder: of the images; None where they are not at hand.
        changes: counts what is made.

    Raises:
        AnnotationError: something is wrong that cannot be repaired.
    """
    kept = {image["id"] for image in images}
    annotations: list[dict[str, Any]] = []
    for person in persons:
        if person["image_id"] not in kept:
            changes["annotations left out, their image is not there"] += 1
            continue
        done = complete(person, changes)
        if done is not None:
            annotations.append({"id": len(annotations) + 1, **done, "category_id": 1})
    categories = [{**category, "id": 1}]
    coco = {"images": list(images), "annotations": annotations, "categories": categories}
    for evaluation in (False, True):
        for problem in find_problems(coco, evaluation=evaluation):
            raise AnnotationError(f"{source}: {problem}")
    return Converted(coco, +changes, folder)


def complete(person: dict[str, Any], changes: Changes) -> dict[str, Any] | None:
    """Make box, area and counts of an annotation where they are missing or wrong.

    The box becomes that around the labelled keypoints, 2 pixels wide around a single one; the area
    that of the polygons, else 0.53 of the box, as in the API of CrowdPose's authors.

    Args:
        person: with sound `keypoints`; not changed.
        changes: counts what is made.

    Returns:
        A copy; None where there is neither a box nor a labelled keypoint.
    """
    given = person.get("bbox")
    rest = {k: v for k, v in person.items() if k != "bbox"}
    box: Any = given if _is_box(given) else box_of(rest)
    if box is None:
        changes["annotations left out, with neither a box nor a labelled keypoint"] += 1
        return None
    if box is not given:
        changes["boxes made, around the labelled keypoints"] += 1
        if max(box[2:]) <= 1:  # validation would take it for fractions
            box = [box[0] - 1, box[1] - 1, 2, 2]
    area = person.get("area")
    if not _is_area(area, box):
        area = _area_of(person.get("segmentation"))
        how = "of the polygons"
        if not _is_area(area, box):
            area, how = AREA_OF_BOX * box[2] * box[3], f"{AREA_OF_BOX} of the box"
        changes[f"areas made, {how}"] += 1
    number = sum(v > 0 for v in person["keypoints"][2::3])
    return {"iscrowd": 0, **rest, "bbox": box, "area": area, "num_keypoints": number}


def _is_box(box: Any) -> bool:
    is_list = isinstance(box, list) and len(box) == 4 and all(map(is_number, box))
    return is_list and box[2] > 0 and box[3] > 0


def _is_area(area: Any, box: Sequence[float]) -> bool:
    """Whether it may be that of a person in the box, as validation asks."""
    whole = box[2] * box[3]
    return is_number(area) and area > 0 and whole / 100 <= area <= 1.5 * whole + 4


def _area_of(polygons: Any) -> float | None:
    """Sum of the areas of polygons [x, y, x, y, ...]."""
    if not isinstance(polygons, list):
        return None
    area = 0.0
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) % 2 or not all(map(is_number, polygon)):
            return None
        area += float(polygon_area(*np.array(polygon, float).reshape(-1, 2).T))
    return area


def read_corners(points: Any, place: str) -> list[XY]:
    """Check a list of [x, y]; `place` is for the message of the AnnotationError."""
    if not isinstance(points, list) or not points:
        raise AnnotationError(f"{place}: must be a list of [x, y], got {points!r:.80}")
    for point in points:
        if not isinstance(point, list) or len(point) != 2 or not all(map(is_number, point)):
            raise AnnotationError(f"{place}: must be two numbers x and y, got {point!r:.80}")
    return [(x, y) for x, y in points]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number within `MAX_PIXELS` squared, as areas are."""
    return type(value) in (int, float) and abs(value) <= MAX_PIXELS**2


def some(names: Sequence[object]) -> str:
    """Write a list, of a long one the beginning."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(str, names[:SHOWN])) + more
