"""Checkpoints: whole after any crash, checked when read, refused in words, never run as code."""

import logging
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from inspose_d2.checkpoint import (
    BestCheckpointer,
    CheckpointError,
    InsPoseCheckpointer,
    NoValidCheckpoint,
)
from inspose_d2.engine import launch as train_net

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.fault


class Small(nn.Module):
    """Two weights, filled with a number."""

    def __init__(self, value: float = 0.0, classes: int = 3, width: int = 4) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, width, bias=False)
        self.head = nn.Linear(4, classes, bias=False)
        nn.init.constant_(self.backbone.weight, value)
        nn.init.constant_(self.head.weight, value)

    @property
    def value(self) -> float:
        return float(self.backbone.weight[0, 0].detach())


def save(folder: Path, iteration: int, name: str = "", **options: Any) -> Path:
    """Save a model that is filled with the iteration."""
    name = name or f"model_{iteration:07d}"
    InsPoseCheckpointer(Small(iteration), str(folder)).save(name, iteration=iteration, **options)
    return folder / f"{name}.pth"


def resume(folder: Path) -> tuple[float, dict[str, Any]]:
    """Weights and what else was resumed; weight -1 where there was nothing to resume."""
    model = Small(-1)
    rest = InsPoseCheckpointer(model, str(folder)).resume_or_load("")
    return model.value, rest


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(x.getMessage() for x in caplog.records if x.levelno >= logging.WARNING)


def test_saved_file_has_a_checksum_that_sha256sum_accepts_and_is_plain_detectron2s(
    tmp_path: Path,
) -> None:
    path = save(tmp_path, 5)
    names = {path.name, path.name + ".sha256", "last_checkpoint"}
    assert {x.name for x in tmp_path.iterdir()} == names
    assert (tmp_path / "last_checkpoint").read_text() == path.name
    subprocess.run(["sha256sum", "-c", path.name + ".sha256"], cwd=tmp_path, check=True)
    model = Small()
    rest = DetectionCheckpointer(model, str(tmp_path)).resume_or_load("")
    assert (model.value, rest["iteration"]) == (5, 5)


def test_checkpoint_of_plain_detectron2_is_resumed(tmp_path: Path) -> None:
    DetectionCheckpointer(Small(7), str(tmp_path)).save("model_0000007", iteration=7)
    assert resume(tmp_path) == (7, {"iteration": 7})


def test_untagged_save_leaves_last_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2, "model_best", tag_last=False)
    assert resume(tmp_path)[0] == 1


def test_without_any_checkpoint_resume_starts_from_the_weights(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save({"model": Small(3).state_dict()}, weights)  # no checkpoint of a training
    model = Small()
    checkpointer = InsPoseCheckpointer(model, str(tmp_path))
    checkpointer.resume_or_load(str(weights), resume=True)
    assert model.value == 3
    assert not checkpointer.has_checkpoint()


@pytest.mark.parametrize("name", ["model_0000002", "model_0000001"])  # a new file, a rewritten one
def test_every_instant_of_a_save_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # What kill -9 leaves is the folder as it is between two calls of the system that change it.
    folder = tmp_path / "run"
    save(folder, 1)
    instants = []

    def after_snapshot(original: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            instants.append(tmp_path / str(len(instants)))
            shutil.copytree(folder, instants[-1])
            original(*args)

        return call

    for function in ("replace", "unlink", "fsync"):
        monkeypatch.setattr(os, function, after_snapshot(getattr(os, function)))
    (folder / "model_0000000.pth.tmp").touch()  # of an earlier crash
    save(folder, 2, name)
    monkeypatch.undo()
    assert not list(instants[1].glob("model_0000000*"))  # gone before anything is written
    assert len(instants) >= 6
    values = [resume(instant)[0] for instant in instants]
    assert values == sorted(values)
    assert {1, 2} >= set(values)
    assert resume(folder)[0] == 2
    assert not list(folder.glob("*.tmp"))
    for instant in instants:
        save(instant, 3)
        assert not list(instant.glob("*.tmp"))


KILLED = """
import os, sys, time, random, signal
import torch
from torch import nn
from inspose_d2.checkpoint import InsPoseCheckpointer
torch.set_num_threads(1)
folder = sys.argv[1]
for trial in range(20):
    saved, tell = os.pipe()
    child = os.fork()
    if not child:
        model = nn.Linear(1000, 1000)
        saver = InsPoseCheckpointer(model, folder)
        first = saver.resume_or_load("").get("iteration", 0)
        for i in range(first + 1, first + 100000):
            nn.init.constant_(model.weight, i)
            saver.save("model_final", iteration=i)
            os.write(tell, b".")
    os.close(tell)
    assert os.read(saved, 1)  # at least one checkpoint, then some part of the next ones
    time.sleep(random.Random(trial).random() / 5)
    os.close(saved)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    model = nn.Linear(1000, 1000)
    data = InsPoseCheckpointer(model, folder).resume_or_load("")
    assert (model.weight == data["iteration"]).all(), trial
    print("resumable", data["iteration"])
"""


@pytest.mark.slow
def test_run_killed_while_saving_is_resumable_20_of_20_times(tmp_path: Path) -> None:
    result = run_script(KILLED, str(tmp_path))
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("resumable") == 20
    save(tmp_path, 1)
    assert not list(tmp_path.glob("*.tmp"))


def run_script(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", script, *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("name", ["model_final", "model_0000002"])
def test_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1, "model_final")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CheckpointError) as error:
            save(tmp_path, 2, name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = f"{tmp_path / name}.pth could not be written: no space left"
    assert str(error.value).startswith(message)
    assert resume(tmp_path)[0] == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/model_0000001\.pth could not be written"):
        save(tmp_path / "file", 1)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    save(tmp_path, 1)
    model = Small(2)
    model.head.weight.data[0, :2] = torch.tensor([float("nan"), float("inf")])
    with pytest.raises(CheckpointError, match=r"head\.weight has 2 values that are not finite"):
        InsPoseCheckpointer(model, str(tmp_path)).save("model_0000001", iteration=2)
    assert resume(tmp_path)[0] == 1


def test_flipped_bit_is_found(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model_0000002\.pth is damaged: .* checksum"):
        InsPoseCheckpointer(Small()).load(str(path))
    assert resume(tmp_path)[0] == 1


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def tag(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "last_checkpoint").write_text(text) and None


def newest(size: int, *, checksum: bool) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        cut(folder / "model_0000002.pth", size)
        if not checksum:
            (folder / "model_0000002.pth.sha256").unlink()

    return spoil


# What is spoilt, what is said, which iteration is resumed.
SPOILT = {
    "empty tag": (tag(""), "last_checkpoint is empty", 2),
    "cut tag": (tag("model_00000"), "must name a .pth file", 2),
    "tag of a missing file": (tag("model_0000003.pth"), "model_0000003.pth, which is not there", 2),
    "tag of a pickle": (
        tag("model.pkl"),
        "must name a .pth file of its folder, got 'model.pkl'",
        2,
    ),
    "tag that leaves the folder": (tag("../x/model.pth"), "must name a .pth file", 2),
    "empty newest file": (newest(0, checksum=False), "model_0000002.pth is empty", 1),
    "cut newest file": (newest(700, checksum=False), "damaged or cut short", 1),
    "cut newest file with checksum": (newest(700, checksum=True), "is damaged: it differs", 1),
}


@pytest.mark.parametrize("case", SPOILT)
def test_newest_valid_checkpoint_is_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    spoil, words, iteration = SPOILT[case]
    # Names do not sort as the iterations do.
    save(tmp_path, 0, "model_final")
    save(tmp_path, 1, "model_0000001")
    save(tmp_path, 9, "model_0000009_diverged", tag_last=False)
    save(tmp_path, 2, "model_0000002")
    spoil(tmp_path)
    assert resume(tmp_path)[0] == iteration
    assert words in warnings_of(caplog)
    assert warnings_of(caplog).count(words) == 1
    assert f"model_000000{iteration}.pth of iteration {iteration}" in warnings_of(caplog)


def test_resume_without_last_checkpoint_counts_as_resumed(tmp_path: Path) -> None:
    save(tmp_path, 4, tag_last=False)
    checkpointer = InsPoseCheckpointer(Small(), str(tmp_path))
    checkpointer.resume_or_load("")
    assert checkpointer.has_checkpoint()


def test_no_valid_checkpoint_lists_each_and_train_net_exits_with_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cut(save(tmp_path, 1), 100)
    save(tmp_path, 2).write_bytes(b"")
    with pytest.raises(NoValidCheckpoint) as error:
        resume(tmp_path)
    for words in ("model_0000001.pth: ", "model_0000002.pth: ", "start anew"):
        assert words in str(error.value)

    cfg = CfgNode({"OUTPUT_DIR": str(tmp_path), "MODEL": {"WEIGHTS": ""}, "DATASETS": {"TEST": ()}})
    monkeypatch.setattr(train_net, "setup", lambda _: cfg)
    monkeypatch.setattr(train_net, "describe_model", lambda *_: None)
    monkeypatch.setattr(train_net.Trainer, "build_model", lambda _: Small())
    with pytest.raises(SystemExit) as stop:
        train_net.main(SimpleNamespace(eval_only=True, resume=True))
    assert stop.value.code == 3
    assert "None of the checkpoints" in caplog.text


def test_weights_without_training_state_are_not_resumed_as_a_training(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpointer = InsPoseCheckpointer(Small(), str(tmp_path), trainer=nn.Linear(1, 1))
    with pytest.raises(NoValidCheckpoint, match="holds no trainer"):
        checkpointer.resume_or_load("")


TWO_WORKERS = """
import sys
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn
from inspose_d2.checkpoint import InsPoseCheckpointer
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
comm.create_local_process_group(2)
if rank:  # sees another folder, as on a machine that is behind
    InsPoseCheckpointer._newest_valid = lambda self: "of rank 1"
for run in ("/valid", "/damaged"):
    try:
        checkpointer = InsPoseCheckpointer(nn.Linear(1, 1), folder + run)
        print("iteration", checkpointer.resume_or_load("")["iteration"])
    except RuntimeError as error:
        print(type(error).__name__)
"""


@pytest.mark.slow
def test_two_workers_agree_with_the_first(tmp_path: Path) -> None:
    for name in ("valid", "damaged"):
        checkpointer = InsPoseCheckpointer(nn.Linear(1, 1), str(tmp_path / name))
        checkpointer.save("model_0000006", iteration=6)
    (tmp_path / "damaged" / "model_0000006.pth").write_bytes(b"")
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", TWO_WORKERS, str(rank), str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [worker.communicate(timeout=600)[0].splitlines() for worker in workers]
    assert printed == [["iteration 6", "NoValidCheckpoint"]] * 2


# Another number of keypoints, depth of the KP-Nets, width of the head and of the pyramid.
OTHERS = {
    "MODEL.INSPOSE.NUM_KEYPOINTS": 5,
    "MODEL.INSPOSE.KP_NET.NUM_LAYERS": 2,
    "MODEL.INSPOSE.CONV_DIM": 32,
    "MODEL.FPN.OUT_CHANNELS": 64,
}


@pytest.mark.parametrize("key", OTHERS)
def test_weights_of_another_architecture_do_not_resume_or_evaluate(
    tmp_path: Path, tiny_cfg: Callable[..., CfgNode], key: str
) -> None:
    other = build_model(tiny_cfg(**{key: OTHERS[key]}))
    InsPoseCheckpointer(other, str(tmp_path)).save("model_final", iteration=3)
    checkpointer = InsPoseCheckpointer(build_model(tiny_cfg()), str(tmp_path))
    words = r"does not fit the model: (\d+) of its .*\n  \S+ \(.*\): \(.*\) in the file"
    with pytest.raises(CheckpointError, match=words) as error:
        checkpointer.resume_or_load("")
    assert str(error.value).count("\n  ") <= 11
    with pytest.raises(CheckpointError, match=words):
        checkpointer.resume_or_load(str(tmp_path / "model_final.pth"), resume=False, strict=True)


def test_missing_weight_is_an_error_in_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model": {"backbone.weight": torch.zeros(4, 2)}}, path)
    with pytest.raises(CheckpointError, match=r"head\.weight \(3, 4\): not in the file"):
        InsPoseCheckpointer(Small()).load(str(path))


def test_training_starts_from_what_fits_and_says_how_much(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "model.pth"
    torch.save({"model": Small(2, classes=5).state_dict()}, path)
    model = Small()
    InsPoseCheckpointer(model).resume_or_load(str(path))
    assert model.value == 2
    # 2 * 4 of 2 * 4 + 4 * 3 weights.
    assert "40.0 % of the weights, 100.0 % of the backbone" in caplog.text


def test_training_does_not_start_from_weights_without_its_backbone(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model": {"body.weight": torch.zeros(4, 2)}}, path)
    with pytest.raises(CheckpointError, match=r"model\.pth has no weight of the backbone"):
        InsPoseCheckpointer(Small()).resume_or_load(str(path))


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("ending", ["pkl", "pth", "pyth"])
@pytest.mark.parametrize("through_torch", [False, True])
def test_code_in_weights_does_not_run(tmp_path: Path, ending: str, through_torch: bool) -> None:
    path, harm = tmp_path / f"model_final.{ending}", tmp_path / "harm"
    data = {"model": {"head.weight": Malicious(harm)}, "__author__": "x", "iteration": 1}
    if through_torch and ending != "pkl":
        torch.save(data, path)
    else:
        path.write_bytes(pickle.dumps(data, 2))
    with pytest.raises(CheckpointError, match=r"refused: it asks for \w+\.system, and could run"):
        InsPoseCheckpointer(Small()).load(str(path))
    (tmp_path / "last_checkpoint").write_text(path.name)
    with pytest.raises(NoValidCheckpoint, match=r"refused|must name a \.pth file"):
        resume(tmp_path)
    assert not harm.exists()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickles_of_detectron2_and_caffe2_are_read(tmp_path: Path, protocol: int) -> None:
    weights = {name: x.numpy() for name, x in Small(4).state_dict().items()}
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "Detectron2"}, protocol))
    model = Small()
    InsPoseCheckpointer(model).load(str(path))
    assert model.value == 4

    blobs = {"backbone_w": weights["backbone.weight"] + 1, "backbone_w_momentum": np.float64(0)}
    path.write_bytes(pickle.dumps({"blobs": blobs, "cfg": "x"}, protocol))
    InsPoseCheckpointer(model).load(str(path), strict=False)
    assert model.value == 5


def names_of_msra() -> dict[str, str]:
    """Weights of a ResNet-50 by their names in Detectron2's R-50.pkl, which are Caffe2's."""
    layers = {"stem.conv1": ("conv1", "res_conv1_bn")}
    for stage, blocks in enumerate((3, 4, 6, 3), start=2):
        for block in range(blocks):
            branches = {"conv1": "2a", "conv2": "2b", "conv3": "2c"}
            for conv, branch in (({} if block else {"shortcut": "1"}) | branches).items():
                name = f"res{stage}_{block}_branch{branch}"
                layers[f"res{stage}.{block}.{conv}"] = name, f"{name}_bn"
    norms = {"weight": "gamma", "bias": "beta"}
    norms |= {name: name for name in ("running_mean", "running_var")}
    return {
        **{f"{theirs}_w": f"{ours}.weight" for ours, (theirs, _) in layers.items()},
        **{
            f"{theirs}_{y}": f"{ours}.norm.{x}"
            for ours, (_, theirs) in layers.items()
            for x, y in norms.items()
        },
    }


def test_weights_in_the_form_of_msra_are_loaded_wholly(
    tmp_path: Path, tiny_cfg: Callable[..., CfgNode]
) -> None:
    r50 = {"BACKBONE.NAME": "build_inspose_resnet_fpn_backbone", "RESNETS.NORM": "FrozenBN"}
    model = build_model(tiny_cfg(**{f"MODEL.{key}": value for key, value in r50.items()}))
    state, names = model.backbone.bottom_up.state_dict(), names_of_msra()
    assert set(names.values()) == state.keys()
    wanted = {name: torch.full_like(x, number) for number, (name, x) in enumerate(state.items(), 1)}
    blobs = {theirs: wanted[ours].numpy() for theirs, ours in names.items()}
    blobs |= dict.fromkeys(("conv1_b", "fc1000_b", "conv1_w_momentum"), np.zeros(8, np.float32))
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs}, 2))
    InsPoseCheckpointer(model, str(tmp_path)).resume_or_load(str(path), resume=False)
    for name, value in model.backbone.bottom_up.state_dict().items():
        assert value.equal(wanted[name]), name


def test_pyth_of_pycls_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.pyth"
    torch.save({"model_state": {"weight": torch.full((4, 2), 6.0)}}, path)
    model = nn.ModuleDict({"backbone": nn.Linear(2, 4, bias=False)})
    InsPoseCheckpointer(model).load(str(path))
    assert float(model["backbone"].weight.detach()[0, 0]) == 6


UNREADABLE = {
    "model.pth": {
        b"": "is empty",
        b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
        b"<!DOCTYPE html><html>": "web page",
        b"PK\x03\x04 cut": "damaged or cut short",
        b"hello": "no checkpoint",
    },
    "model.pkl": {b"": "is empty", b"<html>": "web page", b"\x80\x02}q": "cut short"},
}
FILES = [(name, data, words) for name, cases in UNREADABLE.items() for data, words in cases.items()]


@pytest.mark.parametrize(("name", "data", "words"), FILES)
def test_file_that_is_no_checkpoint_is_explained(
    tmp_path: Path, name: str, data: bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    checkpointer = InsPoseCheckpointer(Small())
    for _ in range(2):  # an error does not spoil the next load
        with pytest.raises(CheckpointError, match=words) as error:
            checkpointer.load(str(path))
        assert str(path) in str(error.value)


@pytest.mark.parametrize("data", [[1], {"state_dict": {}}, {"model": 3}])
def test_file_without_weights_by_name_is_explained(tmp_path: Path, data: Any) -> None:
    path = tmp_path / "model.pth"
    torch.save(data, path)
    with pytest.raises(CheckpointError, match="by name"):
        InsPoseCheckpointer(Small()).load(str(path))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.pth", "nowhere.pth is not there. Set MODEL.WEIGHTS"),
        ("catalog://x", "Download it"),
    ],
)
def test_missing_weights_are_explained(path: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        InsPoseCheckpointer(Small()).load(path)


def train_best(folder: Path, values: dict[int, float], start: int = 0) -> None:
    """Let the hook see a value of AP after each of some iterations of a training of 10."""
    trainer = SimpleNamespace(start_iter=start, max_iter=10, state_dict=lambda: {"iteration": -1})
    checkpointer = InsPoseCheckpointer(Small(), str(folder))
    hook = BestCheckpointer(1, checkpointer, "keypoints/AP")
    hook.trainer = trainer
    with EventStorage() as trainer.storage:
        hook.before_train()
        for trainer.iter, value in values.items():
            nn.init.constant_(checkpointer.model.backbone.weight, trainer.iter)
            trainer.storage.put_scalar("keypoints/AP", value)
            hook.after_step() if trainer.iter < 9 else hook.after_train()


def best(folder: Path) -> tuple[float, int]:
    data = torch.load(folder / "model_best.pth", weights_only=True)
    return data["best_value"], data["iteration"]


def test_best_model_survives_resume_and_leaves_last_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    train_best(tmp_path, {0: float("nan")})
    assert not (tmp_path / "model_best.pth").exists()
    train_best(tmp_path, {1: 10.0, 2: 30.0, 3: 20.0, 4: float("nan"), 5: 30.0})
    assert best(tmp_path) == (30.0, 2)
    train_best(tmp_path, {6: 25.0}, start=6)  # resumed
    assert best(tmp_path) == (30.0, 2)
    train_best(tmp_path, {6: 35.0, 10: 40.0}, start=6)  # 10: after the last step, number 9
    assert best(tmp_path) == (40.0, 9)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    train_best(tmp_path, {0: 5.0})  # a new training in the old folder
    assert best(tmp_path) == (5.0, 0)


def test_nothing_found_is_not_called_the_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train_best(tmp_path, {0: 0.0, 2: 3.0})
    praised = [x for x in caplog.messages if "best so far" in x]
    assert len(praised) == 1
    assert "3.000 is the best so far" in praised[0]


def test_damaged_best_model_is_no_obstacle(tmp_path: Path) -> None:
    train_best(tmp_path, {1: 10.0})
    cut(tmp_path / "model_best.pth", 100)
    train_best(tmp_path, {6: 5.0}, start=6)
    assert best(tmp_path) == (5.0, 6)
