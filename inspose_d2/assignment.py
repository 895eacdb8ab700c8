"""Which location answers for which person (sec. 3.1)."""

import torch
from torch import Tensor

from .geometry import Locations

BACKGROUND = -1


def assign_locations(
    locations: Locations, boxes: Tensor, *, radius: float, sizes_of_interest: list[int]
) -> Tensor:
    """Give each location of one image the person it must find, or background.

    A location is positive for a person when it lies strictly inside the square of half side
    ``radius * stride`` around the box centre, cut down to the box, and the largest of its
    distances to the sides of the box is in the range of its level, ends included (FCOS).
    Of several persons the smallest box wins, then the lower index. A person whom no location
    fits, such as one with a single keypoint, competes for the nearest one (ours).

    Args:
        locations: the L locations of the image.
        boxes: (N, 4) boxes of the persons to find, image pixels.
        radius: half side of the centre square in strides.
        sizes_of_interest: bounds between the ranges of the levels in pixels, one fewer than levels.

    Returns:
        (L,) int64: index of the person or ``BACKGROUND``.
    """
    points, stride = locations.points, locations.strides
    if len(boxes) == 0:
        return torch.full_like(locations.levels, BACKGROUND)
    bounds = points.new_tensor([-torch.inf, *sizes_of_interest, torch.inf])
    low, high = bounds[locations.levels], bounds[locations.levels + 1]

    offset = points[:, None] - (boxes[:, :2] + boxes[:, 2:]) / 2  # (L, N, 2) from the centre
    half_size = (boxes[:, 2:] - boxes[:, :2]) / 2
    reach = (offset.abs() + half_size).amax(dim=-1)  # largest distance to a side
    in_range = (reach >= low[:, None]) & (reach <= high[:, None])
    half_region = half_size.minimum(radius * stride[:, None, None])  # centre square cut to the box
    positive = in_range & (offset.abs() < half_region).all(dim=-1)

    unfitted = ~positive.any(dim=0)
    positive[_nearest_locations(offset, in_range)[unfitted], unfitted.nonzero()[:, 0]] = True

    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    smallest, person = torch.where(positive, area, torch.inf).min(dim=1)
    return torch.where(torch.isfinite(smallest), person, BACKGROUND)


def _nearest_locations(offset: Tensor, in_range: Tensor) -> Tensor:
    """Find for each person the location nearest to the box centre on a level that fits its size.

    Args:
        offset: (L, N, 2) from box centres to locations.
        in_range: (L, N) whether the location's level answers for the size.

    Returns:
        (N,) location indices; where no location is in range, the nearest of all.
    """
    distance = offset.square().sum(dim=-1)
    out_of_range = ~in_range & in_range.any(dim=0)
    return distance.masked_fill(out_of_range, torch.inf).argmin(dim=0)


def inside_any(locations: Locations, boxes: Tensor) -> Tensor:
    """Mark the locations that lie in one of the boxes.

    Args:
        locations: the L locations of the image.
        boxes: (N, 4) image pixels.

    Returns:
        (L,) bool.
    """
    points = locations.points[:, None]
    return ((points > boxes[:, :2]) & (points < boxes[:, 2:])).all(dim=-1).any(dim=-1)
