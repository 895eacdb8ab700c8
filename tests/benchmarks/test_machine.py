"""What benchmarks say of the machine."""

from unittest.mock import patch

import pytest
import torch

from benchmarks.machine import Probe, limits, probes
from benchmarks.timing import Seconds


def test_limit_is_the_best_rate_of_each_unit() -> None:
    found = limits(
        [
            Probe("product", "multiply-adds", 8.0, print),
            Probe("convolution", "multiply-adds", 9.0, print),
            Probe("copy", "bytes", 0.5, print),
        ],
        [Seconds(4, 2, 9), Seconds(5, 3, 6), Seconds(2, 0.25, 3)],
    )
    assert found == {
        "multiply-adds": {"rate": 4, "probe": "product"},  # 8 / 2 against 9 / 3
        "bytes": {"rate": 2, "probe": "copy"},
    }


def test_probes_do_the_work_that_they_say() -> None:
    by_name = {probe.name: probe for probe in probes("cpu")}
    product = by_name["matrix product"].run()
    assert by_name["matrix product"].amount == pytest.approx(product.shape[0] ** 3 / 1e9)
    out = by_name["3x3 convolution"].run()
    assert out.shape == (1, 256, 100, 152)
    assert by_name["3x3 convolution"].amount == pytest.approx(out.numel() * 9 * 256 / 1e9)
    copied = by_name["copy"].run()
    assert by_name["copy"].amount == pytest.approx(2 * copied.numel() * copied.itemsize / 1e9)
    with patch.object(torch, "exp", wraps=torch.exp) as exp:
        by_name["exp in the cache"].run()
    done = sum(call.args[0].numel() for call in exp.call_args_list)
    assert by_name["exp in the cache"].amount == pytest.approx(done / 1e9)
