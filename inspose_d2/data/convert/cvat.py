"""CVAT's XML 1.1 for images to COCO: https://docs.cvat.ai/docs/other/xml_format.

A person is a skeleton; or points that each are labelled with a keypoint; or one of several points
in order. Boxes and polygons are of the person with their ``group_id``, of single points also those
that alone have them inside. Points outside are not labelled, those occluded are hidden (v = 1).
CVAT's export of COCO keypoints is read by :mod:`.coco`.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..annotations import AnnotationError
from .common import (
    XY,
    Changes,
    Converted,
    Outline,
    Point,
    gather,
    keypoint_names,
    make_coco,
    make_persons,
    place_images,
    read_corners,
)

Element = ElementTree.Element


def read_cvat(
    xml_file: Path,
    *,
    images: Path | None = None,
    keypoints: Sequence[str] | None = None,
    category: str | None = None,
) -> Converted:
    """Read an export "CVAT for images 1.1".

    Args:
        xml_file: ``annotations.xml`` of it.
        images: folder of the images; None takes names and sizes as they stand.
        keypoints: names in order, those to keep; also the names of several points in order. By
            default those of the skeleton, else all labels of points, COCO's in COCO's order, others
            by the alphabet.
        category: the skeleton, or the label of boxes, to keep where there are several.

    Raises:
        OSError: the file cannot be read.
        AnnotationError: something is wrong; names the file, the image and the attribute.
    """
    root = _parse(xml_file)
    changes = Changes()
    entries, persons = [], []
    for n, image in enumerate(root.iter("image"), start=1):
        name = image.get("name")
        if not name:
            raise AnnotationError(f"{xml_file}: image {n}, name: is missing")
        place = f"{xml_file}: image {name!r}"
        sizes = {key: _whole(image, key, place) for key in ("width", "height")}
        entries.append({"id": n, "file_name": name, **sizes})
        points, outlines = _shapes(image, place, keypoints, changes)
        persons += gather(n, points, outlines, place)
    if not entries:
        raise AnnotationError(f"{xml_file}: has no image: export as CVAT for images 1.1")
    placed = place_images(entries, images, xml_file, changes)
    names_of = _sublabels(root)
    rough, made = make_persons(persons, keypoints, category, xml_file, changes, names_of)
    made["skeleton"] = _skeleton(root, made["name"], made["keypoints"])
    return make_coco(placed, rough, made, xml_file, images, changes)


def _parse(xml_file: Path) -> Element:
    data = xml_file.read_bytes()
    if b"<!DOCTYPE" in data:  # entities that grow without end
        raise AnnotationError(f"{xml_file}: has a DOCTYPE, which CVAT does not write")
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise AnnotationError(f"{xml_file}: no XML, or cut off: {error}") from error
    if root.tag != "annotations":
        raise AnnotationError(f"{xml_file}: must be CVAT's annotations, got <{root.tag}>")
    if root.find("track") is not None:
        raise AnnotationError(f"{xml_file}: has tracks: export as CVAT for images 1.1")
    return root


def _whole(element: Element, key: str, place: str) -> int:
    value = element.get(key, "")
    if not value.isdecimal() or not int(value):
        raise AnnotationError(f"{place}, {key}: must be a number of pixels, got {value!r:.80}")
    return int(value)


def _shapes(
    image: Element, place: str, names: Sequence[str] | None, changes: Changes
) -> tuple[list[Point], list[Outline]]:
    points: list[Point] = []
    outlines: list[Outline] = []
    for n, shape in enumerate(image):
        where, label = f"{place}, {shape.tag}[{n}]", shape.get("label", "")
        group: Hashable | None = shape.get("group_id")
        group = None if group in ("0", "") else group
        if shape.tag == "skeleton":
            parts = [x for x in shape if x.tag == "points" and x.get("outside") != "1"]
            own = group or n
            points += [_point(x, _only(x, where), own, owner=label) for x in parts]
        elif shape.tag == "points":
            corners = _corners(shape, where)
            if len(corners) == 1:
                points.append(_point(shape, corners[0], group))
            else:
                own = group or n
                several = keypoint_names(names, len(corners), where)
                pairs = zip(several, corners, strict=True)
                points += [_point(shape, xy, own, name, label) for name, xy in pairs]
        elif shape.tag in ("box", "polygon"):
            is_box = shape.tag == "box"
            corners = _box(shape, where) if is_box else _corners(shape, where)
            changes["turned boxes made upright"] += float(shape.get("rotation") or 0) != 0
            outlines.append(Outline(label, corners, group, is_box))
        else:
            changes[f"shapes of the kind {shape.tag!r:.80} left out"] += shape.tag != "tag"
    return points, outlines


def _point(
    shape: Element,
    xy: XY,
    group: Hashable | None,
    name: str | None = None,
    owner: str | None = None,
) -> Point:
    v = 1 if shape.get("occluded") == "1" else 2
    return Point(name or shape.get("label") or "", *xy, v, group, owner)


def _only(shape: Element, where: str) -> XY:
    """Place of a keypoint of a skeleton."""
    corners = _corners(shape, where)
    if len(corners) != 1:
        raise AnnotationError(f"{where}, points: {shape.get('label')!r} must be one point")
    return corners[0]


def _corners(shape: Element, where: str) -> list[XY]:
    """Points of an attribute "x,y;x,y"."""
    text = shape.get("points", "")
    return _floats([x.split(",") for x in text.split(";")], f"{where}, points")


def _box(shape: Element, where: str) -> list[XY]:
    """Corners of a box, turned about its centre."""
    texts = [[shape.get("xtl"), shape.get("ytl")], [shape.get("xbr"), shape.get("ybr")]]
    (x0, y0), (x1, y1) = _floats(texts, f"{where}, xtl, ytl, xbr, ybr")
    ((degrees, _),) = _floats([[shape.get("rotation", "0"), "0"]], f"{where}, rotation")
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y, w, h = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
    sides = ((-w, -h), (w, -h), (w, h), (-w, h))
    return [(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in sides]


def _floats(texts: Sequence[Sequence[Any]], place: str) -> list[XY]:
    try:
        return read_corners([[float(z) for z in row] for row in texts], place)
    except (TypeError, ValueError) as error:
        if isinstance(error, AnnotationError):
            raise
        raise AnnotationError(f"{place}: must be numbers, got {texts!r:.80}") from error


def _sublabels(root: Element) -> dict[str, list[str]]:
    """Names of keypoints, by the label of their skeleton."""
    found: dict[str, list[str]] = {}
    for label in root.iter("label"):
        parent, name = label.findtext("parent"), label.findtext("name")
        if parent and name:
            found.setdefault(parent, []).append(name)
    return found


def _skeleton(root: Element, name: str, names: Sequence[str]) -> list[list[int]]:
    """Connections of a skeleton, from the drawing that CVAT keeps of it."""
    for label in root.iter("label"):
        if label.findtext("name") == name and label.findtext("svg"):
            return list(_connections(label.findtext("svg", ""), names))
    return []


def _connections(svg: str, names: Sequence[str]) -> Iterator[list[int]]:
    try:
        drawing = ElementTree.fromstring(f"<svg>{svg}</svg>")
    except ElementTree.ParseError:
        return
    nodes = {x.get("data-node-id"): x.get("data-label-name", "") for x in drawing.iter("circle")}
    for line in drawing.iter("line"):
        ends = [nodes.get(line.get(f"data-node-{x}")) for x in ("from", "to")]
        if all(end in names for end in ends):
            yield [names.index(end) + 1 for end in ends if end is not None]
