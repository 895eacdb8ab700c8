"""Who gets a place that several persons claim: a location (sec. 3.1), a cell (sec. 3.3)."""

import torch
from torch import Tensor

NOBODY = -1
_NO_CLAIM = 0x7F800000 << 32  # infinity's bits above any row number
_ROW = 0xFFFFFFFF


def settle_claims(places: Tensor, costs: Tensor, num_places: int) -> Tensor:
    """Give each place to the claimant with the lowest cost, then with the lowest number (ours).

    Args:
        places: (M, S) int64 places in [0, num_places) that each of M claimants asks for.
        costs: (M, S) not negative; infinite where there is no claim after all.
        num_places: number of places.

    Returns:
        (num_places,) int64: number of the claimant or ``NOBODY``.
    """
    # The bits of floats that are not negative are ordered like the floats. With the claimant's
    # number in the lower half one minimum of integers settles both, on any device alike.
    row = torch.arange(len(costs), device=costs.device)[:, None]
    keys = (costs.float().view(torch.int32).long() << 32) | row
    best = keys.new_full((num_places,), _NO_CLAIM)
    best = best.scatter_reduce(0, places.flatten(), keys.flatten(), "amin")
    return (best & _ROW).masked_fill(best == _NO_CLAIM, NOBODY)
