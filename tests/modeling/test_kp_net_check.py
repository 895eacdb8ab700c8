"""Kernels that give wrong numbers, or do not compile, are found out and replaced."""

import logging
import math
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from inspose_d2.modeling import kp_net_check
from inspose_d2.modeling.candidates import Candidates
from inspose_d2.modeling.kp_net import KPNet

HEIGHT, WIDTH, K = 5, 7, 3
SIZES = [(HEIGHT, WIDTH), (4, 6)]
CELLS = torch.arange(5 * K).view(5, K)
Kernels = SimpleNamespace


@pytest.fixture(autouse=True)
def nothing_checked() -> Iterator[None]:
    """Forget what other tests have found out, and leave nothing."""
    kept = [x.copy() for x in (kp_net_check._problems, kp_net_check._passed)]
    for known in (kp_net_check._problems, kp_net_check._passed):
        known.clear()
    yield
    for known, before in zip((kp_net_check._problems, kp_net_check._passed), kept, strict=True):
        known.clear()
        known.update(before)


def right_kernels() -> Kernels:
    """What the Triton kernels compute, from the definition."""
    definition = KPNet(stride=8, feature_channels=4, channels=8, num_layers=2, num_keypoints=K)

    def maps(
        params: Tensor, points: Tensor, scales: Tensor, image: Tensor, features: Tensor
    ) -> Any:
        for n, number in enumerate(image.tolist()):
            own = params[n, None], points[n, None], scales[n, None] / 8, features[number]
            yield number, definition.maps_by_grouped_convolution(*own)[0]

    def peaks(*args: Tensor, **_: Any) -> tuple[Tensor, ...]:
        *inputs, sizes = args
        own = [x[:, : sizes[i][0], : sizes[i][1]].flatten(1) for i, x in maps(*inputs)]
        best = [x.max(dim=1) for x in own]
        return (
            torch.stack([x.indices for x in best]),
            torch.stack([x.values for x in best]),
            torch.stack([x.logsumexp(dim=1) for x in own]),
        )

    def log_probs(*args: Tensor, **_: Any) -> Tensor:
        *inputs, cells = args
        all_maps = torch.stack([x.flatten(1) for _, x in maps(*inputs)])
        return all_maps.log_softmax(dim=2).gather(2, cells[..., None])[..., 0]

    return Kernels(peaks=peaks, log_probs=log_probs)


class OtherGradient(torch.autograd.Function):
    """Gives back its input; its gradient is of the wrong sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        return -grad


def tampered(what: str) -> Kernels:
    """Kernels with one fault."""
    kernels = right_kernels()
    peaks, log_probs = kernels.peaks, kernels.log_probs

    def wrong_peaks(*args: Tensor, **constants: Any) -> tuple[Tensor, ...]:
        cells, logits, log_sums = peaks(*args, **constants)
        if what == "cell":
            cells[-1, -1] = (cells[-1, -1] + 1) % 24
        elif what == "sum":
            log_sums = log_sums + 0.05
        elif what == "logit":
            logits = logits * math.nan
        return cells, logits, log_sums

    def wrong_log_probs(*args: Tensor, **constants: Any) -> Tensor:
        result = log_probs(*args, **constants)
        if what == "probability":
            return result + 0.05
        return OtherGradient.apply(result) if what == "gradient" else result

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("at 3:4:\n    x = y\nno such thing as y")

    if what == "compiler":
        return Kernels(peaks=fail, log_probs=fail)
    return Kernels(peaks=wrong_peaks, log_probs=wrong_log_probs)


def make(backend: str, kernels: Kernels | None, monkeypatch: pytest.MonkeyPatch) -> KPNet:
    kp_net = KPNet(
        stride=8, feature_channels=4, channels=8, num_layers=2, num_keypoints=K, backend=backend
    )
    if kernels is not None:
        monkeypatch.setattr(kp_net, "_kernels", lambda _: kernels)
    return kp_net


def batch(kp_net: KPNet) -> tuple[Tensor, Candidates, Tensor]:
    """Five persons in two images."""
    generator = torch.Generator().manual_seed(0)
    candidates = Candidates(
        torch.tensor([0, 0, 1, 1, 1]),
        torch.zeros(5, dtype=torch.int64),
        torch.rand(5, 2, generator=generator) * 40,
        torch.tensor([8.0, 16.0, 8.0, 32.0, 8.0]),
        [2, 3],
    )
    params = torch.randn(5, kp_net.num_params, generator=generator)
    return params, candidates, torch.randn(2, 4, HEIGHT, WIDTH, generator=generator)


def run(kp_net: KPNet, task: str) -> Tensor:
    """Cells of the peaks, or the gradient of the parameters."""
    params, candidates, features = batch(kp_net)
    if task == "peaks":
        return kp_net.peaks(params, candidates, features, SIZES)[0]
    log_probs = kp_net.log_probs(params.requires_grad_(), candidates, features, CELLS)
    return torch.autograd.grad(log_probs.square().sum(), params)[0]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]


FAULTS = [
    ("peaks", "cell", "the logits at the cells of the peaks differ by"),
    ("peaks", "logit", "the logits of the peaks differ by nan"),
    ("peaks", "sum", "the log-sum-exp of the maps differ by 0.05"),
    ("peaks", "compiler", "they fail with RuntimeError: no such thing as y"),
    ("loss", "probability", "the log-probabilities differ by 0.05"),
    ("loss", "gradient", "the gradient of the parameters differ by .*the gradient of the features"),
    ("loss", "compiler", "they fail with RuntimeError: no such thing as y"),
]


@pytest.mark.parametrize(("task", "fault", "message"), FAULTS)
def test_wrong_kernels_are_replaced_with_one_warning(
    task: str,
    fault: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = run(make("torch", None, monkeypatch), task)
    kp_net = make("auto", tampered(fault), monkeypatch)
    for _ in range(2):
        assert run(kp_net, task).equal(expected)
    assert run(make("auto", tampered(fault), monkeypatch), task).equal(expected)  # another model
    (warning,) = warnings_of(caplog)
    pattern = "KP-Nets run as matrix products, without Triton: .*first 5 persons: .*" + message
    assert re.search(pattern, warning)


@pytest.mark.parametrize(("task", "fault", "message"), FAULTS)
def test_wrong_kernels_that_were_asked_for_are_an_error(
    task: str, fault: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kp_net = make("triton", tampered(fault), monkeypatch)
    with pytest.raises(
        ValueError, match=rf"BACKEND is 'triton', but .*{message}.*set it to 'auto'"
    ):
        run(kp_net, task)


@pytest.mark.parametrize("task", ["peaks", "loss"])
def test_right_kernels_are_checked_once_and_taken(
    task: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels, persons = right_kernels(), []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Tensor, **constants: Any) -> Any:
            persons.append(len(args[0]))
            return function(*args, **constants)

        return call

    kernels = Kernels(**{name: counted(function) for name, function in vars(kernels).items()})
    monkeypatch.setattr(kp_net_check, "NUM_PERSONS", 3)
    kp_net = make("auto", kernels, monkeypatch)
    expected = run(make("torch", None, monkeypatch), task)
    for _ in range(2):
        torch.testing.assert_close(run(kp_net, task), expected, rtol=1e-4, atol=1e-4)
    assert persons == [3, 5, 5]
    assert not warnings_of(caplog)


def test_what_one_task_finds_holds_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    kp_net = make("auto", tampered("sum"), monkeypatch)
    run(kp_net, "peaks")
    kp_net._kernels = lambda _: Kernels(peaks=None, log_probs=None)  # type: ignore[method-assign]
    run(kp_net, "loss")  # would fail


def test_persons_whose_numbers_are_not_finite_prove_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kp_net = make("auto", tampered("sum"), monkeypatch)
    params, candidates, features = batch(kp_net)
    kp_net.peaks(params * math.nan, candidates, features, SIZES)
    assert not warnings_of(caplog)
    kp_net.peaks(params, candidates, features, SIZES)
    assert len(warnings_of(caplog)) == 1
