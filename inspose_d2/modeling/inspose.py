"""InsPose: the whole way from images to poses or losses, one line per stage (fig. 3)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from ..config.check import check_model
from .branches import DiskOffsetBranch, HeatmapBranch, KeypointFeatureBranch
from .candidates import Candidates, select_by_score
from .expected_oks import decode_by_expected_oks
from .geometry import Locations, map_size
from .head import InsPoseHead, gather_patches
from .image_model import ImageModel
from .keypoint_codec import decode_keypoints
from .kp_net import KPNet
from .losses import (
    box_loss,
    classification_loss,
    disk_offset_loss,
    heatmap_loss,
    keypoint_loss,
    quality_loss,
    regression_loss,
    visibility_loss,
)
from .oks import object_keypoint_similarity, oks_sigmas
from .postprocess import body_areas, boxes_of_poses, select_poses
from .target_generator import PERSON, VISIBLE, TargetGenerator, Targets


@dataclass
class Predictions:
    """What the network says of B images with L locations each."""

    person_logits: Tensor  # (B, L)
    params_features: list[Tensor]  # per level, the input of InsPoseHead.patches_at
    keypoint_features: Tensor  # (B, C, H', W'), shared input of the KP-Nets, at their stride
    disk_offsets: Tensor | None  # (B, 2K, H, W) in cells, at the maps' stride; None without branch
    heatmap_logits: Tensor | None  # (B, K, H', W') at P3's stride; None in evaluation too


@META_ARCH_REGISTRY.register()
class InsPose(ImageModel):
    """Single-stage multi-person pose estimation with instance-aware dynamic networks."""

    oks_sigmas: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: InsPoseHead,
        kp_net: KPNet,
        keypoint_branch: KeypointFeatureBranch,
        disk_offset_branch: DiskOffsetBranch | None,
        heatmap_branch: HeatmapBranch | None,
        target_generator: TargetGenerator,
        in_features: list[str],
        map_feature: str,
        classification: str,
        focal_loss_alpha: float,
        focal_loss_gamma: float,
        oks_sigmas: list[float],
        loss_weights: dict[str, float],
        score_threshold: float,
        topk_candidates: int,
        decoding: str,
        nms_type: str,
        nms_threshold: float,
        keypoint_score_weight: float,
        max_poses: int,
        pixel_mean: list[float],
        pixel_std: list[float],
        channels_last: bool,
    ) -> None:
        """Join the built parts.

        Args:
            backbone: makes the pyramid.
            head: person logits and KP-Net parameters of each location.
            kp_net: runs the KP-Nets.
            keypoint_branch: shared input of the KP-Nets.
            disk_offset_branch: None decodes the centres of the cells (Table 1, first row).
            heatmap_branch: auxiliary task; None trains without.
            target_generator: makes the targets in training.
            in_features: pyramid levels of the head, finest first.
            map_feature: pyramid level of the three branches.
            classification: "focal" (the paper) or "varifocal", see :func:`quality_loss`.
            focal_loss_alpha: see :func:`classification_loss`.
            focal_loss_gamma: the same.
            oks_sigmas: of each keypoint, see :func:`object_keypoint_similarity`.
            loss_weights: weight of each loss key.
            score_threshold: lowest person probability of a candidate.
            topk_candidates: most candidates of an image.
            decoding: "peaks" (the paper) or "expected_oks", see :func:`decode_by_expected_oks`.
            nms_type: "boxes" (the paper) or "poses", see :func:`nms_of_poses`.
            nms_threshold: see :func:`select_poses`.
            keypoint_score_weight: of the mean keypoint score in the score of a pose, in [0, 1].
            max_poses: most poses of an image.
            pixel_mean: per channel, in the order of ``INPUT.FORMAT``.
            pixel_std: per channel.
            channels_last: whether convolutions run in this memory layout.
        """
        super().__init__(backbone, pixel_mean, pixel_std)
        self.head = head
        self.kp_net = kp_net
        self.keypoint_branch = keypoint_branch
        self.disk_offset_branch = disk_offset_branch
        self.heatmap_branch = heatmap_branch
        self.target_generator = target_generator
        self.in_features = in_features
        self.map_feature = map_feature
        self.classification = classification
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.loss_weights = loss_weights
        self.score_threshold = score_threshold
        self.topk_candidates = topk_candidates
        self.decoding = decoding
        self.nms_type = nms_type
        self.nms_threshold = nms_threshold
        self.keypoint_score_weight = keypoint_score_weight
        self.max_poses = max_poses
        shapes = backbone.output_shape()
        self.strides = [shapes[name].stride for name in in_features]
        self.register_buffer("oks_sigmas", torch.tensor(oks_sigmas), False)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the parts that the config describes; nothing else in this file reads it."""
        check_model(cfg)
        node = cfg.MODEL.INSPOSE
        k = node.NUM_KEYPOINTS
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        map_feature = shapes[node.KEYPOINT_BRANCH.IN_FEATURE]
        _check_map_stride(node.MAP_STRIDE, map_feature.stride, backbone.size_divisibility)
        map_scale = map_feature.stride / node.MAP_STRIDE
        resamples_maps = node.RESAMPLE == "predictions"
        kp_net = KPNet(
            stride=map_feature.stride if resamples_maps else node.MAP_STRIDE,
            map_stride=node.MAP_STRIDE,
            feature_channels=node.KEYPOINT_BRANCH.OUT_CHANNELS,
            channels=node.KP_NET.CHANNELS,
            num_layers=node.KP_NET.NUM_LAYERS,
            num_keypoints=k,
            backend=node.KP_NET.BACKEND,
        )

        def branch_args(branch: CfgNode, out_channels: int, scale: float) -> dict[str, Any]:
            return {
                "in_channels": map_feature.channels,
                "num_convs": branch.NUM_CONVS,
                "conv_dim": branch.CONV_DIM,
                "norm": node.NORM,
                "out_channels": out_channels,
                "scale": scale,
            }

        return {
            "backbone": backbone,
            "head": InsPoseHead(
                in_channels=shapes[node.IN_FEATURES[0]].channels,
                num_convs=node.NUM_CONVS,
                conv_dim=node.CONV_DIM,
                norm=node.NORM,
                num_params=kp_net.num_params,
                prior_prob=node.PRIOR_PROB,
                with_boxes=node.BOX_HEAD.ENABLED,
                num_regressed=k if node.REGRESSION.ENABLED else 0,
                num_visibility=k if node.VISIBILITY.ENABLED else 0,
            ),
            "kp_net": kp_net,
            "keypoint_branch": KeypointFeatureBranch(
                **branch_args(
                    node.KEYPOINT_BRANCH,
                    node.KEYPOINT_BRANCH.OUT_CHANNELS,
                    1 if resamples_maps else map_scale,
                )
            ),
            "disk_offset_branch": DiskOffsetBranch(
                **branch_args(node.DISK_OFFSET, 2 * k, map_scale)
            )
            if node.DISK_OFFSET.ENABLED
            else None,
            "heatmap_branch": HeatmapBranch(**branch_args(node.HEATMAP, k, 1))
            if node.HEATMAP.ENABLED
            else None,
            "target_generator": TargetGenerator(
                num_keypoints=k,
                map_stride=node.MAP_STRIDE,
                heatmap_stride=map_feature.stride,
                assign_by_boxes=node.BOX_HEAD.ENABLED,
                center_sampling_radius=node.CENTER_SAMPLING_RADIUS,
                sizes_of_interest=node.SIZES_OF_INTEREST,
                ignore_unlabeled=node.UNLABELED_PERSONS == "ignore",
                disk_radius=node.DISK_OFFSET.RADIUS * map_feature.stride,
                heatmap_min_overlap=node.HEATMAP.MIN_OVERLAP,
                heatmap_max_radius=node.HEATMAP.MAX_RADIUS or math.inf,
            ),
            "in_features": node.IN_FEATURES,
            "map_feature": node.KEYPOINT_BRANCH.IN_FEATURE,
            "classification": node.CLS_LOSS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "oks_sigmas": oks_sigmas(cfg),
            "loss_weights": {f"loss_{key.lower()}": w for key, w in node.LOSS_WEIGHT.items()},
            "score_threshold": node.SCORE_THRESH_TEST,
            "topk_candidates": node.TOPK_CANDIDATES_TEST,
            "decoding": node.DECODING_TEST,
            "nms_type": node.NMS_TYPE_TEST,
            "nms_threshold": node.NMS_THRESH_TEST,
            "keypoint_score_weight": node.KEYPOINT_SCORE_WEIGHT_TEST,
            "max_poses": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            # 0.7 of the step on a CPU core; CUDA's group norm would copy it back at each layer.
            "channels_last": torch.device(cfg.MODEL.DEVICE).type == "cpu",
        }

    @property
    def nms_sigmas(self) -> Tensor | None:
        """Sigmas (K,) for NMS of poses, None for NMS of boxes; see :func:`select_poses`."""
        return self.oks_sigmas if self.nms_type == "poses" else None

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Compute losses in training, poses in evaluation.

        Args:
            batched_inputs: as Detectron2's ``DatasetMapper`` makes them. Per image: "image",
                (C, H, W) in the order of ``INPUT.FORMAT``; in training "instances" with
                gt_keypoints, gt_boxes and gt_classes; in evaluation, optionally, "height" and
                "width" that the poses are to be scaled to.

        Returns:
            Training: dict of the losses of eq. 5. Evaluation: per image {"instances":
            ``Instances`` with pred_boxes, scores, pred_classes and pred_keypoints (N, K, 3):
            x, y in pixels of the asked size and the keypoint's score in [0, 1]; with
            ``VISIBILITY.ENABLED`` pred_visibility (N, K) too, the probability that the keypoint
            is visible}.
        """
        images = self.preprocess_image(batched_inputs)
        predictions = self.predict(images.tensor)
        locations = self.locations_of(predictions)
        if self.training:
            instances = [x["instances"].to(self.device) for x in batched_inputs]
            return self.losses(predictions, locations, instances)

        poses = self.inference(predictions, locations, images.image_sizes)
        return self.results_of(poses, batched_inputs, images.image_sizes)

    def locations_of(self, predictions: Predictions) -> Locations:
        """Give the locations that predictions are of."""
        return Locations.of(predictions.params_features, self.strides)

    def kp_net_inputs(
        self,
        predictions: Predictions,
        locations: Locations,  # noqa: ARG002  other architectures need them
        candidates: Candidates,
        image_size: tuple[int, int],
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Give what the KP-Nets of N locations of a single image take.

        Args:
            predictions: of one image.
            locations: of the padded image.
            candidates: the N locations.
            image_size: (H, W) of the image without padding, pixels.

        Returns:
            (N, P) parameters, (C, H, W) shared features and the size (H, W) of the maps.
        """
        patches = self.head.patches_at(predictions.params_features, candidates)
        maps = map_size(image_size, self.kp_net.map_stride)
        height, width = self.kp_net.feature_size(maps)
        features = predictions.keypoint_features[0, :, :height, :width]
        return self.head.predict_params(patches), features, maps

    def predict(self, images: Tensor) -> Predictions:
        """Run all that depends on no person: backbone, heads and branches.

        Nearly all multiplications are here, and no graph break for ``torch.compile``:
        ``model.predict = torch.compile(model.predict, dynamic=True)``. One graph serves all usual
        sizes of a single image, another all batches; small images may need a few more.

        Args:
            images: (B, C, H, W) normalized and padded.

        Returns:
            The predictions.
        """
        features = self.backbone(images)
        pyramid = [features[name] for name in self.in_features]
        p3 = features[self.map_feature]
        person_logits, params_features = self.head(pyramid)
        heatmap_branch = self.heatmap_branch if self.training else None
        return Predictions(
            person_logits,
            params_features,
            keypoint_features=self.keypoint_branch(p3),
            disk_offsets=None if self.disk_offset_branch is None else self.disk_offset_branch(p3),
            heatmap_logits=None if heatmap_branch is None else heatmap_branch(p3),
        )

    def losses(
        self,
        predictions: Predictions,
        locations: Locations,
        instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Compare predictions with annotations (eq. 5).

        Args:
            predictions: of the network.
            locations: of the padded images.
            instances: gt_keypoints, gt_boxes and gt_classes per image.

        Returns:
            The terms of eq. 5, weighted. A branch that does not exist has none. All are
            finite and reach every parameter, with no person in the batch too.
        """
        features = predictions.keypoint_features
        targets = self.target_generator(instances, locations, self.kp_net.map_size(features))
        patches = self.head.patches_at(predictions.params_features, targets.positives)
        params = self.head.predict_params(patches)
        boxes = self.head.predict_boxes(patches, targets.positives)
        regressed = self.head.regress_keypoints(patches)
        visibility = self.head.predict_visibility(patches)
        num_positives, num_pairs, num_offsets, num_labelled = _average_over_workers(
            torch.stack(
                [
                    (targets.labels == PERSON).sum(),
                    targets.labelled.sum(),
                    targets.disk_mask.sum() * 2,
                    targets.num_labelled,
                ]
            )
        )
        with torch.no_grad():
            active = self.kp_net.active_units(params, targets.positives, features)
        _write_scalars(num_positives=num_positives, active_units=active)

        image_sizes = [x.image_size for x in instances]
        log_probs = self.kp_net.log_probs(params, targets.positives, features, targets.cells)
        losses = {
            "loss_cls": self._person_loss(predictions, params, targets, image_sizes)
            / num_positives,
            "loss_keypoint": keypoint_loss(log_probs, targets.labelled) / num_pairs,
        }
        if predictions.disk_offsets is not None:
            losses["loss_disk_offset"] = (
                disk_offset_loss(predictions.disk_offsets, targets.disk_offsets, targets.disk_mask)
                / num_offsets
            )
        if predictions.heatmap_logits is not None:
            losses["loss_heatmap"] = (
                heatmap_loss(predictions.heatmap_logits, targets.heatmaps) / num_labelled
            )
        if boxes is not None:
            losses["loss_box"] = box_loss(boxes, targets.boxes) / num_positives
        if regressed is not None:
            where = targets.positives
            offsets = targets.keypoints[..., :2] - where.points[:, None]
            offsets = offsets / where.strides[:, None, None]
            loss = regression_loss(regressed, offsets, targets.labelled)
            losses["loss_regression"] = loss / num_pairs
        if visibility is not None:
            visible = targets.keypoints[..., 2] == VISIBLE
            loss = visibility_loss(visibility, visible, targets.labelled)
            losses["loss_visibility"] = loss / num_pairs
        return {name: self.loss_weights[name] * loss for name, loss in losses.items()}

    def _person_loss(
        self,
        predictions: Predictions,
        params: Tensor,
        targets: Targets,
        image_sizes: list[tuple[int, int]],
    ) -> Tensor:
        """Sum of the classification loss: persons are 1, or as good as the pose found there."""
        logits, labels = predictions.person_logits, targets.labels
        if self.classification == "focal":
            alpha, gamma = self.focal_loss_alpha, self.focal_loss_gamma
            return classification_loss(logits, labels, alpha=alpha, gamma=gamma)
        with torch.no_grad():
            poses = self.keypoints_of(predictions, params, targets.positives, image_sizes)
            quality = object_keypoint_similarity(
                torch.cat(poses), targets.keypoints, targets.areas, self.oks_sigmas
            )
        get_event_storage().put_scalar("mean_oks", quality.mean().nan_to_num())
        return quality_loss(logits, labels, quality, alpha=0.75, gamma=2.0)

    def inference(
        self,
        predictions: Predictions,
        locations: Locations,
        image_sizes: list[tuple[int, int]],
        *,
        with_locations: bool = False,
    ) -> list[Instances]:
        """Turn predictions into poses (sec. 3.4).

        Args:
            predictions: of the network.
            locations: of the padded images.
            image_sizes: (H, W) of each image without padding, pixels.
            with_locations: whether the poses have pred_locations (N,), the number of the location
                that each comes from, for :func:`.keypoint_maps.keypoint_maps_of`.

        Returns:
            Per image ``Instances`` in pixels of the network input.
        """

        def select(
            poses: tuple[Tensor, Tensor, Tensor, Tensor], size: tuple[int, int]
        ) -> Instances:
            keypoints, boxes, scores, where = poses
            return select_poses(
                keypoints,
                boxes,
                scores,
                size,
                nms_threshold=self.nms_threshold,
                max_poses=self.max_poses,
                sigmas=self.nms_sigmas,
                locations=where,
            )

        decoded = self.decode(predictions, locations, image_sizes)
        poses = [select(*own) for own in zip(decoded, image_sizes, strict=True)]
        if self.decoding == "expected_oks":
            for image, (own, size) in enumerate(zip(poses, image_sizes, strict=True)):
                kept = own.pred_keypoints, own.pred_boxes.tensor, own.scores, own.pred_locations
                # Doubles of a person become alike: they are suppressed now at the latest.
                poses[image] = select(self.refine(predictions, locations, image, kept, size), size)
        for image, own in enumerate(poses):
            if self.head.visibility_pred is not None:
                own.pred_visibility = self.visibility_at(predictions, image, own.pred_locations)
            if not with_locations:
                own.remove("pred_locations")
        return poses

    def decode(
        self, predictions: Predictions, locations: Locations, image_sizes: list[tuple[int, int]]
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Run the KP-Nets of the candidates and decode their maps: the poses before NMS.

        Args:
            predictions: as for :meth:`inference`.
            locations: the same.
            image_sizes: the same.

        Returns:
            Per image keypoints (N, K, 3), boxes (N, 4) and scores (N,), see :func:`best_poses`, and
            the numbers of their locations (N,).
        """
        scores = predictions.person_logits.float().sigmoid()
        candidates = select_by_score(locations, scores, self.score_threshold, self.topk_candidates)
        scores = scores[candidates.image, candidates.index]
        patches = self.head.patches_at(predictions.params_features, candidates)
        boxes = self.head.predict_boxes(patches, candidates)
        params = self.head.predict_params(patches)
        counts = candidates.counts
        per_image = zip(
            self.keypoints_of(predictions, params, candidates, image_sizes),
            [None] * len(counts) if boxes is None else boxes.split(counts),
            scores.split(counts),
            candidates.index.split(counts),
            image_sizes,
            strict=True,
        )
        return [
            (
                keypoints,
                boxes_of_poses(keypoints) if own is None else clip_boxes_to_image(own, size),
                # Where poses are refined, by these alone: NMS comes before.
                score if self.decoding == "expected_oks" else self.pose_scores(score, keypoints),
                index,
            )
            for keypoints, own, score, index, size in per_image
        ]

    def keypoints_of(
        self,
        predictions: Predictions,
        params: Tensor,
        candidates: Candidates,
        image_sizes: list[tuple[int, int]],
    ) -> list[Tensor]:
        """Run KP-Nets and decode the peaks of their maps (eq. 2 and 3).

        Args:
            predictions: of the network.
            params: (N, P) parameters of the KP-Nets.
            candidates: the N locations that they come from.
            image_sizes: (H, W) of each image without padding, pixels.

        Returns:
            Per image keypoints (n, K, 3): x, y in pixels of the network input, score.
        """
        stride, offsets = self.kp_net.map_stride, predictions.disk_offsets
        sizes = [map_size(size, stride) for size in image_sizes]
        features = predictions.keypoint_features
        cells, scores = self.kp_net.peaks(params, candidates, features, sizes)
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

    def refine(
        self,
        predictions: Predictions,
        locations: Locations,
        image: int,
        poses: tuple[Tensor, Tensor, Tensor, Tensor],
        image_size: tuple[int, int],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decode the poses of an image that NMS has left once more, by the expected OKS (ours).

        Args:
            predictions: of the network.
            locations: of the padded images.
            image: its number in the batch.
            poses: what :meth:`decode` gives for the image, of N poses.
            image_size: (H, W) of the image without padding, pixels.

        Returns:
            The same in the same order: keypoints and their scores, boxes around them, scores of
            poses, locations.
        """
        keypoints, boxes, scores, index = poses
        candidates = Candidates(
            torch.full_like(index, image),
            index,
            locations.points[index],
            locations.strides[index],
            [index.shape[0]],
        )
        patches = self.head.patches_at(predictions.params_features, candidates)
        params = self.head.predict_params(patches)
        areas, stride = body_areas(keypoints), self.kp_net.map_stride
        offsets, size = predictions.disk_offsets, map_size(image_size, stride)
        features = predictions.keypoint_features[image : image + 1]
        decoded = [
            decode_by_expected_oks(
                logits,
                None if offsets is None else offsets[image],
                areas[chunk],
                self.oks_sigmas,
                stride=stride,
                map_size=size,
                image_size=image_size,
            )
            for _, chunk, logits in self.kp_net.maps(params, candidates, features, [size])
        ]
        keypoints = torch.cat([keypoints[:0], *decoded])
        boxes = boxes_of_poses(keypoints) if self.head.box_pred is None else boxes
        return keypoints, boxes, self.pose_scores(scores, keypoints), index

    def visibility_at(self, predictions: Predictions, image: int, index: Tensor) -> Tensor:
        """Give the probability (n, K) that keypoints are visible, of n locations of an image."""
        patches = gather_patches(predictions.params_features, torch.full_like(index, image), index)
        logits = self.head.predict_visibility(patches)
        assert logits is not None
        return logits.float().sigmoid()

    def pose_scores(self, scores: Tensor, keypoints: Tensor) -> Tensor:
        """Mix person probabilities (n,) with the scores of keypoints (n, K, 3)."""
        weight = self.keypoint_score_weight
        return scores ** (1 - weight) * keypoints[..., 2].mean(dim=1) ** weight


def _write_scalars(**values: Tensor) -> None:
    """Write numbers of a training step, but NaN; one wait for the device."""
    for name, value in zip(values, torch.stack([*values.values()]).tolist(), strict=True):
        if not math.isnan(value):
            get_event_storage().put_scalar(name, value)


def _check_map_stride(map_stride: int, feature_stride: int, size_divisibility: int) -> None:
    """Refuse maps whose cells do not fit into those of their feature, or into a padded image."""
    small, large = sorted([map_stride, feature_stride])
    if small < 1 or large % small or size_divisibility % large:
        raise ValueError(
            f"MODEL.INSPOSE.MAP_STRIDE is {map_stride}: it must divide the stride of "
            f"KEYPOINT_BRANCH.IN_FEATURE, {feature_stride}, or be a multiple of it, and divide "
            f"{size_divisibility}, which images are padded to"
        )


def _average_over_workers(counts: Tensor) -> Tensor:
    """Average counts over all workers, each at least 1: the normalisers of the losses."""
    average = counts.float()
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(average)
        average /= comm.get_world_size()
    return average.clamp(min=1)
