"""Targets and losses of the authors' model, against numbers of their code."""

from typing import Any

import pytest
import torch
from detectron2.structures import Boxes, Instances, Keypoints
from torch import Tensor

from inspose_d2 import get_cfg
from inspose_d2.modeling.geometry import Locations
from inspose_d2.modeling.kp_net import KPNet
from inspose_d2.modeling.official.criterion import (
    OfficialCriterion,
    Persons,
    persons_of,
    tag_losses,
)
from inspose_d2.modeling.oks import oks_sigmas
from inspose_d2.modeling.target_generator import CROWD

STRIDES = [8, 16, 32, 64, 128]
OURS = {
    "loss_cls": "loss_cls",
    "loss_keypoint": "loss_keypoint",
    "loss_keypoint_reg": "loss_regression",
    "loss_heatmap": "loss_heatmap",
    "loss_ae_pull": "loss_tag_pull",
    "loss_ae_push": "loss_tag_push",
    "loss_heatmap_offset": "loss_offset",
}


def criterion() -> OfficialCriterion:
    net = KPNet(stride=8, feature_channels=8, channels=8, num_layers=3, num_keypoints=17)
    return OfficialCriterion(
        kp_net=net,
        oks_sigmas=SIGMAS,
        center_sampling_radius=1.5,
        sizes_of_interest=[64, 128, 256, 512],
        min_overlap=0.9,
    )


def persons_of_images(numbers: dict[str, Tensor]) -> list[Persons]:
    return [
        Persons(
            *(numbers[name][numbers["image"] == i] for name in ("keypoints", "boxes", "mask_area"))
        )
        for i in range(3)
    ]


def test_dense_targets(golden: Any) -> None:
    numbers, persons = golden("targets_stride4"), persons_of_images(golden("gt"))
    for i, own in enumerate(persons):
        heatmaps, offsets, mask = criterion()._dense_targets(own, (32, 40))
        assert torch.equal(mask.repeat_interleave(2, dim=0), numbers["offset_mask"][i])
        torch.testing.assert_close(heatmaps, numbers["heatmap"][i], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(offsets, numbers["offset"][i], rtol=1e-5, atol=1e-5)


def test_dense_targets_whose_windows_overlap(golden: Any) -> None:
    numbers = golden("targets_stride4_large")
    own = Persons(numbers["keypoints"], numbers["boxes"], torch.ones(2))
    heatmaps, offsets, mask = criterion()._dense_targets(own, (64, 64))
    assert torch.equal(mask.repeat_interleave(2, dim=0), numbers["offset_mask"][0])
    torch.testing.assert_close(heatmaps, numbers["heatmap"][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(offsets, numbers["offset"][0], rtol=1e-5, atol=1e-5)


def leaves(outputs: dict[str, Any]) -> dict[str, Tensor]:
    """Made-up outputs by the names of the recorded gradients."""
    found = {}
    for name, value in outputs.items():
        for i, array in enumerate(value if isinstance(value, list) else [value]):
            key = f"{name}{i}" if isinstance(value, list) else name
            found[key] = torch.from_numpy(array).requires_grad_()
    return found


def rows_of(inputs: dict[str, Tensor], name: str) -> Tensor:
    """Outputs of all levels, (B, L, C)."""
    return torch.cat([inputs[f"{name}{i}"].flatten(2) for i in range(5)], dim=2).mT


def losses_of(inputs: dict[str, Tensor], targets: Any, persons: list[Persons]) -> dict[str, Tensor]:
    where = targets.positives.image, targets.positives.index
    return criterion().losses(
        targets,
        persons,
        person_logits=rows_of(inputs, "cls_scores")[..., 0],
        params=rows_of(inputs, "controllers")[where],
        regressed=rows_of(inputs, "offset_preds")[where].unflatten(1, (17, 2)),
        keypoint_features=inputs["shared_feat"],
        heatmap_logits=inputs["hm_feat"],
        tags=inputs["ae_feat"],
        offsets=inputs["hm_offset_feat"],
    )


def test_losses_of_the_authors_outputs_and_their_gradients(golden: Any) -> None:
    numbers, persons = golden("loss_from_outputs"), persons_of_images(golden("gt"))
    inputs = leaves(golden.recipe("recipe").head_outputs(3))
    locations = Locations.of([inputs[f"cls_scores{i}"] for i in range(5)], STRIDES)
    targets = criterion().targets(persons, locations, (32, 40))
    assert len(targets.positives.index) == 57
    got = losses_of(inputs, targets, persons)
    assert got.keys() == set(OURS.values())
    for name, value in zip(numbers["names"], numbers["values_double_f64"].tolist(), strict=True):
        assert got[OURS[str(name)]].item() == pytest.approx(value, rel=1e-5), name
    sum(got.values()).backward()  # type: ignore[union-attr]
    for name, norm in zip(numbers["grad_of"], numbers["grad_norm_f64"].tolist(), strict=True):
        grad = inputs[str(name)].grad
        assert grad is not None
        assert grad.double().norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-7), name


def test_batch_without_persons_has_finite_losses_that_reach_every_input(golden: Any) -> None:
    inputs = leaves(golden.recipe("recipe").head_outputs(1))
    locations = Locations.of([inputs[f"cls_scores{i}"] for i in range(5)], STRIDES)
    persons = [Persons(torch.zeros(0, 17, 3), torch.zeros(0, 4), torch.zeros(0))]
    targets = criterion().targets(persons, locations, (32, 40))
    got = losses_of(inputs, targets, persons)
    assert all(x.isfinite() for x in got.values())
    sum(got.values()).backward()  # type: ignore[union-attr]
    assert [name for name, x in inputs.items() if x.grad is None] == []


def test_persons_who_are_found() -> None:
    """One as annotated, one without labels, one with a single keypoint, a crowd."""
    keypoints = torch.zeros(4, 17, 3)
    keypoints[0, :2] = torch.tensor([[10.0, 20, 2], [40, 60, 1]])
    keypoints[2, 5] = torch.tensor([7.0, 8, 2])
    boxes = torch.tensor([[0.0, 0, 50, 80], [1, 2, 30, 40], [0, 0, 9, 9], [0, 0, 90, 90]])
    instances = Instances(
        (100, 100),
        gt_keypoints=Keypoints(keypoints),
        gt_boxes=Boxes(boxes),
        gt_classes=torch.tensor([0, 0, 0, CROWD]),
    )
    persons = persons_of(instances, torch.tensor([-0.5, -1.0]))
    assert persons.boxes.tolist() == [[9.5, 19, 39.5, 59], [1, 2, 30, 40]]
    assert persons.keypoints[0, 1].tolist() == [39.5, 59, 1]
    assert instances.gt_keypoints.tensor[0, 1].tolist() == [40, 60, 1]  # stays as it is


def test_tags_are_read_one_cell_up_and_left_and_pushed_apart() -> None:
    keypoints = torch.zeros(3, 17, 3)
    keypoints[0, 0], keypoints[0, 1] = torch.tensor([[9.0, 5, 2], [2, 13, 2]])
    keypoints[2, 0] = torch.tensor([20.0, 20, 1])
    tags = torch.zeros(17, 8, 8)
    tags[0, 0, 1] = 1.0  # cell (2, 1) of the nose, less one
    tags[1, 2, -1] = 3.0  # column -1 is the last
    tags[0, 4, 4] = 2.5
    persons = Persons(keypoints, torch.zeros(3, 4), torch.ones(3))
    pull, push = tag_losses(tags, persons, 4)
    assert pull.item() == pytest.approx((1.0 + 0.0) / 2)  # (1 + 1) / 2 of the first person
    assert push.item() == pytest.approx(2 * torch.tensor(-0.25).exp().item() / 4)


SIGMAS = oks_sigmas(get_cfg("InsPose_R50_3x"))
