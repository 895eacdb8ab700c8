"""The authors' released model as one graph from an image to its poses: every size is open."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..candidates import Candidates
from ..kp_net import find_cells
from ..open_sizes import open_norms, pad_to_multiple
from .decode import (
    ENLARGE,
    HALF_PIXEL,
    MIN_SCORE,
    best_of_levels,
    enlarge,
    enlarging_weights,
    regressed_boxes,
    soft_nms_round,
)
from .head import DENSE_SCALE, StarConv2d
from .inspose_official import InsPoseOfficial


class OfficialGraph(nn.Module):
    """:class:`InsPoseOfficial` for one image: a tensor in, tensors out.

    What the model leaves out by looking at its results, such as the parameters of levels without
    poses, is computed here, for ``TEST.DETECTIONS_PER_IMAGE`` poses always; those that are none are
    dropped at the end.
    """

    def __init__(self, model: InsPoseOfficial) -> None:
        """Take a copy of a model.

        Args:
            model: on the CPU; stays as it is.
        """
        super().__init__()
        self.model = copy.deepcopy(model).eval().to(memory_format=torch.contiguous_format)
        open_norms(self.model)
        for module in self.model.modules():
            if isinstance(module, StarConv2d):
                module.__class__ = _StarByGrid

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find the poses of an image.

        Args:
            image: (3, H, W) uint8, colours in the order of ``INPUT.FORMAT``, at the size that the
                network is to see.

        Returns:
            Of N poses, best first: boxes (N, 4) and keypoints (N, K, 3) x, y, score in pixels of
            ``image``, and scores (N,).
        """
        model = self.model
        height, width = image.shape[1], image.shape[2]
        divisor = model.backbone.size_divisibility
        predictions = model.predict(pad_to_multiple(model.normalize(image), divisor)[None])
        locations = model.locations_of(predictions)

        own = predictions.person_logits[0].sigmoid()
        index = best_of_levels(own, locations, model.topk_candidates)
        deltas = torch.cat([x.flatten(2) for x in predictions.poses], dim=2)[0].T
        boxes = regressed_boxes(deltas[index], locations, index, (height, width))
        scores = own[index]
        scores = scores.where(scores > model.score_threshold, 0)
        # As many rows for every image: the state of a loop has a fixed size.
        rows = torch.arange(len(locations.sizes) * model.topk_candidates)
        boxes = F.pad(boxes, (0, 0, 0, len(rows))).index_select(0, rows)
        scores = F.pad(scores, (0, len(rows))).index_select(0, rows)
        index = F.pad(index, (0, len(rows))).index_select(0, rows)
        keep, scores = soft_nms_loop(boxes, scores, model.nms_threshold, model.max_poses)
        boxes, index = boxes[keep], index[keep]

        zeros = torch.zeros_like(index)
        points, strides = locations.points[index], locations.strides[index]
        candidates = Candidates(zeros, index, points, strides, [model.max_poses])
        params = model.head.params_everywhere(predictions.pyramid, predictions.poses, candidates)
        p3 = predictions.pyramid[0]
        shared = model.kp_net.shared_input(model.keypoint_branch(p3)[0])
        logits = model.kp_net.logits(params, points, strides, shared)
        map_height, map_width = p3.shape[2], p3.shape[3]
        weights = enlarging_weights(p3)
        cells = torch.cat(
            [  # a keypoint at a time: the enlarged maps of all are large
                find_cells(
                    enlarge(own_maps.unflatten(2, (map_height, map_width)), weights).flatten(2),
                    ENLARGE * map_width,
                )[0]
                for own_maps in logits.split(1, dim=1)
            ],
            dim=1,
        )
        offsets = model.dense_branch.offsets_at(model.dense_branch(p3), zeros, cells)
        row = cells // (DENSE_SCALE * map_width)
        column = cells - row * (DENSE_SCALE * map_width)
        xy = torch.stack([column, row], dim=-1) + offsets
        xy = xy * (model.kp_net.stride / DENSE_SCALE) + HALF_PIXEL
        keypoints = torch.cat([xy, logits.softmax(dim=2).amax(dim=2)[..., None]], dim=-1)
        found = (scores >= MIN_SCORE).nonzero()[:, 0]
        return boxes[found], scores[found], keypoints[found]


def soft_nms_loop(
    boxes: Tensor, scores: Tensor, iou_threshold: float, rounds: int
) -> tuple[Tensor, Tensor]:
    """Run :func:`soft_nms` as a loop of the graph; a score below the minimum is of no pose."""
    state = (
        torch.zeros((), dtype=torch.int64),
        scores.clone(),
        torch.zeros(rounds, dtype=torch.int64),
        torch.zeros(rounds),
    )
    fixed = boxes, torch.tensor(iou_threshold)
    _, _, keep, kept = torch.ops.higher_order.while_loop(_goes_on, _round, state, fixed)
    return keep, kept


def _goes_on(number: Tensor, _: Tensor, keep: Tensor, *__: Tensor) -> Tensor:
    return number < keep.shape[0]


def _round(
    number: Tensor, scores: Tensor, keep: Tensor, kept: Tensor, boxes: Tensor, threshold: Tensor
) -> tuple[Tensor, ...]:
    best, score, scores = soft_nms_round(boxes, scores, threshold, MIN_SCORE)
    now = torch.arange(keep.shape[0]) == number
    return number + 1, scores, torch.where(now, best, keep), torch.where(now, score, kept)


class _StarByGrid(StarConv2d):
    """Star convolution in standard operators: ``grid_sample`` and a matrix product."""

    def sample(self, x: Tensor, points: Tensor) -> Tensor:
        """See :meth:`StarConv2d.sample`."""
        height, width = x.shape[2], x.shape[3]
        columns = torch.arange(width, device=x.device)
        rows = torch.arange(height, device=x.device)[:, None]
        grid_x = (2 * (points[:, :, 0] + columns) + 1) / width - 1  # (B, 9, H, W)
        grid_y = (2 * (points[:, :, 1] + rows) + 1) / height - 1
        grid = torch.stack([grid_x, grid_y], dim=-1).flatten(1, 2)  # (B, 9 * H, W, 2)
        samples = F.grid_sample(x, grid, align_corners=False)
        samples = samples.unflatten(2, (9, height)).flatten(1, 2).flatten(2)  # (B, C * 9, H * W)
        return (self.weight.flatten(1) @ samples).unflatten(2, (height, width))
