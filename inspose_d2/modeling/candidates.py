"""Candidates: the locations whose KP-Nets are run, chosen by labels or by scores."""

import itertools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import Locations

logger = logging.getLogger(__name__)


@dataclass
class Candidates:
    """N locations of a batch, sorted by image."""

    image: Tensor  # (N,) number of the image in the batch
    index: Tensor  # (N,) number among the L locations of the image
    points: Tensor  # (N, 2) x, y in image pixels
    strides: Tensor  # (N,) stride of the pyramid level
    counts: list[int]  # candidates of each image; plain numbers, lest a GPU be asked again

    def slices(self) -> list[slice]:
        """Say which candidates belong to each image of the batch."""
        ends = list(itertools.accumulate(self.counts, initial=0))
        return [slice(*pair) for pair in itertools.pairwise(ends)]


def candidates_at(locations: Locations, chosen: Tensor) -> Candidates:
    """Make candidates of chosen locations.

    Args:
        locations: the L locations that all images of the batch share.
        chosen: (B, L) bool.

    Returns:
        The candidates, in the order of the images and of their locations.
    """
    image, index = chosen.nonzero(as_tuple=True)
    counts = chosen.sum(dim=1).tolist()
    return Candidates(image, index, locations.points[index], locations.strides[index], counts)


def select_by_score(
    locations: Locations, scores: Tensor, threshold: float, topk: int
) -> Candidates:
    """Choose the locations that may be persons (sec. 3.4).

    Scores that are not a number are passed over, and a warning counts them: a model whose weights
    are damaged would find nobody without a word.

    Args:
        locations: the L locations that all images of the batch share.
        scores: (B, L) person probabilities.
        threshold: a location's score must be above.
        topk: at most this many locations of an image.

    Returns:
        The candidates, best first in each image.
    """
    size = scores.shape[1]
    # min() would fix a size that torch.export leaves open; sym_min() fails in torch.jit.trace.
    smaller = torch.sym_min if isinstance(size, torch.SymInt) else min
    is_nan = scores.isnan()
    best = scores.masked_fill(is_nan, 0).topk(smaller(topk, size), dim=1)
    found = best.values > threshold
    if torch.compiler.is_compiling():  # an export can choose rows, but not cut at a number it lacks
        chosen = [row[own] for row, own in zip(best.indices, found, strict=True)]
        counts = [row.shape[0] for row in chosen]
    else:
        # All that the host needs to know, at once.
        counts, nans = torch.stack([found.sum(dim=1), is_nan.sum(dim=1)]).tolist()
        if any(nans):
            logger.warning(
                "%d person scores of %d images are not a number: are the weights, or the images, "
                "damaged?",
                sum(nans),
                len(nans) - nans.count(0),
            )
        chosen = [row[:count] for row, count in zip(best.indices, counts, strict=True)]
    image = torch.cat([torch.full_like(own, number) for number, own in enumerate(chosen)])
    index = torch.cat(chosen)
    return Candidates(image, index, locations.points[index], locations.strides[index], counts)
