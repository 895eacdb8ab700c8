"""Targets and the seven losses of the authors' model, all of weight 1.

Every normaliser is the worker's own count, as in the authors' code.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor

from ..assignment import BACKGROUND, assign_locations
from ..candidates import Candidates, candidates_at
from ..geometry import Locations, enclosing_boxes
from ..keypoint_codec import (
    encode_cells,
    encode_heatmaps,
    encode_square_offsets,
    gaussian_radius,
)
from ..kp_net import KPNet
from ..losses import heatmap_loss, keypoint_loss, regression_loss
from ..oks import object_keypoint_similarity
from ..target_generator import AREA_OF_BOX, CROWD
from .head import DENSE_SCALE

UNLABELLED_QUALITY = 0.1  # target of the score of a person without labelled keypoints
VARIFOCAL_ALPHA, VARIFOCAL_GAMMA = 0.75, 2.0
MAX_RADIUS = 3  # cells of the dense maps, of Gaussians and of the windows of offsets
MIN_SIDE = 1.0  # pixels; persons with a smaller box are background


@dataclass
class Persons:
    """The n persons of an image who are to be found."""

    keypoints: Tensor  # (n, K, 3) network pixels, in COCO's convention
    boxes: Tensor  # (n, 4) around the labelled keypoints, or annotated where there are none
    areas: Tensor  # (n,) square pixels


@dataclass
class OfficialTargets:
    """Targets of B images with N positive locations."""

    positives: Candidates  # N
    is_positive: Tensor  # (B, L) bool
    keypoints: Tensor  # (N, K, 3) of the positive's person
    boxes: Tensor  # (N, 4) of the positive's person
    cells: Tensor  # (N, K) cell of each keypoint in the maps of the KP-Nets
    areas: Tensor  # (N,)
    heatmaps: Tensor  # (B, K, 2H, 2W)
    offsets: Tensor  # (B, 2K, 2H, 2W) in cells
    offset_mask: Tensor  # (B, K, 2H, 2W) bool


def persons_of(instances: Instances, shift: Tensor) -> Persons:
    """Choose the persons of an image who are to be found, and their boxes.

    Crowds, and persons whose labelled keypoints span less than a pixel, are background.

    Args:
        instances: gt_keypoints, gt_boxes and gt_classes, network pixels; the area of a person is
            taken as a share of the box.
        shift: (2,) x, y that keypoints are moved by, pixels.

    Returns:
        The persons.
    """
    keypoints = instances.gt_keypoints.tensor.clone()
    keypoints[..., :2] += shift
    labelled = keypoints[..., 2] > 0
    given = instances.gt_boxes.tensor
    boxes = torch.where(labelled.any(dim=1)[:, None], enclosing_boxes(keypoints, labelled), given)
    large = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(dim=1)
    keep = large & (instances.gt_classes != CROWD)
    return Persons(keypoints[keep], boxes[keep], AREA_OF_BOX * instances.gt_boxes.area()[keep])


class OfficialCriterion:
    """Makes targets, and compares predictions with them."""

    def __init__(
        self,
        *,
        kp_net: KPNet,
        oks_sigmas: list[float],
        center_sampling_radius: float,
        sizes_of_interest: list[int],
        min_overlap: float,
    ) -> None:
        """Set the rules.

        Args:
            kp_net: runs the KP-Nets.
            oks_sigmas: (K,) of COCO.
            center_sampling_radius: see :func:`assign_locations`, in strides.
            sizes_of_interest: the same, in pixels.
            min_overlap: see :func:`gaussian_radius`, of Gaussians and windows.
        """
        self.kp_net = kp_net
        self.oks_sigmas = oks_sigmas
        self.center_sampling_radius = center_sampling_radius
        self.sizes_of_interest = sizes_of_interest
        self.min_overlap = min_overlap

    @torch.no_grad()
    def targets(
        self, persons: list[Persons], locations: Locations, map_size: tuple[int, int]
    ) -> OfficialTargets:
        """Make the targets of a batch.

        Args:
            persons: per image.
            locations: the L locations of the padded images.
            map_size: (H, W) of the maps of the KP-Nets.

        Returns:
            The targets.
        """
        stride = self.kp_net.stride
        person = torch.stack(
            [
                assign_locations(
                    locations,
                    own.boxes,
                    radius=self.center_sampling_radius,
                    sizes_of_interest=self.sizes_of_interest,
                    nearest=False,
                )
                for own in persons
            ]
        )
        is_positive = person != BACKGROUND
        chosen = [x[x != BACKGROUND] for x in person]
        keypoints = torch.cat([x.keypoints[i] for x, i in zip(persons, chosen, strict=True)])
        dense = [self._dense_targets(own, map_size) for own in persons]
        heatmaps, offsets, masks = (torch.stack(x) for x in zip(*dense, strict=True))
        return OfficialTargets(
            positives=candidates_at(locations, is_positive),
            is_positive=is_positive,
            keypoints=keypoints,
            boxes=torch.cat([x.boxes[i] for x, i in zip(persons, chosen, strict=True)]),
            cells=encode_cells(keypoints, stride, map_size),
            areas=torch.cat([x.areas[i] for x, i in zip(persons, chosen, strict=True)]),
            heatmaps=heatmaps,
            offsets=offsets,
            offset_mask=masks,
        )

    def _dense_targets(
        self, persons: Persons, map_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Heatmaps (K, 2H, 2W), offsets (2K, 2H, 2W) and their mask (K, 2H, 2W) of an image."""
        stride = self.kp_net.stride // DENSE_SCALE
        size = DENSE_SCALE * map_size[0], DENSE_SCALE * map_size[1]
        heatmaps = encode_heatmaps(
            persons.keypoints, persons.boxes, stride, size, self.min_overlap, MAX_RADIUS
        )
        sides = (persons.boxes[:, 2:] - persons.boxes[:, :2]) / stride
        radius = gaussian_radius(sides, self.min_overlap).clamp(max=MAX_RADIUS).floor()
        return heatmaps, *encode_square_offsets(persons.keypoints, radius, stride, size)

    def losses(
        self,
        targets: OfficialTargets,
        persons: list[Persons],
        *,
        person_logits: Tensor,
        params: Tensor,
        regressed: Tensor,
        keypoint_features: Tensor,
        heatmap_logits: Tensor,
        tags: Tensor,
        offsets: Tensor,
    ) -> dict[str, Tensor]:
        """Compare predictions with targets.

        Args:
            targets: of :meth:`targets`.
            persons: that they were made of.
            person_logits: (B, L).
            params: (N, P) KP-Net parameters of the positive locations.
            regressed: (N, K, 2) their regressed poses, from the location, in strides.
            keypoint_features: (B, C, H, W).
            heatmap_logits: (B, K, 2H, 2W).
            tags: (B, K, 2H, 2W).
            offsets: (B, 2K, 2H, 2W).

        Returns:
            The losses by name.
        """
        positives, labelled = targets.positives, targets.keypoints[..., 2] > 0
        quality = self._quality(targets, params, keypoint_features)
        log_probs = self.kp_net.log_probs(params, positives, keypoint_features, targets.cells)
        points, strides = positives.points[:, None], positives.strides[:, None, None]
        distances = (targets.keypoints[..., :2] - points) / strides
        num_pairs = labelled.sum().clamp(min=1)
        mask = targets.offset_mask.repeat_interleave(2, dim=1)
        num_images = len(person_logits)
        dense_stride = self.kp_net.stride // DENSE_SCALE
        of_tags = [tag_losses(*x, dense_stride) for x in zip(tags, persons, strict=True)]
        pull, push = zip(*of_tags, strict=True)
        return {
            "loss_cls": varifocal_loss(
                person_logits,
                torch.zeros_like(person_logits, dtype=torch.float32).masked_scatter(
                    targets.is_positive, quality
                ),
            )
            / (len(quality) + num_images),
            "loss_keypoint": keypoint_loss(log_probs, labelled) / num_pairs,
            "loss_regression": regression_loss(regressed, distances, labelled) / num_pairs,
            "loss_heatmap": heatmap_loss(heatmap_logits, targets.heatmaps)
            / (targets.heatmaps == 1).sum().clamp(min=1),
            "loss_tag_pull": torch.stack(pull).sum() / num_images,
            "loss_tag_push": torch.stack(push).sum() / num_images,
            "loss_offset": F.l1_loss(offsets[mask].float(), targets.offsets[mask], reduction="sum")
            / (mask.sum() + 1e-4),
        }

    @torch.no_grad()
    def _quality(self, targets: OfficialTargets, params: Tensor, features: Tensor) -> Tensor:
        """OKS (N,) of the poses that the maps show, in cells; the area stays in pixels.

        So distances are 8 times too small beside the area: the authors' code is that lenient.
        """
        height, width = features.shape[2], features.shape[3]
        sizes = [(height, width)] * len(features)
        cells, _ = self.kp_net.peaks(params, targets.positives, features, sizes, normalize=False)
        found, expected = (
            torch.stack([x % width, x // width], dim=-1).float() for x in (cells, targets.cells)
        )
        visible = targets.keypoints[..., 2:]
        sigmas = found.new_tensor(self.oks_sigmas)
        expected = torch.cat([expected, visible], dim=-1)
        quality = object_keypoint_similarity(found, expected, targets.areas + 1e-4, sigmas)
        return quality.where((visible > 0).any(dim=1)[:, 0], UNLABELLED_QUALITY)


def varifocal_loss(logits: Tensor, quality: Tensor) -> Tensor:
    """Cross-entropy towards the quality of the pose at each location (Zhang et al. 2021).

    Unlike :func:`inspose_d2.modeling.losses.quality_loss`, gradients go through the weights too.

    Args:
        logits: (...) person logits.
        quality: (...) in [0, 1], 0 where there is no person.

    Returns:
        Scalar sum.
    """
    logits = logits.float()
    weight = VARIFOCAL_ALPHA * (logits.sigmoid() - quality).abs() ** VARIFOCAL_GAMMA
    weight = torch.where(quality > 0, quality, weight)
    loss = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return (weight * loss).sum()


def tag_losses(tags: Tensor, persons: Persons, stride: int) -> tuple[Tensor, Tensor]:
    """Associative embedding: tags of a person are pulled together, persons pushed apart.

    Tags are read one cell above and left of the keypoint's, as in the authors' code.

    Args:
        tags: (K, 2H, 2W) of an image.
        persons: of the image.
        stride: image pixels per cell.

    Returns:
        Scalars pull and push, 0 without labelled keypoints.
    """
    labelled = persons.keypoints[..., 2] > 0
    persons_of_tags, channel = labelled[labelled.any(dim=1)].nonzero(as_tuple=True)
    zero = tags.sum() * 0  # keeps the graph
    if not len(channel):
        return zero, zero
    column, row = (persons.keypoints[labelled][:, :2] / stride).floor().long().sub(1).unbind(1)
    own = tags[channel, row, column].float()
    n = int(persons_of_tags.max()) + 1
    count = torch.bincount(persons_of_tags, minlength=n)
    mean = own.new_zeros(n).index_add(0, persons_of_tags, own) / count
    square = (own - mean[persons_of_tags]).square()
    pull = (own.new_zeros(n).index_add(0, persons_of_tags, square) / count).mean()
    if n == 1:
        return pull, zero
    near = torch.exp(-(mean[:, None] - mean).square())
    return pull, (near.sum() - near.diagonal().sum()) / (2 * n * (n - 1))
