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


def best_poses(
    keypoints: Tensor, boxes: Tensor, scores: Tensor, *, nms_threshold: float, max_poses: int
) -> tuple[Tensor, int]:
    """Choose the poses that stay.

    A pose with a keypoint, box or score that is not finite does not: it would suppress nothing,
    and COCO's evaluation takes it for perfect.

    Args:
        keypoints: (N, K, 3) x, y in pixels, score.
        boxes: (N, 4) of :func:`boxes_of_poses` or of the box head.
        scores: (N,) pose scores.
        nms_threshold: IoU above which the lower score goes.
        max_poses: how many stay.

    Returns:
        Numbers of the poses that stay, best first, and how many of the N are finite.
    """
    finite = keypoints.flatten(1).isfinite().all(dim=1) & boxes.isfinite().all(dim=1)
    # The number comes with nonzero: no other wait for the device before that of NMS.
    finite = (finite & scores.isfinite()).nonzero().squeeze(1)
    keep = finite[nms(boxes[finite], scores[finite], nms_threshold)[:max_poses]]
    return keep, finite.shape[0]


def select_poses(
    keypoints: Tensor,
    boxes: Tensor,
    scores: Tensor,
    image_size: tuple[int, int],
    *,
    nms_threshold: float,
    max_poses: int,
    locations: Tensor | None = None,
) -> Instances:
    """Suppress double poses by their boxes and keep the best; a warning counts those not finite.

    Args:
        keypoints: as for :func:`best_poses`.
        boxes: the same.
        scores: the same.
        image_size: (H, W) of the image.
        nms_threshold: as for :func:`best_poses`.
        max_poses: the same.
        locations: (N,) numbers of the locations that the poses come from, or None.

    Returns:
        Instances with pred_boxes, scores, pred_classes (0), pred_keypoints and, if given,
        pred_locations, best first.
    """
    keep, num_finite = best_poses(
        keypoints, boxes, scores, nms_threshold=nms_threshold, max_poses=max_poses
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
