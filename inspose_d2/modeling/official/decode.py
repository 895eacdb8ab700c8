"""From what the network says of every location to poses, in the order of the authors' code.

Scores, then soft-NMS on the boxes of the regressed poses; KP-Nets only of what is left.
"""

from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..candidates import Candidates
from ..geometry import Locations, enclosing_boxes
from ..kp_net import KPNet, find_cells

# Keypoints of the authors' model are in COCO's own coordinates. Detectron2 adds half a pixel when
# it reads them, and takes it off when it writes results.
HALF_PIXEL = 0.5
MIN_SCORE = 0.001  # a pose that soft-NMS brings below goes
ENLARGE = 2  # keypoint maps are enlarged before their peaks are looked for


@dataclass
class Kept:
    """N locations of a batch whose poses are kept, best first in each image."""

    candidates: Candidates
    scores: Tensor  # (N,) after soft-NMS
    boxes: Tensor  # (N, 4) x0, y0, x1, y1 of the regressed pose, pixels of the network input


def select_poses(
    locations: Locations,
    person_logits: Tensor,
    poses: list[Tensor],
    image_sizes: list[tuple[int, int]],
    *,
    score_threshold: float,
    topk: int,
    nms_threshold: float,
    max_poses: int,
) -> Kept:
    """Choose the locations whose poses are kept.

    Args:
        locations: the L locations that all images of the batch share.
        person_logits: (B, L).
        poses: per level the regressed poses (B, 2K, H_l, W_l), see ``OfficialHead.forward``.
        image_sizes: (H, W) of each image without padding, pixels.
        score_threshold: a score must be above.
        topk: at most this many locations of a level enter soft-NMS.
        nms_threshold: see :func:`soft_nms`.
        max_poses: most poses of an image.

    Returns:
        The locations, with scores and boxes.
    """
    scores = person_logits.float().sigmoid().nan_to_num(0)
    rows = torch.cat([x.flatten(2) for x in poses], dim=2).mT  # (B, L, 2K)
    indices, kept_scores, kept_boxes = [], [], []
    for own, row, size in zip(scores, rows, image_sizes, strict=True):
        index = best_of_levels(own, locations, topk)
        index = index[own[index] > score_threshold]
        boxes = regressed_boxes(row[index], locations, index, size)
        keep, decayed = soft_nms(
            boxes, own[index], iou_threshold=nms_threshold, min_score=MIN_SCORE, limit=max_poses
        )
        indices.append(index[keep])
        kept_scores.append(decayed)
        kept_boxes.append(boxes[keep])
    index = torch.cat(indices)
    counts = [len(x) for x in indices]
    image = torch.cat([torch.full_like(x, number) for number, x in enumerate(indices)])
    candidates = Candidates(image, index, locations.points[index], locations.strides[index], counts)
    return Kept(candidates, torch.cat(kept_scores), torch.cat(kept_boxes))


def best_of_levels(scores: Tensor, locations: Locations, topk: int) -> Tensor:
    """Number the best `topk` locations of each level, best first, or all of a smaller one."""
    indices, start = [], 0
    for height, width in locations.sizes:
        size = height * width
        # min() would fix a size that torch.export leaves open.
        smaller = torch.sym_min if isinstance(size, torch.SymInt) else min
        own = scores[start : start + size]
        indices.append(own.topk(smaller(topk, size)).indices + start)
        start += size
    return torch.cat(indices)


def regressed_boxes(
    deltas: Tensor, locations: Locations, index: Tensor, image_size: tuple[int, int]
) -> Tensor:
    """Boxes around regressed poses, whose keypoints are moved into the image.

    Args:
        deltas: (N, 2K) x0, y0, x1, ... from the locations, in strides.
        locations: of the levels.
        index: (N,) of the location of each pose.
        image_size: (H, W) without padding, pixels.

    Returns:
        (N, 4) x0, y0, x1, y1, pixels; at the border of the image some have no area.
    """
    strides = locations.strides[index][:, None, None]
    xy = locations.points[index][:, None] + deltas.float().unflatten(1, (-1, 2)) * strides
    x, y = xy.unbind(-1)
    xy = torch.stack([x.clamp(0, image_size[1]), y.clamp(0, image_size[0])], dim=-1)
    return enclosing_boxes(xy, torch.ones_like(xy[..., 0], dtype=torch.bool))


def soft_nms(
    boxes: Tensor, scores: Tensor, *, iou_threshold: float, min_score: float, limit: int
) -> tuple[Tensor, Tensor]:
    """Linear soft-NMS: what overlaps a better box loses score (Bodla et al. 2017).

    The best box that is left comes next. Others with an IoU of the threshold or more are multiplied
    by 1 - IoU, and those below the minimum go.

    Args:
        boxes: (N, 4) x0, y0, x1, y1; two without area do not overlap.
        scores: (N,).
        iou_threshold: in [0, 1].
        min_score: lowest score of a box that is left.
        limit: most results.

    Returns:
        (M,) numbers of the boxes, best first, and (M,) their scores, on the device of the boxes.
    """
    if not len(boxes):
        return torch.zeros_like(scores, dtype=torch.int64), scores
    device, boxes, scores = boxes.device, boxes.cpu(), scores.cpu()  # every round asks for the best
    keep, kept = [], []
    for _ in range(min(limit, len(boxes))):
        best, score, scores = soft_nms_round(boxes, scores, iou_threshold, min_score)
        keep.append(best)
        kept.append(score)
    decayed = torch.cat(kept)
    found = decayed >= min_score
    found[0] = True  # the first comes whatever its score
    return torch.cat(keep)[found].to(device), decayed[found].to(device)


def soft_nms_round(
    boxes: Tensor, scores: Tensor, iou_threshold: float | Tensor, min_score: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Give (1,) number and (1,) score of the best box, and (N,) scores with it taken out."""
    low, high = boxes.split(2, dim=1)
    areas = (high - low).prod(dim=1)
    best = scores.argmax()[None]
    overlap = (high.minimum(high[best]) - low.maximum(low[best])).clamp(min=0).prod(dim=1)
    iou = overlap / (areas + areas[best] - overlap)
    left = torch.where(iou >= iou_threshold, scores * (1 - iou), scores)  # NaN: no overlap
    others = torch.arange(scores.shape[0], device=scores.device) != best
    return best, scores[best], left.where(others & (left >= min_score), 0)


def enlarged_peaks(
    kp_net: KPNet, params: Tensor, candidates: Candidates, features: Tensor
) -> tuple[Tensor, Tensor]:
    """Find the peak of every keypoint map after it is enlarged.

    Args:
        kp_net: runs the KP-Nets.
        params: (N, P) parameters.
        candidates: the N locations that they come from.
        features: (B, C, H, W) shared features of the batch, with padding: peaks may lie in it.

    Returns:
        (N, K) int64 cells, row * 2W + column of the maps at twice the resolution, the first of
        equal maxima, and (N, K) scores: the largest softmax probability of the map as it was
        trained, not enlarged (ours; the authors' code gives 1).
    """
    height, width = features.shape[2:]
    scores = features.new_empty(len(params), kp_net.num_keypoints, dtype=torch.float32)
    cells = torch.empty_like(scores, dtype=torch.int64)
    inputs = [kp_net.shared_input(x) for x in features]
    weights = enlarging_weights(features)
    for image, chunk in kp_net.chunks(candidates, inputs):
        logits = kp_net.logits(
            params[chunk], candidates.points[chunk], candidates.strides[chunk], inputs[image]
        )
        scores[chunk] = logits.softmax(dim=2).amax(dim=2)
        maps = enlarge(logits.unflatten(2, (height, width)), weights)
        cells[chunk], _ = find_cells(maps.flatten(2), ENLARGE * width)
    return cells, scores


def enlarge(maps: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """Enlarge maps twice, bicubically: half-pixel centres, borders repeated.

    As two matrix products: 3 times as fast as ``F.interpolate`` on a CPU, and in exported graphs.

    Args:
        maps: (..., H, W).
        weights: for maps of this size, see :func:`enlarging_weights`.

    Returns:
        (..., 2H, 2W) float32.
    """
    rows, columns = weights
    with torch.autocast(maps.device.type, enabled=False):
        return rows @ (maps.float() @ columns.T)


def enlarging_weights(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (2H, H) and (2W, W) for :func:`enlarge` of maps (..., H, W)."""
    height, width = maps.shape[-2:]
    return _bicubic_weights(height, maps), _bicubic_weights(width, maps)


def _bicubic_weights(size: int, like: Tensor) -> Tensor:
    """Weights (2 * size, size) that enlarge a row of cells, with a = -0.75 (Keys 1981)."""
    a = -0.75
    at = (torch.arange(ENLARGE * size, device=like.device) + 0.5) / ENLARGE - 0.5
    cell = at.floor()[:, None] + torch.arange(-1, 3, device=like.device)
    d = (at[:, None] - cell).abs()
    near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    weight = torch.where(d <= 1, near, far)
    own = cell.clamp(0, size - 1)[..., None] == torch.arange(size, device=like.device)
    return (weight[..., None] * own).sum(dim=1)


def make_instances(
    kept: Kept,
    keypoints: Tensor,
    image_sizes: list[tuple[int, int]],
) -> list[Instances]:
    """Put the poses of each image together.

    Args:
        kept: the N locations of the batch.
        keypoints: (N, K, 3) x, y in pixels of the network input, score.
        image_sizes: (H, W) of each image, pixels.

    Returns:
        Per image pred_boxes, scores, pred_classes (0), pred_keypoints and pred_locations (N,), the
        number of the location that each comes from.
    """
    return [
        Instances(
            size,
            pred_boxes=Boxes(kept.boxes[own]),
            scores=kept.scores[own],
            pred_classes=torch.zeros_like(kept.candidates.index[own]),
            pred_keypoints=keypoints[own],
            pred_locations=kept.candidates.index[own],
        )
        for own, size in zip(kept.candidates.slices(), image_sizes, strict=True)
    ]


def rescale(poses: Instances, height: int, width: int) -> Instances:
    """Scale poses to the asked size, and shift their keypoints by ``HALF_PIXEL``.

    ``detector_postprocess`` would clip the boxes and drop poses whose box has no area; the
    keypoints of these are as good as any.

    Args:
        poses: in pixels of the network input.
        height: asked, pixels.
        width: asked, pixels.

    Returns:
        New Instances.
    """
    scale = poses.scores.new_tensor([width / poses.image_size[1], height / poses.image_size[0]])
    xy = poses.pred_keypoints[..., :2] * scale + HALF_PIXEL
    scaled = Instances((height, width), **poses.get_fields())
    scaled.pred_boxes = Boxes(poses.pred_boxes.tensor * scale.repeat(2))
    scaled.pred_keypoints = torch.cat([xy, poses.pred_keypoints[..., 2:]], dim=-1)
    return scaled
