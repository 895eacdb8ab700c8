"""Whether poses know which of their keypoints are hidden: COCO's v against what was predicted."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..modeling.target_generator import VISIBLE

LEAST_OKS = 0.5  # of a pose and the person that it shows: the lowest threshold of COCO's AP


def match_poses(
    truth: COCO, records: list[dict[str, Any]], sigmas: Sequence[float]
) -> tuple[COCO, COCOeval]:
    """Match poses with persons by COCO's own code, at ``LEAST_OKS`` and for all sizes.

    Args:
        truth: the annotations.
        records: poses in COCO's result format; their entries are added to.
        sigmas: (K,) of OKS; empty takes COCO's.

    Returns:
        The poses as COCO has them, and its evaluation, done.
    """
    with contextlib.redirect_stdout(None):
        found = truth.loadRes(records) if records else COCO()
        evaluation = COCOeval(truth, found, "keypoints")
        if sigmas:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.params.iouThrs = np.array([LEAST_OKS])
        evaluation.params.areaRng = [[0, 1e10]]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
    return found, evaluation


def visibility_figures(visibility: np.ndarray, v: np.ndarray) -> dict[str, float]:
    """Compare predicted visibility with COCO's v.

    Args:
        visibility: (M,) that keypoints are visible, in [0, 1].
        v: (M,) 1 hidden, 2 visible.

    Returns:
        In percent: "accuracy" at 0.5; "always-visible", the accuracy of who says that all are
        visible; "AUC", the probability that a visible keypoint has a higher value than a hidden
        one, half where they are equal. NaN where it cannot be said.
    """
    visible = v == VISIBLE
    if not len(v):
        return dict.fromkeys(("accuracy", "always-visible", "AUC"), float("nan"))
    own, others = visibility[visible], np.sort(visibility[~visible])
    wins = sum(np.searchsorted(others, own, side).sum() for side in ("left", "right")) / 2
    pairs = len(own) * len(others)
    return {
        "accuracy": 100 * float(((visibility >= 0.5) == visible).mean()),
        "always-visible": 100 * float(visible.mean()),
        "AUC": 100 * float(wins / pairs) if pairs else float("nan"),
    }


def evaluate_visibility(
    truth: COCO, records: list[dict[str, Any]], sigmas: Sequence[float]
) -> dict[str, float]:
    """:func:`visibility_figures` of the labelled keypoints of persons that were found.

    Args:
        truth: the annotations.
        records: poses in COCO's result format, each with "visibility", K values.
        sigmas: (K,) of OKS.
    """
    found, evaluation = match_poses(truth, records, sigmas)
    matches = [
        (found.anns[pose], truth.anns[int(person)])
        for result in filter(None, evaluation.evalImgs)
        for pose, person, ignored in zip(
            result["dtIds"], result["dtMatches"][0], result["dtIgnore"][0], strict=True
        )
        if person and not ignored
    ]
    visibility = np.array([x for pose, _ in matches for x in pose["visibility"]])
    v = np.array([x for _, person in matches for x in person["keypoints"][2::3]])
    return visibility_figures(visibility[v > 0], v[v > 0])
