"""What a benchmark says of the machine: its description, and how fast it is at the most."""

import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import detectron2
import torch
import torch.nn.functional as F

from benchmarks.timing import Seconds

ROOT = Path(__file__).resolve().parent.parent
EXP_CALLS = 64


def cpu_name() -> str:
    """The processor as Linux calls it; elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe(device: str) -> dict[str, Any]:
    """What a figure depends on, for the record."""
    on_cuda = torch.device(device).type == "cuda"
    return {
        "device": device,
        "GPU": torch.cuda.get_device_name(device) if on_cuda else None,
        "CPU": cpu_name(),
        "CPU cores": os.cpu_count(),
        "CPU threads used": torch.get_num_threads(),
        "torch": torch.__version__,
        "Detectron2": detectron2.__version__,
        "Python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the project, "-dirty" with changes; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@dataclass(frozen=True)
class Probe:
    """A function that keeps the machine busy with one kind of work."""

    name: str
    unit: str
    amount: float  # of work in a call, in 1e9 of the unit
    run: Callable[..., Any]  # takes whatever


def probes(device: str) -> list[Probe]:
    """Make what measures a device: products, convolutions, copies, exponentials.

    They belong into the turns of what is compared with them. A large product or convolution is the
    most multiply-adds that the libraries reach; both are given, since on a GPU a float32
    convolution may run in TF32, and a product not. The exponentials are those of numbers in the
    cache; in registers they may be faster.

    Args:
        device: of torch.

    Returns:
        Probes, whose sizes suit the device. They follow autocast where torch does.
    """
    on_cuda = torch.device(device).type == "cuda"
    size, images, numbers, exponents = (
        (8192, 32, 2**28, 2**22) if on_cuda else (2048, 1, 2**25, 2**17)
    )

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=device)

    left, right = random(size, size), random(size, size)
    # A convolution of the head towers on P3 of an image of 800 x 1216.
    x = random(images, 256, 100, 152).to(memory_format=torch.channels_last)
    weight = random(256, 256, 3, 3).to(memory_format=torch.channels_last)
    source, target = random(numbers), random(numbers)
    powers, results = random(exponents), random(exponents)

    def exponentials(*_: Any) -> None:
        for _ in range(EXP_CALLS):
            torch.exp(powers, out=results)

    return [
        Probe("matrix product", "multiply-adds", size**3 / 1e9, lambda *_: left @ right),
        Probe(
            "3x3 convolution",
            "multiply-adds",
            images * 100 * 152 * 9 * 256**2 / 1e9,
            lambda *_: F.conv2d(x, weight, padding=1),
        ),
        Probe("copy", "bytes", 2 * 4 * numbers / 1e9, lambda *_: target.copy_(source)),
        Probe("exp in the cache", "exponentials", EXP_CALLS * exponents / 1e9, exponentials),
    ]


def limits(of_machine: Sequence[Probe], times: Sequence[Seconds]) -> dict[str, dict[str, Any]]:
    """Say how fast the machine did each kind of work at best.

    Args:
        of_machine: from :func:`probes`.
        times: of each.

    Returns:
        By unit the "rate", in 1e9 a second, and the "probe" that reached it.
    """
    best: dict[str, dict[str, Any]] = {}
    for probe, seconds in zip(of_machine, times, strict=True):
        rate = probe.amount / seconds.min
        if rate > best.get(probe.unit, {"rate": 0.0})["rate"]:
            best[probe.unit] = {"rate": rate, "probe": probe.name}
    return best
