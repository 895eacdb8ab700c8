import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inspose_d2.modeling.claims import NOBODY, settle_claims

CLAIMS = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.sampled_from([0.0, 1e-40, 0.5, 1.0, 1.0 + 2**-23, 3e38, math.inf]),
    ),
    min_size=3,
    max_size=3,
)


def settle(places: list[list[int]], costs: list[list[float]], num_places: int) -> list[int]:
    owners = settle_claims(torch.tensor(places), torch.tensor(costs), num_places)
    assert owners.dtype == torch.int64
    return owners.tolist()


@pytest.mark.parametrize("num_claims", [0, 9])
def test_nobody_claims(num_claims: int) -> None:
    places = torch.zeros(0, num_claims, dtype=torch.int64)
    assert settle_claims(places, torch.zeros(0, num_claims), 2).tolist() == [NOBODY, NOBODY]


@given(claims=st.lists(CLAIMS, min_size=1, max_size=8))
def test_claims_equal_loops(claims: list[list[tuple[int, float]]]) -> None:
    lowest = [(math.inf, NOBODY)] * 5
    for number, own in enumerate(claims):
        for place, cost in own:
            if cost < lowest[place][0]:
                lowest[place] = cost, number
    places, costs = ([[claim[i] for claim in own] for own in claims] for i in (0, 1))
    assert settle(places, costs, 5) == [number for _, number in lowest]
