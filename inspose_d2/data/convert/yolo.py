"""YOLO's folders of poses to COCO and back.

A line of a label file is a person: class, box (centre, width, height), then x, y and mostly v of
each keypoint, all places in fractions of the image. The labels of ``images/a.jpg`` are in
``labels/a.txt``, else beside it. The form: https://docs.ultralytics.com/datasets/pose.
"""

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..annotations import AnnotationError, find_problems
from ..coco_file import load_annotations, plain
from ..folders import list_folder
from ..keypoint_names import infer_flip_pairs
from .common import (
    PERSON,
    Changes,
    Converted,
    choose_category,
    keypoint_names,
    make_coco,
    place_images,
    some,
)

NOT_LABELS = {"classes.txt", "readme.txt", "readme.dataset.txt", "readme.roboflow.txt"}
FAR = 0.5  # of the image: what lies further outside is no fraction of it
DIGITS = 3  # after the point, of pixels that are made of fractions


@dataclass(frozen=True)
class Line:
    """A line of a label file: its place for messages, image, class and the numbers after it."""

    place: str
    image: dict[str, Any]
    number: int
    values: Sequence[float]


def read_yolo(
    source: Path,
    *,
    split: str = "train",
    images: Path | None = None,
    keypoints: Sequence[str] | None = None,
    category: str | None = None,
) -> Converted:
    """Read a data set of YOLO's poses, Roboflow's too.

    Args:
        source: ``data.yaml``, or a folder: with ``images`` in it, or of the images themselves.
        split: "train", "val" or "test" of ``data.yaml``.
        images: folder of the images, where ``data.yaml`` does not name the right one.
        keypoints: names; by default those of ``data.yaml``, or COCO's where there are 17.
        category: the class to keep, where there are several; without names its number.

    Raises:
        OSError: a file cannot be read.
        AnnotationError: something is wrong; names the file and its line or key.
    """
    config = _read_config(source) if source.is_file() else {}
    folder = images or _image_folder(source, config, split)
    listing = list_folder(folder)
    files = listing.images
    if not files:
        raise AnnotationError(f"{folder}: no images in it, or no folder; name it by --images")
    changes = Changes()
    odd = sorted(Path(x).name for x in listing.left_out)
    changes[f"files left out, no images that can be read: {some(odd)}"] += len(odd)
    _check_labels(files, changes)
    names = [x.relative_to(folder).as_posix() for x in files]
    entries = [{"id": n, "file_name": name} for n, name in enumerate(names, start=1)]
    placed = place_images(entries, folder, source, changes)
    del changes["sizes of images read from their files"]  # as always
    lines = [line for image in placed for line in _read_lines(image, folder)]
    name, own = _choose(lines, config, category, source)
    changes["annotations of other categories left out"] += len(lines) - len(own)
    known = keypoints or _config_names(config, own[0].number if own else 0, source)
    number, dims = _shape(config, own, known, source)
    made = {"name": name, "keypoints": list(keypoint_names(known, number, source))}
    if _swaps(made["keypoints"]) != config.get("flip_idx", _swaps(made["keypoints"])):
        changes["flip_idx not taken over: left and right follow from the keypoints' names"] += 1
    persons = [_person(line, number, dims, changes) for line in own]
    return make_coco(placed, persons, made, source, folder, changes)


def _read_config(source: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise AnnotationError(f"{source}: no YAML in UTF-8: {reason}") from error
    if not isinstance(config, dict):
        raise AnnotationError(f"{source}: must be YOLO's data.yaml, with train, val and names")
    return config


def _image_folder(source: Path, config: dict[str, Any], split: str) -> Path:
    """Folder of the images; Roboflow's ``../train/images`` lies below data.yaml's folder."""
    if not config:
        return source / "images" if (source / "images").is_dir() else source
    value = config.get(split)
    if not isinstance(value, str):
        raise AnnotationError(
            f"{source}: {split}: must be a folder of images, got {value!r}; choose by --split, or "
            "give it by --images"
        )
    for root in (source.parent / str(config.get("path") or ""), source.parent):
        for folder in (root / value, root / value.removeprefix("../")):
            if folder.is_dir():
                return folder
    raise AnnotationError(f"{source}: {split}: {value!r} is no folder; give it by --images")


def labels_of(image: Path) -> Path:
    """Path of the labels of an image: in ``labels`` for its last ``images``, else beside it."""
    folders = list(image.parent.parts)
    if "images" in folders:
        folders[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    return Path(*folders, image.name).with_suffix(".txt")


def _existing_labels(image: Path) -> Path:
    beside = image.with_suffix(".txt")
    path = labels_of(image)
    return beside if beside.is_file() and not path.is_file() else path


def _check_labels(files: Sequence[Path], changes: Changes) -> None:
    """Count label files without an image; none at all is an error."""
    labels = {_existing_labels(x) for x in files}
    if not any(x.is_file() for x in labels):
        raise AnnotationError(
            f"{files[0]}: no image has labels, neither {labels_of(files[0])} nor a file beside it"
        )
    there = {x for folder in {x.parent for x in labels} for x in folder.glob("*.txt")}
    lost = sorted(x.name for x in there - labels if x.name.lower() not in NOT_LABELS)
    changes[f"label files left out, without an image: {some(lost)}"] += len(lost)


def _read_lines(image: dict[str, Any], folder: Path) -> Iterator[Line]:
    path = _existing_labels(folder / image["file_name"])
    if not path.is_file():  # nobody is in the image
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise AnnotationError(f"{path}: must be text in UTF-8: {error}") from error
    for n, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {n}"
        try:
            number, *values = map(float, line.split())
        except ValueError:
            raise AnnotationError(f"{place}: must be numbers, got {line!r:.80}") from None
        if not all(map(math.isfinite, (number, *values))) or number < 0 or number % 1:
            raise AnnotationError(
                f"{place}: must be a class (0, 1, ...) and finite numbers, got {line!r:.80}"
            )
        yield Line(place, image, int(number), values)


def _choose(
    lines: Sequence[Line], config: dict[str, Any], wanted: str | None, source: Path
) -> tuple[str, list[Line]]:
    """The class to learn and its lines."""
    names = config.get("names") or {}
    if not isinstance(names, list | dict):
        raise AnnotationError(f"{source}: names: must be a list, or numbers with names")
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    classes = {str(number): str(name) for number, name in pairs}
    found = {str(x.number) for x in lines}
    if not classes and len(found) == 1:
        classes = dict.fromkeys(found, wanted or PERSON)
    label = {x: classes.get(x, x) for x in found}
    name = choose_category(set(label.values()), set(classes.values()), wanted, source)
    return name, [x for x in lines if label[str(x.number)] == name]


def _config_names(config: dict[str, Any], number: int, source: Path) -> list[str] | None:
    """Names of the keypoints of a class in ``kpt_names``, where there are some."""
    names = config.get("kpt_names")
    if isinstance(names, dict):
        names = names.get(number, names.get(str(number)))
    elif isinstance(names, list) and all(isinstance(x, list) for x in names):
        names = dict(enumerate(names)).get(number)
    if names is not None and not isinstance(names, list):
        raise AnnotationError(f"{source}: kpt_names: must be lists of names, got {names!r:.80}")
    return names and list(map(str, names))


def _shape(
    config: dict[str, Any], lines: Sequence[Line], given: Sequence[str] | None, source: Path
) -> tuple[int, int]:
    """Number of keypoints and of values of each, 2 or 3."""
    if "kpt_shape" in config:
        shape = config["kpt_shape"]
        is_list = isinstance(shape, list) and list(map(type, shape)) == [int, int]
        if not is_list or shape[0] < 1 or shape[1] not in (2, 3):
            raise AnnotationError(
                f"{source}: kpt_shape: must be [K, 2] or [K, 3] of K keypoints, got {shape!r}"
            )
        return shape[0], shape[1]
    count = len(lines[0].values) - 4 if lines else 0
    number = len(given or keypoint_names(None, 17 if count in (34, 51) else None, source))
    if count not in (2 * number, 3 * number):
        place = lines[0].place if lines else source
        raise AnnotationError(
            f"{place}: keypoints: {number} are named, which are {2 * number} or {3 * number} "
            f"numbers after the box; got {count}"
        )
    return number, count // number


def _person(line: Line, number: int, dims: int, changes: Changes) -> dict[str, Any]:
    """A rough annotation of a line."""
    values, width, height = line.values, line.image["width"], line.image["height"]
    if len(values) != 4 + number * dims:
        raise AnnotationError(
            f"{line.place}: must be a class, 4 numbers of the box and {dims} of each of {number} "
            f"keypoints, {5 + number * dims} in all; got {len(values) + 1}"
        )
    centre_x, centre_y, w, h = values[:4]
    keypoints: list[float] = []
    places = list(values[:4])
    for k in range(4, len(values), dims):
        x, y = values[k : k + 2]
        v = values[k + 2] if dims == 3 else 2 * any((x, y))
        if v not in (0, 1, 2):
            raise AnnotationError(
                f"{line.place}: v of keypoint {(k - 4) // dims} must be 0, 1 or 2, got {v:g}: are "
                "these predictions with scores?"
            )
        places += (x, y) if v else ()
        own = (round(x * width, DIGITS), round(y * height, DIGITS), int(v))
        keypoints += own if v else (0, 0, 0)
    if not all(-FAR <= z <= 1 + FAR for z in places):
        raise AnnotationError(
            f"{line.place}: places must be fractions of the image, from 0 to 1, got "
            f"{max(places, key=abs):g}"
        )
    changes["keypoints without v: 0 at (0, 0), else 2"] += number if dims == 2 else 0
    box = [(centre_x - w / 2) * width, (centre_y - h / 2) * height, w * width, h * height]
    return {
        "image_id": line.image["id"],
        "keypoints": keypoints,
        "bbox": [round(z, DIGITS) for z in box],
    }


def write_yolo(json_file: Path, images: Path, output: Path) -> Changes:
    """Write a data set for YOLO: ``data.yaml``, ``labels`` and copies of the images.

    Crowds, which YOLO does not know, are left out; boxes are cut, and keypoints not labelled, at
    the border of the image, as YOLO refuses what lies outside.

    Args:
        json_file: COCO keypoint file; :func:`.coco.read_coco` makes a sound one.
        images: folder of its images.
        output: folder to make; may be there where it is empty.

    Returns:
        How often what was left out.

    Raises:
        OSError: a file cannot be read or written.
        AnnotationError: the file is not sound, or two images have the same labels.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise AnnotationError(f"{output}: is there already; name a new folder")
    coco = load_annotations(json_file)
    for problem in find_problems(coco):
        raise AnnotationError(f"{json_file}: {problem}")
    coco, changes = plain(coco, evaluation=False), Changes()
    (category,) = coco["categories"]
    placed = place_images(coco["images"], images, json_file, changes)
    lines: dict[int, list[str]] = {x["id"]: [] for x in placed}
    sizes = {x["id"]: (x["width"], x["height"]) for x in placed}
    number = len(category.get("keypoints", ())) or max(
        len(x.get("keypoints", ())) // 3 for x in coco["annotations"]
    )
    for person in coco["annotations"]:
        if person.get("iscrowd"):
            changes["crowds left out"] += 1
        elif person["image_id"] not in lines:
            changes["annotations left out, their image is not there"] += 1
        elif line := _line(person, number, *sizes[person["image_id"]], changes):
            lines[person["image_id"]].append(line)
    unfinished = output.with_name(f"{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for image in placed:
            _write_image(images, unfinished / "images", image["file_name"], lines[image["id"]])
        config = _make_config(category, number)
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        (unfinished / "data.yaml").write_text(text, encoding="utf-8")
        os.replace(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return +changes


def _line(
    person: dict[str, Any], number: int, width: int, height: int, changes: Changes
) -> str | None:
    """A line of a label file; None for who is not in the image."""
    x, y, w, h = person["bbox"]
    x0, x1 = (min(max(z, 0), width) / width for z in (x, x + w))
    y0, y1 = (min(max(z, 0), height) / height for z in (y, y + h))
    if x0 == x1 or y0 == y1:
        changes["annotations left out, their box lies outside of the image"] += 1
        return None
    changes["boxes cut at the border of the image"] += (
        x < 0 or y < 0 or x + w > width or y + h > height
    )
    values = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
    keypoints = person.get("keypoints", [0] * 3 * number)
    for k in range(0, 3 * number, 3):
        px, py, v = keypoints[k : k + 3]
        is_inside = 0 <= px <= width and 0 <= py <= height
        changes["keypoints outside of the image made not labelled"] += v > 0 and not is_inside
        values += (px / width, py / height, v) if v and is_inside else (0, 0, 0)
    return " ".join(["0", *(f"{z:.10g}" for z in values)])


def _write_image(images: Path, folder: Path, name: str, lines: Sequence[str]) -> None:
    image = folder / name
    labels = labels_of(image)
    image.parent.mkdir(parents=True, exist_ok=True)
    labels.parent.mkdir(parents=True, exist_ok=True)
    if labels.exists():
        raise AnnotationError(
            f"images, file_name: {name!r} and another image would have the same labels "
            f"{labels.name!r}: rename one"
        )
    shutil.copyfile(images / name, image)
    labels.write_text("".join(f"{x}\n" for x in lines), encoding="utf-8")


def _make_config(category: dict[str, Any], number: int) -> dict[str, Any]:
    """What ``data.yaml`` holds."""
    config: dict[str, Any] = {"train": "images", "val": "images", "kpt_shape": [number, 3]}
    names = category.get("keypoints")
    if names:
        config |= {"flip_idx": _swaps(names), "kpt_names": {0: list(names)}}
    return config | {"names": {0: category["name"]}}


def _swaps(names: Sequence[str]) -> list[int]:
    """Of each keypoint, the number of that which takes its place in a mirror."""
    partner = {a: b for pair in infer_flip_pairs(names) for a, b in (pair, reversed(pair))}
    return [names.index(partner.get(name, name)) for name in names]
