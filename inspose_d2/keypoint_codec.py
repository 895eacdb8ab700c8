"""Keypoints to map cells, disk offsets and Gaussians, and back (eq. 2 to 4, sec. 3.3).

Keypoints are (N, K, 3): x, y in image pixels and v; v > 0 means labelled. In map units a
keypoint is (x / stride, y / stride); its cell is the floor, the centre of cell q is q + 0.5.
"""

import torch
from torch import Tensor


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
        disk_offsets: (2K, H, W) offsets in cells as x0, y0, x1, ...; None takes the cell's centre.
        stride: image pixels per cell.
        map_width: W of the maps.
        image_size: (H, W) of the image in pixels.

    Returns:
        (N, K, 3) keypoints x, y in image pixels, score.
    """
    index = torch.stack([cells % map_width, cells // map_width], dim=-1)  # (N, K, 2)
    if disk_offsets is None:
        offset = torch.full_like(index, 0.5, dtype=scores.dtype)
    else:
        per_keypoint = disk_offsets.flatten(1).unflatten(0, (-1, 2))  # (K, 2, H*W)
        offset = per_keypoint[torch.arange(cells.shape[1], device=cells.device), :, cells]
    height, width = image_size
    limit = scores.new_tensor([width, height])
    xy = ((index + offset.to(scores.dtype)) * stride).clamp(min=0).minimum(limit)
    return torch.cat([xy, scores[..., None]], dim=-1)


def encode_disk_offsets(
    keypoints: Tensor, stride: int, size: tuple[int, int], radius: float
) -> tuple[Tensor, Tensor]:
    """Write the offset to the keypoint into every cell of the disk around it (sec. 3.3).

    Where disks of the same keypoint of several persons overlap, the nearest wins.

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
    channel, point = _labelled_points(keypoints, stride)  # (M,), (M, 2)
    cell = _cells(point, size)[:, None] + _window(int(radius) + 1, point.device)  # (M, S, 2)
    vector = point[:, None] - cell  # to the keypoint, from the cell's index
    distance = (vector - 0.5).square().sum(dim=-1)
    in_disk = (distance <= radius**2) & _inside(cell, size)
    target = ((channel[:, None] * height + cell[..., 1]) * width + cell[..., 0])[in_disk]

    # Rank all entries by distance; the lowest rank that claims a cell gets it.
    order = distance[in_disk].argsort(stable=True)
    claims, rank = target[order], torch.arange(len(order), device=point.device)
    winner = torch.full((num_keypoints * height * width,), len(order), device=point.device)
    winner = winner.scatter_reduce(0, claims, rank, "amin")
    mask = winner < len(order)
    offsets = point.new_zeros(num_keypoints * height * width, 2)
    offsets[mask] = vector[in_disk][order[winner[mask]]]
    offsets = offsets.unflatten(0, (num_keypoints, -1)).mT  # (K, 2, H*W)
    return offsets.reshape(-1, height, width), mask.view(num_keypoints, height, width)


def encode_heatmaps(
    keypoints: Tensor, boxes: Tensor, stride: int, size: tuple[int, int], min_overlap: float
) -> Tensor:
    """Draw a Gaussian around the cell of each keypoint; where they overlap the larger counts.

    Args:
        keypoints: (N, K, 3).
        boxes: (N, 4) pseudo-boxes in image pixels, which set the width of the Gaussians.
        stride: image pixels per cell.
        size: (H, W) of the map.
        min_overlap: see :func:`gaussian_radius`.

    Returns:
        (K, H, W) heatmaps in [0, 1], exactly 1 in the keypoints' cells.
    """
    (height, width), num_keypoints = size, keypoints.shape[1]
    heatmaps = keypoints.new_zeros(num_keypoints * height * width)
    channel, point = _labelled_points(keypoints, stride)
    if len(point) == 0:
        return heatmaps.view(num_keypoints, height, width)
    radius = gaussian_radius((boxes[:, 2:] - boxes[:, :2]) / stride, min_overlap).floor()
    radius = radius[:, None].expand(keypoints.shape[:2])[keypoints[..., 2] > 0]  # (M,)
    step = _window(int(radius.max()), point.device)  # (S, 2)
    cell = _cells(point, size)[:, None] + step  # (M, S, 2)
    sigma = (2 * radius + 1) / 6
    value = torch.exp(-step.square().sum(dim=-1) / (2 * sigma[:, None].square()))
    drawn = (step.abs().amax(dim=-1) <= radius[:, None]) & _inside(cell, size)
    target = ((channel[:, None] * height + cell[..., 1]) * width + cell[..., 0])[drawn]
    heatmaps = heatmaps.scatter_reduce(0, target, value[drawn], "amax")
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


def _labelled_points(keypoints: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Channel (M,) and map coordinates (M, 2) of the labelled keypoints."""
    labelled = keypoints[..., 2] > 0
    return labelled.nonzero()[:, 1], keypoints[..., :2][labelled] / stride


def _cells(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Cell (column, row), inside the map, of each point (..., 2) in map coordinates."""
    limit = points.new_tensor([size[1] - 1, size[0] - 1])
    return points.floor().clamp(min=0).minimum(limit).long()


def _inside(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Which cells (..., 2), as (column, row), are in the map."""
    return ((cells >= 0) & (cells < cells.new_tensor([size[1], size[0]]))).all(dim=-1)


def _window(radius: int, device: torch.device) -> Tensor:
    """Steps (S, 2) from a cell to the cells of the square of side 2 * radius + 1 around it."""
    steps = torch.arange(-radius, radius + 1, device=device)
    return torch.cartesian_prod(steps, steps)
