"""Decoding keypoint maps to the points of the highest expected OKS (ours, instead of eq. 2)."""

import math

import torch
from torch import Tensor

from .kp_net import find_cells

# Of a probability and of a Gaussian: products of three of them are still normal numbers, and all
# others take a CPU five times as long. No sum of cells is changed by it.
LEAST = 1e-12


def decode_by_expected_oks(
    logits: Tensor,
    places: Tensor,
    areas: Tensor,
    sigmas: Tensor,
    *,
    stride: int,
    image_size: tuple[int, int],
) -> Tensor:
    """Find for each keypoint the point where the expected OKS is highest.

    A map is a distribution over the cells where the keypoint may be. OKS forgives a distance in
    proportion to the person's size and to the keypoint's sigma; so its expectation at a point is
    the map under a Gaussian of that width, and it is highest where much probability lies near,
    not in the single best cell: for a large person dozens of cells are as good. From the best cell
    the point moves to the mean, under the same Gaussian, of the places that the disk offsets point
    at: as the Gaussian becomes narrower than a cell this becomes eq. 2 and 3.

    Args:
        logits: (N, K, H*W) keypoint maps of N persons.
        places: (K, 2, H, W) from :func:`places_of_cells`.
        areas: (N,) of the persons, square pixels, as OKS takes them.
        sigmas: (K,) of OKS.
        stride: image pixels per cell.
        image_size: (H, W) of the image in pixels.

    Returns:
        (N, K, 3) keypoints x, y in image pixels, and the expected OKS in [0, 1] as their scores.
    """
    height, width = map_size = places.shape[2], places.shape[3]
    columns = torch.arange(width, device=logits.device)
    rows = torch.arange(height, device=logits.device)
    with torch.autocast(logits.device.type, enabled=False):  # whose products would be rounded
        maps = logits.float().softmax(dim=2).clamp_(min=LEAST).unflatten(2, map_size)
        # Half of what OKS divides the square of a distance by is the variance of the Gaussian.
        spread = 2 * sigmas * areas.sqrt()[:, None] / stride  # (N, K) cells
        across, down = _gaussian(columns, spread), _gaussian(rows, spread)
        cells, scores = find_cells((down @ maps @ across).flatten(2), width)
        row = cells // width
        column = cells - row * width
        near = maps.mul_(_row_of(down, row)[..., None] * _row_of(across, column)[:, :, None])
        # Of each keypoint (N, H * W) @ (H * W, 3): the sums of x and y, and of the weights.
        ones = torch.ones_like(places[:, :1])
        sums = near.flatten(2).transpose(0, 1) @ torch.cat([places, ones], 1).flatten(2).mT
        x, y, total = sums.transpose(0, 1).unbind(dim=2)
        x, y = x / total * stride, y / total * stride
    x, y = x.clamp(0, image_size[1]), y.clamp(0, image_size[0])
    return torch.stack([x, y, scores.clamp(max=1)], dim=2)


def places_of_cells(
    disk_offsets: Tensor | None, num_keypoints: int, map_size: tuple[int, int], device: torch.device
) -> Tensor:
    """Where each cell of a map says that the keypoint is.

    Args:
        disk_offsets: as for :func:`.decode_keypoints`; (2K, at least H, at least W) or None.
        num_keypoints: K.
        map_size: (H, W) of the maps without padding.
        device: where to put the result.

    Returns:
        (K, 2, H, W) float32 x, y in cells.
    """
    rows, columns = (torch.arange(n, device=device) for n in map_size)
    cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy")).float()
    if disk_offsets is None:
        return (cells + 0.5).expand(num_keypoints, -1, -1, -1)
    offsets = disk_offsets.unflatten(0, (-1, 2))
    return cells + offsets.index_select(-2, rows).index_select(-1, columns)


def _gaussian(cells: Tensor, spread: Tensor) -> Tensor:
    """How much OKS is left between each two of W cells: (N, K, W, W)."""
    squares = (cells[:, None] - cells).square()
    exponents = squares / (-2 * spread.square())[..., None, None]
    return exponents.clamp_(min=math.log(LEAST)).exp_()


def _row_of(matrices: Tensor, row: Tensor) -> Tensor:
    """Take a row of each of the matrices (N, K, W, W): (N, K, W)."""
    index = row[..., None, None].expand(-1, -1, 1, matrices.shape[3])
    return matrices.gather(2, index)[:, :, 0]
