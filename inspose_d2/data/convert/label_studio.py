"""Label Studio's exports, JSON and JSON-MIN, to COCO: https://labelstud.io/guide/export.

A person is a rectangle or polygon, and the keypoints that have it as their parent (``parentID``),
or lie in no other. JSON-MIN knows no parents. Places are in percent of the image.
Of several annotations of a task the first that is not cancelled counts. A keypoint is hidden
(v = 1) where a choice for its region is "occluded" or "hidden".
"""

import math
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ..annotations import AnnotationError
from ..coco_file import load_annotations
from ..images import SUFFIXES
from .common import (
    HIDDEN,
    XY,
    Changes,
    Converted,
    Outline,
    Point,
    find_below,
    gather,
    is_number,
    make_coco,
    make_persons,
    place_images,
    read_corners,
)

LABELS = ("keypointlabels", "rectanglelabels", "polygonlabels")
DIGITS = 3  # after the point, of pixels that are made of percents
UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # what Label Studio puts before names

Region = dict[str, Any]


def read_label_studio(
    json_file: Path,
    *,
    images: Path | None = None,
    keypoints: Sequence[str] | None = None,
    category: str | None = None,
) -> Converted:
    """Read an export of keypoint labels.

    Args:
        json_file: JSON or JSON-MIN.
        images: folder of the images, where names are found with or without the beginning that
            Label Studio puts before them; None takes names and sizes as they stand.
        keypoints: names in order, those to keep. By default all labels of keypoints, COCO's in
            COCO's order, others by the alphabet.
        category: the class to keep, where outlines have several.

    Raises:
        OSError: the file cannot be read.
        AnnotationError: something is wrong; names the file, the task and the key.
    """
    tasks = load_annotations(json_file)
    if not isinstance(tasks, list) or not all(isinstance(x, dict) for x in tasks):
        raise AnnotationError(f"{json_file}: must be a list of tasks: export JSON or JSON-MIN")
    changes = Changes()
    entries, persons = [], []
    for n, task in enumerate(tasks, start=1):
        place = f"{json_file}: task {task.get('id', n)}"
        regions = _regions(task, place, changes)
        if regions is None:
            changes["tasks left out, nobody has annotated them"] += 1
            continue
        entries.append(_image(task, n, regions, place, images))
        points, outlines = _shapes(regions, place, changes)
        persons += gather(n, points, outlines, place)
    placed = place_images(entries, images, json_file, changes)
    rough, made = make_persons(persons, keypoints, category, json_file, changes)
    return make_coco(placed, rough, made, json_file, images, changes)


def _regions(task: dict[str, Any], place: str, changes: Changes) -> list[Region] | None:
    """Regions of a task; None where it is not annotated. Those of JSON-MIN stand in the task."""
    if "annotations" not in task and "completions" not in task:
        if not task.keys() & {"annotation_id", "annotator"}:
            return None
        lists = [x for x in task.values() if isinstance(x, list)]
        return [_from_min(x) for values in lists for x in values if isinstance(x, dict)]
    done = task.get("annotations", task.get("completions"))
    if not isinstance(done, list) or not all(isinstance(x, dict) for x in done):
        raise AnnotationError(f"{place}, annotations: must be a list of objects, got {done!r:.80}")
    valid = [x for x in done if not x.get("was_cancelled")]
    if not valid:
        return None
    changes["further annotations of a task left out"] += len(valid) - 1
    regions = valid[0].get("result")
    if not isinstance(regions, list) or not all(isinstance(x, dict) for x in regions):
        raise AnnotationError(f"{place}, result: must be a list of objects, got {regions!r:.80}")
    return regions


def _from_min(value: dict[str, Any]) -> Region:
    """A region of JSON-MIN in the form of JSON."""
    kind = next((x for x in value if x.endswith("labels")), "")
    return {**value, "type": kind, "value": value}


def _image(
    task: dict[str, Any], number: int, regions: Sequence[Region], place: str, folder: Path | None
) -> dict[str, Any]:
    """The image of a task, its size where a region says it."""
    data = task.get("data", task)
    values = data.values() if isinstance(data, dict) else ()
    names = [_file_name(x) for x in values if isinstance(x, str)]
    names = [x for x in names if posixpath.splitext(x)[1].lower() in SUFFIXES]
    if not names:
        raise AnnotationError(f"{place}, data: has no name of an image")
    name = names[0]
    plain = posixpath.join(posixpath.dirname(name), UPLOADED.sub("", posixpath.basename(name)))
    if folder is not None and find_below(name, folder) is None:
        name = plain
    sizes = [(x.get("original_width"), x.get("original_height")) for x in regions]
    known = [x for x in sizes if list(map(type, x)) == [int, int]]
    if any(x.get("image_rotation") for x in regions):
        raise AnnotationError(f"{place}, image_rotation: turned images are not read: turn the file")
    image = {"id": number, "file_name": name}
    return image | (dict(zip(("width", "height"), known[0], strict=True)) if known else {})


def _file_name(url: str) -> str:
    """Name of a file in a URL: local files have it in `d`, uploaded ones are named by their end."""
    parts = urlsplit(url)
    local = parse_qs(parts.query).get("d")
    if local:
        return local[0].lstrip("/")
    return posixpath.basename(unquote(parts.path))


def _shapes(
    regions: Sequence[Region], place: str, changes: Changes
) -> tuple[list[Point], list[Outline]]:
    choices = [x for x in regions if x.get("type") == "choices" and isinstance(x.get("id"), str)]
    hidden = {x["id"] for x in choices if _is_hidden(x)}
    points, outlines = [], []
    for n, region in enumerate(regions):
        kind, where, own_id = region.get("type"), f"{place}, result[{n}]", region.get("id")
        if kind not in LABELS:
            changes[f"regions of the kind {kind!r:.80} left out"] += kind != "choices"
            continue
        own = region.get("value")
        value: dict[str, Any] = own if isinstance(own, dict) else {}
        labels = value.get(kind)
        if not isinstance(labels, list) or len(labels) != 1 or not isinstance(labels[0], str):
            raise AnnotationError(f"{where}, {kind}: must be one label, got {labels!r:.80}")
        corners = _corners(kind, value, _size(region, where), where)
        if kind == "keypointlabels":
            (x, y), v = corners[0], 1 if isinstance(own_id, str) and own_id in hidden else 2
            points.append(Point(labels[0], x, y, v, _group(region.get("parentID"), where)))
        else:
            is_box = kind == "rectanglelabels"
            changes["turned boxes made upright"] += is_box and bool(value.get("rotation"))
            outlines.append(Outline(labels[0], corners, _group(own_id, where), is_box))
    return points, outlines


def _group(value: Any, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise AnnotationError(f"{where}, id, parentID: must be text, got {value!r:.80}")
    return value or None


def _is_hidden(region: Region) -> bool:
    value = region.get("value")
    choices = value.get("choices") if isinstance(value, dict) else None
    return isinstance(choices, list) and any(str(x).lower() in HIDDEN for x in choices)


def _size(region: Region, where: str) -> XY:
    width, height = region.get("original_width"), region.get("original_height")
    if not is_number(width) or not is_number(height) or min(width, height) <= 0:
        raise AnnotationError(
            f"{where}, original_width, original_height: must be the size of the image, got "
            f"{width!r:.80} x {height!r:.80}"
        )
    return width, height


def _corners(kind: str, value: dict[str, Any], size: XY, where: str) -> list[XY]:
    """Corners in pixels; a box is turned about its first one."""
    rows: Any = [[value.get("x"), value.get("y")]]
    if kind == "rectanglelabels":
        rows.append([value.get("width"), value.get("height")])
    percents = read_corners(
        value.get("points") if kind == "polygonlabels" else rows, f"{where}, value"
    )
    corners = [(x * size[0] / 100, y * size[1] / 100) for x, y in percents]
    if kind == "rectanglelabels":
        (x, y), (w, h) = corners
        turn = math.radians(_turn(value.get("rotation"), where))
        cos, sin = math.cos(turn), math.sin(turn)
        sides = ((0, 0), (w, 0), (w, h), (0, h))
        corners = [(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in sides]
    return [(round(x, DIGITS), round(y, DIGITS)) for x, y in corners]


def _turn(value: Any, where: str) -> float:
    if value is not None and not is_number(value):
        raise AnnotationError(f"{where}, rotation: must be degrees, got {value!r:.80}")
    return float(value or 0)
