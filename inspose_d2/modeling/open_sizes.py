"""Sizes that torch.export leaves open, as one letter each.

The exporter carries the size of every tensor as a term in the sizes of the input and proves each
comparison on it. A padded and resized picture has long terms, and with them an export takes twice
as long. Here a size becomes a number that only the running program knows. Ours.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pad_to_multiple(images: Tensor, divisor: int) -> Tensor:
    """Pad images (..., H, W) at the bottom and right until their sides divide by a number."""
    height, width = images.shape[-2:]
    rows, columns = opened((side + divisor - 1) // divisor for side in (height, width))
    return F.pad(images, (0, columns * divisor - width, 0, rows * divisor - height))


def opened(sizes: Iterable[int]) -> list[int]:
    """Give sizes of at least 1 as numbers that the exporter knows nothing else about."""
    numbers: list[Any] = [torch.scalar_tensor(x, dtype=torch.int64).item() for x in sizes]
    for number in numbers:
        torch._check(number >= 1)
    return numbers


def with_opened_size(images: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Give images (..., H, W) of a size, and the size, in :func:`opened` numbers."""
    height, width = opened(size)
    return F.pad(images, (0, width - size[1], 0, height - size[0])), (height, width)


def open_norms(model: nn.Module) -> None:
    """Let the group norms of a model not ask whether a group has but one value: a size may be 1."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = _GroupNorm


class _GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
