"""From decoded poses to ``Instances`` (end of sec. 3.4)."""

import logging

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import nms

logger = logging.getLogger(__name__)


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


def body_areas(keypoints: Tensor) -> Tensor:
    """Areas of the boxes around the inner keypoints of poses (ours).

    The outermost tenth of the keypoints (2 of 17) at either side does not count: those that are
    never labelled for a person, which nothing trains, often lie on another one.

    Args:
        keypoints: (N, K, 2 or more) x, y first, in pixels.

    Returns:
        (N,) square pixels, at least 1.
    """
    outer = (keypoints.shape[1] + 4) // 10  # not round(): a shape may be a tensor
    inner = keypoints[..., :2].sort(dim=1).values
    return (inner[:, -1 - outer] - inner[:, outer]).clamp(min=1).prod(dim=1)


def nms_of_poses(
    keypoints: Tensor, scores: Tensor, sigmas: Tensor, threshold: float, max_poses: int
) -> Tensor:
    """Suppress poses that are similar to a better one (ours).

    The similarity is OKS with all keypoints and the smaller of the two :func:`body_areas`. It is
    computed on the CPU, one pose that stays against all others at a time: memory linear in N.

    Args:
        keypoints: (N, K, 3) x, y in pixels, score; finite.
        scores: (N,) finite.
        sigmas: (K,) of OKS.
        threshold: similarity above which the lower score goes.
        max_poses: how many stay.

    Returns:
        Numbers of the poses that stay, best first.
    """
    device = keypoints.device
    keypoints, left, sigmas = keypoints.cpu(), scores.cpu(), sigmas.cpu()
    areas = body_areas(keypoints)
    # (2, K, N), scaled so that the OKS of a keypoint is exp(-distance^2 / area).
    xy = (keypoints[..., :2] / (8**0.5 * sigmas[:, None])).permute(2, 1, 0).contiguous()
    kept = [torch.empty(0, dtype=torch.int64)]
    for _ in range(max_poses):
        # A graph has all steps; those that find no pose left give -1.
        if not torch.compiler.is_compiling() and not (left > -torch.inf).any():
            break
        score, best = left.max(dim=0, keepdim=True)
        kept.append(best.where(score > -torch.inf, -1))
        squares = (xy - xy.index_select(2, best)).square().sum(dim=0)
        area = torch.minimum(areas, areas.index_select(0, best))
        similar = (-squares / area).exp().mean(dim=0) > threshold
        left = left.masked_fill(similar, -torch.inf).index_fill(0, best, -torch.inf)
    numbers = torch.cat(kept)
    return numbers[numbers >= 0].to(device)


def best_poses(
    keypoints: Tensor,
    boxes: Tensor,
    scores: Tensor,
    *,
    nms_threshold: float,
    max_poses: int,
    sigmas: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Choose the poses that stay.

    A pose with a keypoint, box or score that is not finite does not: it would suppress nothing,
    and COCO's evaluation takes it for perfect.

    Args:
        keypoints: (N, K, 3) x, y in pixels, score.
        boxes: (N, 4) of :func:`boxes_of_poses` or of the box head.
        scores: (N,) pose scores.
        nms_threshold: IoU, or similarity of poses, above which the lower score goes.
        max_poses: how many stay.
        sigmas: (K,) for :func:`nms_of_poses`; None for NMS of the boxes (the paper).

    Returns:
        Numbers of the poses that stay, best first, and how many of the N are finite.
    """
    finite = keypoints.flatten(1).isfinite().all(dim=1) & boxes.isfinite().all(dim=1)
    # The number comes with nonzero: no other wait for the device before that of NMS.
    finite = (finite & scores.isfinite()).nonzero().squeeze(1)
    if sigmas is None:
        keep = nms(boxes[finite], scores[finite], nms_threshold)[:max_poses]
    else:
        keep = nms_of_poses(keypoints[finite], scores[finite], sigmas, nms_threshold, max_poses)
    return finite[keep], finite.shape[0]


def select_poses(
    keypoints: Tensor,
    boxes: Tensor,
    scores: Tensor,
    image_size: tuple[int, int],
    *,
    nms_threshold: float,
    max_poses: int,
    sigmas: Tensor | None = None,
    locations: Tensor | None = None,
) -> Instances:
    """Suppress double poses and keep the best; a warning counts those not finite.

    Args:
        keypoints: as for :func:`best_poses`.
        boxes: the same.
        scores: the same.
        image_size: (H, W) of the image.
        nms_threshold: as for :func:`best_poses`.
        max_poses: the same.
        sigmas: the same.
        locations: (N,) numbers of the locations that the poses come from, or None.

    Returns:
        Instances with pred_boxes, scores, pred_classes (0), pred_keypoints and, if given,
        pred_locations, best first.
    """
    keep, num_finite = best_poses(
        keypoints, boxes, scores, nms_threshold=nms_threshold, max_poses=max_poses, sigmas=sigmas
    )
    if num_finite < len(scores):
        dropped = len(scores) - num_finite
        logger.warning("dropped %d of %d poses of an image: not finite", dropped, len(scores))
    poses = Instances(
        image_size,
        pred_boxes=Boxes(boxes[keep]),
        scores=scores[keep],
        pred_classes=torch.zeros_like(keep),
        pred_keypoints=keypoints[keep],
    )
    if locations is not None:
        poses.pred_locations = locations[keep]
    return poses
