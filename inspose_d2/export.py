"""InsPose as one graph from an image to its poses, for torch.export and ONNX."""

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.ops import box_iou, clip_boxes_to_image

from .modeling.backbone import keep_folded
from .modeling.candidates import Candidates
from .modeling.inference import Poses
from .modeling.inspose import InsPose
from .modeling.kp_net import KPNet, find_cells, find_peaks
from .modeling.official import InsPoseOfficial
from .modeling.official.decode import HALF_PIXEL
from .modeling.official.export import OfficialGraph
from .modeling.open_sizes import open_norms, pad_to_multiple, with_opened_size
from .modeling.postprocess import body_areas
from .modeling.predictions import Predictions

OUTPUTS = ("boxes", "scores", "keypoints")


class InsPoseGraph(nn.Module):
    """InsPose for one image: a tensor in, tensors out, and no size known beforehand."""

    def __init__(self, model: InsPose) -> None:
        """Take a copy of a model.

        Args:
            model: on the CPU; stays as it is.
        """
        super().__init__()
        # With other memory layouts the exporter compares strides, and these depend on the size.
        self.model = copy.deepcopy(model).eval().to(memory_format=torch.contiguous_format)
        self.model.kp_net.__class__ = _KPNetAtOnce
        self.model.kp_net.backend = "torch"  # the groups of a convolution are a fixed number
        open_norms(self.model)
        keep_folded(self.model)  # else the exporter folds itself, into a file that does not load

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Find the poses of an image.

        Args:
            image: (3, H, W) uint8, colours in the order of ``INPUT.FORMAT``, at the size that the
                network is to see.

        Returns:
            Of N poses, best first, N between 0 and ``TEST.DETECTIONS_PER_IMAGE``: boxes (N, 4) x0,
            y0, x1, y1 and keypoints (N, K, 3) x, y, score in pixels of ``image``, and scores (N,).
            In the order of :func:`outputs_of`, with visibility (N, K) where the model predicts it.
        """
        model, inference = self.model, self.model.pose_inference
        size = image.shape[1], image.shape[2]
        divisor = model.backbone.size_divisibility
        predictions = model.predict(pad_to_multiple(model.normalize(image), divisor)[None])
        candidates = inference.candidates(predictions, model.locations_of(predictions))
        persons = model.head.at(predictions.params_features, candidates)
        (poses,) = inference.decode(predictions, persons, [size])
        if inference.nms_sigmas is not None or inference.refines:
            poses = _rows(poses, inference.topk_candidates)
            *rows, count = self.rows_of(poses, poses.scores > 0, predictions, 0, size)
            found = (torch.arange(rows[0].shape[0]) < count).nonzero()[:, 0]
            return tuple(x[found] for x in rows)
        poses = inference.suppress(_with_two_more(poses))
        poses = poses.take(poses.scores >= 0)  # without the two
        # As detector_postprocess does for the eager model.
        boxes = clip_boxes_to_image(poses.boxes, size)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        poses = poses._replace(boxes=boxes).take(inside)
        return poses.boxes, poses.scores, poses.keypoints, *self.more_of(poses, predictions, 0)

    def more_of(self, poses: Poses, predictions: Predictions, image: int) -> list[Tensor]:
        """Give visibility (N, K) of N poses of an image, where the model predicts it."""
        if self.model.head.visibility_pred is None:
            return []
        return [self.model.visibility_at(predictions, image, poses.locations)]

    def rows_of(
        self,
        poses: Poses,
        valid: Tensor,
        predictions: Predictions,
        image: int,
        image_size: tuple[int, int],
    ) -> tuple[Tensor, ...]:
        """Choose the poses that stay, as :class:`PoseInference` does, in tensors of fixed size.

        Args:
            poses: N rows.
            valid: (N,) bool: which rows are poses.
            predictions: of the network.
            image: its number in the batch.
            image_size: (H, W), pixels.

        Returns:
            Of R = ``TEST.DETECTIONS_PER_IMAGE`` rows, N at most, boxes (R, 4), scores (R,),
            keypoints (R, K, 3) and, where predicted, visibility (R, K), best first, zeros behind
            the last pose; and the number of poses.
        """
        inference = self.model.pose_inference
        size = min(inference.max_poses, inference.topk_candidates)
        poses, keep = self.suppress(poses, valid, size)
        if inference.refines:
            # Few are left: of all rows this would be nearly all of the time.
            poses = inference.refine(poses.take(keep), predictions, image, image_size)
            poses = _rows(poses, size)
            poses, keep = self.suppress(poses, poses.scores > 0, size)
        boxes = clip_boxes_to_image(poses.boxes, image_size)
        keep = keep & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        scores, best = poses.scores.where(keep, -1).topk(size)
        keep, poses = keep[best], poses._replace(boxes=boxes).take(best)
        more = self.more_of(poses, predictions, image)
        return (
            poses.boxes.where(keep[:, None], 0),
            scores * keep,
            poses.keypoints.where(keep[:, None, None], 0),
            *(x.where(keep[:, None], 0) for x in more),
            keep.sum(),
        )

    def suppress(self, poses: Poses, valid: Tensor, size: int) -> tuple[Poses, Tensor]:
        """Choose R of N poses: those that NMS leaves, best first, and others behind them.

        Args:
            poses: as for :meth:`rows_of`.
            valid: the same.
            size: R, at most N.

        Returns:
            R poses, and (R,) bool: which NMS has left.
        """
        keypoints, boxes, scores = poses.keypoints, poses.boxes, poses.scores
        finite = keypoints.flatten(1).isfinite().all(dim=1) & boxes.isfinite().all(dim=1)
        valid = valid & finite & scores.isfinite()
        order = scores.where(valid, -1).topk(scores.shape[0]).indices  # there is no stable sort
        poses = poses.take(order)
        inference = self.model.pose_inference
        overlaps = (
            box_iou(poses.boxes, poses.boxes)
            if inference.nms_sigmas is None
            else similarities(poses.keypoints, inference.nms_sigmas)
        )
        keep = unsuppressed(overlaps > inference.nms_threshold, valid[order])
        numbers = torch.arange(keep.shape[0], 0, -1)
        rows = (keep.int() * numbers).topk(size).indices  # in their order, the others behind
        return poses.take(rows), keep[rows]


def similarities(keypoints: Tensor, sigmas: Tensor) -> Tensor:
    """Similarity (N, N) of poses (N, K, 3) as :func:`nms_of_poses` has it."""
    areas = body_areas(keypoints)
    xy = keypoints[..., :2] / (8**0.5 * sigmas[:, None])
    squares = (xy[:, None] - xy).square().sum(dim=3)  # (N, N, K)
    return (-squares / torch.minimum(areas[:, None], areas)[..., None]).exp().mean(dim=2)


def unsuppressed(similar: Tensor, keep: Tensor) -> Tensor:
    """Drop what is similar to a better one that stays.

    Every step drops what is similar to a better one that the step before has left. After n steps
    this is right for the n best, so it ends, after as many steps as the longest chain is long; and
    what a step leaves as it is is right for all. A loop is a handful of nodes; one step for each of
    a hundred poses was half of the graph's.

    Args:
        similar: (N, N) bool, best first.
        keep: (N,) bool: what may stay.

    Returns:
        (N,) bool.
    """
    changed = torch.ones((), dtype=torch.bool)
    suppresses = similar.triu(diagonal=1)
    _, kept = torch.ops.higher_order.while_loop(
        _goes_on, _step, (changed, keep.clone()), (suppresses, keep)
    )
    return kept


def _goes_on(changed: Tensor, *_: Tensor) -> Tensor:
    return changed.clone()  # a loop may not return what it was given


def _step(_: Tensor, kept: Tensor, suppresses: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    left = keep & ~(suppresses & kept[:, None]).any(dim=0)
    return (left != kept).any(), left


def _rows(poses: Poses, count: int) -> Poses:
    """Make poses as many rows for every image: steps of open size would take the exporter minutes.

    Args:
        poses: of scores above 0, N at most ``count``.
        count: of rows.

    Returns:
        The poses, and zeros behind them.
    """
    return Poses(*(F.pad(x, (0, 0) * (x.dim() - 1) + (0, count))[:count] for x in poses))


def _with_two_more(poses: Poses) -> Poses:
    """Append two poses with boxes outside the image and scores below 0.

    torchvision tells the exporter that at least two boxes survive NMS; a program that relies on it
    fails on an image with one person.
    """
    outside = poses.boxes.new_tensor([[-2, -2, -1, -1], [-4, -4, -3, -3]])
    padded = Poses(*(F.pad(x, (0, 0) * (x.dim() - 1) + (0, 2)) for x in poses))
    return padded._replace(
        boxes=torch.cat([poses.boxes, outside]), scores=F.pad(poses.scores, (0, 2), value=-1.0)
    )


class BatchGraph(InsPoseGraph):
    """InsPose for a batch of images of one size, in tensors of as many rows for every image.

    All ``TOPK_CANDIDATES_TEST`` candidates of an image are decoded, however many are persons.
    """

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Find the poses of B images.

        Args:
            images: (B, 3, H, W) uint8, else as of :class:`InsPoseGraph`.

        Returns:
            boxes (B, R, 4), scores (B, R), keypoints (B, R, K, 3), where predicted visibility
            (B, R, K), and counts (B,) int64: of each image the rows of :meth:`rows_of`.
        """
        model, inference = self.model, self.model.pose_inference
        count, size = images.shape[0], (images.shape[2], images.shape[3])
        divisor = model.backbone.size_divisibility
        predictions = model.predict(pad_to_multiple(model.normalize(images), divisor))
        locations = model.locations_of(predictions)
        rows = inference.topk_candidates
        scores = predictions.person_logits.sigmoid().nan_to_num(0)
        # Small images have fewer locations than rows.
        scores, index = F.pad(scores, (0, rows)).topk(rows, dim=1)
        index = index.where(scores > 0, 0).flatten()
        number = torch.arange(count)[:, None].expand(-1, rows).flatten()
        points, strides = locations.points[index], locations.strides[index]
        candidates = Candidates(number, index, points, strides, [rows] * count)
        persons = model.head.at(predictions.params_features, candidates)
        valid = scores > inference.score_threshold
        # Not vmap, which the exporter cannot follow where sizes are open.
        found = [
            self.rows_of(poses, valid[image], predictions, image, size)
            for image, poses in enumerate(inference.decode(predictions, persons, [size] * count))
        ]
        return tuple(torch.stack(x) for x in zip(*found, strict=True))


class _KPNetAtOnce(KPNet):
    """KP-Nets of an image without the loop over chunks, whose length depends on the image."""

    def peaks(
        self,
        params: Tensor,
        candidates: Candidates,
        features: Tensor,
        sizes: list[tuple[int, int]],
        *,
        normalize: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`KPNet.peaks`."""
        find = find_peaks if normalize else find_cells
        found = [
            find(logits, sizes[image][1])
            for image, _, logits in self.maps(params, candidates, features, sizes)
        ]
        cells, scores = zip(*found, strict=True)
        return torch.cat(cells), torch.cat(scores)

    def maps(
        self,
        params: Tensor,
        candidates: Candidates,
        features: Tensor,
        sizes: list[tuple[int, int]],
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """See :meth:`KPNet.maps`; all of an image are in memory at once."""
        counts = candidates.counts
        of_images = zip(
            params.split(counts),
            candidates.points.split(counts),
            candidates.strides.split(counts),
            strict=True,
        )
        for image, (own, size) in enumerate(zip(of_images, sizes, strict=True)):
            shared = self.shared_input(self.crop(features[image], self.feature_size(size)))
            yield image, slice(None), self.resample(self.logits(*own, shared), size)

    @staticmethod
    def crop(maps: Tensor, size: tuple[int, int]) -> Tensor:
        """See :meth:`KPNet.crop`."""
        # Not [:height, :width]: whether a slice is contiguous depends on the size, and asking fixes
        # the answer.
        maps = maps.index_select(-2, torch.arange(size[0]))
        return maps.index_select(-1, torch.arange(size[1]))


class PictureGraph(nn.Module):
    """A graph that takes pictures as they are: colours and size are changed inside."""

    def __init__(self, graph: nn.Module, cfg: CfgNode, shift: float = 0.0) -> None:
        """Put the steps before and behind a graph.

        Args:
            graph: of one image.
            cfg: reads ``INPUT.FORMAT``, ``MIN_SIZE_TEST``, ``MAX_SIZE_TEST`` and ``RESIZE``.
            shift: pixels that keypoints are shifted by once they are scaled; the graph has shifted
                them already.
        """
        super().__init__()
        self.network = graph  # a module named graph would hide that of the exporter
        self.is_rgb = cfg.INPUT.FORMAT == "RGB"
        self.min_size, self.max_size = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        self.antialias = cfg.INPUT.RESIZE == "pillow"
        self.shift = shift

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Find the poses of a picture.

        Args:
            image: (H, W, 3) uint8 in BGR, as ``cv2.imread`` gives it.

        Returns:
            As of the graph, in pixels of ``image``.
        """
        height, width = image.shape[0], image.shape[1]
        pixels = image.permute(2, 0, 1).float()
        if self.is_rgb:
            pixels = pixels.flip(0)
        size = self.size_of(height, width)
        if self.min_size:
            pixels, size = with_opened_size(self.resized(pixels[None], size)[0], size)
        boxes, scores, keypoints, *more = self.network(pixels)
        scale = torch.tensor([width, height]) / torch.tensor([size[1], size[0]])
        xy = (keypoints[..., :2] - self.shift) * scale + self.shift
        keypoints = torch.cat([xy, keypoints[..., 2:]], dim=2)
        return boxes * scale.repeat(2), scores, keypoints, *more

    def resized(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize (B, C, H, W) as :class:`ResizeShortestEdge` does: to whole numbers again."""
        if not self.antialias:
            return (F.interpolate(pixels, size, mode="bilinear") + 0.5).floor()
        # Pillow's steps: along the rows, then along the columns, rounded after each.
        for step in ((pixels.shape[2], size[1]), size):
            pixels = F.interpolate(pixels, step, mode="bilinear", antialias=True)
            pixels = (pixels + 0.5).floor()
        return pixels

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Size (H, W) for the network, as ``ResizeShortestEdge`` has it."""
        if not self.min_size:
            return height, width
        # min() would fix a size that torch.export leaves open.
        short, long = torch.sym_min(height, width), torch.sym_max(height, width)
        new_height, new_width = (
            torch.sym_max(
                torch.sym_min(
                    (2 * side * self.min_size + short) // (2 * short),  # rounded
                    (2 * side * self.max_size + long) // (2 * long),
                ),
                1,
            )
            for side in (height, width)
        )
        return new_height, new_width


def outputs_of(model: InsPose | InsPoseOfficial) -> list[str]:
    """Name what the graph of a model gives of each pose, in its order."""
    has_visibility = isinstance(model, InsPose) and model.head.visibility_pred is not None
    return [*OUTPUTS, "visibility"] if has_visibility else list(OUTPUTS)


def graph_of(model: InsPose | InsPoseOfficial, preprocess: CfgNode | None = None) -> nn.Module:
    """Make the graph of a model: an image in, what :func:`outputs_of` names out.

    Args:
        model: on the CPU; stays as it is.
        preprocess: config for :class:`PictureGraph`; without, the graph takes (3, H, W) as
            :class:`InsPoseGraph` does.
    """
    is_official = isinstance(model, InsPoseOfficial)
    kind: Any = OfficialGraph if is_official else InsPoseGraph
    if preprocess is None:
        return kind(model)
    return PictureGraph(kind(model), preprocess, HALF_PIXEL if is_official else 0.0)


def export_program(
    model: InsPose | InsPoseOfficial, *, preprocess: CfgNode | None = None
) -> ExportedProgram:
    """Export a model with ``torch.export``.

    Args:
        model: on the CPU; stays as it is.
        preprocess: see :func:`graph_of`.

    Returns:
        Program of :func:`graph_of` for images of any height and width, of 32 pixels or more.
    """
    image = _example() if preprocess is None else _picture()
    sizes = {"image": {i: Dim.DYNAMIC for i in range(3) if image.shape[i] > 3}}
    with torch.no_grad():
        return torch.export.export(graph_of(model, preprocess), (image,), dynamic_shapes=sizes)


def export_onnx(
    model: InsPose | InsPoseOfficial,
    path: str | os.PathLike[str],
    *,
    batch: int | None = None,
    preprocess: CfgNode | None = None,
) -> None:
    """Write a model as an ONNX file, for images of any height and width.

    Args:
        model: on the CPU; stays as it is.
        path: file to write.
        batch: images of a batch, see :class:`BatchGraph`; None takes a single image. The number is
            fixed, as the graph has a part for each image.
        preprocess: see :func:`graph_of`; for single images.

    Raises:
        ValueError: a batch for :class:`InsPoseOfficial`.
    """
    image, sizes = _example(), {1: "height", 2: "width"}
    if preprocess is not None:
        image, sizes = _picture(), {0: "height", 1: "width"}
    graph, name, outputs = graph_of(model, preprocess), "image", outputs_of(model)
    if batch is not None:
        if not isinstance(model, InsPose):
            raise ValueError("InsPoseOfficial is exported for single images alone")
        image, sizes = image.expand(batch, -1, -1, -1), {2: "height", 3: "width"}
        graph, name, outputs = BatchGraph(model), "images", [*outputs, "counts"]
    with torch.no_grad():
        program = torch.onnx.export(
            graph.eval(),
            (image,),
            dynamo=True,
            dynamic_shapes={name: sizes},
            output_names=outputs,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with the paths of this machine
    program.save(path)


def _example() -> Tensor:
    """Make an image whose size says nothing: no level is one cell wide, no numbers are equal."""
    return torch.zeros(3, 232, 328, dtype=torch.uint8)


def _picture() -> Tensor:
    """Make a picture for :class:`PictureGraph`, of another size than the network's."""
    return torch.zeros(421, 563, 3, dtype=torch.uint8)
