"""benchmarks/gpu_report.py: parts that work, fail, hang or miss something; never how fast."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_report
from benchmarks.gpu_report import Part

QUICK = Path(__file__).parents[2] / "configs" / "quick"
TINY = ["--config-file", str(QUICK / "synthetic_people.yaml"), "--size", "96", "128"]
TINY += ["--peer", str(QUICK / "keypoint_rcnn.yaml"), "--repeats", "1"]


def part(name: str, code: str, needs: tuple[str, ...] = (), report: str = "") -> Part:
    return Part(name, [sys.executable, "-c", code], needs, report)


def report_of(
    parts: list[Part], folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str
) -> tuple[int, Any, str]:
    """Exit status, JSON and Markdown of a report of these parts."""
    monkeypatch.setattr(gpu_report, "parts", lambda *_: parts)
    status = gpu_report.main(["--device", "cpu", "--output", str(folder), *flags])
    text = (folder / "gpu_report.md").read_text()
    return status, json.loads((folder / "gpu_report.json").read_text()), text


def test_report_goes_on_where_parts_fail_or_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "times.json").write_text('{"seconds": 3}')
    (tmp_path / "times.md").write_text("# Times\n\n- torch: 0.1\n- batch 8\n\n![plot](times.png)\n")
    parts = [
        part("Broken", "print('on the way'); raise RuntimeError('out of memory')"),
        part("Missing", "", needs=("json", "no_such_module")),
        part("Whole", "print('hidden')", report=str(tmp_path / "times")),
        part("Tests", "print('3 passed')"),
    ]
    status, found, text = report_of(parts, tmp_path, monkeypatch)
    assert status == 1
    outcomes = {row["name"]: row["outcome"] for row in found["parts"]}
    assert outcomes == {
        "Broken": "failed with status 1",
        "Missing": "not run: no_such_module not installed",
        "Whole": "done",
        "Tests": "done",
    }
    assert [row["result"] for row in found["parts"]] == [None, None, {"seconds": 3}, None]
    assert found["machine"]["torch"] == torch.__version__
    assert "Triton" in found["machine"]
    for name, outcome in outcomes.items():
        assert f"| {name} | {outcome} |" in text
    assert "on the way" in text
    assert "RuntimeError: out of memory" in text
    assert "3 passed" in text
    assert "\n### Times\n" in text
    assert "- batch 8" in text
    assert "- torch: 0.1" not in text  # the machine is said once
    assert "![" not in text
    assert "hidden" not in text


def test_part_that_hangs_is_ended_and_time_that_is_up_starts_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "LARGEST_SHARE", 2)
    hanging = "import time; print('began', flush=True); time.sleep(60)"
    parts = [part("Hanging", hanging), part("Late", "print(1)")]
    status, found, text = report_of(parts, tmp_path, monkeypatch, "--minutes", "0.05")
    assert status == 1
    outcomes = [row["outcome"] for row in found["parts"]]
    assert outcomes[0].startswith("ended after 3 s")
    assert outcomes[1] == "not run: the time was up"
    assert "began" in text


def test_all_done_is_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report_of([part("One", "print(1)")], tmp_path, monkeypatch)[0] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main(["--output", str(tmp_path / "x")]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_every_part_runs_on_tiny_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "TESTS", ("tests/modeling/test_geometry.py",))
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # no kernels on the CPU
    tiny = shlex.join([*TINY, "--persons", "2", "--batch", "2"])
    flags = ["--device", "cpu", "--minutes", "60", "--output", str(tmp_path)]
    status = gpu_report.main([*flags, f"--benchmark={tiny}"])
    found = json.loads((tmp_path / "gpu_report.json").read_text())
    outcomes = {row["name"]: row["outcome"] for row in found["parts"]}
    assert set(outcomes.values()) == {"done"}, found
    assert status == 0
    tests, kp_nets, one, eight, training, half = found["parts"]
    assert " passed" in tests["printed"]
    errors = kp_nets["result"]["errors"]["by backend"]
    assert errors.keys() == {"grouped", "torch"}
    for backend in errors.values():
        assert backend.pop("other peaks") == 0
        assert max(backend.values()) < 1e-3
    assert "memory" not in one["result"]
    assert [x["result"]["setting"]["batch"] for x in (one, eight, training, half)] == [2] * 4
    assert half["result"]["setting"]["amp"] == "bf16"
    assert {x["model"] for x in training["result"]["steps"]} >= {"InsPose", "Keypoint R-CNN"}
    text = (tmp_path / "gpu_report.md").read_text()
    assert "Not run: triton: MODEL.INSPOSE.KP_NET.BACKEND is 'triton', but the model is" in text
    assert "### Latency against the number of persons" in text
    assert "Keypoint R-CNN" in text
