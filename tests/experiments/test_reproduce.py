"""Rows, runs and reports of experiments/reproduce.py; what it trains is tested elsewhere."""

import argparse
import copy
import csv
import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from detectron2.evaluation.coco_evaluation import _evaluate_predictions_on_coco
from pycocotools.coco import COCO

from experiments import peer_report as reproduce_peer
from experiments import reproduce
from experiments.coco_ap import ap_by_people, average_precision, images_by_people
from experiments.peer_report import write_people_report
from experiments.report import Line, Report, figure, mean_and_spread

ALL_ROWS = {row for table in (*reproduce.TABLES.values(), reproduce.PEER) for row in table.rows}
PAPER = {"AP": 63.1, "AP50": 86.2, "AP75": 68.5, "APM": 58.5, "APL": 70.1}
ARGS = argparse.Namespace(jobs=2, num_gpus=1)


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """Undo what ``main`` changes of the process, which is a whole one's own in real life."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    logging.disable(logging.NOTSET)


def test_every_row_has_configs_that_can_be_read(tmp_path: Path) -> None:
    for row in ALL_ROWS:
        for steps in (20, None):
            cfg = reproduce.make_run(row, 1, tmp_path, steps, []).cfg()
            assert cfg.MODEL.META_ARCHITECTURE in ("InsPose", "GeneralizedRCNN")


def test_the_full_method_of_all_tables_is_one_run(tmp_path: Path) -> None:
    rows = [
        r for t in "1234" for r in reproduce.TABLES[t].rows if r.config == "InsPose_R50_3x.yaml"
    ]
    assert len(rows) == 4
    assert {reproduce.make_run(row, 1, tmp_path, 20, []).folder for row in rows} == {
        tmp_path / "small" / "InsPose_R50_3x" / "seed1"
    }


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("plain", {"DISK_OFFSET.ENABLED": False, "HEATMAP.ENABLED": False}),
        ("disk_offset", {"HEATMAP.ENABLED": False}),
        ("depth1", {"KP_NET.NUM_LAYERS": 1}),
        ("depth2", {"KP_NET.NUM_LAYERS": 2}),
        ("depth4", {"KP_NET.NUM_LAYERS": 4}),
        ("stride16", {"MAP_STRIDE": 16}),
        ("stride4", {"MAP_STRIDE": 4}),
        ("stride2", {"MAP_STRIDE": 2}),
        ("box_head", {"BOX_HEAD.ENABLED": True}),
    ],
)
@pytest.mark.parametrize("steps", [20, None], ids=["small", "full"])
def test_ablation_differs_from_the_full_method_in_its_own_keys(
    name: str, difference: dict[str, Any], steps: int | None, tmp_path: Path
) -> None:
    settings = [
        reproduce.settings_of(reproduce.make_run(row, 1, tmp_path, steps, []).cfg())
        for row in (reproduce.full_method(""), reproduce.ablation(name, ""))
    ]
    changed = {k: v for k, v in settings[1].items() if v != settings[0][k]}
    assert changed == {f"MODEL.INSPOSE.{key}": value for key, value in difference.items()}


@pytest.mark.parametrize("steps", [20, None], ids=["small", "full"])
def test_rows_of_the_recipe_leave_out_one_part_each(steps: int | None, tmp_path: Path) -> None:
    whole, *others = reproduce.TABLES["recipe"].rows
    runs = [reproduce.make_run(row, 1, tmp_path, steps, []) for row in (whole, *others)]
    assert len({run.folder for run in runs}) == len(runs)
    settings = [reproduce.settings_of(run.cfg()) for run in runs]
    ignored = {"MODEL.WEIGHTS"}  # of the row that is only tested
    changed = [{k for k, v in x.items() if v != settings[0][k]} - ignored for x in settings[1:]]
    assert changed == [
        {"MODEL.INSPOSE.CLS_LOSS"},
        {"MODEL.INSPOSE.REGRESSION.ENABLED"},
        {"INPUT.SCALE_JITTER"},
        {"INPUT.ROTATION", "INPUT.COLOR_JITTER"},
        {"SOLVER.EMA_DECAY"},
        {"MODEL.INSPOSE.DECODING_TEST", "MODEL.INSPOSE.KEYPOINT_SCORE_WEIGHT_TEST"},
    ]


def test_small_run_is_the_quick_config_for_a_fixed_number_of_steps(tmp_path: Path) -> None:
    cfg = reproduce.make_run(reproduce.full_method(""), 2, tmp_path, 300, []).cfg()
    assert cfg.DATASETS.TEST == ("synthetic_people_val",)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS, cfg.SEED) == (300, 60, 2)
    assert cfg.SOLVER.CHECKPOINT_PERIOD == 200  # an interruption costs no more
    assert cfg.TEST.EVAL_PERIOD == 0


def test_full_run_changes_nothing_of_its_config_and_a_test_takes_the_row_s_weights() -> None:
    trained, tested = reproduce.TABLES["5"].rows[:2]
    runs = reproduce.ROOT / "output" / "reproduce"
    assert reproduce.make_run(trained, 1, runs, None, [], 8).command() == [
        *("train_net.py", "--config-file", "configs/InsPose_R50_100ep.yaml", "--resume"),
        *("--num-gpus", "8", "OUTPUT_DIR", "output/reproduce/full/InsPose_R50_100ep/seed1"),
        *("SEED", "1"),
    ]
    command = reproduce.make_run(tested, 1, runs, None, []).command()
    assert "--eval-only" in command
    at = command.index("MODEL.WEIGHTS")
    assert command[at + 1] == "output/reproduce/full/InsPose_R50_100ep/seed1/model_final.pth"
    assert command[command.index("TEST.AUG.ENABLED") + 1] == "True"
    assert "InsPose_R50_100ep_R-50_multi-scale" in command[command.index("OUTPUT_DIR") + 1]


@pytest.mark.parametrize(("num_gpus", "steps", "batch"), [(8, 127350, 16), (4, 254700, 8)])
def test_steps_of_a_full_run_follow_the_number_of_gpus(
    tmp_path: Path, num_gpus: int, steps: int, batch: int
) -> None:
    run = reproduce.make_run(reproduce.full_method(""), 1, tmp_path, None, [], num_gpus)
    assert run.steps_and_batch() == (steps, batch)


FAKE = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
with (folder / "starts").open("a") as file: file.write("x")
if (folder / "break").exists():
    print("first line"); sys.exit("out of luck")
(folder / "inference").mkdir(exist_ok=True)
(folder / "inference/coco_instances_results.json").write_text("[]")
(folder / "model_0000009.pth").write_text(""); (folder / "model_final.pth").write_text("")
lines = [{"iteration": 19, "time": 0.5}, {"iteration": 39, "time": 0.3}, {"iteration": 40}]
(folder / "metrics.json").write_text("\\n".join(map(json.dumps, lines)) + '\\n{"iterat')
"""


@pytest.fixture
def fake_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """A train_net.py that is done at once, or fails where there is a file "break"."""
    monkeypatch.setattr(reproduce.Run, "command", lambda self: ["-c", FAKE, str(self.folder)])
    monkeypatch.setattr(reproduce, "truth_of", lambda *_: None)


def two_runs(folder: Path, steps: int = 40) -> list[reproduce.Run]:
    rows = reproduce.TABLES["2"].rows[:2]
    return [reproduce.make_run(row, 1, folder, steps, []) for row in rows]


@pytest.mark.usefixtures("fake_runner")
def test_run_with_a_result_is_not_run_again_and_a_failed_one_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good, bad = two_runs(tmp_path)
    bad.folder.mkdir(parents=True)
    (bad.folder / "break").touch()
    assert reproduce.run_all([bad, good], ARGS) == [bad]
    assert "out of luck" in capfd.readouterr().err  # the end of its log
    assert (reproduce.is_done(good), reproduce.is_done(bad)) == (True, False)
    assert not (good.folder / "model_0000009.pth").exists()
    result = json.loads((good.folder / "result.json").read_text())
    assert (result["AP"], result["steps"], result["images"]) == (0, 40, 160)
    assert result["seconds per step"] == pytest.approx(0.4)

    (bad.folder / "break").unlink()
    assert reproduce.run_all([bad, good], ARGS) == []
    starts = [(run.folder / "starts").read_text() for run in (good, bad)]
    assert starts == ["x", "xx"]


@pytest.mark.usefixtures("fake_runner")
def test_further_test_sets_have_a_column(tmp_path: Path) -> None:
    sets = ["DATASETS.TEST", "('people_holdout', 'people_val')"]
    run = reproduce.make_run(reproduce.TABLES["recipe"].rows[0], 1, tmp_path, 40, sets)
    for name in ("people_holdout", "people_val"):
        folder = run.folder / "inference" / name
        folder.mkdir(parents=True)
        (folder / "coco_instances_results.json").write_text("[]")
    assert reproduce.run_all([run], ARGS) == []
    result = json.loads((run.folder / "result.json").read_text())
    assert (result["AP"], result["AP, people_val"]) == (0, 0)
    lines = [Line(run.row.label, {1: result})]
    Report("Table", "`people_holdout`", "", lines, ["-"]).write(tmp_path / "table")
    text = (tmp_path / "table.md").read_text()
    assert "| AP, people_val | seconds of training | seeds |" in text
    assert "paper" not in text


@pytest.mark.usefixtures("fake_runner")
def test_result_of_other_settings_is_refused_by_the_key(tmp_path: Path) -> None:
    assert reproduce.run_all(two_runs(tmp_path), ARGS) == []
    with pytest.raises(ValueError, match=r"depth1.*SOLVER.MAX_ITER was 40, is 50"):
        reproduce.run_all(two_runs(tmp_path, steps=50), ARGS)


def test_key_that_did_not_exist_then_had_its_default(tmp_path: Path) -> None:
    now = reproduce.settings_of(two_runs(tmp_path)[0].cfg())
    then = {k: v for k, v in now.items() if k != "MODEL.INSPOSE.MAP_STRIDE"}
    assert reproduce.changed_settings(then | {"MODEL.GONE": 1}, now) == {}
    now["MODEL.INSPOSE.MAP_STRIDE"] = 4
    assert reproduce.changed_settings(then, now) == {"MODEL.INSPOSE.MAP_STRIDE": (8, 4)}


def test_missing_data_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = argparse.Namespace(json_file=str(tmp_path / "no.json"), image_root=str(tmp_path / "no"))
    monkeypatch.setattr(reproduce.MetadataCatalog, "get", lambda _: meta)
    assert reproduce.main(["--table", "1", "--runs", str(tmp_path / "runs")]) == 1
    printed = capsys.readouterr().err
    assert str(tmp_path / "no.json") in printed
    assert "--small" in printed
    assert not (tmp_path / "runs").exists()


def test_mean_and_spread() -> None:
    mean, spread = mean_and_spread([50.0, 54.0])
    assert mean == 52
    assert spread == pytest.approx(8**0.5)  # ((-2)^2 + 2^2) / (2 - 1) = 8
    assert mean_and_spread([50.0]) == (50, None)
    assert [figure(x) for x in ([50.0, 54.0], [50.0], [])] == ["52.0 ± 2.8", "50.0", "not measured"]


def made_up_report() -> Report:
    first = dict.fromkeys(PAPER, 50.0) | {"seconds per step": 0.5, "steps": 100, "APL": -100.0}
    second = dict.fromkeys(PAPER, 54.0) | {"seconds per step": 0.3, "steps": 100, "APL": 20.0}
    lines = [Line("full", {1: first, 2: second}, PAPER), Line("other", {}, PAPER | {"AP": 54.7})]
    return Report("Table 0", "synthetic people, 100 steps", "COCO val2017", lines, ["`command`"])


def test_report_keeps_ours_and_the_paper_s_apart(tmp_path: Path) -> None:
    made_up_report().write(tmp_path / "table0")
    text = (tmp_path / "table0.md").read_text()
    ours, paper = text.split("## The paper's: COCO val2017")
    lines = ours.splitlines()
    assert "## Ours: synthetic people, 100 steps" in lines
    # APL of seed 1 is COCO's "nothing to find"; 100 steps of 0.5 and of 0.3 s: 40 s on average.
    numbers = " | ".join(["52.0 ± 2.8"] * 4 + ["20.0", "40", "2", "63.1"])
    assert f"| full | {numbers} |" in lines
    numbers = " | ".join(["not measured"] * 5 + ["-", "0", "54.7"])
    assert f"| other | {numbers} |" in lines
    assert "| full | 63.1 | 86.2 | 68.5 | 58.5 | 70.1 |" in paper
    assert "`command`" in paper

    with (tmp_path / "table0.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["seed"], row["AP"]) for row in rows] == [
        ("full", "1", "50.0"),
        ("full", "2", "54.0"),
        ("full", "", "63.1"),
        ("other", "", "54.7"),
    ]
    assert [row["data"].split(",")[0] for row in rows] == ["ours", "ours", "paper", "paper"]
    assert cv2.imread(str(tmp_path / "table0.png")).std() > 0


def made_up_truth() -> COCO:
    """Image 1 shows one person, image 2 two of whom one has no keypoints, image 3 two."""
    truth = COCO()
    people = []
    for image, x, labelled in ((1, 0, 17), (2, 0, 17), (2, 200, 0), (3, 0, 17), (3, 200, 17)):
        points = [(x + 5.0 * i, 10.0 * i, 2 if labelled else 0) for i in range(17)]
        people.append(
            {
                **{"id": len(people) + 1, "image_id": image, "category_id": 1, "iscrowd": 0},
                **{"bbox": [x, 0, 80, 160], "area": 80 * 160, "num_keypoints": labelled},
                "keypoints": np.ravel(points).tolist(),
            }
        )
    images = [{"id": i, "width": 400, "height": 200} for i in (1, 2, 3)]
    truth.dataset = {"images": images, "annotations": people, "categories": [{"id": 1}]}
    truth.createIndex()
    return truth


def test_ap_by_people_counts_each_image_once_with_its_kind(tmp_path: Path) -> None:
    truth = made_up_truth()
    assert images_by_people(truth) == {1: [1, 2], 2: [3]}
    keys = ("image_id", "category_id", "keypoints", "bbox")
    found = [{k: p[k] for k in keys} | {"score": 0.9} for p in truth.anns.values()]
    perfect = [found[0], found[1], found[3], found[4]]
    half = perfect[:3]  # one of the two persons of image 3 is missed
    aps = ap_by_people(truth, [perfect, half, []])
    # Recall stops at 1/2: of COCO's 101 recalls 0, 0.01, ..., 0.5 have precision 1.
    assert aps[1] == pytest.approx([100, 100, 0])
    assert aps[2] == pytest.approx([100, 100 * 51 / 101, 0])
    # All four boxes against five: recall 0.8, 81 of the 101.
    assert average_precision(truth, perfect, "bbox")["AP"] == pytest.approx(100 * 81 / 101)

    stem = tmp_path / "peer"
    costs = {"InsPose": {"M parameters": 3.39}}
    write_people_report(stem, {1: 2, 2: 1}, {"InsPose": aps}, costs, "made up")
    text = stem.with_suffix(".md").read_text()
    assert "| 1 | 2 | 66.7 ± 57.7 |" in text
    assert "| InsPose | 3.39 |" in text
    assert (tmp_path / "peer_people.csv").read_text().splitlines()[1].startswith("InsPose,1,2,")
    assert cv2.imread(str(tmp_path / "peer_people.png")).std() > 0


def test_ap_is_that_of_detectron2_s_evaluator() -> None:
    truth = made_up_truth()
    keys = ("image_id", "category_id", "keypoints")
    people = [p for p in truth.anns.values() if p["num_keypoints"]]
    found = [{k: p[k] for k in keys} | {"score": 0.9, "bbox": [0, 0, 50, 50]} for p in people]
    found[0]["keypoints"] = [x + 9 for x in found[0]["keypoints"]]
    theirs = _evaluate_predictions_on_coco(truth, copy.deepcopy(found), "keypoints").stats
    ours = average_precision(truth, found)
    assert list(ours.values()) == pytest.approx([100 * x for x in theirs[:5]])
    assert ours["APL"] != ours["APM"]  # the boxes are of medium size, the persons large


@pytest.mark.slow
def test_a_small_table_and_the_peer_from_end_to_end(
    tmp_path: Path, few_people: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce_peer, "TIMED_STEPS", 2)
    monkeypatch.setattr(reproduce_peer, "TIMED_IMAGES", 4)
    folders = ["--runs", str(tmp_path), "--output", str(tmp_path)]
    small = {"INPUT.MIN_SIZE_TRAIN": (64,), "INPUT.MIN_SIZE_TEST": 64, "SOLVER.IMS_PER_BATCH": 2}
    tiny = [str(x) for item in {**few_people, **small}.items() for x in item]
    jobs = str(min(2, os.cpu_count() or 1))
    flags = ["--small", "--steps", "4", "--seeds", "1", "--jobs", jobs, *folders, *tiny]
    assert reproduce.main(["--peer", *flags]) == 0
    text = (tmp_path / "peer_small.md").read_text()
    assert "not measured" not in text
    assert "| Keypoint R-CNN |" in text.split("## Cost")[1]
    assert reproduce.main(["--table", "1", *flags]) == 0
    assert "not measured" not in (tmp_path / "table1_small.md").read_text()
    for name in ("InsPose_R50_3x", "KeypointRCNN_R50_3x"):
        folder = tmp_path / "small" / name / "seed1"
        evaluator = json.loads((folder / "metrics.json").read_text().splitlines()[-1])
        ours = json.loads((folder / "result.json").read_text())
        assert ours["AP"] == pytest.approx(evaluator["keypoints/AP"], abs=1e-6)
