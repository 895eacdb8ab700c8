"""What the network says: of whole images, and of the persons at chosen locations."""

from dataclasses import dataclass

from torch import Tensor

from .candidates import Candidates


@dataclass
class Predictions:
    """What the network says of B images with L locations each."""

    person_logits: Tensor  # (B, L)
    params_features: list[Tensor]  # per level, the input of InsPoseHead.at
    keypoint_features: Tensor  # (B, C, H', W'), shared input of the KP-Nets, at their stride
    disk_offsets: Tensor | None  # (B, 2K, H, W) in cells, at the maps' stride; None without branch
    heatmap_logits: Tensor | None  # (B, K, H', W') at P3's stride; None in evaluation too


@dataclass
class PersonPredictions:
    """What the head says of the persons at N locations."""

    candidates: Candidates  # the N locations
    params: Tensor  # (N, P) of their KP-Nets
    boxes: Tensor | None  # (N, 4) x0, y0, x1, y1 in image pixels; None without the box head
    regressed: Tensor | None  # (N, K, 2) to the keypoints, in strides; None in evaluation too
    visibility: Tensor | None  # (N, K) logits; None without this output, and in evaluation
