"""`benchmarks/` on tiny models: what it measures and writes, never how fast."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from detectron2.data.datasets import load_coco_json

from benchmarks import __main__ as benchmark
from benchmarks import memory as benchmark_memory
from benchmarks import train as benchmark_train
from benchmarks.kp_net import BACKENDS, LOSS, PEAKS, draw_kp_nets, errors_of, least_work
from benchmarks.models import (
    BACKBONE,
    HEIGHTS,
    INSPOSE,
    MODELS,
    PEER,
    WIDTH,
    Setting,
    build_inspose,
    build_one,
    inference,
    multiply_adds,
    person_boxes,
)
from benchmarks.train import COCO, SYNTHETIC, Training
from inspose_d2.data.synthetic import build_synthetic_people
from inspose_d2.modeling.kp_net import KPNet

QUICK = Path(__file__).parents[2] / "configs" / "quick"
CONFIGS = [str(QUICK / "synthetic_people.yaml"), str(QUICK / "keypoint_rcnn.yaml")]
SETTING = Setting(*CONFIGS, (96, 128), 2, "cpu", amp=None, channels_last=False, compile=False)
FLAGS = ["--config-file", CONFIGS[0], "--peer", CONFIGS[1], "--size", "96", "128"]
FLAGS += ["--persons", "1", "3", "--repeats", "1", "--batch", "2"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Any, str]]:
    """Run the tool, without new processes or large maps; its JSON and its Markdown come back."""
    small = {"peak_in_fresh_process": benchmark_memory.peak_of, "KP_NET_MAPS": (30, 40)}
    small |= {"MANY_KP_NETS": 200, "MANY_POSITIVES": (5, 50)}
    for name, value in small.items():
        monkeypatch.setattr(benchmark_memory, name, value)

    def run(name: str, *flags: str) -> tuple[Any, str]:
        benchmark.main([*FLAGS, *flags, "--output", str(tmp_path)])
        text = (tmp_path / f"{name}.md").read_text()
        pictures = re.findall(r"!\[.*\]\((.*)\)", text)
        assert all(cv2.imread(str(tmp_path / x)).std() > 0 for x in pictures)
        return json.loads((tmp_path / f"{name}.json").read_text()), text

    return run


def check_shares(text: str, num_tables: int) -> None:
    """The shares of each stage table add up to the 100 % of its last line."""
    tables = re.findall(r"\| share \|.*?\n(.*?)\n\n", text, re.DOTALL)
    assert len(tables) == num_tables
    for table in tables:
        *shares, total = [float(x) for x in re.findall(r"([\d.]+) % \|", table)]
        assert total == 100
        assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares) + 0.01)


@pytest.mark.slow
def test_latency_report_has_every_number_of_persons(run: Callable[..., Any]) -> None:
    result, text = run("latency", "--stages", "3")
    assert result["command"].startswith("python -m benchmarks --config-file")
    assert result["command"] in text
    assert result["machine"]["torch"] == torch.__version__
    rows = {(row["model"], row["persons"]): row for row in result["latency"]}
    assert rows.keys() == {*((name, n) for name in MODELS for n in (1, 3)), (BACKBONE, None)}
    rate = result["limits"]["multiply-adds"]["rate"]
    for row in rows.values():
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert row["floor"] == pytest.approx(row["GMACs"] / rate)
    for ratio in result["ratios"]:
        n = ratio["persons"]
        fastest = min(rows[name, n]["median"] for name in MODELS[1:])
        assert ratio["ratio"] == pytest.approx(rows[INSPOSE, n]["median"] / fastest)
        assert f"| {n} | " in text

    seconds = result["stages"]["seconds"]
    names = {stage.name for stage in benchmark.inference_stages(build_inspose(SETTING))}
    assert seconds.keys() == names | {"rest"}
    dense = sum(seconds[x] for x in (*benchmark.BACKBONE_STAGES, *benchmark.DENSE_STAGES))
    assert result["stages"]["outside"] == pytest.approx(1 - dense / sum(seconds.values()))
    check_shares(text, num_tables=1)
    floors = result["stages"]["floors"]
    assert floors.keys() < seconds.keys()
    assert min(floors.values()) > 0
    assert sum(floors.values()) == pytest.approx(rows[INSPOSE, 3]["floor"])

    memory = [(row["what"], row["persons"]) for row in result["memory"]]
    kp_nets = [("peaks of KP-Nets alone", n) for n in (1, 3, 200)]
    assert memory == [*((name, n) for name in (INSPOSE, PEER) for n in (1, 3)), *kp_nets]
    assert all(row["bytes before"] > 0 and row["bytes more"] >= 0 for row in result["memory"])
    assert result["memory"][-1]["bytes more"] > 0


@pytest.mark.slow
def test_training_report(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    json_file = build_synthetic_people(tmp_path, "val", 2, 96, num_workers=1)
    images = json_file.parents[1] / "val"
    records = load_coco_json(str(json_file), str(images), "synthetic_people_val")
    asked = []
    monkeypatch.setattr(
        benchmark_train, "get_detection_dataset_dicts", lambda name: asked.append(name) or records
    )
    result, text = run("training", "--train")
    rows = {(row["model"], row["persons"]): row for row in result["steps"]}
    assert rows.keys() == {(name, n) for name in MODELS for n in (1, 3)}
    for (name, n), row in rows.items():
        assert row["median"] > 0
        # The peer gets all annotated boxes of two images; a person has a location at the least.
        assert row["regions"] >= 2 * n, name
    for stages in result["stages"]:
        parts = {"backbone, heads and branches", "targets", "losses without targets"}
        assert stages["seconds"].keys() == parts | {"backward", "optimizer", "rest"}
    check_shares(text, num_tables=2)
    assert asked == [result["loading"]["data"]]
    assert result["loading"]["images per second"] > 0
    memory = [(row["what"], row["persons"]) for row in result["memory"]]
    steps = [(f"step of {name}", n) for name in (INSPOSE, PEER) for n in (1, 3)]
    assert memory == [*steps, *(("loss of KP-Nets alone, and gradient", n) for n in (5, 50))]


@pytest.mark.parametrize(("has_coco", "data"), [(True, COCO), (False, SYNTHETIC)])
def test_photographs_are_loaded_where_they_are(
    monkeypatch: pytest.MonkeyPatch, has_coco: bool, data: str
) -> None:
    cfg = benchmark_train.configs(SETTING)[0]
    monkeypatch.setattr("os.path.isfile", lambda _: has_coco)
    monkeypatch.setattr(benchmark_train, "get_detection_dataset_dicts", lambda _: [{}])
    monkeypatch.setattr(
        benchmark_train.Trainer, "build_mapper", lambda *_, **__: lambda record: record
    )
    assert benchmark_train.loading_rate(cfg)["data"] == data


def test_kp_net_report(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # no kernels on the CPU
    result, text = run("kp_net", "--kp-net")
    assert result["maps"] == [12, 16]
    rows = {(row["task"], row["persons"], row["backend"]): row for row in result["KP-Nets"]}
    assert rows.keys() == {(t, n, b) for t in (PEAKS, LOSS) for n in (1, 3) for b in BACKENDS[:2]}
    (problem,) = result["not run"]
    assert problem.startswith("triton: ")
    assert problem in text
    for row in rows.values():
        rates = {unit: x["rate"] for unit, x in result["limits"].items()}
        floors = [work / rates[unit] for unit, work in row["work"].items()]
        assert row["floor"] == pytest.approx(max(floors))
    assert "| loss and gradient, torch | 3 |" in text
    assert result["errors"]["by backend"].keys() == set(BACKENDS[:2])


class OffByALittle(KPNet):
    """Peaks one cell too far, probabilities too low, gradients doubled."""

    def peaks(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cells, scores = super().peaks(*args)
        return (cells + 1) % 42, scores + 0.25

    def log_probs(self, *args: Any) -> torch.Tensor:
        return 2 * super().log_probs(*args)


def test_errors_beside_the_definition_are_found() -> None:
    net = paper_kp_net()
    drawn = draw_kp_nets(SETTING, net, 9, (6, 7))
    assert max(errors_of(net, drawn).values()) < 1e-4
    net.__class__ = OffByALittle
    errors = errors_of(net, drawn)
    assert errors["other peaks"] == 9 * 17
    assert errors["scores"] == pytest.approx(0.25, abs=1e-4)
    assert errors["log-probabilities"] > 1
    assert errors["gradient of the parameters"] == pytest.approx(1, rel=1e-3)
    assert errors["gradient of the features"] == pytest.approx(1, rel=1e-3)


def paper_kp_net() -> KPNet:
    return KPNet(stride=8, feature_channels=8, channels=8, num_layers=3, num_keypoints=17)


def test_least_work_of_two_kp_nets_on_six_cells() -> None:
    peaks, loss = (least_work(paper_kp_net(), task, 2, 6) for task in (PEAKS, LOSS))
    # 10*8 + 8*8 + 8*17 = 280; backwards 280 for the weights, 8*8 + 8*8 + 8*17 = 264 for inputs.
    assert peaks["multiply-adds"] == pytest.approx(280 * 12 / 1e9)
    assert loss["multiply-adds"] == pytest.approx((280 + 280 + 264) * 12 / 1e9)
    features, params, outputs = 8 * 6 * 4, 2 * 313 * 4, 2 * 17 * (8 + 4)
    assert peaks["bytes"] == pytest.approx((features + params + outputs) / 1e9)
    assert loss["bytes"] == pytest.approx((2 * features + 2 * params + outputs) / 1e9)
    assert peaks["exponentials"] == loss["exponentials"] == pytest.approx(2 * 17 * 6 / 1e9)


@pytest.mark.parametrize("name", MODELS)
def test_forced_number_of_persons_is_found_in_every_image(name: str) -> None:
    model = build_one(SETTING, name)
    for n in (1, 40, 7):
        found = [result["instances"] for result in inference(SETTING, model, n)()]
        assert [len(x) for x in found] == [n, n]
        assert found[0].pred_keypoints.shape == (n, 17, 3)
        assert found[0].pred_keypoints.isfinite().all()
        if name != INSPOSE:
            torch.testing.assert_close(found[1].pred_boxes.tensor, person_boxes(n, (96, 128)))


@pytest.mark.parametrize("size", [(800, 1216), (96, 128), (400, 40)])
def test_boxes_are_persons_in_the_image(size: tuple[int, int]) -> None:
    boxes = person_boxes(500, size)
    assert torch.equal(boxes[:20], person_boxes(20, size))
    x0, y0, x1, y1 = boxes.unbind(dim=1)
    assert min(x0.min(), y0.min()) >= 0
    assert x1.max() <= size[1] + 1e-3
    assert y1.max() <= size[0] + 1e-3
    torch.testing.assert_close(x1 - x0, WIDTH * (y1 - y0), rtol=1e-5, atol=1e-3)
    if size == (800, 1216):
        heights = y1 - y0
        assert HEIGHTS[0] <= heights.min() < 80
        assert 380 < heights.max() <= HEIGHTS[1]


def test_stages_leave_the_model_as_it_was() -> None:
    model = build_inspose(SETTING)
    run = inference(SETTING, model, 3)
    stages = benchmark.inference_stages(model)
    owners = [stage.owner for stage in stages]
    expected = run()
    before = [dict(vars(owner)) for owner in owners]
    benchmark.stage_seconds(run, stages, 1)
    assert [dict(vars(owner)) for owner in owners] == before
    for result, other in zip(run(), expected, strict=True):
        got, wanted = result["instances"], other["instances"]
        assert torch.equal(got.pred_keypoints, wanted.pred_keypoints)


def test_multiply_adds_grow_with_the_persons_by_their_own() -> None:
    model, peer = build_one(SETTING, INSPOSE), build_one(SETTING, PEER)
    few, many = (multiply_adds(SETTING, model, n)[""] for n in (2, 5))
    # Two images, 3 more persons in each: 3x3x64 inputs to 313 parameters, 280 in 12 x 16 cells.
    assert many - few == pytest.approx(6 * (576 * 313 + 280 * 12 * 16 + 16) / 1e9, rel=1e-3)
    few, many = (multiply_adds(SETTING, peer, n)[""] for n in (2, 5))
    assert many - few > 6 * 14 * 14 * 9 * 128**2 * 3 / 1e9  # more than three of four convolutions


def test_losses_that_are_not_finite_are_refused() -> None:
    training = Training(SETTING, INSPOSE)
    inputs = benchmark_train.images_with_persons(SETTING, 1)
    before = copy.deepcopy(training.model.head.cls_score.weight)
    training.step(inputs)
    assert torch.equal(training.model.head.cls_score.weight, before)  # the rate is 0
    with torch.no_grad():
        training.model.head.cls_score.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss_cls"):
        training.check(inputs)


def allocate(megabytes: int) -> Callable[[], Any]:
    return lambda: torch.ones(megabytes, 2**18)


def make_allocate() -> Callable[[int], Callable[[], Any]]:
    return allocate


@pytest.mark.slow
def test_peak_memory_of_a_new_process_is_what_the_call_takes() -> None:
    torch.ones(200, 2**18)  # 200 MiB here are nothing to the other process
    peak = benchmark_memory.peak_in_fresh_process(make_allocate, 100, on_cuda=False)
    assert 95 < peak["bytes more"] / 2**20 < 110
    assert peak["bytes before"] > 2**20
