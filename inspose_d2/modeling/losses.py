"""The terms of the loss (eq. 5, Table 4), each as a sum; the caller divides by its normaliser."""

import torch.nn.functional as F
from fvcore.nn import giou_loss, sigmoid_focal_loss
from torch import Tensor


def classification_loss(logits: Tensor, targets: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss over all locations that count (sec. 3.4; Lin et al. 2017b).

    Args:
        logits: (...) person logits.
        targets: (...) 1 person, 0 background, -1 left out.
        alpha: weight of the persons against the background, in [0, 1].
        gamma: focusing exponent.

    Returns:
        Scalar sum.
    """
    counted = targets >= 0
    return sigmoid_focal_loss(
        logits[counted].float(), targets[counted].float(), alpha, gamma, reduction="sum"
    )


def quality_loss(
    logits: Tensor, targets: Tensor, quality: Tensor, *, alpha: float, gamma: float
) -> Tensor:
    """Varifocal loss: the person probability learns how good the pose is (ours here).

    Zhang et al. 2021 with OKS in the place of IoU, as in the authors' later code: cross-entropy
    towards the quality, weighted by it at persons, by alpha * probability^gamma elsewhere.

    Args:
        logits: (...) person logits.
        targets: (...) 1 person, 0 background, -1 left out.
        quality: (N,) in [0, 1], OKS of the decoded pose of each of the N persons of ``targets``, in
            their order.
        alpha: weight of the background, above 0.
        gamma: focusing exponent of the background.

    Returns:
        Scalar sum.
    """
    logits = logits.float()
    towards = logits.new_zeros(logits.shape).masked_scatter(targets == 1, quality.float())
    weight = (alpha * logits.detach().sigmoid() ** gamma).where(targets != 1, towards)
    loss = F.binary_cross_entropy_with_logits(logits, towards, weight, reduction="none")
    return loss[targets >= 0].sum()


def regression_loss(offsets: Tensor, targets: Tensor, labelled: Tensor) -> Tensor:
    """L1 of the auxiliary regression, mean over x and y (the authors' later code).

    Args:
        offsets: (N, K, 2) predicted offsets from locations to keypoints, in strides.
        targets: (N, K, 2) annotated.
        labelled: (N, K) bool.

    Returns:
        Scalar sum over the labelled keypoints.
    """
    distance = (offsets.float() - targets).abs().mean(dim=2)
    return distance.where(labelled, 0).sum()


def visibility_loss(logits: Tensor, visible: Tensor, labelled: Tensor) -> Tensor:
    """Cross-entropy of visible against hidden keypoints (ours).

    Args:
        logits: (N, K) of the probability that a keypoint is visible.
        visible: (N, K) bool.
        labelled: (N, K) bool.

    Returns:
        Scalar sum over the labelled keypoints.
    """
    loss = F.binary_cross_entropy_with_logits(logits.float(), visible.float(), reduction="none")
    return loss.where(labelled, 0).sum()


def keypoint_loss(log_probs: Tensor, labelled: Tensor) -> Tensor:
    """Softmax cross-entropy over the cells of each labelled keypoint's map (eq. 4).

    Args:
        log_probs: (N, K) logarithms of the probability of the target cell (`KPNet.log_probs`).
        labelled: (N, K) bool.

    Returns:
        Scalar sum.
    """
    return -log_probs.where(labelled, 0).sum()


def disk_offset_loss(offsets: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """L1 inside the disks (sec. 3.3).

    Args:
        offsets: (B, 2K, H, W) predictions in cells, x0, y0, x1, ...
        targets: (B, 2K, H, W).
        mask: (B, K, H, W) bool, cells in a disk.

    Returns:
        Scalar sum.
    """
    mask = mask.repeat_interleave(2, dim=1)
    return F.l1_loss(offsets[mask].float(), targets[mask], reduction="sum")


def heatmap_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Penalty-reduced focal loss of CornerNet, alpha 2, beta 4 (sec. 3.4; Law and Deng 2018).

    Args:
        logits: (...) heatmap logits.
        targets: (...) Gaussians in [0, 1], 1 at the keypoints, -1 left out.

    Returns:
        Scalar sum.
    """
    logits = logits.float()
    score = logits.sigmoid()
    at_keypoint = -F.logsigmoid(logits) * (1 - score).square()
    elsewhere = -F.logsigmoid(-logits) * score.square() * (1 - targets).pow(4)
    return at_keypoint.where(targets == 1, elsewhere).where(targets >= 0, 0).sum()


def box_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """GIoU loss of the box head, 1 - GIoU of each box (Table 4; Rezatofighi et al. 2019).

    Args:
        boxes: (N, 4) predicted x0, y0, x1, y1 in image pixels.
        targets: (N, 4) annotated.

    Returns:
        Scalar sum, each box in [0, 2].
    """
    return giou_loss(boxes.float(), targets, reduction="sum")
