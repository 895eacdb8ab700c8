"""Whether poses know which of their keypoints are hidden: COCO's v against what was predicted."""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from scipy.stats import rankdata

from ..modeling.oks import object_keypoint_similarity
from ..modeling.target_generator import VISIBLE

LEAST_OKS = 0.5  # of a pose and the person whose keypoints it is compared with


def match_poses(
    truth: COCO, records: list[dict[str, Any]], sigmas: list[float]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pair poses with persons as COCO's evaluation does at ``LEAST_OKS``.

    The best pose of an image takes the person that is left with the highest OKS; then the next.

    Args:
        truth: the annotations.
        records: poses in COCO's result format.
        sigmas: (K,) of OKS.

    Returns:
        Pairs of record and annotation. Crowds and persons without keypoints are in none.
    """
    poses = defaultdict(list)
    for record in sorted(records, key=lambda x: -x["score"]):
        poses[record["image_id"]].append(record)
    pairs = []
    for image_id, found in poses.items():
        people = [
            x
            for x in truth.imgToAnns[image_id]
            if x.get("num_keypoints", 0) and not x.get("iscrowd", 0)
        ]
        for record in found:
            same = [x for x in people if x["category_id"] == record["category_id"]]
            if not same:
                continue
            targets = torch.tensor([x["keypoints"] for x in same]).double().unflatten(1, (-1, 3))
            pose = torch.tensor(record["keypoints"]).double().view(1, -1, 3)
            areas = torch.tensor([x["area"] for x in same]).double()
            oks = object_keypoint_similarity(pose, targets, areas, torch.tensor(sigmas).double())
            best = int(oks.argmax())
            if oks[best] >= LEAST_OKS:
                pairs.append((record, same[best]))
                people.remove(same[best])
    return pairs


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
    num_visible, num_hidden = int(visible.sum()), int((~visible).sum())
    if not len(v):
        return dict.fromkeys(("accuracy", "always-visible", "AUC"), float("nan"))
    wins = rankdata(visibility)[visible].sum() - num_visible * (num_visible + 1) / 2
    pairs = num_visible * num_hidden
    return {
        "accuracy": 100 * float(((visibility >= 0.5) == visible).mean()),
        "always-visible": 100 * float(visible.mean()),
        "AUC": 100 * float(wins / pairs) if pairs else float("nan"),
    }


def evaluate_visibility(
    truth: COCO, records: list[dict[str, Any]], sigmas: list[float]
) -> dict[str, float]:
    """:func:`visibility_figures` of the labelled keypoints of persons that were found.

    Args:
        truth: the annotations.
        records: poses in COCO's result format, each with "visibility", K values.
        sigmas: (K,) of OKS.
    """
    pairs = match_poses(truth, records, sigmas)
    visibility = np.array([x for record, _ in pairs for x in record["visibility"]])
    v = np.array([x for _, person in pairs for x in person["keypoints"][2::3]])
    return visibility_figures(visibility[v > 0], v[v > 0])
