"""COCO keypoint files as tools write them, those of Roboflow and CVAT too, made into sound ones."""

from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from ..annotations import AnnotationError, learned_categories
from ..coco_file import load_annotations
from .common import (
    PERSON,
    Changes,
    Converted,
    choose_category,
    is_number,
    keypoint_names,
    make_coco,
    place_images,
)

LISTS = ("images", "annotations", "categories")
SMALL = 4  # pixels of an image's shorter side, up to which numbers below 1 may be pixels

Entries = list[dict[str, Any]]


def read_coco(
    json_file: Path,
    *,
    images: Path | None = None,
    keypoints: Sequence[str] | None = None,
    category: str | None = None,
) -> Converted:
    """Repair a file in COCO's form: https://cocodataset.org/#format-data.

    Several categories, missing boxes, areas, counts and flags, null and NaN, numbers written as
    text, fractions of the image, boxes as corners, keypoints without v or as lists of lists, and
    ids that are no numbers or come twice are no hindrance.

    Args:
        json_file: the file.
        images: folder of the images, for sizes that the file does not give, and to leave out images
            that are not there; None looks for nothing.
        keypoints: names, where the file has none or others are wanted.
        category: the one to keep, where several have annotations.

    Raises:
        OSError: the file cannot be read.
        AnnotationError: it has what cannot be repaired; names the file, the entry and the key.
    """
    coco = load_annotations(json_file)
    changes = Changes()
    lists = {key: _entries(coco, key, json_file) for key in LISTS}
    chosen, own = _choose(lists["categories"], lists["annotations"], category, json_file, changes)
    names = _names(chosen, [x for _, x in own], keypoints, json_file, changes)
    all_images, new_id = _read_images(lists["images"], json_file, changes)
    placed = place_images(all_images, images, json_file, changes)
    persons = []
    for index, entry in own:
        place = f"{json_file}: annotations[{index}] (annotation id {entry.get('id')!r})"
        person = _read_person(entry, len(names), place, changes)
        persons.append({**person, "image_id": new_id.get(_id(entry.get("image_id")))})
    _renumber(persons, changes)
    _scale_fractions(persons, placed, changes)
    _mend_corners(persons, placed, changes)
    made = {k: v for k, v in chosen.items() if k not in ("id", "skeleton") and v is not None}
    made |= {"keypoints": names, "skeleton": _skeleton(chosen, len(names), changes)}
    done = make_coco(placed, persons, made, json_file, images, changes)
    rest = {k: v for k, v in coco.items() if k not in LISTS}
    return Converted({**rest, **done.coco}, done.changes, images)


def _entries(coco: Any, key: str, source: Path) -> Entries:
    """A top-level list of objects; categories may be missing."""
    value = coco.get(key) if isinstance(coco, dict) else None
    entries = [] if value is None and key == "categories" and isinstance(coco, dict) else value
    if not isinstance(entries, list) or not (entries or key == "categories"):
        raise AnnotationError(f"{source}: {key}: must be a list of objects; is it COCO's format?")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise AnnotationError(f"{source}: {key}[{index}]: must be an object, got {entry!r:.80}")
    return entries


def _id(value: Any) -> Hashable:
    """An id such that 7, 7.0 and "7" are the same."""
    try:
        return int(value) if float(value) == int(value) else str(value)
    except (TypeError, ValueError, OverflowError):
        return None if value is None else str(value)


def _choose(
    categories: Entries,
    annotations: Entries,
    wanted: str | None,
    source: Path,
    changes: Changes,
) -> tuple[dict[str, Any], list[tuple[int, dict[str, Any]]]]:
    """The category to learn, and its annotations with their places."""
    ids = [_id(x.get("category_id")) for x in annotations]
    if not categories:
        several = len(set(ids)) > 1
        categories = [
            {"id": x, "name": f"category {x}" if several else wanted or PERSON}
            for x in dict.fromkeys(ids)
        ]
        changes["categories made"] += len(categories)
    number = {_id(x.get("id")): n for n, x in enumerate(categories)}
    numbered = [{"name": PERSON, **x, "id": number[_id(x.get("id"))]} for x in categories]
    if len(number) == 1:
        changes["category_id mended"] += sum(x not in number for x in ids)
        ids = [*number] * len(ids)
    own_numbers = [number.get(x) for x in ids]
    counted = [{"category_id": x} for x in own_numbers]
    learned = learned_categories({"categories": numbered, "annotations": counted})
    name = choose_category(
        {str(x["name"]) for x in learned}, {str(x["name"]) for x in numbered}, wanted, source
    )
    same = [x for x in numbered if str(x["name"]) == name]
    lists = [x["keypoints"] for x in same if x.get("keypoints")]
    if any(x != lists[0] for x in lists):
        raise AnnotationError(
            f"{source}: categories: several are called {name!r}, with other keypoints each"
        )
    chosen = next((x for x in same if x.get("keypoints")), same[0])
    keep = {x["id"] for x in same}
    own = [(i, annotations[i]) for i, n in enumerate(own_numbers) if n in keep]
    changes["annotations of other categories left out"] += len(annotations) - len(own)
    changes["categories left out"] += len(categories) - len(same)
    return {**chosen, "name": name}, own


def _names(
    category: dict[str, Any],
    annotations: Entries,
    given: Sequence[str] | None,
    source: Path,
    changes: Changes,
) -> list[str]:
    """Names of the keypoints."""
    own = category.get("keypoints") or None
    if own is not None and not isinstance(own, list):
        raise AnnotationError(f"{source}: categories, keypoints: must be a list, got {own!r:.80}")
    if own is not None and given is None:
        names = list(map(str, own))
        if len(set(names)) < len(names):
            raise AnnotationError(
                f"{source}: categories, keypoints: {names} are not different; give others by "
                "--keypoints"
            )
        return names
    lengths = Counter(len(_flat(x["keypoints"])) for x in annotations if x.get("keypoints"))
    number = len(own) if own else lengths.most_common(1)[0][0] // 3 if lengths else None
    names = list(keypoint_names(given, number, source))
    changes["names of keypoints taken from COCO" if given is None else "keypoints named"] += (
        len(names) if names != own else 0
    )
    return names


def _flat(keypoints: Any) -> list[Any]:
    """Keypoints as one list; [x, y] of a list of lists get v None."""
    if not isinstance(keypoints, list):
        return []
    if keypoints and all(isinstance(x, list) for x in keypoints):
        return [z for x in keypoints for z in ([*x, None] if len(x) == 2 else x)]
    return keypoints


def _read_images(
    entries: Entries, source: Path, changes: Changes
) -> tuple[Entries, dict[Hashable, int]]:
    """Images, with their sizes where these are known, and what ids become."""
    by_id: dict[Hashable, dict[str, Any]] = {}
    for index, entry in enumerate(entries):
        place = f"{source}: images[{index}]"
        own_id, name = _id(entry.get("id")), entry.get("file_name")
        if own_id is None:
            raise AnnotationError(f"{place}, id: is missing; annotations name their image by it")
        if not isinstance(name, str) or not name.strip("./\\ ") or "\0" in name:
            raise AnnotationError(
                f"{place}, file_name: must be the name of a file, got {name!r:.80}"
            )
        image = {**entry, "file_name": name}
        for key in ("width", "height"):
            size = _number(image.pop(key, None), f"{place}, {key}")
            if size is not None and size >= 1 and size == int(size):
                image[key] = int(size)
                changes["widths and heights made whole numbers"] += type(entry[key]) is not int
        if by_id.setdefault(own_id, image)["file_name"] != name:
            raise AnnotationError(
                f"{place}, id: {own_id!r} is the id of {by_id[own_id]['file_name']!r} too: whose "
                "annotations are whose cannot be known; give each image its own id"
            )
    changes["copies of images left out"] += len(entries) - len(by_id)
    are_numbers = all(isinstance(x, int) for x in by_id)
    new_id: dict[Hashable, Any] = {x: x if are_numbers else n for n, x in enumerate(by_id, start=1)}
    changes["ids of images made whole numbers"] += sum(type(x["id"]) is not int for x in entries)
    return [{**image, "id": new_id[x]} for x, image in by_id.items()], new_id


def _number(value: Any, place: str) -> float | None:
    """A number, which may be written as text; None of what is none: null, NaN, infinity."""
    if value is None or (isinstance(value, float | int) and not isinstance(value, bool)):
        return value if is_number(value) else None
    try:
        return _number(float(value), place) if isinstance(value, str) else float("x")
    except ValueError:
        raise AnnotationError(f"{place}: must be a number, got {value!r:.80}") from None


def _read_person(
    entry: dict[str, Any], num_keypoints: int, place: str, changes: Changes
) -> dict[str, Any]:
    """An annotation whose numbers are numbers; what is none of them is left out."""
    keypoints = _keypoints(entry.get("keypoints"), num_keypoints, place, changes)
    dropped = ("keypoints", "bbox", "area", "iscrowd", "ignore")
    person = {k: v for k, v in entry.items() if k not in dropped and v is not None}
    person |= {"keypoints": keypoints, "iscrowd": _crowd(entry, place, changes)}
    box = entry.get("bbox")
    if isinstance(box, list) and len(box) == 4:
        numbers = [_number(x, f"{place}, bbox") for x in box]
        if None not in numbers:
            person["bbox"] = numbers
            changes["boxes of text made numbers"] += numbers != box
    area = _number(entry.get("area"), f"{place}, area")
    if area is not None:
        person["area"] = area
    labelled = sum(v > 0 for v in keypoints[2::3])
    changes["num_keypoints counted"] += entry.get("num_keypoints") != labelled
    return person


def _crowd(entry: dict[str, Any], place: str, changes: Changes) -> int:
    """`iscrowd`; what other programs are to ignore is a crowd here."""
    flags = {}
    for key in ("iscrowd", "ignore"):
        value = entry.get(key)
        flags[key] = (
            int(value) if isinstance(value, bool) else _number(value, f"{place}, {key}") or 0
        )
        if flags[key] not in (0, 1):
            raise AnnotationError(f"{place}, {key}: must be 0 or 1, got {value!r:.80}")
    changes["iscrowd made 0 or 1"] += type(entry.get("iscrowd")) is not int
    changes["persons to ignore made crowds"] += flags["ignore"] > flags["iscrowd"]
    return int(max(flags.values()))


def _keypoints(value: Any, number: int, place: str, changes: Changes) -> Sequence[float]:
    """K times x, y, v."""
    if value is None or value == []:
        changes["persons without keypoints: none is labelled"] += 1
        return [0] * 3 * number
    flat = _flat(value)
    changes["lists of lists of keypoints made flat"] += flat is not value
    if len(flat) == 2 * number:
        rows = [(x, y, None) for x, y in zip(flat[::2], flat[1::2], strict=True)]
    elif len(flat) == 3 * number:
        rows = list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
    else:
        raise AnnotationError(
            f"{place}, keypoints: must be {number} times x, y, v ({3 * number} numbers), got "
            f"{len(flat) if isinstance(value, list) else repr(value)[:80]}"
        )
    where = f"{place}, keypoints"
    return [
        z for k, row in enumerate(rows) for z in _keypoint(row, f"{where}, number {k}", changes)
    ]


def _keypoint(row: Sequence[Any], place: str, changes: Changes) -> tuple[float, float, int]:
    x, y = (_number(z, place) for z in row[:2])
    v = _number(row[2], place)
    if v is None:
        v = 0 if x is None or y is None or x == y == 0 else 2
        changes["v of keypoints made, 2 where they have a place"] += 1
    if v not in (0, 1, 2):
        raise AnnotationError(f"{place}: v must be 0, 1 or 2, got {row[2]!r:.80}")
    if x is None or y is None:
        changes["keypoints without a place: not labelled"] += 1
        return 0, 0, 0
    if v == 0:
        changes["keypoints that are not labelled moved to (0, 0)"] += (x, y) != (0, 0)
        return 0, 0, 0
    changes["keypoints of text made numbers"] += any(isinstance(z, str) for z in row)
    return x, y, int(v)


def _renumber(persons: Entries, changes: Changes) -> None:
    """Give new ids to all, where some are missing, no numbers or come twice."""
    ids = [_id(x.pop("id", None)) for x in persons]
    if all(isinstance(x, int) for x in ids) and len(set(ids)) == len(ids):
        for person, own_id in zip(persons, ids, strict=True):
            person["id"] = own_id
    else:
        changes["ids of annotations given anew"] += len(ids)


def _scale_fractions(persons: Entries, images: Entries, changes: Changes) -> None:
    """Make pixels of fractions of the image, where most persons have such."""
    sizes = {x["id"]: (x["width"], x["height"]) for x in images}
    known = [x for x in persons if min(sizes.get(x["image_id"], (0, 0))) > SMALL]
    with_points = [x for x in known if any(x["keypoints"][2::3])]
    small = [x for x in with_points if all(0 <= z <= 1 for z in _places(x["keypoints"]))]
    if 2 * len(small) > len(with_points):
        for person in small:
            scale = (*sizes[person["image_id"]], 1)
            person["keypoints"] = [z * scale[i % 3] for i, z in enumerate(person["keypoints"])]
        changes["persons whose keypoints were fractions of the image"] += len(small)
    with_box = [x for x in known if max(x.get("bbox", [0])[2:], default=0) > 0]
    tiny = [x for x in with_box if max(x["bbox"]) <= 1]
    if 2 * len(tiny) > len(with_box):
        for person in tiny:
            width, height = sizes[person["image_id"]]
            person["bbox"] = [
                z * side for z, side in zip(person["bbox"], (width, height) * 2, strict=True)
            ]
            person.pop("area", None)
        changes["boxes that were fractions of the image"] += len(tiny)


def _mend_corners(persons: Entries, images: Entries, changes: Changes) -> None:
    """Make boxes [x0, y0, x1, y1] COCO's, where as such nearly all fit, and as COCO's few do."""
    sizes = {x["id"]: (x["width"], x["height"]) for x in images}
    with_both = [
        x for x in persons if x["image_id"] in sizes and "bbox" in x and any(x["keypoints"][2::3])
    ]
    fit = sum(_fits(x["bbox"], x["keypoints"], sizes[x["image_id"]]) for x in with_both)
    fit_as_corners = sum(
        _fits(_from_corners(x["bbox"]), x["keypoints"], sizes[x["image_id"]]) for x in with_both
    )
    if fit < len(with_both) / 2 and fit_as_corners > 0.9 * len(with_both):
        for person in (x for x in persons if "bbox" in x):
            person["bbox"] = _from_corners(person["bbox"])
            changes["boxes that were corners [x0, y0, x1, y1]"] += 1


def _from_corners(box: Sequence[float]) -> list[float]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]


def _fits(box: Sequence[float], keypoints: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether a box lies in the image and has the labelled keypoints in it, but for 2 pixels."""
    places = _places(keypoints)
    for z0, side, length, own in zip(box, box[2:], size, (places[::2], places[1::2]), strict=False):
        if not (-2 <= z0 <= min(own) + 2 and max(own) - 2 <= z0 + side <= length + 2):
            return False
    return True


def _places(keypoints: Sequence[float]) -> list[float]:
    """Coordinates of the labelled keypoints."""
    return [z for i, z in enumerate(keypoints) if i % 3 < 2 and keypoints[i - i % 3 + 2]]


def _skeleton(category: dict[str, Any], number: int, changes: Changes) -> list[list[int]]:
    """Pairs of numbers from 1 on; those that count from 0 are moved, others are left out."""
    pairs = category.get("skeleton") or []
    try:
        pairs = [[int(i), int(j)] for i, j in pairs]
    except (TypeError, ValueError, OverflowError):
        pairs = [[0, number]]
    ends = {k for pair in pairs for k in pair}
    if 0 in ends and ends <= set(range(number)):
        changes["connections of the skeleton counted from 1"] += len(pairs)
        return [[i + 1, j + 1] for i, j in pairs]
    if not ends <= set(range(1, number + 1)):
        changes["skeletons left out: no pairs of keypoints"] += 1
        return []
    return pairs
