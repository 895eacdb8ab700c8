"""Seconds of the KP-Nets alone, beside the least that their work takes on the machine."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import limits, probes
from benchmarks.models import SEED, Setting, build_inspose, person_boxes
from benchmarks.timing import by_turns
from inspose_d2.modeling.candidates import Candidates
from inspose_d2.modeling.geometry import map_size
from inspose_d2.modeling.kp_net import KPNet

BACKENDS = ("grouped", "torch", "triton")  # the first is the definition, sec. 3.2
COMPARED_PERSONS, PEAK_TOLERANCE = 20, 1e-3
PEAKS, LOSS = "peaks", "loss and gradient"


@dataclass(frozen=True)
class Drawn:
    """Arguments of the KP-Nets of N persons in one image."""

    params: Tensor  # (N, P)
    candidates: Candidates
    features: Tensor  # (1, C, H, W)
    cells: Tensor  # (N, K)


def kp_net_of(setting: Setting) -> KPNet:
    """The KP-Net of the config."""
    return build_inspose(setting).kp_net


def draw_kp_nets(setting: Setting, net: KPNet, num_persons: int, maps: tuple[int, int]) -> Drawn:
    """Draw parameters, locations and features at random; maps are (H, W) cells."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(setting.device)

    height, width = maps
    boxes = person_boxes(num_persons, (height * net.stride, width * net.stride))
    image = torch.zeros(num_persons, dtype=torch.int64)
    candidates = Candidates(
        image.to(setting.device),
        image.to(setting.device),
        (boxes[:, :2] / 2 + boxes[:, 2:] / 2).to(setting.device),
        torch.full((num_persons,), 8.0, device=setting.device),
        [num_persons],
    )
    features = normal(1, net.widths[0] - 2, height, width)
    cells = torch.randint(height * width, (num_persons, net.num_keypoints), generator=generator).to(
        setting.device
    )
    with setting.autocast():  # of the dtype that a model would make them
        dtype = torch.get_autocast_dtype(features.device.type) if setting.amp else features.dtype
    return Drawn(normal(num_persons, net.num_params) / 3, candidates, features.to(dtype), cells)


def peaks_call(net: KPNet, drawn: Drawn) -> Callable[..., Any]:
    """Make the function that finds the peaks, as at inference."""
    size = (drawn.features.shape[2], drawn.features.shape[3])

    def run(*_: Any) -> Any:
        with torch.inference_mode():
            return net.peaks(drawn.params, drawn.candidates, drawn.features, [size])

    return run


def training_call(net: KPNet, drawn: Drawn) -> Callable[..., Any]:
    """Make the function that computes the keypoint loss and its gradient."""
    leaves = [drawn.params.requires_grad_(), drawn.features.requires_grad_()]

    def run(*_: Any) -> Any:
        log_probs = net.log_probs(leaves[0], drawn.candidates, leaves[1], drawn.cells)
        return torch.autograd.grad(-log_probs.sum(), leaves)

    return run


CALLS = {PEAKS: peaks_call, LOSS: training_call}


def least_work(net: KPNet, task: str, num_persons: int, cells: int) -> dict[str, float]:
    """Count what no implementation can do without, in 1e9, in float32.

    Args:
        net: the KP-Net.
        task: ``PEAKS`` or ``LOSS``.
        num_persons: N.
        cells: H * W.

    Returns:
        By unit of :func:`machine.probes`: multiply-adds; bytes, where features, parameters and
        outputs (for the loss also both gradients) pass once and maps never; exponentials of each
        map's softmax, once.
    """
    macs = sum(n_in * n_out for n_in, n_out in net.layers)  # 280 per cell and person
    features, params = 4 * (net.widths[0] - 2) * cells, 4 * num_persons * net.num_params
    outputs = num_persons * net.num_keypoints * (8 + 4)  # a cell as int64, a number
    moved = features + params + outputs
    if task == LOSS:
        # Backwards: of the weights as many as forwards, of the inputs all but the coordinates'.
        macs = 3 * macs - 2 * net.layers[0][1]
        moved += features + params
    return {
        "multiply-adds": macs * cells * num_persons / 1e9,
        "bytes": moved / 1e9,
        "exponentials": num_persons * net.num_keypoints * cells / 1e9,
    }


def nets_that_run(setting: Setting, net: KPNet) -> tuple[dict[str, KPNet], list[str]]:
    """Every way to run the KP-Net on the device, and why others cannot."""
    nets, problems = {}, []
    for backend in BACKENDS:
        candidate = copy.copy(net)
        candidate.backend = backend
        try:
            for call in CALLS.values():
                call(candidate, draw_kp_nets(setting, candidate, 1, (8, 8)))()
        except ValueError as error:
            problems.append(f"{backend}: {error}")
        else:
            nets[backend] = candidate
    return nets, problems


def errors_of(net: KPNet, drawn: Drawn) -> dict[str, float]:
    """Compare a way to run KP-Nets with the definition in float64 on the CPU.

    Returns:
        The number of peaks in another cell, unless its logit is the same but for rounding, and the
        largest error of scores, log-probabilities and both gradients, the last two relative to the
        largest gradient.
    """
    cells, scores = (x.cpu() for x in peaks_call(net, drawn)())
    gradients = training_call(net, drawn)()
    values = net.log_probs(drawn.params, drawn.candidates, drawn.features, drawn.cells)

    leaves = [x.detach().cpu().double().requires_grad_() for x in (drawn.params, drawn.features)]
    points, strides = drawn.candidates.points.cpu(), drawn.candidates.strides.cpu()
    maps = net.maps_by_grouped_convolution(leaves[0], points, strides, leaves[1][0]).flatten(2)
    expected = maps.log_softmax(dim=2)
    at_cells = expected.gather(2, drawn.cells.cpu()[..., None])[..., 0]
    expected_gradients = torch.autograd.grad(-at_cells.sum(), leaves)
    expected = expected.detach()
    best = expected.amax(dim=2)
    missed = best - expected.gather(2, cells[..., None])[..., 0]

    def largest(got: Tensor, wanted: Tensor) -> float:
        return (got.detach().cpu().double() - wanted.detach()).abs().max().item()

    of_params, of_features = (
        largest(got, wanted) / wanted.abs().max().item()
        for got, wanted in zip(gradients, expected_gradients, strict=True)
    )
    return {
        "other peaks": int((missed > PEAK_TOLERANCE).sum()),
        "scores": largest(scores, best.exp()),
        "log-probabilities": largest(values, at_cells),
        "gradient of the parameters": of_params,
        "gradient of the features": of_features,
    }


def measure_kp_net(setting: Setting, persons: list[int], repeats: int) -> dict[str, Any]:
    """Time all ways to run N KP-Nets by turns, on one image of the setting's size."""
    net = kp_net_of(setting)
    maps = map_size(setting.size, net.stride)
    cells = maps[0] * maps[1]
    nets, problems = nets_that_run(setting, net)
    cases, calls = [], []
    for task, call in CALLS.items():
        for n in persons:
            for backend, candidate in nets.items():
                drawn = draw_kp_nets(setting, candidate, n, maps)
                cases.append((task, n, backend))
                calls.append(call(candidate, drawn))
    of_machine = probes(setting.device)
    times = by_turns([*calls, *(probe.run for probe in of_machine)], repeats, warm_up=1)
    rates = limits(of_machine, times[len(calls) :])
    rows = []
    for (task, n, backend), seconds in zip(cases, times, strict=False):
        work = least_work(net, task, n, cells)
        floors = {unit: amount / rates[unit]["rate"] for unit, amount in work.items()}
        row = {"task": task, "persons": n, "backend": backend, **asdict(seconds)}
        rows.append(row | {"work": work, "floors": floors, "floor": max(floors.values())})
    errors = {
        backend: errors_of(candidate, draw_kp_nets(setting, candidate, COMPARED_PERSONS, maps))
        for backend, candidate in nets.items()
    }
    return {
        "maps": maps,
        "limits": rates,
        "KP-Nets": rows,
        "errors": {"persons": COMPARED_PERSONS, "by backend": errors},
        "not run": problems,
    }
