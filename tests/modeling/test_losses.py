import math

import numpy as np
import pytest
import torch
from torch import Tensor

from inspose_d2.modeling.losses import (
    box_loss,
    classification_loss,
    disk_offset_loss,
    heatmap_loss,
    keypoint_loss,
    quality_loss,
    regression_loss,
    visibility_loss,
)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss, of)
    return result


def classification_sum(logits: Tensor, targets: Tensor) -> Tensor:
    return classification_loss(logits, targets, alpha=0.25, gamma=2.0)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.9, 3.0)])
def test_classification_loss_equals_formula(alpha: float, gamma: float) -> None:
    logits = 3 * rand(2, 40)
    targets = torch.arange(80).view(2, 40) % 3 - 1
    expected = 0.0
    for x, target in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        if target == 1:
            expected -= alpha * (1 - p) ** gamma * math.log(p)
        elif target == 0:
            expected -= (1 - alpha) * p**gamma * math.log(1 - p)
    loss = classification_loss(logits, targets, alpha=alpha, gamma=gamma)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_left_out_locations_have_no_loss_and_no_gradient() -> None:
    targets = torch.tensor([1, -1, 0, -1])
    logits = rand(4).requires_grad_()
    changed = logits.detach() + torch.tensor([0, 30.0, 0, -30.0])
    loss = classification_sum(logits, targets)
    assert loss.item() == classification_sum(changed, targets).item()
    assert (gradient(loss, logits) != 0).tolist() == [True, False, True, False]


def test_keypoint_loss_by_hand() -> None:
    # Probabilities 1/2 and 1/4 of labelled keypoints, 1/8 of one without label: ln 2 + ln 4.
    log_probs = torch.tensor([[0.5, 0.125], [0.25, 0.125]]).log()
    labelled = torch.tensor([[True, False], [True, False]])
    loss = keypoint_loss(log_probs, labelled)
    assert loss.item() == pytest.approx(math.log(2) + math.log(4), rel=1e-6)


def test_unlabelled_keypoints_have_no_gradient() -> None:
    log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss = keypoint_loss(log_probs, torch.tensor([[True, False]]))
    assert gradient(loss, log_probs).tolist() == [[-1.0, 0.0]]


def test_disk_offset_loss_by_hand() -> None:
    # K = 2, one row of two cells. Keypoint 0 has its disk in cell 0, keypoint 1 in cell 1.
    offsets = torch.tensor([[[[1.0, 9.0]], [[2.0, 9.0]], [[9.0, 3.0]], [[9.0, 4.0]]]])
    targets = torch.tensor([[[[0.5, 0.0]], [[2.5, 0.0]], [[0.0, 0.0]], [[0.0, 6.0]]]])
    mask = torch.tensor([[[[True, False]], [[False, True]]]])
    # |1 - 0.5| + |2 - 2.5| + |3 - 0| + |4 - 6|
    assert disk_offset_loss(offsets, targets, mask).item() == 6.0


def test_heatmap_loss_equals_formula() -> None:
    logits = 3 * rand(2, 3, 5, 4)
    targets = rand(2, 3, 5, 4, seed=1).abs().clamp(max=1)
    assert (targets == 1).any()
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    y = targets.double().numpy()
    terms = np.where(y == 1, (1 - p) ** 2 * np.log(p), (1 - y) ** 4 * p**2 * np.log(1 - p))
    loss = heatmap_loss(logits, targets)
    assert loss.item() == pytest.approx(-terms.sum(), rel=1e-5)


def test_heatmap_loss_leaves_cells_out() -> None:
    logits = torch.tensor([0.0, 50.0, -50.0, 0.0], requires_grad=True)
    loss = heatmap_loss(logits, torch.tensor([1.0, -1.0, -1.0, 0.0]))
    assert loss.item() == pytest.approx(0.25 * math.log(2) * 2, rel=1e-6)
    assert gradient(loss, logits)[1:3].tolist() == [0, 0]


def test_box_loss_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    targets = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 0, 30, 10]])
    # GIoU is IoU minus the part of the enclosing box that neither covers: 1; 50 / 150 with nothing
    # uncovered; 0 - 100 / 300.
    for chosen, expected in zip(range(3), (0, 2 / 3, 4 / 3), strict=True):
        loss = box_loss(boxes[chosen, None], targets[chosen, None])
        assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert box_loss(boxes, targets).item() == pytest.approx(2, abs=1e-5)


def loss_of(name: str, logits: Tensor) -> Tensor:
    """A loss of logits (2, 2, 3, 3) with persons and background."""
    targets = (torch.arange(36).view(2, 2, 3, 3) % 3 == 0).long()
    if name == "cls":
        return classification_sum(logits, targets)
    if name == "disk_offset":
        return disk_offset_loss(logits, torch.zeros(2, 2, 3, 3), targets[:, :1] == 1)
    return heatmap_loss(logits, targets.float())


NAMES = ["cls", "disk_offset", "heatmap"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [50.0, 1e4])
def test_loss_and_gradient_are_finite_when_logits_are_extreme(name: str, size: float) -> None:
    logits = (size * rand(2, 2, 3, 3).sign()).requires_grad_()
    loss = loss_of(name, logits)
    assert torch.isfinite(loss)
    assert loss > 0
    assert torch.isfinite(gradient(loss, logits)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("autocast", [True, False])
def test_loss_is_float32_when_logits_are_bfloat16(name: str, autocast: bool) -> None:
    logits = rand(2, 2, 3, 3).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(name, logits)
    assert loss.dtype == torch.float32
    # The same numbers as if the input had been rounded only: nothing is computed in bfloat16.
    assert loss.item() == pytest.approx(loss_of(name, logits.float()).item(), rel=1e-6)
    assert (gradient(loss, logits) != 0).any()


def test_quality_loss_by_hand() -> None:
    # A person of quality 0.8 at p = 0.5: 0.8 * ln 2. Background at p = 0.5: 0.75 * 0.25 * ln 2.
    # A person of quality 0 counts nothing; the last is left out.
    logits, targets = torch.zeros(4), torch.tensor([1, 0, 1, -1])
    loss = quality_loss(logits, targets, torch.tensor([0.8, 0.0]), alpha=0.75, gamma=2.0)
    assert loss.item() == pytest.approx((0.8 + 0.1875) * math.log(2), rel=1e-6)


def test_probability_settles_at_the_quality() -> None:
    targets, quality = torch.tensor([1, 1, 0]), torch.tensor([0.7, 0.2])
    logits = torch.tensor([math.log(0.7 / 0.3), math.log(0.2 / 0.8), -60.0], requires_grad=True)
    loss = quality_loss(logits, targets, quality, alpha=0.75, gamma=2.0)
    assert gradient(loss, logits).tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def test_quality_loss_without_persons() -> None:
    logits = rand(2, 3).requires_grad_()
    targets = torch.zeros(2, 3, dtype=torch.int64)
    loss = quality_loss(logits, targets, torch.zeros(0), alpha=0.75, gamma=2.0)
    assert loss.item() > 0
    assert gradient(loss, logits).isfinite().all()


def test_regression_loss_by_hand() -> None:
    # |1 - 0| and |2 - 4| have the mean 1.5; the second keypoint is not labelled.
    offsets = torch.tensor([[[1.0, 2.0], [50.0, 50.0]]])
    targets = torch.tensor([[[0.0, 4.0], [0.0, 0.0]]])
    assert regression_loss(offsets, targets, torch.tensor([[True, False]])).item() == 1.5


NO, NOWHERE = torch.zeros(2, 17, dtype=torch.bool), torch.zeros(1, 2, 2, 2, dtype=torch.bool)
OF_NOTHING = {
    "all left out": ((2, 3), lambda x: classification_sum(x, torch.full((2, 3), -1))),
    "nobody": ((0, 17), lambda x: keypoint_loss(x, NO[:0])),
    "nothing labelled": ((2, 17), lambda x: keypoint_loss(x, NO)),
    "no disks": ((1, 4, 2, 2), lambda x: disk_offset_loss(x, torch.zeros(1, 4, 2, 2), NOWHERE)),
    "no maps": ((0, 17, 4, 4), lambda x: heatmap_loss(x, torch.zeros(0, 17, 4, 4))),
    "no boxes": ((0, 4), lambda x: box_loss(x, torch.zeros(0, 4))),
    "no visibility": ((0, 17), lambda x: visibility_loss(x, NO[:0], NO[:0])),
}


@pytest.mark.parametrize("name", OF_NOTHING)
def test_loss_of_nothing_is_zero_and_so_is_its_gradient(name: str) -> None:
    shape, loss_of = OF_NOTHING[name]
    inputs = rand(*shape).requires_grad_()
    loss = loss_of(inputs)
    assert loss.item() == 0
    assert gradient(loss, inputs).equal(torch.zeros(shape))
