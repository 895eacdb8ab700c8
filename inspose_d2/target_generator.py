"""What the network should say of a batch: all targets, made from ``gt_keypoints`` (sec. 3)."""

from dataclasses import dataclass

import torch
from detectron2.structures import Instances
from torch import Tensor

from .assignment import BACKGROUND, assign_locations, inside_any
from .candidates import Candidates, candidates_at
from .geometry import Locations, enclosing_boxes
from .keypoint_codec import encode_cells, encode_disk_offsets, encode_heatmaps

PERSON, NO_PERSON, LEFT_OUT = 1, 0, -1


@dataclass
class Targets:
    """Targets of B images with N positive locations, each of which answers for one person."""

    labels: Tensor  # (B, L) PERSON, NO_PERSON or LEFT_OUT
    positives: Candidates  # N
    cells: Tensor  # (N, K) cell of each keypoint of the positive's person
    labelled: Tensor  # (N, K) bool
    disk_offsets: Tensor  # (B, 2K, H, W) in cells
    disk_mask: Tensor  # (B, K, H, W) bool
    heatmaps: Tensor  # (B, K, H, W)
    num_labelled: Tensor  # scalar, labelled keypoints of all persons


class TargetGenerator:
    """Turns annotated persons into targets."""

    def __init__(
        self,
        *,
        num_keypoints: int,
        map_stride: int,
        center_sampling_radius: float,
        sizes_of_interest: list[int],
        ignore_unlabeled: bool,
        disk_radius: float,
        heatmap_min_overlap: float,
    ) -> None:
        """Set the rules.

        Args:
            num_keypoints: K.
            map_stride: image pixels per cell of the keypoint maps.
            center_sampling_radius: see :func:`assign_locations`, in strides.
            sizes_of_interest: the same, in pixels.
            ignore_unlabeled: whether the boxes of persons without labelled keypoints (crowds
                too) are left out of the classification loss.
            disk_radius: see :func:`encode_disk_offsets`, in cells.
            heatmap_min_overlap: see :func:`encode_heatmaps`.
        """
        self.num_keypoints = num_keypoints
        self.map_stride = map_stride
        self.center_sampling_radius = center_sampling_radius
        self.sizes_of_interest = sizes_of_interest
        self.ignore_unlabeled = ignore_unlabeled
        self.disk_radius = disk_radius
        self.heatmap_min_overlap = heatmap_min_overlap

    @torch.no_grad()
    def __call__(
        self, instances: list[Instances], locations: Locations, map_size: tuple[int, int]
    ) -> Targets:
        """Make the targets of a batch.

        Args:
            instances: per image gt_keypoints (n, K, 3) in pixels and gt_boxes, on the
                device of the locations. An image without persons needs no gt_keypoints.
            locations: the L locations of the padded images.
            map_size: (H, W) of the keypoint maps of the padded images.

        Returns:
            The targets.

        Raises:
            ValueError: persons without gt_keypoints, or with another number of keypoints.
        """
        per_image = [self._targets_of_image(x, locations, map_size) for x in instances]
        labels, cells, labelled, offsets, masks, heatmaps, counts = zip(*per_image, strict=True)
        return Targets(
            labels=torch.stack(labels),
            positives=candidates_at(locations, torch.stack(labels) == PERSON),
            cells=torch.cat(cells),
            labelled=torch.cat(labelled),
            disk_offsets=torch.stack(offsets),
            disk_mask=torch.stack(masks),
            heatmaps=torch.stack(heatmaps),
            num_labelled=torch.stack(counts).sum(),
        )

    def _targets_of_image(
        self, instances: Instances, locations: Locations, map_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        """Make the targets of one image, in the order in which ``__call__`` unpacks them."""
        keypoints = self._keypoints(instances, locations.points)
        has_pose = (keypoints[..., 2] > 0).any(dim=1)
        poses = keypoints[has_pose]
        labelled = poses[..., 2] > 0
        boxes = enclosing_boxes(poses, labelled)

        person = assign_locations(
            locations,
            boxes,
            radius=self.center_sampling_radius,
            sizes_of_interest=self.sizes_of_interest,
        )
        positive = person != BACKGROUND
        labels = torch.where(positive, PERSON, NO_PERSON)
        if self.ignore_unlabeled and not has_pose.all():
            unlabeled = inside_any(locations, instances.gt_boxes.tensor[~has_pose])
            labels[unlabeled & ~positive] = LEFT_OUT

        return (
            labels,
            encode_cells(poses, self.map_stride, map_size)[person[positive]],
            labelled[person[positive]],
            *encode_disk_offsets(poses, self.map_stride, map_size, self.disk_radius),
            encode_heatmaps(poses, boxes, self.map_stride, map_size, self.heatmap_min_overlap),
            labelled.sum(),
        )

    def _keypoints(self, instances: Instances, like: Tensor) -> Tensor:
        """Keypoints (n, K, 3) of an image; (0, K, 3) where there is no person."""
        if len(instances) == 0:
            return like.new_zeros(0, self.num_keypoints, 3)
        if not instances.has("gt_keypoints"):
            raise ValueError(
                f"{len(instances)} persons have no gt_keypoints: set MODEL.KEYPOINT_ON: True"
            )
        keypoints = instances.gt_keypoints.tensor
        if keypoints.shape[1] != self.num_keypoints:
            raise ValueError(
                f"MODEL.INSPOSE.NUM_KEYPOINTS is {self.num_keypoints}, but the annotations have "
                f"{keypoints.shape[1]} keypoints per person: set it to that number"
            )
        return keypoints
