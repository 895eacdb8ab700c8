"""InsPose: the whole way from images to poses or losses, one line per stage (fig. 3)."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Instances
from torch import Tensor

from ..config.check import check_model
from .branches import DiskOffsetBranch, HeatmapBranch, KeypointFeatureBranch
from .candidates import Candidates
from .criterion import Criterion
from .geometry import Locations, map_size
from .head import InsPoseHead, gather_patches
from .image_model import ImageModel
from .inference import PoseInference
from .kp_net import KPNet
from .predictions import Predictions
from .target_generator import TargetGenerator


@META_ARCH_REGISTRY.register()
class InsPose(ImageModel):
    """Single-stage multi-person pose estimation with instance-aware dynamic networks."""

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
        criterion: Criterion,
        pose_inference: PoseInference,
        in_features: list[str],
        map_feature: str,
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
            criterion: compares predictions with them.
            pose_inference: makes poses of the predictions in evaluation.
            in_features: pyramid levels of the head, finest first.
            map_feature: pyramid level of the three branches.
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
        self.criterion = criterion
        self.pose_inference = pose_inference
        self.in_features = in_features
        self.map_feature = map_feature
        shapes = backbone.output_shape()
        self.strides = [shapes[name].stride for name in in_features]
        if channels_last:
            self.to(memory_format=torch.channels_last)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the parts that the config describes; each reads its own keys."""
        check_model(cfg)
        node = cfg.MODEL.INSPOSE
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        feature = shapes[node.KEYPOINT_BRANCH.IN_FEATURE]
        _check_map_stride(node.MAP_STRIDE, feature.stride, backbone.size_divisibility)
        kp_net = KPNet(cfg, feature.stride)
        return {
            "backbone": backbone,
            "head": InsPoseHead(
                cfg,
                in_channels=shapes[node.IN_FEATURES[0]].channels,
                num_params=kp_net.num_params,
            ),
            "kp_net": kp_net,
            "keypoint_branch": KeypointFeatureBranch(cfg, feature),
            "disk_offset_branch": DiskOffsetBranch(cfg, feature)
            if node.DISK_OFFSET.ENABLED
            else None,
            "heatmap_branch": HeatmapBranch(cfg, feature) if node.HEATMAP.ENABLED else None,
            "target_generator": TargetGenerator(cfg, feature.stride),
            "criterion": Criterion(cfg, kp_net=kp_net),
            "pose_inference": PoseInference(cfg, kp_net=kp_net),
            "in_features": node.IN_FEATURES,
            "map_feature": node.KEYPOINT_BRANCH.IN_FEATURE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            # 0.7 of the step on a CPU core; CUDA's group norm would copy it back at each layer.
            "channels_last": torch.device(cfg.MODEL.DEVICE).type == "cpu",
        }

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
            ``VISIBILITY.ENABLED`` pred_visibility (N, K) too, the probability that the keypoint is
            visible}.
        """
        images = self.preprocess_image(batched_inputs)
        predictions = self.predict(images.tensor)
        locations = self.locations_of(predictions)
        if self.training:
            instances = [x["instances"].to(self.device) for x in batched_inputs]
            return self.losses(predictions, locations, instances)

        poses = self.inference(predictions, locations, images.image_sizes)
        return self.results_of(poses, batched_inputs, images.image_sizes)

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
        self, predictions: Predictions, locations: Locations, instances: list[Instances]
    ) -> dict[str, Tensor]:
        """Compare predictions with annotations.

        Args:
            predictions: of the network.
            locations: of the padded images.
            instances: gt_keypoints, gt_boxes and gt_classes per image.

        Returns:
            The terms of eq. 5, weighted; see :class:`Criterion`.
        """
        maps = self.kp_net.map_size(predictions.keypoint_features)
        targets = self.target_generator(instances, locations, maps)
        persons = self.head.at(predictions.params_features, targets.positives)
        return self.criterion(predictions, persons, targets, [x.image_size for x in instances])

    def inference(
        self, predictions: Predictions, locations: Locations, image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """Turn predictions into poses (sec. 3.4).

        Args:
            predictions: of the network.
            locations: of the padded images.
            image_sizes: (H, W) of each image without padding, pixels.

        Returns:
            Per image its poses in pixels of the network input; see :meth:`Poses.to_instances`.
        """
        candidates = self.pose_inference.candidates(predictions, locations)
        persons = self.head.at(predictions.params_features, candidates)
        poses = self.pose_inference(predictions, persons, image_sizes)
        if self.head.visibility_pred is not None:
            for image, own in enumerate(poses):
                own.pred_visibility = self.visibility_at(predictions, image, own.pred_locations)
        return poses

    def visibility_at(self, predictions: Predictions, image: int, locations: Tensor) -> Tensor:
        """Give the visibility (N, K) of the keypoints of poses, in [0, 1].

        Args:
            predictions: of the network, which has this output.
            image: number in the batch.
            locations: (N,) of the poses, their numbers among the L locations.
        """
        where = torch.full_like(locations, image), locations
        patches = gather_patches(predictions.params_features, *where)
        logits = self.head.predict_visibility(patches)
        assert logits is not None
        return logits.float().sigmoid()

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
        params = self.head.at(predictions.params_features, candidates).params
        maps = map_size(image_size, self.kp_net.map_stride)
        height, width = self.kp_net.feature_size(maps)
        return params, predictions.keypoint_features[0, :, :height, :width], maps


def _check_map_stride(map_stride: int, feature_stride: int, size_divisibility: int) -> None:
    """Refuse maps whose cells do not fit into those of their feature, or into a padded image."""
    small, large = sorted([map_stride, feature_stride])
    if small < 1 or large % small or size_divisibility % large:
        raise ValueError(
            f"MODEL.INSPOSE.MAP_STRIDE is {map_stride}: it must divide the stride of "
            f"KEYPOINT_BRANCH.IN_FEATURE, {feature_stride}, or be a multiple of it, and divide "
            f"{size_divisibility}, which images are padded to"
        )
