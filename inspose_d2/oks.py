"""Object keypoint similarity, COCO's measure of a pose."""

import torch
from torch import Tensor


def object_keypoint_similarity(
    keypoints: Tensor, targets: Tensor, areas: Tensor, sigmas: Tensor
) -> Tensor:
    """Compare poses with annotated ones, pair by pair, as COCO's evaluation does.

    Args:
        keypoints: (N, K, 2 or more) x, y first, in pixels.
        targets: (N, K, 3) x, y, v; keypoints with v > 0 count.
        areas: (N,) of the annotated persons, square pixels.
        sigmas: (K,) COCO's constants of the keypoints.

    Returns:
        (N,) in [0, 1], the mean over the labelled keypoints; 0 where none is.
    """
    square = (keypoints[..., :2] - targets[..., :2]).square().sum(dim=2)
    variance = (2 * sigmas).square() * 2 * areas.clamp(min=torch.finfo(areas.dtype).eps)[:, None]
    labelled = targets[..., 2] > 0
    similarity = torch.exp(-square / variance).where(labelled, 0)
    return similarity.sum(dim=1) / labelled.sum(dim=1).clamp(min=1)
