"""COCO's average precision from files, also of a part of the images."""

import contextlib
import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from inspose_d2.data.annotations import count_people
from inspose_d2.evaluation import keypoint_ap

METRICS = ("AP", "AP50", "AP75", "APM", "APL")
MAX_PEOPLE = 6  # images with more are counted with these


def load_truth(json_file: str) -> COCO:
    """Read a data set without a word."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(json_file)


def average_precision(
    truth: COCO, detections: list[dict[str, Any]], task: str = "keypoints"
) -> dict[str, float]:
    """COCO's AP, AP50, AP75, APM, APL in percent, computed by pycocotools.

    As in Detectron2's ``COCOEvaluator`` the size of what was found is that of its box.

    Args:
        truth: the data set.
        detections: records of ``coco_instances_results.json``.
        task: "keypoints" or "bbox".
    """
    if not detections:
        return dict.fromkeys(METRICS, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(detections), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    small = 0 if task == "keypoints" else 1  # boxes have APs too, before APM
    stats = np.delete(evaluation.stats[: 5 + small], 3) if small else evaluation.stats[:5]
    return {name: 100 * float(value) for name, value in zip(METRICS, stats, strict=True)}


def images_by_people(truth: COCO) -> dict[int, list[int]]:
    """Ids of the images with 1, 2, ..., ``MAX_PEOPLE`` or more persons with labelled keypoints."""
    images = defaultdict(list)
    for image_id, count in sorted(count_people(truth.anns.values()).items()):
        images[min(count, MAX_PEOPLE)].append(image_id)
    return dict(sorted(images.items()))


def ap_by_people(truth: COCO, detections: Sequence[list[dict[str, Any]]]) -> dict[int, list[float]]:
    """Keypoint AP of several runs on the images with 1, 2, ... persons.

    Args:
        truth: the test set.
        detections: for each run its records of ``coco_instances_results.json``.
    """
    return {
        count: [keypoint_ap(truth, found, images) for found in detections]
        for count, images in images_by_people(truth).items()
    }
