"""train_net.py as users run it: training, resuming, evaluating, several workers."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.engine import default_argument_parser
from detectron2.engine import launch as launch_workers
from detectron2.structures import BoxMode
from detectron2.utils import comm
from PIL import Image

from experiments.coco_ap import average_precision, load_truth
from inspose_d2.data.dataset_mapper import InsPoseDatasetMapper
from inspose_d2.engine import launch as train_net
from inspose_d2.engine.trainer import Trainer
from inspose_d2.model_zoo import find_weights
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
QUICK = str(ROOT / "configs" / "quick" / "synthetic_people.yaml")
AP_LINE = "Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets= 20 ]"
SMALL = {
    **TINY,
    "MODEL.INSPOSE.SCORE_THRESH_TEST": 0.0,
    "MODEL.INSPOSE.TOPK_CANDIDATES_TEST": 10,
    "DATASETS.TRAIN": ("synthetic_people_val",),
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "SEED": 7,
}

PATIENCE = 600  # seconds: for a machine with much else to do


def arguments(output: Path, *flags: str, **settings: Any) -> list[str]:
    """Command line of a small run."""
    values = {**SMALL, "OUTPUT_DIR": str(output), **settings}
    pairs = [str(x) for item in values.items() for x in item]
    return ["--config-file", QUICK, *flags, *pairs]


def run(output: Path, *flags: str, **settings: Any) -> Any:
    """Run ``train_net.main`` in this process."""
    args = default_argument_parser().parse_args(arguments(output, *flags, **settings))
    return train_net.main(args)


def launch(command: list[str]) -> str:
    """Run a command in the project's folder; returns what it printed."""
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "model_final.pth", weights_only=True)["model"]


@pytest.mark.slow
def test_training_evaluates_on_the_way_resumes_and_evaluates_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], few_people: dict[str, Any]
) -> None:
    run(tmp_path, **few_people, **{"SOLVER.MAX_ITER": 2, "TEST.EVAL_PERIOD": 1})
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert list(tmp_path.glob("events.out.tfevents*"))  # TensorBoard
    assert capfd.readouterr().out.count(AP_LINE) == 2  # after the first step and at the end
    assert "keypoints/AP" in metrics(tmp_path)[-1]
    assert not [key for line in metrics(tmp_path) for key in line if key.startswith("bbox")]

    run(tmp_path, "--resume", **few_people, **{"SOLVER.MAX_ITER": 3})
    last = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert last["iteration"] == 2  # the third step, counted from 0

    capfd.readouterr()
    final = str(tmp_path / "model_final.pth")
    weights_of_run = {**few_people, "MODEL.WEIGHTS": final}
    results = run(tmp_path, "--eval-only", **weights_of_run)
    assert results.keys() == {"keypoints"}  # no box AP for pseudo-boxes
    assert math.isfinite(results["keypoints"]["AP"])
    printed = capfd.readouterr()
    assert AP_LINE in printed.out
    assert "copypaste: Task: keypoints" in printed.out + printed.err
    assert "Task: bbox" not in printed.out + printed.err

    predictions = tmp_path / "inference" / "coco_instances_results.json"
    plain = json.loads(predictions.read_text())
    assert plain
    views = {**weights_of_run, "TEST.AUG.ENABLED": True, "TEST.AUG.MIN_SIZES": (64,)}
    run(tmp_path, "--eval-only", **views, **{"TEST.AUG.FLIP": False})
    assert json.loads(predictions.read_text()) == plain  # one view: the same from file to result
    results = run(tmp_path, "--eval-only", **views)
    assert results.keys() == {"keypoints"}
    assert json.loads(predictions.read_text()) != plain


@pytest.mark.slow
def test_boxes_of_a_box_head_are_evaluated_beside_keypoints(
    tmp_path: Path, few_people: dict[str, Any]
) -> None:
    settings = {**few_people, "MODEL.INSPOSE.BOX_HEAD.ENABLED": True}
    results = run(tmp_path, "--eval-only", **settings)
    assert results.keys() == {"bbox", "keypoints"}
    truth = load_truth(settings["DATASETS.REGISTER"][0][1])
    found = json.loads((tmp_path / "inference/coco_instances_results.json").read_text())
    assert {x["image_id"] for x in found} == set(truth.imgs)
    for task, figures in results.items():
        assert figures["AP"] == pytest.approx(average_precision(truth, found, task)["AP"], abs=1e-6)


@pytest.mark.fault
@pytest.mark.slow
def test_two_gloo_workers_equal_one(tmp_path: Path) -> None:
    # The same two images a step: on one worker, or one on each of two. What depends on the
    # division is switched off: batch statistics, random flips, images of other shapes.
    same = {
        "MODEL.RESNETS.NORM": "FrozenBN",
        "INPUT.RANDOM_FLIP": "none",
        "DATALOADER.ASPECT_RATIO_GROUPING": False,
        "INPUT.MAX_SIZE_TRAIN": 64,
        "SOLVER.OPTIMIZER": "SGD",
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.MAX_ITER": 2,
        "SOLVER.CHECKPOINT_PERIOD": 1,
        "DATASETS.TEST": (),
    }
    flags = workers_flags(2, tmp_path)
    two = [sys.executable, "-W", "ignore", "train_net.py"]
    launch(two + arguments(tmp_path / "two", *flags, **same))
    run(tmp_path / "one", **same)
    one, two_workers = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two_workers.keys()
    before = torch.load(tmp_path / "one" / "model_0000000.pth", weights_only=True)["model"]
    moved = (one["head.cls_score.weight"] - before["head.cls_score.weight"]).abs().max()
    assert moved > 1e-3  # more than what is taken for rounding below
    for name, value in one.items():
        torch.testing.assert_close(two_workers[name], value, rtol=1e-5, atol=1e-6, msg=name)


def train_beside_nobody(folder: str) -> None:
    """Four steps of a worker; in each, one of two workers has the image without persons."""
    names = "keypoint_names", "keypoint_flip_map"
    like = MetadataCatalog.get("synthetic_people_val")
    MetadataCatalog.get("one_of_two").set(**{name: getattr(like, name) for name in names})
    person = {"bbox": [8, 8, 40, 40], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    person["keypoints"] = [x for k in range(17) for x in (8 + 2 * k, 40 - k, 2)]
    records = [
        {"file_name": f"{folder}/{i}.png", "image_id": i, "height": 64, "width": 64}
        | {"annotations": [person] * i}
        for i in (0, 1)
    ]
    DatasetCatalog.register("one_of_two", lambda: records)
    settings = {
        "DATASETS.TRAIN": ("one_of_two",),
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
        "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": 0,
        "SOLVER.MAX_ITER": 4,
        "DATASETS.TEST": (),
    }
    args = default_argument_parser().parse_args(arguments(Path(folder), **settings))
    persons: list[int] = []

    class Counting(InsPoseDatasetMapper):
        def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
            persons.append(len(record["annotations"]))
            return super().__call__(record)

    cfg = train_net.setup(args)
    loader = build_detection_train_loader(cfg, mapper=Counting(cfg))
    with patch.object(Trainer, "build_train_loader", lambda *_: loader):
        trainer = Trainer(cfg)
    start = {name: value.clone() for name, value in trainer._trainer.model.state_dict().items()}
    trainer.train()
    end = trainer._trainer.model.state_dict()
    seen = {"start": start, "end": end, "persons": torch.tensor(persons[:4])}
    torch.save(seen, f"{folder}/worker_{comm.get_rank()}.pth")


@pytest.mark.slow
@pytest.mark.fault
def test_worker_without_persons_keeps_up_with_the_other(tmp_path: Path) -> None:
    for i in (0, 1):
        Image.effect_noise((64, 64), 50 + 100 * i).convert("RGB").save(tmp_path / f"{i}.png")
    # A worker that waited for the other in vain would fail after these seconds.
    launch_workers(
        train_beside_nobody,
        2,
        dist_url=f"file://{tmp_path / 'rendezvous'}",
        args=(str(tmp_path),),
        timeout=timedelta(seconds=PATIENCE),
    )
    one, two = (torch.load(tmp_path / f"worker_{i}.pth", weights_only=True) for i in (0, 1))
    assert (one["persons"] + two["persons"]).tolist() == [1, 1, 1, 1]
    assert {0, 1} >= set(one["persons"].tolist())
    assert not all(one["start"][name].equal(value) for name, value in one["end"].items())
    for name, value in one["end"].items():
        assert value.isfinite().all(), name
        assert value.equal(two["end"][name]), name


@pytest.mark.slow
def test_two_workers_of_torchrun_evaluate_as_one_does(
    tmp_path: Path, few_people: dict[str, Any]
) -> None:
    # From weights that find people, to figures above 0.
    start = {"MODEL.WEIGHTS": find_weights("synthetic_people_tiny"), "SOLVER.BASE_LR": 1e-6}
    small = {"OUTPUT_DIR": str(tmp_path), "DATALOADER.NUM_WORKERS": 0, "SOLVER.IMS_PER_BATCH": 2}
    settings = {**few_people, **start, **small, "SOLVER.MAX_ITER": 2}
    config = ["--config-file", str(ROOT / "configs/quick/synthetic_people_tiny.yaml")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "train_net.py", *config]
    printed = launch([*command, *(str(x) for item in settings.items() for x in item)])
    assert "cpu, 2 worker(s)" in printed
    beginning = printed.partition("Starting training")[0].splitlines()
    assert len(beginning) < 20, beginning  # torchrun's own among them
    assert "FutureWarning" not in printed
    of_two = [x for x in metrics(tmp_path) if "keypoints/AP" in x][-1]
    poses = json.loads((tmp_path / "inference/coco_instances_results.json").read_text())

    settings["MODEL.WEIGHTS"] = tmp_path / "model_final.pth"
    settings["OUTPUT_DIR"] = tmp_path / "one"
    pairs = [str(x) for item in settings.items() for x in item]
    args = default_argument_parser().parse_args([*config, "--eval-only", *pairs])
    figures = train_net.main(args)["keypoints"]
    assert figures["AP"] > 10
    for name, value in figures.items():
        assert of_two[f"keypoints/{name}"] == pytest.approx(value, abs=1e-6, nan_ok=True)
    of_one = json.loads((tmp_path / "one/inference/coco_instances_results.json").read_text())
    key = lambda x: (x["image_id"], -x["score"])  # noqa: E731
    assert len({x["image_id"] for x in poses}) == 7
    for ours, theirs in zip(sorted(poses, key=key), sorted(of_one, key=key), strict=True):
        assert ours["image_id"] == theirs["image_id"]
        assert ours["keypoints"] == pytest.approx(theirs["keypoints"], abs=1e-3)


def start(
    output: Path, *flags: str, until: str = "iter: 19 ", **settings: Any
) -> "subprocess.Popen[str]":
    """Start ``train_net.py`` and wait for words in its log: by default for 20 steps."""
    values = {"SOLVER.MAX_ITER": 100_000, "DATASETS.TEST": (), **settings}
    command = [sys.executable, "-W", "ignore", "train_net.py", *arguments(output, *flags, **values)]
    log = output / "log.txt"
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=-1, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + PATIENCE
    while not log.exists() or until not in log.read_text():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, f"no {until!r} in {PATIENCE} s"
        time.sleep(0.05)
    return process


def finish(process: "subprocess.Popen[str]") -> str:
    """Wait for the end of a command, which would go on for hours; returns what it printed."""
    try:
        return process.communicate(timeout=PATIENCE)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"did not end within {PATIENCE} s")


def saved_step(output: Path) -> int:
    """Number of the step that ``--resume`` goes on after."""
    last = (output / "last_checkpoint").read_text()
    assert last.startswith("model_0")
    return int(torch.load(output / last, weights_only=True)["trainer"]["iteration"])


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            _, parent, *_ = stat.read_text().rpartition(")")[2].split()
            found += [int(stat.parent.name)] * (int(parent) == pid)
    return sorted(found)


def workers_flags(number: int, folder: Path) -> tuple[str, ...]:
    """Flags for so many workers. They meet in a file: a free port may be taken before they do."""
    url = f"file://{folder / 'rendezvous'}"
    return ("--num-gpus", str(number), "--dist-url", url) if number > 1 else ()


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "status", "number"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 2)]
)
def test_signal_saves_the_step_and_sets_the_exit_status(
    tmp_path: Path, signum: int, status: int, number: int
) -> None:
    process = start(tmp_path, *workers_flags(number, tmp_path))
    process.send_signal(signum)
    printed = finish(process)
    assert process.returncode == status, printed[-3000:]
    assert "go on with --resume" in (tmp_path / "log.txt").read_text()
    assert saved_step(tmp_path) >= 19
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "status", "number"), [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 2)]
)
def test_signal_to_all_processes_of_a_run_is_one_to_the_run(
    tmp_path: Path, signum: int, status: int, number: int
) -> None:
    process = start(tmp_path, *workers_flags(number, tmp_path), **{"DATALOADER.NUM_WORKERS": 2})
    below = children(process.pid)
    for pid in [*(x for child in below for x in children(child)), *below, process.pid]:
        os.kill(pid, signum)
    printed = finish(process)
    assert process.returncode == status, printed[-3000:]
    assert "killed" not in printed
    assert saved_step(tmp_path) >= 19


@pytest.mark.fault
@pytest.mark.slow
def test_signal_ends_an_evaluation_at_once(tmp_path: Path) -> None:
    settings = {"DATASETS.TEST": ("synthetic_people_val",), "TEST.EVAL_PERIOD": 20}
    process = start(tmp_path, until="Start inference on", **settings)
    process.send_signal(signal.SIGTERM)
    printed = finish(process)
    assert process.returncode == 143, printed[-3000:]
    assert saved_step(tmp_path) == 19
    assert "Evaluation results" not in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_two_workers_refuse_annotations_with_one_message(tmp_path: Path) -> None:
    person = {"id": 5, "image_id": 1, "category_id": 1, "keypoints": [1, 2, 2] * 2 + [3, 4, 7]}
    names = ["head", "left_hand", "right_hand"]
    coco = {
        "images": [{"id": 1, "width": 64, "height": 64, "file_name": "1.png"}],
        "annotations": [person],
        "categories": [{"id": 1, "name": "person", "keypoints": names}],
    }
    (tmp_path / "bad.json").write_text(json.dumps(coco))
    settings = {
        "DATASETS.REGISTER": [["bad", str(tmp_path / "bad.json"), str(tmp_path)]],
        "DATASETS.TRAIN": ("bad",),
        "DATASETS.TEST": (),
        "MODEL.INSPOSE.NUM_KEYPOINTS": 3,
    }
    command = [
        sys.executable,
        "-W",
        "ignore",
        "train_net.py",
        *arguments(tmp_path, *workers_flags(2, tmp_path), **settings),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    printed = result.stdout + result.stderr
    assert result.returncode == 1, printed[-3000:]
    assert "Traceback" not in printed
    (line,) = [x for x in printed.splitlines() if "annotations[0]" in x]
    assert "v of keypoint 2 must be 0, 1 or 2, got 7" in line
    assert printed.count("2 workers share the CPUs: that is meant for small configs") == 1
    assert "annotations[0]" in (tmp_path / "log.txt").read_text()


def test_more_workers_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = default_argument_parser().parse_args(["--num-gpus", "4"])
    with pytest.raises(SystemExit) as caught:
        train_net.launch_workers(args)
    assert caught.value.code == 2
    assert "--num-gpus is 4, but this machine has 2 GPUs" in capsys.readouterr().err


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_killed_loader_process_is_an_error_that_names_memory(tmp_path: Path, number: int) -> None:
    flags = workers_flags(number, tmp_path)
    process = start(tmp_path, *flags, **{"DATALOADER.NUM_WORKERS": 1})
    # The second worker's, where there are two workers.
    workers = [x for x in children(process.pid) if children(x)] if flags else [process.pid]
    (loader,) = children(workers[-1])
    os.kill(loader, signal.SIGKILL)
    printed = finish(process)
    assert process.returncode == 1
    assert "mostly killed for memory" in printed
    assert "lower DATALOADER.NUM_WORKERS" in printed
    assert saved_step(tmp_path) >= 19


@pytest.mark.fault
def test_best_checkpoint_is_kept_and_the_run_goes_on_from_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([10.0, 30.0, 20.0, 25.0])
    monkeypatch.setattr(train_net.Trainer, "test", lambda *_: {"keypoints": {"AP": next(values)}})
    run(tmp_path, **{"SOLVER.MAX_ITER": 3, "TEST.EVAL_PERIOD": 1})
    run(tmp_path, "--resume", **{"SOLVER.MAX_ITER": 4, "TEST.EVAL_PERIOD": 1})
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert (best["best_value"], best["iteration"]) == (30.0, 1)
    assert best["trainer"]["iteration"] == 1
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 3
