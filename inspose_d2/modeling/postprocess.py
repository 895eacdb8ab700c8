"""Boxes and areas of decoded poses, and which of them stay (end of sec. 3.4)."""

import logging
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import nms

logger = logging.getLogger(__name__)

NMS_BLOCK = 32  # poses that are compared with all others at a time


def boxes_of_poses(keypoints: Tensor) -> Tensor:
    """Boxes around all keypoints of each pose.

    They reach half a pixel beyond the outermost keypoints. So poses that lie in a line have an IoU
    too, and ``detector_postprocess`` does not drop them as empty (ours).

    Args:
        keypoints: (N, K, 3) x, y in pixels, score.

    Returns:
        (N, 4) x0, y0, x1, y1.
    """
    xy = keypoints[..., :2]
    return torch.cat([xy.amin(dim=1) - 0.5, xy.amax(dim=1) + 0.5], dim=1)


def inner_boxes(keypoints: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes around the inner keypoints of poses (ours).

    The outermost tenth of the keypoints (2 of 17) at either side does not count: those that are
    never labelled for a person, which nothing trains, often lie on another one.

    Args:
        keypoints: (N, K, 2 or more) x, y first, in pixels.

    Returns:
        Corners (N, 2) x0, y0 and (N, 2) x1, y1.
    """
    outer = _num_outer(keypoints.shape[1])
    inner = keypoints[..., :2].sort(dim=1).values
    return inner[:, outer], inner[:, -1 - outer]


def _num_outer(num_keypoints: int) -> int:
    return (num_keypoints + 4) // 10  # not round(): a shape may be a tensor


def body_areas(keypoints: Tensor) -> Tensor:
    """Areas (N,) of the :func:`inner_boxes` of poses, square pixels, at least 1 (ours)."""
    low, high = inner_boxes(keypoints)
    return (high - low).clamp(min=1).prod(dim=1)


def nms_of_poses(
    keypoints: Tensor, scores: Tensor, sigmas: Tensor, threshold: float, max_poses: int
) -> Tensor:
    """Suppress poses that are similar to a better one (ours).

    The similarity is OKS with all keypoints and the smaller of the two :func:`body_areas`. It is
    computed on the CPU, in memory linear in N.

    Args:
        keypoints: (N, K, 3) x, y in pixels, score; finite.
        scores: (N,) finite.
        sigmas: (K,) of OKS.
        threshold: similarity above which the lower score goes.
        max_poses: how many stay.

    Returns:
        Numbers of the poses that stay, best first.
    """
    order = scores.detach().cpu().argsort(descending=True, stable=True)
    poses = _Poses(keypoints.detach().cpu().float()[order], sigmas.cpu(), threshold)
    left, kept = np.arange(len(order)), list[int]()
    while len(left) and len(kept) < max_poses:
        block, left = left[:NMS_BLOCK], left[NMS_BLOCK:]
        alive, first = np.ones(len(block), dtype=bool), len(kept)
        for i, similar in enumerate(poses.similar(block, block)):
            if alive[i]:
                kept.append(block[i])
                alive &= ~similar
        left = left[~poses.similar(np.array(kept[first:]), left).any(axis=0)]
    return order[kept[:max_poses]].to(keypoints.device)


def _lowest_exponent(threshold: float) -> float:
    """Give what exponents may be raised to: exp() of less than -87 takes ten times as long."""
    return -80 if threshold > 0 else -math.inf


class _Poses:
    """Poses that :func:`nms_of_poses` compares, in numpy: its calls take a third of torch's time.

    Most pairs are apart by their :func:`inner_boxes` already. If these are further apart than r,
    in x or in y, only the 2 * outer keypoints outside them may be closer, so OKS is at most
    (2 * outer + (K - 2 * outer) * exp(-r^2 / (8 * sigma^2 * area))) / K, with the largest sigma.
    """

    def __init__(self, keypoints: Tensor, sigmas: Tensor, threshold: float) -> None:
        num_keypoints = len(sigmas.numpy())  # a shape is a tensor where torch.jit traces
        outer = _num_outer(num_keypoints)
        xy = keypoints[..., :2].permute(2, 0, 1).numpy()
        inner = np.sort(np.ascontiguousarray(xy))  # a quarter of the time of inner_boxes
        self.low, self.high = inner[..., outer], inner[..., -1 - outer]  # (2, N)
        self.areas = np.maximum(self.high - self.low, 1).prod(axis=0)
        # Scaled so that the OKS of a keypoint is exp(-distance^2 / area).
        self.x, self.y = xy / (8**0.5 * sigmas.numpy())  # (N, K) each
        limit = (num_keypoints * threshold - 2 * outer) / (num_keypoints - 2 * outer)
        squared = -8 * math.log(limit) * float(sigmas.max()) ** 2 if limit > 0 else math.inf
        self.reach = 1.001 * np.sqrt(squared * self.areas)  # pixels, rounding errors included
        self.total, self.lowest = num_keypoints * threshold, _lowest_exponent(threshold)
        self.ones = np.ones(num_keypoints, dtype=np.float32)  # quicker than sum() of short rows

    def similar(self, some: NDArray[np.intp], others: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Say which of n poses are similar to which of m others, all numbers: (n, m)."""
        reach = np.minimum(self.reach[some][:, None], self.reach[others])
        result = np.ones(reach.shape, dtype=bool)
        for low, high in zip(self.low, self.high, strict=True):
            result &= low[some][:, None] - high[others] <= reach
            result &= low[others] - high[some][:, None] <= reach
        row, column = result.nonzero()
        i, j = some[row], others[column]
        x, y = self.x[i], self.y[i]
        x -= self.x[j]
        y -= self.y[j]
        exponents = (x * x + y * y) / -np.minimum(self.areas[i], self.areas[j])[:, None]
        similarities = np.exp(np.maximum(exponents, self.lowest)) @ self.ones
        result[row, column] = similarities > self.total
        return result


def best_poses(
    keypoints: Tensor,
    boxes: Tensor,
    scores: Tensor,
    *,
    nms_threshold: float,
    max_poses: int,
    sigmas: Tensor | None = None,
) -> Tensor:
    """Suppress double poses and keep the best.

    A pose with a keypoint, box or score that is not finite goes, and a warning counts these: it
    would suppress nothing, and COCO's evaluation takes it for perfect.

    Args:
        keypoints: (N, K, 3) x, y in pixels, score.
        boxes: (N, 4) of :func:`boxes_of_poses` or of the box head.
        scores: (N,) pose scores.
        nms_threshold: IoU, or similarity of poses, above which the lower score goes.
        max_poses: how many stay.
        sigmas: (K,) for :func:`nms_of_poses`; None for NMS of the boxes (the paper).

    Returns:
        Numbers of the poses that stay, best first.
    """
    finite = keypoints.flatten(1).isfinite().all(dim=1) & boxes.isfinite().all(dim=1)
    # The number comes with nonzero: no other wait for the device before that of NMS.
    finite = (finite & scores.isfinite()).nonzero().squeeze(1)
    if not torch.compiler.is_compiling() and len(finite) < len(scores):  # an export knows no sizes
        dropped = len(scores) - len(finite)
        logger.warning("dropped %d of %d poses of an image: not finite", dropped, len(scores))
    if sigmas is None:
        keep = nms(boxes[finite], scores[finite], nms_threshold)[:max_poses]
    else:
        keep = nms_of_poses(keypoints[finite], scores[finite], sigmas, nms_threshold, max_poses)
    return finite[keep]
