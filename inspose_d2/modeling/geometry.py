"""Every coordinate rule of InsPose, once.

Image coordinates are continuous (x, y) pixels of the network input, sizes are (H, W).
Cell (i, j) of a map of stride s covers [i*s, (i+1)*s) x [j*s, (j+1)*s); i counts along x.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def compute_locations(size: tuple[int, int], stride: int, device: torch.device) -> Tensor:
    """Image points that the cells of a map stand for (sec. 3.1).

    Args:
        size: (H, W) of the map.
        stride: image pixels per cell.
        device: where to put the result.

    Returns:
        (H*W, 2) float32 locations (x, y) in image pixels, row by row: index * s + s // 2.
    """
    ys, xs = (torch.arange(n, device=device, dtype=torch.float32) for n in size)
    grid_y, grid_x = torch.meshgrid(ys, xs, indexing="ij")
    return torch.stack([grid_x, grid_y], dim=-1).reshape(-1, 2) * stride + stride // 2


@dataclass
class Locations:
    """The L locations of an image over all pyramid levels, finest level first, row by row."""

    points: Tensor  # (L, 2) x, y in image pixels
    strides: Tensor  # (L,) float32 stride of the level
    levels: Tensor  # (L,) int64 number of the level, from 0
    sizes: list[tuple[int, int]]  # (H, W) of each level

    @classmethod
    def of(cls, features: list[Tensor], strides: list[int]) -> "Locations":
        """Locations of the feature maps (B, C, H_l, W_l) with these strides."""
        sizes = [(x.shape[2], x.shape[3]) for x in features]
        points = [
            compute_locations(size, stride, x.device)
            for x, size, stride in zip(features, sizes, strides, strict=True)
        ]
        # shape, not len(): torch.export would take that for a constant.
        levels = [x.new_full(x.shape[:1], i, dtype=torch.int64) for i, x in enumerate(points)]
        of_stride = [x.new_full(x.shape[:1], s) for x, s in zip(points, strides, strict=True)]
        return cls(torch.cat(points), torch.cat(of_stride), torch.cat(levels), sizes)

    def grids(self) -> list[Tensor]:
        """Split the points by level: (H, W, 2) each."""
        points = self.points.split([height * width for height, width in self.sizes])
        return [x.unflatten(0, size) for x, size in zip(points, self.sizes, strict=True)]


def coordinate_scale(strides: Tensor) -> Tensor:
    """Pixels that become 1 in the relative coordinates of a candidate (ours, as FCOS levels grow).

    Args:
        strides: (N,) stride of each candidate's pyramid level.

    Returns:
        (N,) scale: 64, 128, 256, 512, 1024 for P3 to P7.
    """
    return 8.0 * strides


def map_size(image_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Size (H, W), in cells, of the part of a map that the image covers, without its padding."""
    height, width = image_size
    # Not -(-height // stride): ONNX rounds a negative quotient up.
    return (height + stride - 1) // stride, (width + stride - 1) // stride


def enclosing_boxes(keypoints: Tensor, labelled: Tensor) -> Tensor:
    """Smallest rectangles around the labelled keypoints: the pseudo-boxes of sec. 3.1.

    Args:
        keypoints: (N, K, 2 or more), x and y first, in any unit.
        labelled: (N, K) bool.

    Returns:
        (N, 4) boxes x0, y0, x1, y1; zeros where no keypoint is labelled.
    """
    xy = keypoints[..., :2]
    inf = xy.new_tensor(float("inf"))
    mask = labelled[..., None]
    low = torch.where(mask, xy, inf).amin(dim=1)
    high = torch.where(mask, xy, -inf).amax(dim=1)
    boxes = torch.cat([low, high], dim=1)
    return torch.where(labelled.any(dim=1)[:, None], boxes, torch.zeros_like(boxes))
