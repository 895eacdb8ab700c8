"""One way to read a file of COCO keypoint annotations, for all that train, evaluate and look.

What is read is checked (:mod:`.annotations`) and made plain (:func:`plain`): what InsPose does not
learn from is left out, what follows from the rest is made from it. Detectron2 and pycocotools read
files through :func:`in_memory`.
"""

import logging
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any
from unittest.mock import patch

import pycocotools.coco
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from ..files import read_json
from .annotations import (
    MAX_PERSONS,
    AnnotationError,
    Problem,
    box_of,
    check_image_file,
    count_doubts,
    count_outside,
    count_people,
    find_problems,
    is_dropped,
    learned_categories,
)

logger = logging.getLogger(__name__)
HEADERS_AT_START = 100  # of images that are looked at before a run
MAX_UNREADABLE = 0.01  # of the images of a data set: training does without so few


def load_annotations(json_file: str | os.PathLike[str]) -> Any:
    """Read a file of annotations; see :func:`.read_json`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON; names the file.
    """
    json_file = os.fspath(json_file)
    if not PathManager.isfile(json_file):
        raise FileNotFoundError(
            f"{json_file} is not there: put the data set where it is registered; built-in ones lie "
            "below $DETECTRON2_DATASETS, by default ./datasets"
        )
    return read_json(json_file)


def check_annotations(
    json_file: str,
    num_keypoints: int | None = None,
    *,
    evaluation: bool = False,
    class_names: Sequence[str] | None = None,
    image_root: str | None = None,
) -> dict[str, Any]:
    """Refuse a file in which :func:`find_problems` finds one; warn of what is repaired or odd.

    Args:
        json_file: path, as registered with Detectron2.
        num_keypoints: see :func:`find_problems`, as are the others.
        evaluation: the same.
        class_names: the same.
        image_root: folder of the images; the headers of `HEADERS_AT_START` of them are looked at.

    Returns:
        What the file holds, as :func:`plain` makes it.

    Raises:
        OSError: the file cannot be read.
        AnnotationError: its first problem, and the command that lists all.
    """
    coco = load_annotations(json_file)
    problems = find_problems(coco, num_keypoints, evaluation=evaluation, class_names=class_names)
    problem = next(problems, None)
    if problem is None and image_root is not None:
        step = max(len(coco["images"]) // HEADERS_AT_START, 1)
        problem = _wrong_image(coco["images"][::step], image_root)
    if problem is not None:
        flags = f" --num-keypoints {num_keypoints}" if num_keypoints else ""
        flags += " --evaluation" if evaluation else ""
        flags += f" --images {shlex.quote(image_root)}" if image_root else ""
        raise AnnotationError(
            f"{json_file}: {problem}\nAll problems of the file: "
            f"inspose validate --input {shlex.quote(json_file)}{flags}"
        )
    for note in notes_on(coco, evaluation=evaluation):
        logger.warning("%s: %s", json_file, note)
    return plain(coco, evaluation=evaluation)


def _wrong_image(images: Sequence[dict[str, Any]], image_root: str) -> Problem | None:
    """First image of another size than its entry says, or that is missing with too many others."""
    findings = {x["id"]: next(check_image_file(x, image_root), None) for x in images}
    wrong = {k: finding for k, finding in findings.items() if finding is not None}
    for image_id, (key, what, cure) in wrong.items():
        if key != "file_name" or len(wrong) > MAX_UNREADABLE * len(images):
            return Problem("images", image_id, None, key, what, cure)
    return None


def notes_on(coco: dict[str, Any], *, evaluation: bool) -> Iterator[str]:
    """Say what is odd in a valid file, or not used though its author may think so.

    Args:
        coco: without problems; not changed.
        evaluation: see :func:`find_problems`.

    Yields:
        One line a kind, with its count.
    """
    annotations = coco.get("annotations", [])
    for count, of, doubt in count_doubts(coco, evaluation=evaluation):
        yield f"{count} of {of} persons: {doubt}"
    if evaluation:
        wrong = sum(
            x["num_keypoints"] != _num_labelled(x) for x in annotations if not x.get("iscrowd")
        )
        if wrong:
            yield f"num_keypoints of {wrong} persons is not what their keypoints say: counted anew"
        if crowded := [n for n in count_people(annotations).values() if n > MAX_PERSONS]:
            yield (
                f"{len(crowded)} images have more than {MAX_PERSONS} persons, up to "
                f"{max(crowded)}: COCO's protocol looks at the {MAX_PERSONS} best poses of an "
                "image, so AP cannot be 100"
            )
        return
    persons = [x for x in annotations if not x.get("iscrowd") and not is_dropped(x)]
    if without_key := sum("keypoints" not in x for x in persons):
        yield (
            f"{without_key} of {len(persons)} persons lack the key `keypoints`: no pose of theirs "
            "is learned, their boxes count neither as person nor as background"
        )
    if outside := count_outside(persons, coco["images"]):
        yield f"{outside} labelled keypoints lie outside their images: these are not learned"


def plain(coco: dict[str, Any], *, evaluation: bool) -> dict[str, Any]:
    """Leave out what is not learned from, and make what follows from the rest.

    The one category that is learned stays. Segmentations go: Detectron2 drops persons whose
    polygons it does not like. A missing or flat box becomes the one around the labelled keypoints;
    who has neither goes in training. For evaluation keypoints are counted, and ids begin with 1:
    to COCO's code an annotation of id 0 is never found, and to some below 0 neither.

    Args:
        coco: without problems; not changed.
        evaluation: see :func:`find_problems`.
    """
    if "annotations" not in coco:
        return coco
    categories = learned_categories(coco)
    ids = {category["id"] for category in categories}
    renumber = evaluation and any(x["id"] < 1 for x in coco["annotations"])
    annotations = []
    for number, annotation in enumerate(coco["annotations"], start=1):
        if annotation["category_id"] not in ids or (not evaluation and is_dropped(annotation)):
            continue
        own = {k: v for k, v in annotation.items() if k != "segmentation"}
        box = box_of(annotation)
        if box is not None:
            own["bbox"] = box
        if evaluation:
            own |= {"num_keypoints": _num_labelled(own)} | ({"id": number} if renumber else {})
        annotations.append(own)
    return {**coco, "categories": categories, "annotations": annotations}


def _num_labelled(annotation: dict[str, Any]) -> int:
    return sum(v > 0 for v in annotation.get("keypoints", ())[2::3])


class _InMemory(COCO):
    """What COCO is in a block of :func:`in_memory`."""


@contextmanager
def in_memory(loaded: dict[str, dict[str, Any]], *, evaluation: bool = False) -> Iterator[None]:
    """Let Detectron2, in the ``with`` block, take annotations as :func:`plain` makes them.

    Who loads a data set in the block changes these annotations, as Detectron2 does: use them once.

    Args:
        loaded: by json file, as registered with Detectron2, what :func:`check_annotations` returns;
            other files are read, and not checked.
        evaluation: see :func:`plain`, for these others.
    """
    by_path = {PathManager.get_local_path(file): coco for file, coco in loaded.items()}

    class Loaded(_InMemory):
        def __init__(self, annotation_file: str | None = None) -> None:
            super().__init__()
            if annotation_file is not None:
                known = by_path.pop(annotation_file, None)
                if known is None:
                    known = load_annotations(annotation_file)
                    with suppress(KeyError, TypeError, ValueError, AttributeError):  # unsound
                        known = plain(known, evaluation=evaluation)
                self.dataset = known
                self.createIndex()

    with (
        patch("pycocotools.coco.COCO", Loaded),
        patch("detectron2.evaluation.coco_evaluation.COCO", Loaded),
    ):
        yield


def load_keypoints(json_file: str, image_root: str, name: str | None) -> list[dict[str, Any]]:
    """Load a file as Detectron2's ``load_coco_json`` does, made :func:`plain` before.

    For ``DatasetCatalog``. In a block of :func:`in_memory`, that one's annotations are taken.
    """
    outside = not issubclass(pycocotools.coco.COCO, _InMemory)
    # Persons without labels are images of evaluation too.
    with in_memory({}, evaluation=True) if outside else nullcontext():
        dicts: list[dict[str, Any]] = load_coco_json(json_file, image_root, name)
    return dicts
