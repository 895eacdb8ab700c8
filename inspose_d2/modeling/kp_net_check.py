"""Whether the Triton kernels give what the definition gives, on the first persons that they meet.

The definition runs on the CPU in float64, so that neither TF32 nor another kernel can deceive.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .candidates import Candidates

if TYPE_CHECKING:
    from .kp_net import KPNet

NUM_PERSONS = 8  # at the most; the first ones, so that some share an image
TOLERANCE = 1e-3  # of the largest number, and of 1 where all are smaller

Check = Callable[..., list[str]]
Key = tuple[torch.device, tuple[int, ...], int]

logger = logging.getLogger(__name__)
_problems: dict[Key, str] = {}
_passed: set[tuple[Key, Check]] = set()


def find_problem(
    check: Check,
    kp_net: "KPNet",
    kernels: ModuleType,
    params: Tensor,
    candidates: Candidates,
    features: Tensor,
    asked: object,
) -> str:
    """Say why the kernels must not be used; the comparison is made once for a shape of KP-Nets.

    A compiler that fails is a problem like a wrong number. What one check finds holds for all.

    Args:
        check: :func:`differing_peaks` or :func:`differing_log_probs`.
        kp_net: that is to run.
        kernels: the module.
        params: (N, P) parameters, N at least 1.
        candidates: the N locations that they come from.
        features: (B, C, H, W) shared features of the batch.
        asked: the last argument of the check.

    Returns:
        The problem, which was logged as a warning when it was found; "" where there is none.
    """
    key = (params.device, kp_net.widths, kp_net.stride)
    if key in _problems or (key, check) in _passed:
        return _problems.get(key, "")
    first = slice(min(NUM_PERSONS, len(params)))
    params, features = params.detach()[first], features.detach()
    if not (params.isfinite().all() and features.isfinite().all()):
        return ""  # nothing to learn from: the next call will tell
    own = {name: getattr(candidates, name)[first] for name in ("image", "points", "strides")}
    try:
        differences = check(
            kp_net, kernels, params, dataclasses.replace(candidates, **own), features, asked
        )
    except Exception as error:  # noqa: BLE001  whatever the compiler or the driver raises
        lines = str(error).strip().splitlines() or [""]
        differences = [f"they fail with {type(error).__name__}: {lines[-1]}"]
    if not differences:
        _passed.add((key, check))
        return ""
    found = "; ".join(differences)
    _problems[key] = f"its kernels, tried on the first {len(params)} persons: {found}"
    logger.warning("KP-Nets run as matrix products, without Triton: %s.", _problems[key])
    return _problems[key]


def differing_peaks(
    kp_net: "KPNet",
    kernels: ModuleType,
    params: Tensor,
    candidates: Candidates,
    features: Tensor,
    sizes: list[tuple[int, int]],
) -> list[str]:
    """Compare all that the peaks and their scores are made of; ``sizes`` as for ``KPNet.peaks``."""
    cells, logits, log_sums = kernels.peaks(
        *kp_net.kernel_args(params, candidates, features),
        torch.tensor(sizes).to(features.device),
        stride=kp_net.stride,
        widths=kp_net.widths,
    )
    maps = _maps(kp_net, params.cpu().double(), candidates, features.cpu().double(), sizes)
    best = torch.stack([x.amax(dim=1) for x in maps])
    log_sum_exp = torch.stack([x.logsumexp(dim=1) for x in maps])
    # The logits at the cells, not the cells: of almost equal ones each may be the peak.
    at_cells = [x.gather(1, own[:, None])[:, 0] for x, own in zip(maps, cells.cpu(), strict=True)]
    return [
        *_differences("the logits of the peaks", logits, best),
        *_differences("the logits at the cells of the peaks", torch.stack(at_cells), best),
        *_differences("the log-sum-exp of the maps", log_sums, log_sum_exp),
    ]


def differing_log_probs(
    kp_net: "KPNet",
    kernels: ModuleType,
    params: Tensor,
    candidates: Candidates,
    features: Tensor,
    cells: Tensor,
) -> list[str]:
    """Compare the log-probabilities and their gradient; ``cells`` as for ``KPNet.log_probs``."""
    cells = cells[: len(params)]
    weights = torch.arange(1.0, cells.numel() + 1).view(cells.shape) / cells.numel()
    with torch.enable_grad():
        leaves = [params.float().clone().requires_grad_(), features.float().requires_grad_()]
        log_probs = kernels.log_probs(
            *kp_net.kernel_args(leaves[0], candidates, leaves[1]),
            cells,
            stride=kp_net.stride,
            widths=kp_net.widths,
        )
        gradients = torch.autograd.grad((log_probs * weights.to(log_probs.device)).sum(), leaves)

        leaves = [x.detach().cpu().double().requires_grad_() for x in leaves]
        sizes = [(features.shape[2], features.shape[3])] * len(features)
        maps = torch.stack(_maps(kp_net, leaves[0], candidates, leaves[1], sizes))
        expected = maps.log_softmax(dim=2).gather(2, cells.cpu()[..., None])[..., 0]
        expected_gradients = torch.autograd.grad((expected * weights).sum(), leaves)
    return [
        *_differences("the log-probabilities", log_probs, expected),
        *_differences("the gradient of the parameters", gradients[0], expected_gradients[0]),
        *_differences("the gradient of the features", gradients[1], expected_gradients[1]),
    ]


def _maps(
    kp_net: "KPNet",
    params: Tensor,
    candidates: Candidates,
    features: Tensor,
    sizes: list[tuple[int, int]],
) -> list[Tensor]:
    """Run the definition person by person: (K, H*W) maps without the padding of their image."""
    points, strides = candidates.points.cpu(), candidates.strides.cpu()
    maps = []
    for n, image in enumerate(candidates.image.tolist()):
        height, width = sizes[image]
        own = (
            params[n, None],
            points[n, None],
            strides[n, None],
            features[image, :, :height, :width],
        )
        with torch.autocast("cpu", enabled=False):
            maps.append(kp_net.maps_by_grouped_convolution(*own)[0].flatten(1))
    return maps


def _differences(what: str, got: Tensor, expected: Tensor) -> Iterator[str]:
    """Say how far numbers are off, where that is too far; NaN always is."""
    expected = expected.detach()
    error = (got.detach().cpu().double() - expected).abs().max().item()
    largest = expected.abs().max().item()
    if not error <= TOLERANCE * max(largest, 1.0):
        yield f"{what} differ by {error:.2g} from the definition's, the largest being {largest:.2g}"
