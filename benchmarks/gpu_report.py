#!/usr/bin/env python
"""All that a GPU is to be asked, in one command of nine minutes, and a report to paste.

    python -m benchmarks.gpu_report

Runs the CUDA tests, compares the KP-Nets' kernels with their definition, and times KP-Nets,
inference and training beside Keypoint R-CNN. Each part is a process of its own: where one fails or
needs what is not installed, the report says so, and the next one runs.
"""

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT, describe

TESTS = ("tests/modeling/test_cuda.py", "tests/modeling/test_kp_net_triton.py")
LARGEST_SHARE = 1 / 3  # of the time, for one part: another one that hangs must not take it all
SHOWN_LINES = 40  # of what a part prints that fails


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: its headline.
        command: of the process.
        needs: modules that must be installed.
        report: name of the report that it writes, without ending; "" where it writes none.
    """

    name: str
    command: list[str]
    needs: tuple[str, ...]
    report: str = ""


def parts(device: str, folder: Path, flags: Sequence[str]) -> list[Part]:
    """List what is run; ``flags`` are for ``python -m benchmarks``."""

    def benchmark(name: str, report: str, *own: str) -> Part:
        output = folder / name.lower().replace(",", "").replace(" ", "_")
        command = [sys.executable, "-m", "benchmarks", "--device", device, "--times-only", *own]
        command += [*flags, "--output", str(output)]
        return Part(name, command, ("matplotlib", "fvcore"), str(output / report))

    inference = ["--persons", "1", "20", "100", "--stages", "20"]
    training = ["--train", "--batch", "16", "--persons", "5"]
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *TESTS]
    return [
        Part("Tests", tests, ("pytest", "hypothesis")),
        benchmark("KP-Nets", "kp_net", "--kp-net"),
        benchmark("Inference, batch 1", "latency", *inference),
        benchmark("Inference, batch 8", "latency", *inference, "--batch", "8"),
        benchmark("Training, batch 16", "training", *training),
        benchmark("Training, batch 16, bf16", "training", *training, "--amp", "bf16"),
    ]


def run(part: Part, seconds: float) -> dict[str, Any]:
    """Run a part.

    Args:
        part: to run.
        seconds: that it may take; none left does not start it.

    Returns:
        Name, command, outcome ("done", or what went wrong), seconds, the end of what it printed,
        and the result and the text of its report.
    """
    row: dict[str, Any] = {"name": part.name, "command": shlex.join(part.command), "seconds": 0.0}
    row |= {"printed": "", "result": None, "text": ""}
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return row | {"outcome": f"not run: {', '.join(missing)} not installed"}
    if seconds <= 0:
        return row | {"outcome": "not run: the time was up"}
    begin = time.monotonic()
    try:
        done = subprocess.run(
            part.command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
        printed = done.stdout
        outcome = "done" if done.returncode == 0 else f"failed with status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        printed, outcome = (
            error.stdout or b"",
            f"ended after {seconds:.0f} s, its share of the time",
        )
    row |= {"outcome": outcome, "seconds": time.monotonic() - begin}
    row["printed"] = "\n".join(printed.decode(errors="replace").splitlines()[-SHOWN_LINES:])
    if part.report and outcome == "done":
        row["result"] = json.loads(Path(f"{part.report}.json").read_text(encoding="utf-8"))
        row["text"] = Path(f"{part.report}.md").read_text(encoding="utf-8")
    return row


def machine_of(device: str) -> dict[str, Any]:
    """What figures depend on, Triton and the GPU's properties too."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    found = describe(device) | {"Triton": triton, "CUDA of torch": torch.version.cuda}
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["compute capability"] = f"{properties.major}.{properties.minor}"
        found["GPU memory, GiB"] = round(properties.total_memory / 2**30, 1)
    return found


def markdown(report: dict[str, Any]) -> str:
    """Write the report as text: the machine, what was run, and each part's own report below."""
    machine = [f"- {key}: {x}" for key, x in report["machine"].items() if x is not None]
    table = [f"| {x['name']} | {x['outcome']} | {x['seconds']:.0f} |" for x in report["parts"]]
    lines = ["# GPU report", "", f"`{report['command']}`", "", *machine, ""]
    lines += ["| part | outcome | s |", "| --- | --- | ---: |", *table]
    # What each part's report says again, and pictures, which cannot be pasted.
    left_out = ("![", *(f"- {key}: " for key in report["machine"]))
    for row in report["parts"]:
        lines += ["", f"## {row['name']}", ""]
        if row["text"]:
            own = [x for x in row["text"].splitlines() if not x.startswith(left_out)]
            lines += [f"##{x}" if x.startswith("#") else x for x in own]
        else:
            lines += [f"`{row['command']}`", "", "```", *row["printed"].splitlines(), "```"]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts and write the report after each, so that nothing is lost.

    Returns:
        The exit status: 0 where every part is done.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument(
        "--benchmark", default="", metavar="OPTIONS", help="of benchmarks, in quotes"
    )
    parser.add_argument("--output", type=Path, default=Path("output/gpu_report"))
    args = parser.parse_args(argv)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(
            f"gpu_report.py: PyTorch {torch.__version__} finds no CUDA device: install its build "
            "for CUDA and the driver, or try this program with --device cpu\n"
        )
        return 2
    end = time.monotonic() + 60 * args.minutes
    command = ["python", "-m", "benchmarks.gpu_report", *(sys.argv[1:] if argv is None else argv)]
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"command": shlex.join(command), "machine": machine_of(args.device)}
    report["parts"] = []
    for part in parts(args.device, folder, shlex.split(args.benchmark)):
        left = min(end - time.monotonic(), 60 * args.minutes * LARGEST_SHARE)
        report["parts"].append(run(part, left))
        text = json.dumps(report, indent=2) + "\n"
        (folder / "gpu_report.json").write_text(text, encoding="utf-8")
        (folder / "gpu_report.md").write_text(markdown(report), encoding="utf-8")
        print(f"{part.name}: {report['parts'][-1]['outcome']}", flush=True)
    print(folder / "gpu_report.md")
    return 0 if all(x["outcome"] == "done" for x in report["parts"]) else 1


if __name__ == "__main__":
    sys.exit(main())
