"""Soft-NMS, KP-Nets and decoding of the authors' model, against numbers of their code."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inspose_d2 import InsPoseOfficial
from inspose_d2.modeling.candidates import Candidates
from inspose_d2.modeling.geometry import Locations
from inspose_d2.modeling.kp_net import KPNet
from inspose_d2.modeling.official.decode import (
    HALF_PIXEL,
    Kept,
    enlarge,
    enlarged_peaks,
    enlarging_weights,
    make_instances,
    rescale,
    select_poses,
    soft_nms,
)
from inspose_d2.modeling.official.inspose_official import OfficialPredictions

STRIDES = [8, 16, 32, 64, 128]
SIZE, SCALE = (250, 310), (1.25, 1.2)  # H, W of the image; x, y (README of the numbers, f)


def kp_net() -> KPNet:
    return KPNet(stride=8, feature_channels=8, channels=8, num_layers=3, num_keypoints=17)


def test_enlarged_keypoint_maps_and_their_peaks(golden: Any) -> None:
    numbers, net = golden("kpnet"), kp_net()
    n = len(numbers["params"])
    strides = (8 * 2 ** numbers["level"]).float()
    zeros = torch.zeros(n, dtype=torch.int64)
    candidates = Candidates(zeros, zeros, numbers["location"], strides, [n])
    shared = net.shared_input(numbers["shared_feat"])
    maps = net.logits(numbers["params"], numbers["location"], strides, shared)
    maps = maps.unflatten(2, (32, 40))
    torch.testing.assert_close(maps, numbers["keypoint_maps"], atol=1e-4, rtol=0)
    large = enlarge(maps, enlarging_weights(maps))
    torch.testing.assert_close(large[0], numbers["upsampled_first"], atol=1e-4, rtol=0)
    largest = large.flatten(2).amax(dim=2)
    torch.testing.assert_close(largest, numbers["max_stride4"], atol=1e-4, rtol=0)

    cells, scores = enlarged_peaks(net, numbers["params"], candidates, numbers["shared_feat"][None])
    clear = numbers["gap_stride4"] > 1e-4
    assert clear.sum() == 168
    assert torch.equal(cells[clear], numbers["argmax_stride4"][clear])
    expected = numbers["keypoint_maps"].flatten(2).softmax(dim=2).amax(dim=2)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_soft_nms_by_hand() -> None:
    # IoU of the second with the first 1/3 (10 of 30), of the third with both below 0.3.
    boxes = torch.tensor([[0, 0, 10, 2], [5, 0, 15, 2], [0, 1.5, 10, 20]])
    scores = torch.tensor([0.9, 0.6, 0.5])
    keep, decayed = soft_nms(boxes, scores, iou_threshold=0.3, min_score=0.001, limit=100)
    assert keep.tolist() == [0, 2, 1]
    torch.testing.assert_close(decayed, torch.tensor([0.9, 0.5, 0.4]))  # 0.6 * 2/3
    keep, _ = soft_nms(boxes, scores, iou_threshold=0.3, min_score=0.45, limit=100)
    assert keep.tolist() == [0, 2]


def test_boxes_without_area_do_not_suppress_each_other() -> None:
    boxes = torch.tensor([[3.0, 4, 3, 9], [3, 4, 3, 9], [3, 4, 3, 4]])
    scores = torch.tensor([0.5, 0.4, 0.3])
    keep, decayed = soft_nms(boxes, scores, iou_threshold=0.3, min_score=0.001, limit=100)
    assert keep.tolist() == [0, 1, 2]
    assert torch.equal(decayed, scores)


def test_soft_nms_of_no_box() -> None:
    nothing = torch.zeros(0, 4), torch.zeros(0)
    keep, decayed = soft_nms(*nothing, iou_threshold=0.3, min_score=0.001, limit=100)
    assert keep.shape == decayed.shape == (0,)


@pytest.mark.parametrize("prefix", ["", "rescaled_"])
@pytest.mark.parametrize("name", ["decode_from_outputs", "decode_from_features"])
def test_soft_nms_of_the_authors_candidates(golden: Any, name: str, prefix: str) -> None:
    numbers = golden(name)
    boxes, scores = numbers[f"{prefix}candidate_boxes"], numbers[f"{prefix}candidate_scores"]
    over = (scores > 0.05).nonzero()[:, 0]

    def run(limit: int) -> tuple[Tensor, Tensor]:
        return soft_nms(boxes[over], scores[over], iou_threshold=0.3, min_score=0.001, limit=limit)

    keep, decayed = run(100)
    assert torch.equal(over[keep], numbers[f"{prefix}keep"])
    torch.testing.assert_close(decayed, numbers[f"{prefix}scores"], atol=1e-6, rtol=0)
    all_keep, all_decayed = run(10_000)
    assert len(all_keep) > 100
    assert torch.equal(all_keep[:100], keep)
    assert torch.equal(all_decayed[:100], decayed)


def tensors(arrays: list[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(x) for x in arrays]


class GivenHead:
    """Stands for head and branches: gives made-up outputs instead of computing them."""

    def __init__(self, outputs: dict[str, Any]) -> None:
        self.params = torch.cat([x.flatten(2) for x in tensors(outputs["controllers"])], 2).mT
        self.offsets = torch.from_numpy(outputs["hm_offset_feat"])

    def predict_params(self, *args: Any) -> Tensor:
        candidates = args[-1]
        return self.params[candidates.image, candidates.index]

    def __call__(self, p3: Tensor) -> Tensor:  # noqa: ARG002
        return self.offsets

    @staticmethod
    def offsets_at(x: Tensor, image: Tensor, cells: Tensor) -> Tensor:
        rows = x.unflatten(1, (17, 2)).flatten(3)  # (B, K, 2, cells)
        return rows[image[:, None], torch.arange(17), :, cells]


def decode(outputs: dict[str, Any]) -> tuple[Kept, Any]:
    """Run the part of the model after the convolutions on the authors' made-up outputs."""
    head = GivenHead(outputs)
    logits = torch.cat([x.flatten(1) for x in tensors(outputs["cls_scores"])], dim=1)
    poses = tensors(outputs["offset_preds"])
    locations = Locations.of(poses, STRIDES)
    kept = select_poses(
        locations,
        logits,
        poses,
        [SIZE],
        score_threshold=0.05,
        topk=1000,
        nms_threshold=0.3,
        max_poses=100,
    )
    shared = torch.from_numpy(outputs["shared_feat"])
    model = SimpleNamespace(
        kp_net=kp_net(),
        head=head,
        keypoint_branch=lambda p3: shared,  # noqa: ARG005
        dense_branch=head,
    )
    predictions = OfficialPredictions(poses, logits, poses)
    keypoints = InsPoseOfficial.keypoints_of(model, kept, predictions, locations)  # type: ignore[arg-type]
    return kept, make_instances(kept, keypoints, [SIZE])[0]


@pytest.mark.parametrize("prefix", ["", "rescaled_"])
def test_decoding_of_the_authors_outputs(golden: Any, prefix: str) -> None:
    numbers = golden("decode_from_outputs")
    kept, poses = decode(golden.recipe("recipe").head_outputs(1))
    if prefix:
        poses = rescale(poses, SIZE[0] / SCALE[1], SIZE[1] / SCALE[0])  # type: ignore[arg-type]
        poses.pred_keypoints[..., :2] -= HALF_PIXEL
    torch.testing.assert_close(kept.scores, numbers[f"{prefix}scores"], atol=1e-6, rtol=0)
    boxes = numbers[f"{prefix}boxes"]
    torch.testing.assert_close(poses.pred_boxes.tensor, boxes, atol=1e-3, rtol=0)
    clear = numbers[f"{prefix}map_peak_gap"] > 2e-4
    assert clear.sum() == 1700 - 17
    expected = numbers[f"{prefix}keypoints"][..., :2]
    got = poses.pred_keypoints[..., :2]
    torch.testing.assert_close(got[clear], expected[clear], atol=1e-3, rtol=0)
