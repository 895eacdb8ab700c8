"""labelme's folders, a json for each image, to COCO: https://github.com/wkentaro/labelme.

A person is what has one ``group_id``: points labelled with the names of keypoints, and a rectangle
or polygon labelled with the class. A point is hidden (v = 1) where one of its flags is "occluded"
or "hidden", or it is "difficult", as X-AnyLabeling writes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..annotations import AnnotationError
from ..coco_file import load_annotations
from ..folders import is_metadata
from .common import (
    HIDDEN,
    Changes,
    Converted,
    Outline,
    Point,
    gather,
    make_coco,
    make_persons,
    place_images,
    read_corners,
)

OUTLINES = ("rectangle", "polygon")


def read_labelme(
    folder: Path,
    *,
    images: Path | None = None,
    keypoints: Sequence[str] | None = None,
    category: str | None = None,
) -> Converted:
    """Read the json files of a folder, with all below.

    Args:
        folder: of the json files.
        images: folder of the images; by default the same.
        keypoints: names in order, those to keep. By default all labels of points, COCO's in COCO's
            order, others by the alphabet.
        category: the class to keep, where outlines have several.

    Raises:
        OSError: a file cannot be read.
        AnnotationError: something is wrong; names the file, the shape and the key.
    """
    files = sorted(x for x in folder.rglob("*.json") if not is_metadata(x.relative_to(folder)))
    if not files:
        raise AnnotationError(f"{folder}: no json file in it, or no folder")
    changes = Changes()
    entries, persons = [], []
    for n, file in enumerate(files, start=1):
        labels = load_annotations(file)
        if not isinstance(labels, dict) or not isinstance(labels.get("shapes"), list):
            changes["json files left out: not labelme's"] += 1
            continue
        entries.append(_image(labels, n, file, folder))
        points, outlines = _shapes(labels["shapes"], file, changes)
        persons += gather(n, points, outlines, str(file))
    root = images or folder
    placed = place_images(entries, root, folder, changes)
    rough, made = make_persons(persons, keypoints, category, folder, changes)
    return make_coco(placed, rough, made, folder, root, changes)


def _image(labels: dict[str, Any], number: int, file: Path, folder: Path) -> dict[str, Any]:
    """The image of a file, whose path begins at the file."""
    name = labels.get("imagePath")
    if not isinstance(name, str) or not name:
        raise AnnotationError(f"{file}: imagePath: must be the name of a file, got {name!r:.80}")
    below = file.parent.relative_to(folder) / name.replace("\\", "/")
    sizes = {k: labels.get(f"image{k.capitalize()}") for k in ("width", "height")}
    known = {k: x for k, x in sizes.items() if type(x) is int}
    return {"id": number, "file_name": str(below), **known}


def _shapes(
    shapes: Sequence[Any], file: Path, changes: Changes
) -> tuple[list[Point], list[Outline]]:
    points, outlines = [], []
    for n, shape in enumerate(shapes):
        place = f"{file}: shapes[{n}]"
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise AnnotationError(f"{place}, label: must be text")
        kind, group = shape.get("shape_type"), shape.get("group_id")
        if group is not None and not isinstance(group, int | str):
            raise AnnotationError(f"{place}, group_id: must be a number or null, got {group!r:.80}")
        corners = read_corners(shape.get("points"), f"{place}, points")
        if kind == "point":
            (x, y), v = corners[0], 1 if _is_hidden(shape) else 2
            points.append(Point(shape["label"], x, y, v, group))
        elif kind in OUTLINES:
            outlines.append(Outline(shape["label"], corners, group, kind == "rectangle"))
        else:
            changes[f"shapes of the kind {kind!r:.80} left out"] += 1
    return points, outlines


def _is_hidden(shape: dict[str, Any]) -> bool:
    flags = shape.get("flags")
    names = {k.lower() for k, x in flags.items() if x} if isinstance(flags, dict) else set()
    return bool(names & HIDDEN or shape.get("difficult"))
