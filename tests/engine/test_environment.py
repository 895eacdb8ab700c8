"""What surrounds a run: home folders, launchers, forks, signals, limits of the process."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from torch.utils.data import DataLoader, Dataset

from inspose_d2 import ConfigError, InsPosePredictor, get_cfg, workers
from inspose_d2.cli.parsers import make_parser
from inspose_d2.data.builtin import register_people
from inspose_d2.data.check import check_config
from inspose_d2.data.keypoint_sets import register_datasets
from inspose_d2.engine import launch
from inspose_d2.engine.train_loop import DataLoaderError, explain

pytestmark = pytest.mark.fault
ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and another one to work in."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_home_is_meant_in_every_path_of_a_config(home: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("OUTPUT_DIR: ~/out\nMODEL:\n  WEIGHTS: ~/w.pth\n")
    cfg = get_cfg(tmp_path / "c.yaml", ["MODEL.TIMM.WEIGHTS", "~/t.safetensors"])
    assert (home / "out", home / "w.pth") == (Path(cfg.OUTPUT_DIR), Path(cfg.MODEL.WEIGHTS))
    assert Path(cfg.MODEL.TIMM.WEIGHTS) == home / "t.safetensors"
    assert get_cfg(opts=["OUTPUT_DIR", "a~b"]).OUTPUT_DIR == "a~b"


def test_folder_that_is_called_as_a_home_is_refused() -> None:
    cfg = get_cfg("quick/synthetic_people", ["OUTPUT_DIR", "~nobody_of_this_name/out"])
    with pytest.raises(ConfigError, match=r"OUTPUT_DIR is '~nobody.* which is no home folder"):
        check_config(cfg)
    cfg.OUTPUT_DIR = "~/out"  # set in Python, where nothing has read it
    with pytest.raises(ConfigError, match="write the path in full"):
        check_config(cfg)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Registrations that a test makes are undone; those it takes away come back."""
    before = dict(DatasetCatalog.data)
    metadata = {name: MetadataCatalog.get(name).as_dict() for name in before if "people_" in name}
    yield
    for name in {*DatasetCatalog.data, *metadata}:
        if name not in before or name in metadata:
            DatasetCatalog.data.pop(name, None)
            MetadataCatalog.pop(name, None)
    for name, values in metadata.items():
        DatasetCatalog.register(name, before[name])
        MetadataCatalog.get(name).set(**{k: v for k, v in values.items() if k != "name"})


@pytest.mark.parametrize("entry", [["t.json", "images"], ["~/data/t.json", "~/data/images"]])
@pytest.mark.usefixtures("forgotten")
def test_home_is_meant_where_data_lie(
    entry: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/data")
    category = {"id": 1, "name": "person", "keypoints": ["left_hand", "right_hand"]}
    (home / "data").mkdir()
    (home / "data" / "t.json").write_text(json.dumps({"categories": [category]}))
    cfg = get_cfg("quick/custom")
    cfg.DATASETS.REGISTER = [["at_home", *entry]]
    cfg.DATASETS.TEST = ("at_home",)
    register_datasets(cfg, training=False)
    assert MetadataCatalog.get("at_home").json_file == f"{home}/data/t.json"
    assert MetadataCatalog.get("at_home").image_root == f"{home}/data/images"
    DatasetCatalog.remove("people_val")
    MetadataCatalog.remove("people_val")
    register_people()
    assert MetadataCatalog.get("people_val").image_root == f"{home}/data/people/val"


def test_home_is_meant_on_the_command_line(home: Path) -> None:
    words = ["predict", "--input", "~/a.jpg", "webcam", "--output=~/out"]
    args = make_parser().parse_args(words)
    assert args.input == [f"{home}/a.jpg", "webcam"]
    assert args.output == home / "out"
    args = make_parser().parse_args(["validate", "--input=~/a.json", "--images=~/i"])
    assert (args.input, args.images) == (f"{home}/a.json", f"{home}/i")


@pytest.mark.parametrize("variable", launch.LAUNCHERS)
def test_processes_of_another_launcher_are_refused(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "2")
    args = default_argument_parser().parse_args(["--config-file", "quick/synthetic_people"])
    with pytest.raises(SystemExit) as end:
        launch.run(args)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"train_net.py: {variable} is 2 in the environment")
    assert len(said.splitlines()) == 1
    several = {"num_gpus": 1, "num_machines": 2, "machine_rank": 1, "dist_url": "tcp://here:1234"}
    assert not list(launch.problems_of_launch(Namespace(**several)))
    monkeypatch.setenv(variable, "1")
    assert not list(launch.problems_of_launch(args))


class Numbers(Dataset[int]):
    """Numbers that are slow to come."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        time.sleep(0.01)
        return index


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="macOS has no sigwaitinfo")
def test_loader_processes_leave_signals_to_their_parent() -> None:
    loader = workers.guard_loader(DataLoader(Numbers(), batch_size=None, num_workers=2))
    numbers = iter(loader)
    found = [next(numbers), next(numbers)]  # so both have begun
    script = "import os, sys\nfor x in sys.argv[2:]: os.kill(int(x), int(sys.argv[1]))"
    pids = [str(process.pid) for process in numbers._workers]
    for signum in (signal.SIGTERM, signal.SIGINT):
        subprocess.run([sys.executable, "-c", script, str(int(signum)), *pids], check=True)
    found += numbers
    assert found == list(range(40))
    # The parent's own ends them at once.
    numbers = iter(loader)
    next(numbers)
    process = numbers._workers[0]
    signal_of_child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process.terminate()
    process.join(20)
    assert process.exitcode == 0
    signal.signal(signal.SIGCHLD, signal_of_child)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
        EOFError(),
        ConnectionResetError(104, "Connection reset by peer"),
    ],
)
def test_dead_loader_process_is_explained_once(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inspose_d2.engine.train_loop.file_limit", lambda: 65536)
    once = explain(error)
    assert explain(once) is once
    assert str(once).count("mostly killed for memory") == 1
    assert str(once).startswith(str(error) or "EOFError")


@pytest.mark.parametrize(
    ("error", "limit"),
    [
        (OSError(24, "Too many open files"), 65536),
        (RuntimeError("received 0 items of ancdata"), 65536),
        (RuntimeError("unable to open shared memory object: Too many open files (24)"), 65536),
        (EOFError(), 256),
        (ConnectionResetError(104, "Connection reset by peer"), 256),
    ],
)
def test_want_of_open_files_is_not_told_as_memory(
    error: Exception, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inspose_d2.engine.train_loop.file_limit", lambda: limit)
    said = explain(error)
    assert isinstance(said, DataLoaderError)
    assert f"too few open files are allowed, ulimit -n is {limit}" in str(said)
    assert "memory (" not in str(said)


def test_output_that_breaks_is_no_loader_process() -> None:
    error = BrokenPipeError(32, "Broken pipe")
    assert explain(error) is error


def test_limit_of_open_files_is_raised_for_loader_processes() -> None:
    resource = pytest.importorskip("resource")
    former = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= former[1] < 512:
        pytest.skip("this machine allows few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, former[1]))
    try:
        workers.guard_loader(DataLoader(Numbers(), num_workers=0))
        assert workers.file_limit() == 256
        workers.guard_loader(DataLoader(Numbers(), num_workers=1))
        assert workers.file_limit() > 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, former)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # that is what is tried
def test_used_predictor_works_after_a_fork() -> None:
    former = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        name = "synthetic_people_tiny"
        predictor = InsPosePredictor(f"quick/{name}", weights=name, device="cpu")
        image = np.zeros((320, 320, 3), np.uint8)
        expected = len(predictor(image)["instances"])
        context = multiprocessing.get_context("fork")
        found = context.SimpleQueue()

        def work() -> None:
            found.put(len(predictor(image)["instances"]))

        processes = [context.Process(target=work, daemon=True) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0]
        assert [found.get(), found.get()] == [expected] * 2
    finally:
        torch.set_num_threads(former)
