"""InsPose as one graph from an image to its poses, for torch.export and ONNX."""

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.ops import clip_boxes_to_image

from .modeling.candidates import Candidates
from .modeling.geometry import Locations
from .modeling.inspose import InsPose
from .modeling.kp_net import KPNet, find_peaks
from .modeling.official import InsPoseOfficial
from .modeling.official.export import OfficialGraph
from .modeling.postprocess import best_poses

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

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find the poses of an image.

        Args:
            image: (3, H, W) uint8, colours in the order of ``INPUT.FORMAT``, at the size that the
                network is to see.

        Returns:
            Of N poses, best first, N between 0 and ``TEST.DETECTIONS_PER_IMAGE``: boxes (N, 4) x0,
            y0, x1, y1 and keypoints (N, K, 3) x, y, score in pixels of ``image``, and scores (N,).
        """
        model = self.model
        height, width = image.shape[1], image.shape[2]
        divisor = model.backbone.size_divisibility
        padding = (0, -width % divisor, 0, -height % divisor)
        predictions = model.predict(F.pad(model.normalize(image), padding)[None])
        locations = Locations.of(predictions.params_features, model.strides)
        size = height, width
        ((keypoints, boxes, scores, where),) = model.decode(predictions, locations, [size])
        keypoints, boxes, scores = _add_two(keypoints, boxes, scores)
        keep, _ = best_poses(
            keypoints,
            boxes,
            scores,
            nms_threshold=model.nms_threshold,
            max_poses=model.max_poses,
            sigmas=model.nms_sigmas,
        )
        keep = keep[keep < where.shape[0]]  # without the two
        poses = keypoints[keep], boxes[keep], scores[keep], where[keep]
        if model.decoding == "expected_oks":
            (poses,) = model.refine(predictions, locations, [poses], [size])
        keypoints, boxes, scores, _ = poses
        # As detector_postprocess does for the eager model.
        boxes = clip_boxes_to_image(boxes, size)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        return boxes[inside], scores[inside], keypoints[inside]


def _add_two(keypoints: Tensor, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Append two poses with boxes outside the image, behind all others.

    torchvision tells the exporter that at least two boxes survive NMS; a program that relies on it
    fails on an image with one person.
    """
    outside = boxes.new_tensor([[-2, -2, -1, -1], [-4, -4, -3, -3]])
    return (
        F.pad(keypoints, (0, 0, 0, 0, 0, 2)),
        torch.cat([boxes, outside]),
        F.pad(scores, (0, 2), value=-1.0),
    )


class _KPNetAtOnce(KPNet):
    """KP-Nets of one image without the loop over chunks, whose length depends on the image."""

    def peaks(
        self,
        params: Tensor,
        candidates: Candidates,
        features: Tensor,
        sizes: list[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`KPNet.peaks`."""
        ((_, _, logits),) = self.maps(params, candidates, features, sizes)
        return find_peaks(logits, sizes[0][1])

    def maps(
        self,
        params: Tensor,
        candidates: Candidates,
        features: Tensor,
        sizes: list[tuple[int, int]],
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """See :meth:`KPNet.maps`; all are in memory at once."""
        (size,) = sizes
        shared = self.shared_input(self.crop(features[0], self.feature_size(size)))
        logits = self.logits(params, candidates.points, candidates.strides, shared)
        yield 0, slice(None), self.resample(logits, size)

    @staticmethod
    def crop(maps: Tensor, size: tuple[int, int]) -> Tensor:
        """See :meth:`KPNet.crop`."""
        # Not [:height, :width]: whether a slice is contiguous depends on the size, and asking fixes
        # the answer.
        maps = maps.index_select(-2, torch.arange(size[0]))
        return maps.index_select(-1, torch.arange(size[1]))


def graph_of(model: InsPose | InsPoseOfficial) -> nn.Module:
    """Make the graph of a model: an image (3, H, W) in, boxes, scores and keypoints out."""
    graph: Any = OfficialGraph if isinstance(model, InsPoseOfficial) else InsPoseGraph
    return graph(model)


def export_program(model: InsPose | InsPoseOfficial) -> ExportedProgram:
    """Export a model with ``torch.export``.

    Args:
        model: on the CPU; stays as it is.

    Returns:
        Program of :func:`graph_of` for images of any height and width above 128 pixels.
    """
    sizes = {"image": {1: Dim.DYNAMIC, 2: Dim.DYNAMIC}}
    with torch.no_grad():
        return torch.export.export(graph_of(model), (_example(),), dynamic_shapes=sizes)


def export_onnx(model: InsPose | InsPoseOfficial, path: str | os.PathLike[str]) -> None:
    """Write a model as an ONNX file, for images of any height and width.

    Args:
        model: on the CPU; stays as it is.
        path: file to write.
    """
    with torch.no_grad():
        program = torch.onnx.export(
            graph_of(model).eval(),
            (_example(),),
            dynamo=True,
            dynamic_shapes={"image": {1: "height", 2: "width"}},
            output_names=list(OUTPUTS),
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with the paths of this machine
    program.save(path)


def _example() -> Tensor:
    """Make an image whose size says nothing: no level is one cell wide, no numbers are equal."""
    return torch.zeros(3, 232, 328, dtype=torch.uint8)
