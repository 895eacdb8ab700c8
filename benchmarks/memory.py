"""Peak memory of a call, each in a process of its own."""

import ctypes
import gc
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.kp_net import draw_kp_nets, kp_net_of, peaks_call, training_call
from benchmarks.models import Setting, build_one, images_with_persons, inference
from benchmarks.train import Training

# For so many persons, a function that runs the call to measure.
Prepare = Callable[[int], Callable[[], Any]]
KP_NET_MAPS = (100, 168)  # (H, W) of the largest test image, 800 x 1333, padded
MANY_KP_NETS = 2000
MANY_POSITIVES = (50, 500)  # some and very many persons on a training image


def inference_memory(setting: Setting, names: list[str], persons: list[int]) -> list[dict]:
    """Measure whole models at inference, and the KP-Nets alone on the largest maps."""
    cases = [(name, partial(_inference, setting, name), n) for name in names for n in persons]
    kp_nets = partial(_kp_nets, setting, peaks_call)
    cases += [("peaks of KP-Nets alone", kp_nets, n) for n in [*persons, MANY_KP_NETS]]
    return [_row(setting, *case) for case in cases]


def training_memory(setting: Setting, names: list[str], persons: list[int]) -> list[dict]:
    """Measure training steps, and the keypoint loss alone with its gradient."""
    cases = [(f"step of {x}", partial(_training, setting, x), n) for x in names for n in persons]
    kp_nets = partial(_kp_nets, setting, training_call)
    cases += [("loss of KP-Nets alone, and gradient", kp_nets, n) for n in MANY_POSITIVES]
    return [_row(setting, *case) for case in cases]


def _row(setting: Setting, what: str, make: Callable[[], Prepare], persons: int) -> dict:
    peak = peak_in_fresh_process(make, persons, setting.on_cuda)
    return {"what": what, "persons": persons, **peak}


def _inference(setting: Setting, name: str) -> Prepare:
    return partial(inference, setting, build_one(setting, name))


def _training(setting: Setting, name: str) -> Prepare:
    training = Training(setting, name)
    return lambda persons: partial(training.step, images_with_persons(setting, persons))


def _kp_nets(setting: Setting, call: Callable[..., Callable[[], Any]]) -> Prepare:
    net = kp_net_of(setting)
    return lambda persons: call(net, draw_kp_nets(setting, net, persons, KP_NET_MAPS))


def peak_in_fresh_process(
    make: Callable[[], Prepare], persons: int, on_cuda: bool
) -> dict[str, int]:
    """Measure the peak of a call in a new process, whose memory no earlier call has shaped.

    Args:
        make: builds what is measured; to be pickled.
        persons: of the call.
        on_cuda: whether the memory of the GPU counts, or that of the process.

    Returns:
        Bytes in use just before the call (weights, inputs, in training gradients and the state of
        the optimizer; on the CPU all else that a process with torch has) and how many more there
        are at the peak.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak_of, make, persons, on_cuda).result()


def peak_of(make: Callable[[], Prepare], persons: int, on_cuda: bool) -> dict[str, int]:
    """Measure the peak of a call in this process; see :func:`peak_in_fresh_process`.

    The same call with one person comes first: at their first use libraries load code, choose
    algorithms and keep buffers, which would be charged to the persons.
    """
    prepare = make()
    prepare(1)()
    run = prepare(persons)
    gc.collect()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return {"bytes before": before, "bytes more": torch.cuda.max_memory_allocated() - before}
    _give_back_free_memory()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (man 5 proc)
    run()
    return {"bytes before": before, "bytes more": status("VmHWM") - before}


def _give_back_free_memory() -> None:
    """Let the C library return what it keeps, lest the call grow into that unseen."""
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def status(key: str) -> int:
    """Read the resident memory (VmRSS) or its peak (VmHWM) from Linux, in bytes.

    Not ``ru_maxrss``: a new process inherits that of its parent.
    """
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", text)[1]) * 1024
