"""Keypoints to map cells, disk offsets and Gaussians, and back (eq. 2 to 4, sec. 3.3).

Keypoints are (N, K, 3): x, y in image pixels and v; v > 0 means labelled. In map units a
keypoint is (x / stride, y / stride); its cell is the floor, the centre of cell q is q + 0.5.
"""

import torch
from torch import Tensor

from .claims import NOBODY, settle_claims


def encode_cells(keypoints: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Find the cell of each keypoint: the one-hot target of eq. 4 as an index.

    Args:
        keypoints: (N, K, 3).
        stride: image pixels per cell.
        size: (H, W) of the map; a keypoint on or beyond its border is in the last cell.

    Returns:
        (N, K) int64 index, row * W + column.
    """
    column, row = _cells(keypoints[..., :2] / stride, size).unbind(-1)
    return row * size[1] + column


def decode_keypoints(
    cells: Tensor,
    scores: Tensor,
    disk_offsets: Tensor | None,
    *,
    stride: int,
    map_width: int,
    image_size: tuple[int, int],
) -> Tensor:
    """Turn peaks into keypoints (eq. 3), kept inside the image.

    Args:
        cells: (N, K) peak of each map, row * map_width + column.
        scores: (N, K) keypoint scores.
        disk_offsets: (2K, H, W) offsets in cells as x0, y0, x1, ..., where the maps may have
            padding; None takes the cell's centre.
        stride: image pixels per cell.
        map_width: width of the maps without padding.
        image_size: (H, W) of the image in pixels.

    Returns:
        (N, K, 3) keypoints x, y in image pixels, score.
    """
    row = cells // map_width
    # Not cells % map_width: torch.export fails on it where the width is not known.
    column = cells - row * map_width
    index = torch.stack([column, row], dim=-1)  # (N, K, 2)
    if disk_offsets is None:
        offset = torch.full_like(index, 0.5, dtype=scores.dtype)
    else:
        per_keypoint = disk_offsets.unflatten(0, (-1, 2))  # (K, 2, H, W)
        offset = per_keypoint[torch.arange(cells.shape[1], device=cells.device), :, row, column]
    height, width = image_size
    x, y = ((index + offset.to(scores.dtype)) * stride).unbind(-1)
    return torch.stack([x.clamp(0, width), y.clamp(0, height), scores], dim=-1)


def encode_disk_offsets(
    keypoints: Tensor, stride: int, size: tuple[int, int], radius: float
) -> tuple[Tensor, Tensor]:
    """Write the offset to the keypoint into every cell of the disk around it (sec. 3.3).

    Where disks of the same keypoint of several persons overlap, the nearest wins, then the
    person with the lower index.

    Args:
        keypoints: (N, K, 3).
        stride: image pixels per cell.
        size: (H, W) of the map.
        radius: cells; a cell belongs to the disk if its centre is within.

    Returns:
        (2K, H, W) offsets keypoint - cell index, in cells, laid out x0, y0, x1, ..., and
        (K, H, W) bool: where there is a disk.
    """
    (height, width), num_keypoints = size, keypoints.shape[1]
    _, channel, point = _labelled_points(keypoints, stride)  # (M,), (M, 2)
    reach = int(radius + 0.5)  # a point is at most half a cell from the centre of its own
    steps = torch.arange(-reach, reach + 1, device=point.device)
    window = _cells(point, size)[..., None] + steps  # (M, 2, S) columns and rows
    inside = window.clamp(min=0).minimum(_last_cell(window, size)[:, None])
    column, row = inside.unbind(1)
    cell = ((channel[:, None] * height + row) * width)[..., None] + column[:, None]  # (M, S, S)
    square = (point[..., None] - window - 0.5).square().masked_fill(window != inside, torch.inf)
    distance = square[:, 0, None] + square[:, 1, :, None]
    distance = distance.masked_fill(distance > radius**2, torch.inf)
    owner = settle_claims(cell.flatten(1), distance.flatten(1), num_keypoints * height * width)

    return _offsets_of_owners(owner, point, (num_keypoints, height, width))


def encode_square_offsets(
    keypoints: Tensor, radius: Tensor, stride: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Write the offset to the keypoint into every cell of a square around its own.

    What the authors' code does where the paper has disks. Where squares of the same keypoint of
    several persons overlap, the shorter offset wins, then the person with the lower index.

    Args:
        keypoints: (N, K, 3).
        radius: (N,) half sides of the squares of each person, whole cells.
        stride: image pixels per cell.
        size: (H, W) of the map.

    Returns:
        As :func:`encode_disk_offsets`.
    """
    (height, width), num_keypoints = size, keypoints.shape[1]
    person, channel, point = _labelled_points(keypoints, stride)  # (M,), (M,), (M, 2)
    reach = int(radius.max()) if len(radius) else 0
    steps = torch.arange(-reach, reach + 1, device=point.device)
    window = _cells(point, size)[..., None] + steps  # (M, 2, S) columns and rows
    last = _last_cell(window, size)[:, None]
    inside = (window >= 0) & (window <= last) & (steps.abs() <= radius[person][:, None, None])
    column, row = window.clamp(min=0).minimum(last).unbind(1)
    cell = ((channel[:, None] * height + row) * width)[..., None] + column[:, None]  # (M, S, S)
    square = (point[..., None] - window).square().masked_fill(~inside, torch.inf)
    distance = square[:, 0, None] + square[:, 1, :, None]
    owner = settle_claims(cell.flatten(1), distance.flatten(1), num_keypoints * height * width)
    return _offsets_of_owners(owner, point, (num_keypoints, height, width))


def _offsets_of_owners(
    owner: Tensor, point: Tensor, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Offsets (2K, H, W) from the cells to the points that own them, and where there are any.

    Args:
        owner: (K * H * W,) number of the point, or ``NOBODY``.
        point: (M, 2) map coordinates.
        shape: (K, H, W).
    """
    mask = owner != NOBODY
    owned = point.index_select(0, owner[mask])
    mask = mask.view(shape)
    k, row, column = mask.nonzero(as_tuple=True)
    offsets = point.new_zeros(shape[0], 2, *shape[1:])
    offsets[k, :, row, column] = owned - torch.stack([column, row], dim=1)
    return offsets.flatten(0, 1), mask


def encode_heatmaps(
    keypoints: Tensor,
    boxes: Tensor,
    stride: int,
    size: tuple[int, int],
    min_overlap: float,
    max_radius: float = torch.inf,
) -> Tensor:
    """Draw a Gaussian around the cell of each keypoint; where they overlap the larger counts.

    Args:
        keypoints: (N, K, 3).
        boxes: (N, 4) pseudo-boxes in image pixels, which set the width of the Gaussians.
        stride: image pixels per cell.
        size: (H, W) of the map.
        min_overlap: see :func:`gaussian_radius`.
        max_radius: no Gaussian is wider, cells (the authors' later code).

    Returns:
        (K, H, W) heatmaps in [0, 1], exactly 1 in the keypoints' cells.
    """
    (height, width), num_keypoints = size, keypoints.shape[1]
    person, channel, point = _labelled_points(keypoints, stride)  # (M,), (M,), (M, 2)
    radius = gaussian_radius((boxes[:, 2:] - boxes[:, :2]) / stride, min_overlap)
    radius = radius.clamp(max=max_radius).floor()[person]
    spread = 2 * ((2 * radius + 1) / 6).square()  # 2 sigma^2
    centre = _cells(point, size)
    low = (centre - radius[:, None].long()).clamp(min=0)
    high = (centre + radius[:, None].long()).minimum(_last_cell(centre, size))

    # Squares differ in size: list their rows, then the cells of the rows.
    of_point, row = _ranges(low[:, 1], high[:, 1])
    of_row, column = _ranges(low[of_point, 0], high[of_point, 0])
    row_start = (channel[of_point] * height + row) * width
    row_square = (row - centre[of_point, 1]).square()
    of_rows = centre[of_point, 0], row_square, spread[of_point], row_start
    # From rows to their cells; on the CPU index_select is several times faster than [].
    centre_column, row_square, spread, start = (x.index_select(0, of_row) for x in of_rows)
    value = torch.exp(-((column - centre_column).square() + row_square) / spread)
    heatmaps = keypoints.new_zeros(num_keypoints * height * width)
    heatmaps = heatmaps.scatter_reduce(0, start + column, value, "amax")
    return heatmaps.view(num_keypoints, height, width)


def gaussian_radius(size: Tensor, min_overlap: float) -> Tensor:
    """How far both corners of a box may move outwards and keep the IoU (CornerNet sec. 3.2).

    Of CornerNet's three cases the third is always the smallest; it is taken here in the form of
    CornerNet's code, which divides by 2 where the quadratic formula has 2a.

    Args:
        size: (N, 2) widths and heights in cells.
        min_overlap: IoU, in (0, 1).

    Returns:
        (N,) radius in cells.
    """
    b, area = -2 * min_overlap * size.sum(dim=1), size.prod(dim=1)
    return (b + (b.square() + 16 * min_overlap * (1 - min_overlap) * area).sqrt()) / 2


def _labelled_points(keypoints: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Person (M,), channel (M,) and map coordinates (M, 2) of the labelled keypoints."""
    person, channel = (keypoints[..., 2] > 0).nonzero(as_tuple=True)
    return person, channel, keypoints[person, channel, :2] / stride


def _cells(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Cell (column, row), inside the map, of each point (..., 2) in map coordinates."""
    return points.floor().clamp(min=0).minimum(_last_cell(points, size)).long()


def _last_cell(like: Tensor, size: tuple[int, int]) -> Tensor:
    """Last column and row (2,) of a map."""
    return like.new_tensor([size[1] - 1, size[0] - 1])


def _ranges(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Write ranges of integers one after the other.

    Args:
        low: (M,) int64 first of each range.
        high: (M,) int64 last of each range, not below the first.

    Returns:
        (E,) number of the range and (E,) integer, for all E integers of all ranges.
    """
    length = high - low + 1
    of_range = torch.repeat_interleave(length)
    shift = low - (length.cumsum(0) - length)  # from the number of the entry to its integer
    entry = torch.arange(len(of_range), device=low.device)
    return of_range, entry + shift.index_select(0, of_range)
