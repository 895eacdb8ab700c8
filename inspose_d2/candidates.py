"""Candidates: the locations whose KP-Nets are run, chosen by labels or by scores."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import Locations


@dataclass
class Candidates:
    """N locations of a batch, sorted by image."""

    image: Tensor  # (N,) number of the image in the batch
    index: Tensor  # (N,) number among the L locations of the image
    points: Tensor  # (N, 2) x, y in image pixels
    strides: Tensor  # (N,) stride of the pyramid level

    def __getitem__(self, chosen: slice) -> "Candidates":
        """Take some of them."""
        return Candidates(
            self.image[chosen], self.index[chosen], self.points[chosen], self.strides[chosen]
        )

    def slices(self, num_images: int) -> list[slice]:
        """Say which candidates belong to each image of the batch."""
        ends = self.image.bincount(minlength=num_images).cumsum(0).tolist()
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def candidates_at(locations: Locations, chosen: Tensor) -> Candidates:
    """Make candidates of chosen locations.

    Args:
        locations: the L locations that all images of the batch share.
        chosen: (B, L) bool.

    Returns:
        The candidates, in the order of the images and of their locations.
    """
    image, index = chosen.nonzero(as_tuple=True)
    return Candidates(image, index, locations.points[index], locations.strides[index])


def select_by_score(scores: Tensor, threshold: float, topk: int) -> Tensor:
    """Choose the locations that may be persons (sec. 3.4).

    Args:
        scores: (B, L) person probabilities.
        threshold: a location's score must be above.
        topk: at most this many locations of an image.

    Returns:
        (B, L) bool.
    """
    best = scores.topk(min(topk, scores.shape[1]), dim=1)
    chosen = scores.new_zeros(scores.shape, dtype=torch.bool)
    return chosen.scatter(1, best.indices, best.values > threshold)
