"""What the network should say of a batch: all targets, made from the annotations (sec. 3)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .assignment import BACKGROUND, assign_locations, inside_any
from .candidates import Candidates, candidates_at
from .geometry import Locations, enclosing_boxes
from .keypoint_codec import encode_cells, encode_disk_offsets, encode_heatmaps

PERSON, NO_PERSON, LEFT_OUT = 1, 0, -1
VISIBLE = 2  # COCO's v of a keypoint; 1 is hidden, 0 not labelled
AREA_OF_BOX = 0.53  # COCO's area of a person, that of the mask, as a share of the box
CROWD = -1  # in gt_classes: a region of persons who are not annotated one by one


@dataclass
class Targets:
    """Targets of B images with N positive locations, each of which answers for one person."""

    labels: Tensor  # (B, L) PERSON, NO_PERSON or LEFT_OUT
    positives: Candidates  # N
    cells: Tensor  # (N, K) cell of each keypoint of the positive's person
    labelled: Tensor  # (N, K) bool
    keypoints: Tensor  # (N, K, 3) of the positive's person, image pixels
    areas: Tensor  # (N,) area of the person for OKS, square pixels
    boxes: Tensor  # (N, 4) box that the person was assigned by, image pixels
    disk_offsets: Tensor  # (B, 2K, H, W) in cells
    disk_mask: Tensor  # (B, K, H, W) bool
    heatmaps: Tensor  # (B, K, H', W') at the heatmaps' stride, in [0, 1] or LEFT_OUT
    num_labelled: Tensor  # scalar, labelled keypoints of all persons


@dataclass
class _Persons:
    """The n persons of an image that are to be found, and which location finds whom."""

    keypoints: Tensor  # (n, K, 3)
    labelled: Tensor  # (n, K) bool
    areas: Tensor  # (n,)
    boxes: Tensor  # (n, 4)
    labels: Tensor  # (L,)
    left_out: Tensor  # (m, 4) annotated boxes of those who have no keypoints to learn, crowds too
    of_positive: Tensor  # (N,) person of each positive location, in the order of the locations


class TargetGenerator:
    """Turns annotated persons into targets."""

    @configurable
    def __init__(
        self,
        *,
        num_keypoints: int,
        map_stride: int,
        heatmap_stride: int,
        assign_by_boxes: bool,
        center_sampling_radius: float,
        sizes_of_interest: list[int],
        ignore_unlabeled: bool,
        disk_radius: float,
        heatmap_min_overlap: float,
        heatmap_max_radius: float,
    ) -> None:
        """Set the rules.

        Args:
            num_keypoints: K.
            map_stride: image pixels per cell of keypoint maps and disk offsets.
            heatmap_stride: the same of the heatmaps.
            assign_by_boxes: whether all persons with an annotated box are to be found, by these
                boxes, or those with a labelled keypoint, by pseudo-boxes.
            center_sampling_radius: see :func:`assign_locations`, in strides.
            sizes_of_interest: the same, in pixels.
            ignore_unlabeled: whether the boxes of those who are not to be found (crowds too)
                are left out of the classification loss, and the boxes of those whose keypoints
                are not labelled out of the heatmap loss.
            disk_radius: see :func:`encode_disk_offsets`, but in image pixels.
            heatmap_min_overlap: see :func:`encode_heatmaps`.
            heatmap_max_radius: the same.
        """
        self.num_keypoints = num_keypoints
        self.map_stride = map_stride
        self.heatmap_stride = heatmap_stride
        self.assign_by_boxes = assign_by_boxes
        self.center_sampling_radius = center_sampling_radius
        self.sizes_of_interest = sizes_of_interest
        self.ignore_unlabeled = ignore_unlabeled
        self.disk_radius = disk_radius
        self.heatmap_min_overlap = heatmap_min_overlap
        self.heatmap_max_radius = heatmap_max_radius

    @classmethod
    def from_config(cls, cfg: CfgNode, heatmap_stride: int) -> dict[str, Any]:
        """Read all; ``heatmap_stride`` is that of KEYPOINT_BRANCH.IN_FEATURE."""
        node = cfg.MODEL.INSPOSE
        return {
            "num_keypoints": node.NUM_KEYPOINTS,
            "map_stride": node.MAP_STRIDE,
            "heatmap_stride": heatmap_stride,
            "assign_by_boxes": node.BOX_HEAD.ENABLED,
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "sizes_of_interest": node.SIZES_OF_INTEREST,
            "ignore_unlabeled": node.UNLABELED_PERSONS == "ignore",
            "disk_radius": node.DISK_OFFSET.RADIUS * heatmap_stride,
            "heatmap_min_overlap": node.HEATMAP.MIN_OVERLAP,
            "heatmap_max_radius": node.HEATMAP.MAX_RADIUS or math.inf,
        }

    @torch.no_grad()
    def __call__(
        self, instances: list[Instances], locations: Locations, map_size: tuple[int, int]
    ) -> Targets:
        """Make the targets of a batch.

        Args:
            instances: per image gt_keypoints (n, K, 3) in pixels, gt_boxes and gt_classes, on
                the device of the locations. An image without persons needs no gt_keypoints.
            locations: the L locations of the padded images.
            map_size: (H, W) of the keypoint maps of the padded images.

        Returns:
            The targets.

        Raises:
            ValueError: persons without gt_keypoints, or with another number of keypoints.
        """
        persons = [self._persons(x, locations) for x in instances]
        labels = torch.stack([x.labels for x in persons])
        height, width = (n * self.map_stride // self.heatmap_stride for n in map_size)
        disks = [
            encode_disk_offsets(
                x.keypoints, self.map_stride, map_size, self.disk_radius / self.map_stride
            )
            for x in persons
        ]
        heatmaps = [self._heatmaps(x, (height, width)) for x in persons]
        cells = [encode_cells(x.keypoints, self.map_stride, map_size) for x in persons]
        return Targets(
            labels=labels,
            positives=candidates_at(locations, labels == PERSON),
            cells=torch.cat([c[x.of_positive] for c, x in zip(cells, persons, strict=True)]),
            labelled=torch.cat([x.labelled[x.of_positive] for x in persons]),
            keypoints=torch.cat([x.keypoints[x.of_positive] for x in persons]),
            areas=torch.cat([x.areas[x.of_positive] for x in persons]),
            boxes=torch.cat([x.boxes[x.of_positive] for x in persons]),
            disk_offsets=torch.stack([offsets for offsets, _ in disks]),
            disk_mask=torch.stack([mask for _, mask in disks]),
            heatmaps=torch.stack(heatmaps),
            num_labelled=torch.stack([x.labelled.sum() for x in persons]).sum(),
        )

    def _persons(self, instances: Instances, locations: Locations) -> _Persons:
        """Choose the persons of an image that are to be found and assign the locations."""
        keypoints = self._keypoints(instances, locations.points)
        labelled = keypoints[..., 2] > 0
        if self.assign_by_boxes:
            to_find = instances.gt_classes != CROWD
            boxes = instances.gt_boxes.tensor[to_find]
        else:
            to_find = labelled.any(dim=1)
            boxes = enclosing_boxes(keypoints[to_find], labelled[to_find])
        person = assign_locations(
            locations,
            boxes,
            radius=self.center_sampling_radius,
            sizes_of_interest=self.sizes_of_interest,
        )
        positive = person != BACKGROUND
        labels = torch.where(positive, PERSON, NO_PERSON)
        if self.ignore_unlabeled and not to_find.all():
            left_out = inside_any(locations, instances.gt_boxes.tensor[~to_find])
            labels[left_out & ~positive] = LEFT_OUT
        # An image without persons may have no boxes.
        annotated = instances.gt_boxes if len(instances) else Boxes(keypoints.new_zeros(0, 4))
        return _Persons(
            keypoints[to_find],
            labelled[to_find],
            AREA_OF_BOX * annotated.area()[to_find],
            boxes,
            labels,
            annotated.tensor[~(to_find & labelled.any(dim=1))],
            person[positive],
        )

    def _heatmaps(self, persons: _Persons, size: tuple[int, int]) -> Tensor:
        """Make the heatmaps (K, H', W') of an image; other regions than these hold no keypoints."""
        heatmaps = encode_heatmaps(
            persons.keypoints,
            enclosing_boxes(persons.keypoints, persons.labelled),
            self.heatmap_stride,
            size,
            self.heatmap_min_overlap,
            self.heatmap_max_radius,
        )
        if not self.ignore_unlabeled or len(persons.left_out) == 0:
            return heatmaps
        grid = Locations.of([heatmaps[None]], [self.heatmap_stride])
        left_out = inside_any(grid, persons.left_out).view(size)
        return heatmaps.masked_fill(left_out & (heatmaps < 1), LEFT_OUT)

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
