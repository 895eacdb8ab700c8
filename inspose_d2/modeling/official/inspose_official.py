"""The authors' released model: the whole way from images to poses, one line per stage."""

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ...config.check import check_model
from ..candidates import Candidates
from ..geometry import Locations
from ..image_model import ImageModel
from ..kp_net import KPNet
from ..oks import oks_sigmas
from .criterion import OfficialCriterion, Persons, persons_of
from .decode import HALF_PIXEL, Kept, enlarged_peaks, make_instances, rescale, select_poses
from .head import DENSE_SCALE, DenseBranch, KeypointFeatures, OfficialHead


@dataclass
class OfficialPredictions:
    """What the network says of B images with L locations each, before poses are chosen."""

    pyramid: list[Tensor]  # per level (B, C, H_l, W_l)
    person_logits: Tensor  # (B, L)
    poses: list[Tensor]  # per level (B, 2K, H_l, W_l), see OfficialHead.forward


@META_ARCH_REGISTRY.register()
class InsPoseOfficial(ImageModel):
    """The model whose weights the authors of InsPose published; not that of their paper's text.

    It regresses poses too: these guide classification and parameters, and soft-NMS on their boxes
    comes before the KP-Nets, whose maps are read at twice their resolution.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: OfficialHead,
        kp_net: KPNet,
        keypoint_branch: KeypointFeatures,
        dense_branch: DenseBranch,
        criterion: OfficialCriterion,
        in_features: list[str],
        score_threshold: float,
        topk_candidates: int,
        nms_threshold: float,
        max_poses: int,
        pixel_mean: list[float],
        pixel_std: list[float],
        channels_last: bool,
    ) -> None:
        """Join the built parts.

        Args:
            backbone: makes the pyramid.
            head: person logits, regressed poses and KP-Net parameters of each location.
            kp_net: runs the KP-Nets.
            keypoint_branch: shared input of the KP-Nets.
            dense_branch: offsets at the peaks.
            criterion: targets and losses of training.
            in_features: pyramid levels of the head, finest first, which the branches see too.
            score_threshold: lowest person probability of a candidate.
            topk_candidates: most candidates of a level.
            nms_threshold: of soft-NMS, IoU.
            max_poses: most poses of an image.
            pixel_mean: per channel, in the order of ``INPUT.FORMAT``.
            pixel_std: per channel.
            channels_last: whether convolutions run in this memory layout.
        """
        super().__init__(backbone, pixel_mean, pixel_std)
        self.head = head
        self.kp_net = kp_net
        self.keypoint_branch = keypoint_branch
        self.dense_branch = dense_branch
        self.criterion = criterion
        self.in_features = in_features
        self.score_threshold = score_threshold
        self.topk_candidates = topk_candidates
        self.nms_threshold = nms_threshold
        self.max_poses = max_poses
        shapes = backbone.output_shape()
        self.strides = [shapes[name].stride for name in in_features]
        if channels_last:
            self.to(memory_format=torch.channels_last)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the parts that the config describes; nothing else in this file reads it."""
        check_model(cfg)
        node = cfg.MODEL.INSPOSE
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        channels = shapes[node.KEYPOINT_BRANCH.IN_FEATURE].channels
        kp_net = KPNet(cfg, shapes[node.KEYPOINT_BRANCH.IN_FEATURE].stride)
        return {
            "backbone": backbone,
            "head": OfficialHead(
                in_channels=shapes[node.IN_FEATURES[0]].channels,
                num_convs=node.NUM_CONVS,
                conv_dim=node.CONV_DIM,
                norm=node.NORM,
                num_params=kp_net.num_params,
                num_keypoints=node.NUM_KEYPOINTS,
                prior_prob=node.PRIOR_PROB,
            ),
            "kp_net": kp_net,
            "keypoint_branch": KeypointFeatures(
                in_channels=channels,
                num_convs=node.KEYPOINT_BRANCH.NUM_CONVS,
                conv_dim=node.KEYPOINT_BRANCH.CONV_DIM,
                norm=node.NORM,
                out_channels=node.KEYPOINT_BRANCH.OUT_CHANNELS,
            ),
            "dense_branch": DenseBranch(
                in_channels=channels,
                num_convs=node.HEATMAP.NUM_CONVS,
                conv_dim=node.HEATMAP.CONV_DIM,
                norm=node.NORM,
                num_keypoints=node.NUM_KEYPOINTS,
            ),
            "criterion": OfficialCriterion(
                kp_net=kp_net,
                oks_sigmas=oks_sigmas(cfg),
                center_sampling_radius=node.CENTER_SAMPLING_RADIUS,
                sizes_of_interest=node.SIZES_OF_INTEREST,
                min_overlap=node.HEATMAP.MIN_OVERLAP,
            ),
            "in_features": node.IN_FEATURES,
            "score_threshold": node.SCORE_THRESH_TEST,
            "topk_candidates": node.TOPK_CANDIDATES_TEST,
            "nms_threshold": node.NMS_THRESH_TEST,
            "max_poses": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "channels_last": torch.device(cfg.MODEL.DEVICE).type == "cpu",
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Compute losses in training, poses in evaluation.

        Images of one size are independent of each other. An image that is padded further than it
        would be alone gives other numbers: GroupNorm averages over the padding.

        Args:
            batched_inputs: as :class:`InsPose` takes them.

        Returns:
            Training: dict of losses. Evaluation: per image {"instances": ``Instances`` with
            pred_boxes (of the regressed poses), scores, pred_classes and pred_keypoints (N, K, 3):
            x, y in pixels of the asked size, not clipped, and the keypoint's score in [0, 1]}.
        """
        images = self.preprocess_image(batched_inputs)
        predictions = self.predict(images.tensor)
        locations = self.locations_of(predictions)
        if self.training:
            return self.losses(predictions, locations, batched_inputs, images.image_sizes)

        poses = self.inference(predictions, locations, images.image_sizes)
        return self.results_of(poses, batched_inputs, images.image_sizes)

    def locations_of(self, predictions: OfficialPredictions) -> Locations:
        """Give the locations that predictions are of."""
        return Locations.of(predictions.pyramid, self.strides)

    @staticmethod
    def postprocess(poses: Instances, height: int, width: int) -> Instances:
        """See :func:`inspose_d2.modeling.official.decode.rescale`."""
        return rescale(poses, height, width)

    def predict(self, images: Tensor) -> OfficialPredictions:
        """Run what depends on no pose: backbone, person logits and regressed poses.

        Args:
            images: (B, C, H, W) normalized and padded.

        Returns:
            The predictions.
        """
        features = self.backbone(images)
        pyramid = [features[name] for name in self.in_features]
        return OfficialPredictions(pyramid, *self.head(pyramid))

    def persons_of(
        self, batched_inputs: list[dict[str, Any]], image_sizes: list[tuple[int, int]]
    ) -> list[Persons]:
        """Choose the persons to find in each image, without the half pixel of Detectron2's loader.

        Args:
            batched_inputs: "instances" per image, and "height" and "width" before it was resized.
            image_sizes: (H, W) of each image without padding, pixels.
        """
        persons = []
        for inputs, (height, width) in zip(batched_inputs, image_sizes, strict=True):
            scale = (width / inputs.get("width", width), height / inputs.get("height", height))
            shift = torch.tensor(scale, device=self.device) * -HALF_PIXEL
            persons.append(persons_of(inputs["instances"].to(self.device), shift))
        return persons

    def losses(
        self,
        predictions: OfficialPredictions,
        locations: Locations,
        batched_inputs: list[dict[str, Any]],
        image_sizes: list[tuple[int, int]],
    ) -> dict[str, Tensor]:
        """Compare predictions with annotations.

        Args:
            predictions: of the network.
            locations: of the padded images.
            batched_inputs: as for :meth:`persons_of`.
            image_sizes: the same.

        Returns:
            The losses of :class:`OfficialCriterion`, finite, reaching every parameter that learns.
        """
        persons = self.persons_of(batched_inputs, image_sizes)
        p3 = predictions.pyramid[0]
        targets = self.criterion.targets(persons, locations, (p3.shape[2], p3.shape[3]))
        positives = targets.positives
        deltas = torch.cat([x.flatten(2) for x in predictions.poses], dim=2).mT  # (B, L, 2K)
        dense, features = self.dense_branch(p3), self.keypoint_branch(p3)
        params = self.head.params_everywhere(predictions.pyramid, predictions.poses, positives)
        storage = get_event_storage()
        storage.put_scalar("num_positives", len(positives.index))
        if len(positives.index):
            active = self.kp_net.active_units(params, positives, features)
            storage.put_scalar("active_units", active.item())
        return self.criterion.losses(
            targets,
            persons,
            person_logits=predictions.person_logits,
            params=params,
            regressed=deltas[positives.image, positives.index].unflatten(1, (-1, 2)),
            keypoint_features=features,
            heatmap_logits=self.dense_branch.heatmap_pred(dense),
            tags=self.dense_branch.tag_pred(dense),
            offsets=self.dense_branch.offset_pred(dense),
        )

    def inference(
        self,
        predictions: OfficialPredictions,
        locations: Locations,
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Turn predictions into poses.

        Args:
            predictions: of the network.
            locations: of the padded images.
            image_sizes: (H, W) of each image without padding, pixels.

        Returns:
            Per image ``Instances`` in pixels of the network input; see :func:`make_instances`.
        """
        kept = select_poses(
            locations,
            predictions.person_logits,
            predictions.poses,
            image_sizes,
            score_threshold=self.score_threshold,
            topk=self.topk_candidates,
            nms_threshold=self.nms_threshold,
            max_poses=self.max_poses,
        )
        keypoints = self.keypoints_of(kept, predictions, locations)
        return make_instances(kept, keypoints, image_sizes)

    def keypoints_of(
        self, kept: Kept, predictions: OfficialPredictions, locations: Locations
    ) -> Tensor:
        """Run the KP-Nets of the kept locations, and the layers that only these need.

        Args:
            kept: N locations.
            predictions: of the network.
            locations: of the padded images.

        Returns:
            (N, K, 3) keypoints x, y in pixels of the network input, score.
        """
        candidates = kept.candidates
        if not len(candidates.index):
            return kept.scores.new_zeros(0, self.kp_net.num_keypoints, 3)
        p3 = predictions.pyramid[0]
        params = self.head.predict_params(
            predictions.pyramid, predictions.poses, locations, candidates
        )
        features = self.keypoint_branch(p3)
        cells, scores = enlarged_peaks(self.kp_net, params, candidates, features)
        offsets = self.dense_branch.offsets_at(self.dense_branch(p3), candidates.image, cells)
        width = DENSE_SCALE * p3.shape[3]
        index = torch.stack([cells % width, cells // width], dim=-1)
        xy = (index + offsets.float()) * (self.kp_net.stride / DENSE_SCALE)
        return torch.cat([xy, scores[..., None]], dim=-1)

    def kp_net_inputs(
        self,
        predictions: OfficialPredictions,
        locations: Locations,
        candidates: Candidates,
        image_size: tuple[int, int],  # noqa: ARG002  maps reach into the padding here
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """See :meth:`InsPose.kp_net_inputs`."""
        params = self.head.predict_params(
            predictions.pyramid, predictions.poses, locations, candidates
        )
        features = self.keypoint_branch(predictions.pyramid[0])[0]
        return params, features, self.kp_net.map_size(features)
