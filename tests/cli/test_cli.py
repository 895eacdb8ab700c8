"""The program ``inspose``: what all its subcommands have in common."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from inspose_d2 import __version__, cli
from inspose_d2.cli.parsers import make_parser
from tests.engine.test_train_net import SMALL

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(make_parser()._subparsers._group_actions[0].choices)
# The first word that is missing or wrong, and what must be said of it.
WRONG = [
    (["predict", "--input", "no.jpg", "--output", "o"], "--input no.jpg: no such file"),
    (["eval", "--config-file", "quick/synthetic_peple"], "Did you mean 'quick/synthetic_people'"),
    (["train", "--config-file", "quick/custom", "SOLVER.BASE", "1"], "no key SOLVER.BASE"),
    (["train", "--config-file", "quick/custom", "--weights", "no.pth"], "weights 'no.pth' are no"),
    (["export", "--config-file", "quick/custom", "--output", "no/x.onnx"], "no such folder"),
    (["browse", "data", "--config-file", "no.yaml", "--output", "o"], "'no.yaml' is no file"),
    (["eval", "--config-file", "quick/custom", "SEED", "1", "--resume"], "options go first"),
    (["validate", "--input", "no.json"], "no.json"),
    (["export", "--config-file", "no", "--output", "x.pt2"], "'no' is no file"),
    (["export", "--config-file", "no", "--output", ".", "--format", "pt2"], "is a folder"),
    (["benchmark", "MODEL.INSPOSE.SCORE_THRESH_TEST", "40"], "SCORE_THRESH_TEST must be in [0, 1]"),
    (["web", "MODEL.INSPOSE.NMS_THRESH_TEST", "-1"], "NMS_THRESH_TEST must be in [0, 1]"),
    (
        ["browse", "data", "--config-file", "quick/synthetic_people", "--output", "list.json"],
        "--output list.json: is a file; give a folder",
    ),
    (["benchmark", "--device", "mps"], "MODEL.DEVICE is 'mps', which PyTorch cannot use"),
    (["web", "--device", "xpu"], "MODEL.DEVICE is 'xpu', which PyTorch cannot use"),
    (["train", "--config-file", "quick/custom", "--num-gpus", "-1"], "--num-gpus is -1"),
    (["train", "--config-file", "quick/custom", "--machine-rank", "1"], "--machine-rank is 1"),
    (
        ["train", "--config-file", "quick/custom", "--dist-url", "tcp://here:99999"],
        "--dist-url is tcp://here:99999",
    ),
    (["benchmark", "--input", "no.jpg"], "no.jpg"),
    (["convert", "opera", "no.pth", "out.pth"], "no.pth"),
    (["convert", "crowdpose", "--input", "no"], "no has no crowdpose_"),
    (
        ["convert", "coco", "--input", "list.json", "--output", "o"],
        "list.json: images: must be a list of objects",
    ),
    (
        [
            "convert",
            "select-keypoints",
            "--input",
            "list.json",
            "--output",
            "o",
            "--keypoints",
            "a",
        ],
        "list.json: file: must be an object",
    ),
    (["submit", "--input", "no.json", "--image-info", "no.json", "--name", "x"], "no.json"),
]


def inspose(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "inspose_d2", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("words", [[], *([x] for x in COMMANDS)], ids=" ".join)
def test_help_says_the_usage_and_loads_nothing(words: list[str]) -> None:
    done = inspose(*words, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: inspose {' '.join(words)}".rstrip())
    # What takes seconds is not imported; a stopwatch would measure the machine.
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in loaded
    assert not loaded & {"torch", "numpy", "detectron2", "cv2"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert not end.value.code
    assert capsys.readouterr().out == f"inspose_d2 {__version__}\n"


@pytest.mark.fault
@pytest.mark.parametrize(("words", "said"), WRONG, ids=[" ".join(x[0][:2]) for x in WRONG])
def test_bad_input_is_one_line_and_status_2(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")
    try:
        status = cli.main(words)
    except SystemExit as end:
        status = end.code
    assert status == cli.USAGE
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


@pytest.mark.fault
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predict", "--inp", "a", "--output", "o"], "the following arguments are required: --inp"),
        (["train", "--conf", "quick/custom"], "required: --config-file"),
        (["predict", "--input", "a", "--output", "o", "--score-threshold", "40"], "in [0, 1]"),
        (["predict", "--input", "a", "--output", "o", "--score-threshold", "nan"], "in [0, 1]"),
        (["web", "--port", "70000"], "must be in 0 to 65535"),
        ([], "required: COMMAND"),
    ],
)
def test_wrong_words_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == cli.USAGE
    assert said in capsys.readouterr().err


def into(*words: str, stdout: Any = subprocess.PIPE, **environment: str) -> "tuple[int, str]":
    """Start Python with its output led elsewhere; returns its status and what it says of errors."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )
    return done.returncode, done.stderr


def program(work: str) -> list[str]:
    """A program under the rule of all, without the seconds that PyTorch takes."""
    lines = "import sys", "sys.argv = ['inspose']", "from inspose_d2.cli import told"
    return ["-c", "\n".join([*lines, f"sys.exit(told('it', {work}))"])]


@pytest.mark.fault
def test_output_that_nobody_reads_is_dropped() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    status, error = into(*program("lambda: print('a model')"), stdout=writer)
    os.close(writer)
    assert status == 0
    assert "Traceback" not in error
    assert "Broken" not in error


@pytest.mark.fault
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_cannot_be_written_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        status, error = into(*program("lambda: print('a model')"), stdout=full)
    assert status == cli.USAGE
    assert error.startswith("it: the output cannot be written: No")
    assert len(error.splitlines()) == 1


@pytest.mark.fault
def test_names_are_written_in_any_encoding() -> None:
    status, error = into(*program("lambda: open('фото.json')"), PYTHONIOENCODING="ascii")
    assert status == cli.USAGE
    assert "\\u0444\\u043e\\u0442\\u043e.json" in error
    assert len(error.splitlines()) == 1


@pytest.mark.fault
def test_sigterm_is_leaving_as_after_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    former = signal.getsignal(signal.SIGTERM)
    cleaned = []

    def work() -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned.append(True)
        return 0

    assert cli.told("inspose predict", work) == cli.TERMINATED
    assert cleaned
    assert "inspose predict: interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is former


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^synthetic_people_tiny +quick/synthetic_people_tiny +\d", said, re.MULTILINE)
    assert "  InsPose_R50_3x\n" in said


def test_benchmark_prints_milliseconds(
    tiny_cfg: Callable[..., CfgNode], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny_cfg()
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "w.pth")
    (tmp_path / "c.yaml").write_text(cfg.dump())
    words = ["--config-file", str(tmp_path / "c.yaml"), "--weights", str(tmp_path / "w.pth")]
    assert cli.main(["benchmark", *words, "--num", "2", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "128 x 96 pixels" in said
    fastest, slowest = (
        float(re.search(rf"{x} ([\d.]+) ms", said)[1]) for x in ("fastest", "slowest")
    )
    assert 0 < fastest <= slowest


@pytest.mark.slow
def test_train_and_eval_are_train_net(tmp_path: Path) -> None:
    values = {**SMALL, "OUTPUT_DIR": str(tmp_path), "SOLVER.MAX_ITER": 2, "TEST.EVAL_PERIOD": 0}
    opts = [str(x) for item in values.items() for x in item]
    model = ["--config-file", "quick/synthetic_people", "--device", "cpu"]
    done = inspose("train", *model, *opts)
    assert done.returncode == 0, done.stderr[-2000:]
    weights = str(tmp_path / "model_final.pth")
    done = inspose("eval", *model, "--weights", weights, *opts)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Average Precision" in done.stdout + done.stderr


def test_without_detectron2_the_cure_is_said(tmp_path: Path) -> None:
    # A finder that has no detectron2, whatever is installed.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class NoDetectron2:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'detectron2':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name='detectron2')\n"
        "sys.meta_path.insert(0, NoDetectron2())\n"
    )
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    code = "import inspose_d2\nprint(inspose_d2.__version__)\ninspose_d2.get_cfg"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{__version__}\n"
    assert done.stderr.splitlines()[-1].endswith("This installs it: inspose install-detectron2")
    done = inspose("models", PYTHONPATH=path)
    assert done.returncode == cli.USAGE
    assert "inspose models: Detectron2 is missing: inspose install-detectron2" in done.stderr
    (tmp_path / "LabGym.whl").write_bytes(b"another")
    cure = inspose("install-detectron2", "--wheel", str(tmp_path / "LabGym.whl"), PYTHONPATH=path)
    assert cure.stdout == "Looking for a Detectron2 that can be imported\n"
    assert "LabGym.whl is refused: its sha256 is" in cure.stderr
