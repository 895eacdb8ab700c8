"""The losses of eq. 5: what each term is divided by and weighs."""

import math
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from .inference import keypoints_of
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
from .predictions import PersonPredictions, Predictions
from .target_generator import PERSON, VISIBLE, Targets


class Criterion(nn.Module):
    """Compares predictions with targets."""

    oks_sigmas: Tensor

    @configurable
    def __init__(
        self,
        *,
        kp_net: KPNet,
        classification: str,
        focal_loss_alpha: float,
        focal_loss_gamma: float,
        oks_sigmas: list[float],
        weights: dict[str, float],
    ) -> None:
        """Set the rules.

        Args:
            kp_net: runs the KP-Nets.
            classification: "focal" (the paper) or "varifocal", see :func:`quality_loss`.
            focal_loss_alpha: see :func:`classification_loss`.
            focal_loss_gamma: the same.
            oks_sigmas: of each keypoint, see :func:`object_keypoint_similarity`.
            weights: of each loss, by its name.
        """
        super().__init__()
        self.kp_net = kp_net
        self.classification = classification
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.weights = weights
        self.register_buffer("oks_sigmas", torch.tensor(oks_sigmas), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read all but ``kp_net``."""
        node = cfg.MODEL.INSPOSE
        return {
            "classification": node.CLS_LOSS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "oks_sigmas": oks_sigmas(cfg),
            "weights": {f"loss_{key.lower()}": w for key, w in node.LOSS_WEIGHT.items()},
        }

    def forward(
        self,
        predictions: Predictions,
        persons: PersonPredictions,
        targets: Targets,
        image_sizes: list[tuple[int, int]],
    ) -> dict[str, Tensor]:
        """Compute the terms of eq. 5, weighted.

        Args:
            predictions: of the network.
            persons: at ``targets.positives``.
            targets: of the batch.
            image_sizes: (H, W) of each image without padding, pixels.

        Returns:
            The losses by name. A branch that does not exist has none. All are finite and reach
            every parameter, with no person in the batch too.
        """
        features = predictions.keypoint_features
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
            active = self.kp_net.active_units(persons.params, targets.positives, features)
        _write_scalars(num_positives=num_positives, active_units=active)

        log_probs = self.kp_net.log_probs(
            persons.params, targets.positives, features, targets.cells
        )
        losses = {
            "loss_cls": self._person_loss(predictions, persons, targets, image_sizes)
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
        if persons.boxes is not None:
            losses["loss_box"] = box_loss(persons.boxes, targets.boxes) / num_positives
        if persons.regressed is not None:
            where = targets.positives
            offsets = targets.keypoints[..., :2] - where.points[:, None]
            offsets = offsets / where.strides[:, None, None]
            loss = regression_loss(persons.regressed, offsets, targets.labelled)
            losses["loss_regression"] = loss / num_pairs
        if persons.visibility is not None:
            visible = targets.keypoints[..., 2] == VISIBLE
            loss = visibility_loss(persons.visibility, visible, targets.labelled)
            losses["loss_visibility"] = loss / num_pairs
        return {name: self.weights[name] * loss for name, loss in losses.items()}

    def _person_loss(
        self,
        predictions: Predictions,
        persons: PersonPredictions,
        targets: Targets,
        image_sizes: list[tuple[int, int]],
    ) -> Tensor:
        """Sum of the classification loss: persons are 1, or as good as the pose found there."""
        logits, labels = predictions.person_logits, targets.labels
        if self.classification == "focal":
            alpha, gamma = self.focal_loss_alpha, self.focal_loss_gamma
            return classification_loss(logits, labels, alpha=alpha, gamma=gamma)
        with torch.no_grad():
            poses = keypoints_of(self.kp_net, predictions, persons, image_sizes, normalize=False)
            quality = object_keypoint_similarity(
                torch.cat(poses), targets.keypoints, targets.areas, self.oks_sigmas
            )
        get_event_storage().put_scalar("mean_oks", quality.mean().nan_to_num())
        return quality_loss(logits, labels, quality, alpha=0.75, gamma=2.0)


def _write_scalars(**values: Tensor) -> None:
    """Write numbers of a training step, but NaN; one wait for the device."""
    for name, value in zip(values, torch.stack([*values.values()]).tolist(), strict=True):
        if not math.isnan(value):
            get_event_storage().put_scalar(name, value)


def _average_over_workers(counts: Tensor) -> Tensor:
    """Average counts over all workers, each at least 1: the normalisers of the losses."""
    average = counts.float()
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(average)
        average /= comm.get_world_size()
    return average.clamp(min=1)
