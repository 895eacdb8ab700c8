"""Which location answers for which person (sec. 3.1)."""

import math

import torch
from torch import Tensor

from .claims import NOBODY, settle_claims
from .geometry import Locations

BACKGROUND = NOBODY


def assign_locations(
    locations: Locations,
    boxes: Tensor,
    *,
    radius: float,
    sizes_of_interest: list[int],
    nearest: bool = True,
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
        nearest: whether a person whom no location fits gets the nearest; not in the authors' code.

    Returns:
        (L,) int64: index of the person or ``BACKGROUND``.
    """
    index = _windows(locations, (boxes[:, :2] + boxes[:, 2:]) / 2, radius)  # (N, S)
    offset, in_range = _compare(locations, index, boxes, sizes_of_interest)
    half_size = (boxes[:, None, 2:] - boxes[:, None, :2]) / 2
    half_region = half_size.minimum(radius * locations.strides[index][..., None])
    positive = in_range & (offset.abs() < half_region).all(dim=-1)

    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    if not nearest:
        costs = torch.where(positive, area[:, None], torch.inf)
        return settle_claims(index, costs, len(locations.points))

    unfitted = ~positive.any(dim=1)
    distance = offset.square().sum(dim=-1).masked_fill(~in_range, torch.inf)
    distance, column = distance.min(dim=1)
    place = index.gather(1, column[:, None])[:, 0]
    # A location outside the windows is at least radius strides from the centre: one that is nearer
    # is the nearest of all.
    far = (unfitted & (distance >= (radius * locations.strides.min()) ** 2)).nonzero()[:, 0]
    place[far] = _nearest_locations(locations, boxes[far], sizes_of_interest)

    claims = torch.cat([positive, unfitted[:, None]], dim=1)
    return settle_claims(
        torch.cat([index, place[:, None]], dim=1),
        torch.where(claims, area[:, None], torch.inf),
        len(locations.points),
    )


def _windows(locations: Locations, centres: Tensor, radius: float) -> Tensor:
    """Find the locations around each centre, on all levels, that can be in its centre square.

    Args:
        locations: the L locations of the image.
        centres: (N, 2) image pixels.
        radius: half side of the centre square in strides.

    Returns:
        (N, S) location indices, ascending; at the border of a level some come twice.
    """
    size = centres.new_tensor(locations.sizes, dtype=torch.int64).flip(1)  # (levels, 2): W, H
    num_cells = size.prod(dim=1)
    start = num_cells.cumsum(0) - num_cells  # index of the level's first location
    stride = locations.strides[start][:, None]  # (levels, 1)
    # An open interval of length 2r holds at most ceil(2r) cells; one more is for rounding.
    side = math.ceil(2 * radius) + 1
    steps = torch.arange(1, side + 1, device=centres.device)
    window = torch.cartesian_prod(steps, steps).flip(1)  # row by row
    middle = (centres[:, None] - stride // 2) / stride  # (N, levels, 2)
    before = (middle - side / 2).floor().long()  # the window begins one cell after
    cell = before[:, :, None] + window  # (N, levels, side**2, 2)
    column, row = cell.clamp(min=0).minimum(size[:, None] - 1).unbind(-1)
    return (start[:, None] + row * size[:, :1] + column).flatten(1)


def _compare(
    locations: Locations, index: Tensor, boxes: Tensor, sizes_of_interest: list[int]
) -> tuple[Tensor, Tensor]:
    """Compare boxes with locations.

    Args:
        locations: the L locations of the image.
        index: (N, S) or (1, S) locations to compare each box with.
        boxes: (N, 4) image pixels.
        sizes_of_interest: see :func:`assign_locations`.

    Returns:
        (N, S, 2) offsets from the box centres to the locations and (N, S) bool: whether the
        location's level answers for the size.
    """
    bounds = boxes.new_tensor([-torch.inf, *sizes_of_interest, torch.inf])
    level = locations.levels[index]
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    offset = locations.points[index] - (low + high) / 2
    reach = (offset.abs() + (high - low) / 2).amax(dim=-1)  # largest distance to a side
    return offset, (reach >= bounds[level]) & (reach <= bounds[level + 1])


def _nearest_locations(locations: Locations, boxes: Tensor, sizes_of_interest: list[int]) -> Tensor:
    """Find for each person the location nearest to the box centre on a level that fits its size.

    Args:
        locations: the L locations of the image.
        boxes: (N, 4) image pixels.
        sizes_of_interest: see :func:`assign_locations`.

    Returns:
        (N,) location indices; where no location is in range, the nearest of all.
    """
    everywhere = torch.arange(len(locations.points), device=boxes.device)[None]
    offset, in_range = _compare(locations, everywhere, boxes, sizes_of_interest)
    out_of_range = ~in_range & in_range.any(dim=1, keepdim=True)
    return offset.square().sum(dim=-1).masked_fill(out_of_range, torch.inf).argmin(dim=1)


def inside_any(locations: Locations, boxes: Tensor) -> Tensor:
    """Mark the locations that lie in one of the boxes.

    Args:
        locations: the L locations of the image.
        boxes: (N, 4) image pixels.

    Returns:
        (L,) bool.
    """
    x0, y0, x1, y1 = boxes[:, :, None].unbind(dim=1)  # (N, 1)
    inside = []
    for grid in locations.grids():  # (H, W, 2)
        x, y = grid[0, :, 0], grid[:, 0, 1]
        in_columns, in_rows = (x > x0) & (x < x1), (y > y0) & (y < y1)  # (N, W), (N, H)
        # The product counts the boxes around each location, without an (N, H, W) tensor.
        inside.append((in_rows.float().mT @ in_columns.float()).flatten() > 0)
    return torch.cat(inside)
