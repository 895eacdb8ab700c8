"""Test-time augmentation (Table 5, multi-scale): scaled and flipped views, merged into one result.

The paper says "multi-scale" and no more; how poses of several views are merged is ours.
"""

from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..data.images import ResizeShortestEdge, to_tensor

# Distance of two keypoints, as a part of sqrt(area of the person's box), at which their similarity
# is exp(-1/2): that of the eyes in COCO's OKS, the strictest. It makes averages reject outliers.
FALLOFF = 0.05
# Poses of two views whose mean similarity is above may be one person. Low, for two persons are
# kept apart by matching one pose of each view, and outliers do no harm.
SIMILARITY_THRESHOLD = 0.2


class InsPoseWithTTA(nn.Module):
    """Runs a model on the views of ``TEST.AUG``, one after another; called like the model."""

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        """Wrap a model.

        Args:
            cfg: the whole config; read are ``TEST.AUG.{MIN_SIZES, MAX_SIZE, FLIP}`` (not ENABLED),
                ``INPUT.RESIZE``, ``TEST.DETECTIONS_PER_IMAGE`` and, to flip, the data sets of
                ``DATASETS.TEST``, else of ``DATASETS.TRAIN``.
            model: any model that gives poses as :class:`InsPose` does.
        """
        super().__init__()
        if not cfg.TEST.AUG.MIN_SIZES:
            raise ValueError("TEST.AUG.MIN_SIZES is empty: give the shorter side of each view")
        self.model = model
        self.sizes = cfg.TEST.AUG.MIN_SIZES
        self.max_size = cfg.TEST.AUG.MAX_SIZE
        self.library = cfg.INPUT.RESIZE
        self.flip = cfg.TEST.AUG.FLIP
        self.flip_indices = _flip_indices(cfg) if cfg.TEST.AUG.FLIP else []
        self.max_poses = cfg.TEST.DETECTIONS_PER_IMAGE

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Compute the poses of images.

        Args:
            batched_inputs: per image "image", (C, H, W) in the order of ``INPUT.FORMAT``, best the
                original, for each view is resized from it (its values are rounded to 8 bits, so
                that this happens as for plain evaluation); optionally "height" and "width" that
                the poses are to be scaled to.

        Returns:
            Per image {"instances": as the model gives them}.
        """
        return [{"instances": self._poses_of_image(inputs)} for inputs in batched_inputs]

    def _poses_of_image(self, inputs: dict[str, Any]) -> Instances:
        image = inputs["image"].cpu().round().clamp(0, 255).byte()
        height, width = inputs.get("height", image.shape[1]), inputs.get("width", image.shape[2])
        poses = []
        for view, is_flipped in self._views_of_image(image):
            # The model itself scales the poses of a view to height and width.
            own = self.model([{"image": view, "height": height, "width": width}])[0]["instances"]
            poses.append(flip_poses(own, self.flip_indices) if is_flipped else own)
        return merge_poses(poses, self.max_poses)

    def _views_of_image(self, image: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """Make the views of an image (C, H, W) of uint8, and say which are mirrored."""
        pixels = image.permute(1, 2, 0).numpy()
        for size in self.sizes:
            resize = ResizeShortestEdge(size, self.max_size, library=self.library)
            view = to_tensor(resize.get_transform(pixels).apply_image(pixels))
            yield view, False
            if self.flip:
                yield view.flip(2), True


def flip_poses(poses: Instances, flip_indices: list[int]) -> Instances:
    """Mirror poses at the vertical axis of their image.

    Args:
        poses: pred_boxes, scores, pred_classes and pred_keypoints; pred_visibility if there.
        flip_indices: for each of the K keypoints the number of the one that takes its place.

    Returns:
        New Instances: x becomes W - x, left keypoints become right ones.
    """
    width = poses.image_size[1]
    keypoints = poses.pred_keypoints[:, flip_indices]
    x0, y0, x1, y1 = poses.pred_boxes.tensor.unbind(dim=1)
    flipped = Instances(poses.image_size, **poses.get_fields())
    flipped.pred_boxes = Boxes(torch.stack([width - x1, y0, width - x0, y1], dim=1))
    flipped.pred_keypoints = torch.cat([width - keypoints[..., :1], keypoints[..., 1:]], dim=2)
    if poses.has("pred_visibility"):
        flipped.pred_visibility = poses.pred_visibility[:, flip_indices]
    return flipped


def merge_poses(views: list[Instances], max_poses: int) -> Instances:
    """Merge the poses that V views of an image show into one set (ours).

    Poses of one person (:func:`match_poses`) become one. Each of its keypoints lies where most
    views agree (:func:`robust_average`), for some views mistake it for another; its box is the
    average by score. The score of the pose is the mean over all V views of score times similarity
    to the merged pose, 0 in a view that misses it; the score of a keypoint likewise, over the
    views that show the pose, and visibility without the similarity. So one view stays as it is.

    Args:
        views: per view its poses, best first, all in pixels of the same image. The order of the
            views does not matter.
        max_poses: how many stay.

    Returns:
        Instances with pred_boxes, scores, pred_classes (0) and pred_keypoints, best first, and
        pred_visibility if the views have it.
    """
    views = sorted(views, key=_content)

    def pad(tensors: list[Tensor]) -> Tensor:
        # (V, M, ...) with M the most poses of a view. In float64, so that the average of one pose
        # is that pose; on the CPU, for matching asks for one result after another.
        return pad_sequence(tensors, batch_first=True).double().cpu()

    keypoints = pad([view.pred_keypoints for view in views])  # (V, M, K, 3)
    boxes = pad([view.pred_boxes.tensor for view in views])  # (V, M, 4)
    scores = pad([view.scores for view in views])  # (V, M)
    present = pad([torch.ones_like(view.scores) for view in views]) > 0
    members = match_poses(keypoints, boxes, scores, present)  # (N, V)

    seen = members >= 0
    each = torch.arange(len(views))
    keypoints, boxes = keypoints[each, members], boxes[each, members]  # (N, V, K, 3), (N, V, 4)
    scores = torch.where(seen, scores[each, members].clamp(min=1e-12), 0)  # (N, V)
    xy, keypoint_scores = keypoints[..., :2], keypoints[..., 2].clamp(min=1e-12)

    boxes = _average(boxes, scores[:, :, None])
    areas = box_areas(boxes)[:, None]
    merged = robust_average(xy, scores[:, :, None] * keypoint_scores, areas)  # (N, K, 2)
    similarity = keypoint_similarity(xy, merged[:, None], areas)  # (N, V, K)
    keypoint_scores = _average(keypoint_scores * similarity, scores[:, :, None])
    fields = {}
    if views[0].has("pred_visibility"):
        visibility = pad([view.pred_visibility for view in views])[each, members]
        fields["pred_visibility"] = _average(visibility, scores[:, :, None])
    scores = (scores * similarity.mean(dim=2)).sum(dim=1) / len(views)

    best = scores.argsort(descending=True, stable=True)[:max_poses]
    like = views[0]
    return Instances(
        like.image_size,
        pred_boxes=Boxes(boxes[best].to(like.pred_boxes.tensor)),
        scores=scores[best].to(like.scores),
        pred_classes=like.pred_classes.new_zeros(len(best)),
        pred_keypoints=torch.cat([merged, keypoint_scores[..., None]], dim=2)[best].to(
            like.pred_keypoints
        ),
        **{name: field[best].to(like.get(name)) for name, field in fields.items()},
    )


def match_poses(keypoints: Tensor, boxes: Tensor, scores: Tensor, present: Tensor) -> Tensor:
    """Find the poses of different views that are the same person.

    The best pose that is left takes from each other view the most similar pose that is left, if
    their similarity is above ``SIMILARITY_THRESHOLD``; then the next. Poses of one view stay apart:
    the model has suppressed its doubles.

    Args:
        keypoints: (V, M, K, 3) x, y in pixels, score; at most M poses in V views of an image.
        boxes: (V, M, 4).
        scores: (V, M).
        present: (V, M) bool, False where a view has no more poses.

    Returns:
        (N, V) number of each merged pose in each view, -1 where the view has none.
    """
    areas = box_areas(boxes)
    free = present.clone()
    matches = [torch.empty(0, len(free), dtype=torch.int64)]
    order = scores.where(present, -1).flatten().argsort(descending=True, stable=True)
    for place in order[: present.sum()].tolist():
        view, number = divmod(place, free.shape[1])
        if not free[view, number]:
            continue
        pose = keypoints[view, number, :, :2]
        similarity = keypoint_similarity(keypoints[..., :2], pose, areas[view, number]).mean(dim=2)
        best, numbers = similarity.where(free, 0).max(dim=1)
        numbers[best <= SIMILARITY_THRESHOLD] = -1
        numbers[view] = number
        free[numbers >= 0, numbers[numbers >= 0]] = False
        matches.append(numbers[None])
    return torch.cat(matches)


def robust_average(xy: Tensor, weights: Tensor, areas: Tensor) -> Tensor:
    """Average keypoints near the place where most of them lie: one step of mean shift.

    Args:
        xy: (N, V, K, 2) places of each keypoint in V views, pixels.
        weights: (N, V, K), 0 where a view has none.
        areas: (N, 1) of the persons.

    Returns:
        (N, K, 2) averages by weight times similarity to the place that is nearest to all.
    """
    similarity = keypoint_similarity(xy[:, :, None], xy[:, None], areas[..., None])  # (N, V, V, K)
    support = (similarity * weights[:, None]).sum(dim=2)  # (N, V, K)
    best = support.where(weights > 0, -1).argmax(dim=1, keepdim=True)  # (N, 1, K)
    centre = xy.take_along_dim(best[..., None], dim=1)  # (N, 1, K, 2)
    return _average(xy, (weights * keypoint_similarity(xy, centre, areas))[..., None])


def keypoint_similarity(xy: Tensor, other: Tensor, areas: Tensor) -> Tensor:
    """Similarity of keypoints, as in COCO's OKS, with one falloff.

    Args:
        xy: (..., K, 2) pixels.
        other: the same, or what broadcasts with it.
        areas: (...) of the persons, square pixels.

    Returns:
        (..., K) in [0, 1].
    """
    distances = (xy - other).square().sum(dim=-1)
    return (-distances / (2 * FALLOFF**2 * areas[..., None])).exp()


def box_areas(boxes: Tensor) -> Tensor:
    """Areas (...) of boxes (..., 4), at least one square pixel."""
    return (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1).clamp(min=1)


def _average(values: Tensor, weights: Tensor) -> Tensor:
    """Average (N, V, ...) over the V views."""
    return (values * weights).sum(dim=1) / weights.sum(dim=1)


def _content(view: Instances) -> tuple[list[float], ...]:
    """What views are sorted by, so that ties do not depend on their order."""
    fields = view.scores, view.pred_keypoints.flatten(), view.pred_boxes.tensor.flatten()
    return tuple(field.tolist() for field in fields)


def _flip_indices(cfg: CfgNode) -> list[int]:
    """For each keypoint the number of its mirror image, by the metadata of the data sets."""
    names = cfg.DATASETS.TEST or cfg.DATASETS.TRAIN
    try:
        return create_keypoint_hflip_indices(names)
    except (AttributeError, IndexError) as error:
        raise ValueError(
            f"TEST.AUG.FLIP swaps left and right keypoints, but the metadata of the data sets "
            f"{names} has no keypoint_names and keypoint_flip_map: set these with "
            "MetadataCatalog.get(name).set(...), or set TEST.AUG.FLIP False"
        ) from error
