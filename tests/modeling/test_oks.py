import math

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from inspose_d2.modeling.oks import object_keypoint_similarity


def test_oks_by_hand() -> None:
    # Sigma 0.05 and area 400: variance 2 * 0.1^2 * 400 = 8; distances 0 and 4 (3-4-5 is 5: 25).
    keypoints = torch.tensor([[[10.0, 10.0, 0.3], [3.0, 4.0, 0.9], [99.0, 99.0, 1.0]]])
    targets = torch.tensor([[[10.0, 10.0, 2.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]])
    oks = object_keypoint_similarity(
        keypoints, targets, torch.tensor([400.0]), torch.tensor([0.05, 0.05, 0.05])
    )
    assert oks.tolist() == [pytest.approx((1 + math.exp(-25 / 8)) / 2, rel=1e-6)]


def test_nothing_labelled_or_no_area_is_finite() -> None:
    targets = torch.zeros(2, 17, 3)
    targets[1, :, 2] = 2
    oks = object_keypoint_similarity(torch.ones(2, 17, 2), targets, torch.zeros(2), torch.ones(17))
    assert oks.tolist() == [0, 0]


def test_oks_equals_pycocotools() -> None:
    generator = np.random.default_rng(0)
    keypoints = generator.uniform(0, 60, (5, 17, 3))
    keypoints[..., 2] = generator.integers(0, 3, (5, 17))
    keypoints[:, 0, 2] = 2  # no person without labels
    found = keypoints[..., :2] + generator.normal(0, 4, (5, 17, 2))
    areas = generator.uniform(100, 3000, 5)
    persons = [
        {
            **{"id": i + 1, "image_id": i, "category_id": 1, "iscrowd": 0, "bbox": [0, 0, 60, 60]},
            **{"area": areas[i], "keypoints": keypoints[i].flatten().tolist()},
            "num_keypoints": int((keypoints[i, :, 2] > 0).sum()),
        }
        for i in range(5)
    ]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "height": 60, "width": 60} for i in range(5)],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": persons,
    }
    coco.createIndex()
    rows = np.concatenate([found, np.ones((5, 17, 1))], axis=2).reshape(5, -1)
    results = [
        {"image_id": i, "category_id": 1, "keypoints": row.tolist(), "score": 1.0}
        for i, row in enumerate(rows)
    ]
    evaluation = COCOeval(coco, coco.loadRes(results), "keypoints")
    evaluation.evaluate()
    expected = [evaluation.ious[i, 1][0, 0] for i in range(5)]
    sigmas = torch.tensor(evaluation.params.kpt_oks_sigmas)
    oks = object_keypoint_similarity(
        torch.tensor(found), torch.tensor(keypoints), torch.tensor(areas), sigmas
    )
    assert oks.tolist() == pytest.approx(expected, rel=1e-6)
