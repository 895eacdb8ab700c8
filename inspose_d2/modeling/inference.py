"""From predictions to poses (sec. 3.4): candidates, KP-Nets, scores, NMS, and the limit."""

from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from .candidates import Candidates, select_by_score
from .expected_oks import decode_by_expected_oks, places_of_cells
from .geometry import Locations, map_size
from .keypoint_codec import decode_keypoints
from .kp_net import KPNet
from .oks import oks_sigmas
from .postprocess import best_poses, body_areas, boxes_of_poses
from .predictions import PersonPredictions, Predictions


class Poses(NamedTuple):
    """N poses of an image, and what their KP-Nets were run with."""

    keypoints: Tensor  # (N, K, 3) x, y in pixels of the network input, score
    boxes: Tensor  # (N, 4) x0, y0, x1, y1
    scores: Tensor  # (N,)
    params: Tensor  # (N, P)
    points: Tensor  # (N, 2) location of each, image pixels
    strides: Tensor  # (N,) of its pyramid level
    locations: Tensor  # (N,) its number among the L locations

    def take(self, rows: Tensor) -> "Poses":
        """Choose poses by number or by a mask."""
        return Poses(*(x[rows] for x in self))

    def to_instances(self, image_size: tuple[int, int]) -> Instances:
        """Give pred_boxes, scores, pred_classes (0), pred_keypoints and pred_locations (N,)."""
        return Instances(
            image_size,
            pred_boxes=Boxes(self.boxes),
            scores=self.scores,
            pred_classes=torch.zeros_like(self.locations),
            pred_keypoints=self.keypoints,
            pred_locations=self.locations,
        )


class PoseInference(nn.Module):
    """Chooses candidates, and turns what the network says of them into poses."""

    oks_sigmas: Tensor

    @configurable
    def __init__(
        self,
        *,
        kp_net: KPNet,
        with_boxes: bool,
        oks_sigmas: list[float],
        score_threshold: float,
        topk_candidates: int,
        decoding: str,
        nms_type: str,
        nms_threshold: float,
        keypoint_score_weight: float,
        max_poses: int,
    ) -> None:
        """Set the rules.

        Args:
            kp_net: runs the KP-Nets.
            with_boxes: whether boxes are those of the box head, not around the keypoints.
            oks_sigmas: of each keypoint, see :func:`object_keypoint_similarity`.
            score_threshold: lowest person probability of a candidate.
            topk_candidates: most candidates of an image.
            decoding: "peaks" (the paper) or "expected_oks", see :func:`decode_by_expected_oks`.
            nms_type: "boxes" (the paper) or "poses", see :func:`nms_of_poses`.
            nms_threshold: see :func:`best_poses`.
            keypoint_score_weight: of the mean keypoint score in the score of a pose, in [0, 1].
            max_poses: most poses of an image.
        """
        super().__init__()
        self.kp_net = kp_net
        self.with_boxes = with_boxes
        self.score_threshold = score_threshold
        self.topk_candidates = topk_candidates
        self.decoding = decoding
        self.nms_type = nms_type
        self.nms_threshold = nms_threshold
        self.keypoint_score_weight = keypoint_score_weight
        self.max_poses = max_poses
        self.register_buffer("oks_sigmas", torch.tensor(oks_sigmas), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read all but ``kp_net``."""
        node = cfg.MODEL.INSPOSE
        return {
            "with_boxes": node.BOX_HEAD.ENABLED,
            "oks_sigmas": oks_sigmas(cfg),
            "score_threshold": node.SCORE_THRESH_TEST,
            "topk_candidates": node.TOPK_CANDIDATES_TEST,
            "decoding": node.DECODING_TEST,
            "nms_type": node.NMS_TYPE_TEST,
            "nms_threshold": node.NMS_THRESH_TEST,
            "keypoint_score_weight": node.KEYPOINT_SCORE_WEIGHT_TEST,
            "max_poses": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    @property
    def nms_sigmas(self) -> Tensor | None:
        """Sigmas (K,) for NMS of poses, None for NMS of boxes; see :func:`best_poses`."""
        return self.oks_sigmas if self.nms_type == "poses" else None

    @property
    def refines(self) -> bool:
        """Whether poses are decoded once more, by the expected OKS."""
        return self.decoding == "expected_oks"

    def candidates(self, predictions: Predictions, locations: Locations) -> Candidates:
        """Choose the locations that may be persons."""
        scores = predictions.person_logits.float().sigmoid()
        return select_by_score(locations, scores, self.score_threshold, self.topk_candidates)

    def forward(
        self,
        predictions: Predictions,
        persons: PersonPredictions,
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Turn predictions into poses.

        Args:
            predictions: of the network.
            persons: at the candidates.
            image_sizes: (H, W) of each image without padding, pixels.

        Returns:
            Per image its poses, best first, in pixels of the network input.
        """
        poses = [self.suppress(own) for own in self.decode(predictions, persons, image_sizes)]
        if self.refines:
            # Doubles of a person become alike: they are suppressed now at the latest.
            poses = [
                self.suppress(self.refine(own, predictions, image, size))
                for image, (own, size) in enumerate(zip(poses, image_sizes, strict=True))
            ]
        return [own.to_instances(size) for own, size in zip(poses, image_sizes, strict=True)]

    def decode(
        self,
        predictions: Predictions,
        persons: PersonPredictions,
        image_sizes: list[tuple[int, int]],
    ) -> list[Poses]:
        """Run the KP-Nets of the candidates and decode their maps: the poses before NMS.

        Args:
            predictions: as for :meth:`forward`.
            persons: the same.
            image_sizes: the same.

        Returns:
            Per image its poses, in the order of the candidates. Where poses are refined
            afterwards, the scores are those of the locations alone, and those of the keypoints
            logits.
        """
        candidates, counts = persons.candidates, persons.candidates.counts
        scores = predictions.person_logits.float().sigmoid()[candidates.image, candidates.index]
        per_image = zip(
            keypoints_of(
                self.kp_net, predictions, persons, image_sizes, normalize=not self.refines
            ),
            [None] * len(counts) if persons.boxes is None else persons.boxes.split(counts),
            scores.split(counts),
            persons.params.split(counts),
            candidates.points.split(counts),
            candidates.strides.split(counts),
            candidates.index.split(counts),
            image_sizes,
            strict=True,
        )
        return [
            Poses(
                keypoints,
                boxes_of_poses(keypoints) if boxes is None else clip_boxes_to_image(boxes, size),
                own_scores if self.refines else self.pose_scores(own_scores, keypoints),
                *others,
            )
            for keypoints, boxes, own_scores, *others, size in per_image
        ]

    def suppress(self, poses: Poses) -> Poses:
        """Suppress double poses and keep the best, best first; see :func:`best_poses`."""
        keep = best_poses(
            poses.keypoints,
            poses.boxes,
            poses.scores,
            nms_threshold=self.nms_threshold,
            max_poses=self.max_poses,
            sigmas=self.nms_sigmas,
        )
        return poses.take(keep)

    def refine(
        self, poses: Poses, predictions: Predictions, image: int, image_size: tuple[int, int]
    ) -> Poses:
        """Decode the poses of an image that NMS has left once more, by the expected OKS (ours).

        Args:
            poses: of the image.
            predictions: of the network.
            image: number in the batch.
            image_size: (H, W) of the image without padding, pixels.

        Returns:
            The same poses with other keypoints, scores and, but with the box head, boxes.
        """
        locations, stride = poses.locations, self.kp_net.map_stride
        candidates = Candidates(
            torch.zeros_like(locations),
            locations,
            poses.points,
            poses.strides,
            [locations.shape[0]],
        )
        features = predictions.keypoint_features[image : image + 1]
        offsets = None if predictions.disk_offsets is None else predictions.disk_offsets[image]
        areas, size = body_areas(poses.keypoints), map_size(image_size, stride)
        num_keypoints = poses.keypoints.shape[1]
        places = places_of_cells(offsets, num_keypoints, size, features.device)
        decoded = [
            decode_by_expected_oks(
                logits,
                places,
                areas[chunk],
                self.oks_sigmas,
                stride=stride,
                image_size=image_size,
            )
            for _, chunk, logits in self.kp_net.maps(poses.params, candidates, features, [size])
        ]
        keypoints = torch.cat([poses.keypoints[:0], *decoded])
        return poses._replace(
            keypoints=keypoints,
            boxes=poses.boxes if self.with_boxes else boxes_of_poses(keypoints),
            scores=self.pose_scores(poses.scores, keypoints),
        )

    def pose_scores(self, scores: Tensor, keypoints: Tensor) -> Tensor:
        """Mix person probabilities (n,) with the scores of keypoints (n, K, 3)."""
        weight = self.keypoint_score_weight
        return scores ** (1 - weight) * keypoints[..., 2].mean(dim=1) ** weight


def keypoints_of(
    kp_net: KPNet,
    predictions: Predictions,
    persons: PersonPredictions,
    image_sizes: list[tuple[int, int]],
    *,
    normalize: bool,
) -> list[Tensor]:
    """Run the KP-Nets of persons and decode the peaks of their maps (eq. 2 and 3).

    Args:
        kp_net: runs the KP-Nets.
        predictions: of the network.
        persons: at N locations.
        image_sizes: (H, W) of each image without padding, pixels.
        normalize: as for :meth:`KPNet.peaks`.

    Returns:
        Per image keypoints (n, K, 3): x, y in pixels of the network input, score.
    """
    stride, offsets = kp_net.map_stride, predictions.disk_offsets
    candidates, sizes = persons.candidates, [map_size(size, stride) for size in image_sizes]
    features = predictions.keypoint_features
    cells, scores = kp_net.peaks(persons.params, candidates, features, sizes, normalize=normalize)
    per_image = zip(
        cells.split(candidates.counts),
        scores.split(candidates.counts),
        [None] * len(sizes) if offsets is None else offsets,
        sizes,
        image_sizes,
        strict=True,
    )
    return [
        decode_keypoints(
            own_cells,
            own_scores,
            own_offsets,
            stride=stride,
            map_width=width,
            image_size=image_size,
        )
        for own_cells, own_scores, own_offsets, (_, width), image_size in per_image
    ]
