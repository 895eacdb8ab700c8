#!/usr/bin/env python
"""Run the rows of a table of the paper: ``python -m experiments.reproduce --table 1 --small``.

Every run is a ``train_net.py`` of its own, the peer's an ``experiments.peer``, in
``output/reproduce/{small,full}/<row>/seed<k>``. A run with a result is not run again, an
interrupted one goes on from its last checkpoint.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO
from tqdm import tqdm

from benchmarks.machine import cpu_name
from experiments.coco_ap import (
    METRICS,
    ap_by_people,
    average_precision,
    images_by_people,
    load_truth,
)
from experiments.peer_report import measure, write_people_report
from experiments.report import ELSEWHERE, Line, Report
from inspose_d2 import get_cfg
from inspose_d2.config.files import leaves
from inspose_d2.engine.trainer import Trainer
from inspose_d2.evaluation.results import RESULTS, inference_folder
from inspose_d2.files import write_json

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
SMALL_STEPS = 1200
CHECKPOINT_STEPS = 200  # of a small run: what an interruption costs at most
LOG_TAIL = 25  # lines of the log of a failed run


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        config: YAML file below ``configs/``; its stem names the row's folder.
        label: what the paper's table says.
        paper: the paper's AP, AP50, AP75, APM, APL on COCO; empty if it has none.
        paper_box: the paper's box AP.
        small: YAML of the small setting, to which an ablation adds its own keys.
        keys: config changes of the row, KEY VALUE KEY VALUE ...
        test: those of a row that only tests the weights of the row of this config.
    """

    config: str
    label: str
    paper: tuple[float, ...] = ()
    paper_box: float | None = None
    small: str = "quick/synthetic_people.yaml"
    keys: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the row's folder."""
        stem = Path(self.config).stem
        return re.sub(r"[^\w-]+", "_", f"{stem} {self.label}") if self.keys or self.test else stem


@dataclass(frozen=True)
class Table:
    """A table of the paper, or of ours: its headline, the paper's data set, and its rows."""

    title: str
    paper_data: str
    rows: tuple[Row, ...]
    small_rows: tuple[Row, ...] = ()  # where the small setting has other rows


def ablation(name: str, label: str, *paper: float, paper_box: float | None = None) -> Row:
    """A row that differs from the full method by what its YAML says."""
    return Row(f"ablations/InsPose_R50_3x_{name}.yaml", label, paper, paper_box)


def full_method(label: str) -> Row:
    """The row that Tables 1 to 4 share."""
    return Row("InsPose_R50_3x.yaml", label, (63.1, 86.2, 68.5, 58.5, 70.1))


def backbone(name: str, label: str, *paper: float, test: tuple[str, ...] = ()) -> Row:
    """A row of Table 5."""
    return Row(f"InsPose_{name}_100ep.yaml", label, paper, test=test)


def recipe(label: str, *keys: str, test: tuple[str, ...] = ()) -> Row:
    """A row of the ablation of the recipe for photographs (docs/photographs.md)."""
    config, small = "InsPosePlus_R50_100ep.yaml", "people/InsPose_Lite0_people.yaml"
    return Row(config, label, small=small, keys=keys, test=test)


R50 = (65.4, 88.9, 71.7, 60.2, 72.7)  # the paper's Table 5
R50_MULTISCALE = (67.1, 89.7, 74.0, 62.6, 73.8)
MULTISCALE = ("TEST.AUG.ENABLED", "True")
SMALL_SCALES = ("TEST.AUG.MIN_SIZES", "(256, 320, 384)", "TEST.AUG.MAX_SIZE", "480")
TABLES = {
    "1": Table(
        "Table 1: disk offset and heatmap",
        "COCO val2017",
        (
            ablation("plain", "plain", 60.3, 85.4, 65.5, 55.0, 68.4),
            ablation("disk_offset", "+ disk offset", 62.1, 86.0, 67.5, 57.6, 69.1),
            full_method("+ heatmap"),
        ),
    ),
    "2": Table(
        "Table 2: depth of the KP-Nets",
        "COCO val2017",
        (
            ablation("depth1", "depth 1", 54.7, 81.1, 57.4, 50.5, 62.2),
            ablation("depth2", "depth 2", 62.4, 85.9, 67.9, 58.0, 69.2),
            full_method("depth 3"),
            ablation("depth4", "depth 4", 61.7, 85.9, 67.2, 57.1, 68.7),
        ),
    ),
    "3": Table(
        "Table 3: resolution of keypoint maps and disk offsets",
        "COCO val2017",
        (
            ablation("stride16", "1/16", 62.6, 85.8, 68.2, 57.2, 70.5),
            full_method("1/8"),
            ablation("stride4", "1/4", 62.0, 83.9, 67.5, 57.8, 69.1),
            ablation("stride2", "1/2", 45.4, 73.6, 47.0, 39.1, 54.7),
        ),
    ),
    "4": Table(
        "Table 4: with a bounding-box head",
        "COCO val2017",
        (
            full_method("without boxes"),
            ablation("box_head", "with boxes", 62.5, 86.2, 68.1, 58.3, 70.3, paper_box=52.5),
        ),
    ),
    "5": Table(
        "Table 5: backbones, single-scale and multi-scale testing",
        "COCO test-dev",
        (
            backbone("R50", "R-50", *R50),
            backbone("R50", "R-50, multi-scale", *R50_MULTISCALE, test=MULTISCALE),
            backbone("R101", "R-101", 66.3, 89.2, 73.0, 61.2, 73.9),
            backbone("R101", "R-101, multi-scale", 67.8, 90.3, 74.9, 64.3, 73.4, test=MULTISCALE),
            backbone("HRNet_W32", "HRNet-w32", 69.3, 90.3, 76.0, 64.8, 76.1),
            backbone(
                "HRNet_W32", "HRNet-w32, multi-scale", 71.0, 91.3, 78.0, 67.5, 76.5, test=MULTISCALE
            ),
        ),
        small_rows=(
            Row("InsPose_R50_3x.yaml", "single-scale", R50),
            Row(
                "InsPose_R50_3x.yaml",
                "multi-scale",
                R50_MULTISCALE,
                test=MULTISCALE + SMALL_SCALES,
            ),
        ),
    ),
    "recipe": Table(
        "The recipe for photographs, one part left out at a time",
        "",
        (
            recipe("the whole recipe"),
            recipe("without the quality score", "MODEL.INSPOSE.CLS_LOSS", "focal"),
            recipe("without regression", "MODEL.INSPOSE.REGRESSION.ENABLED", "False"),
            recipe("without scale jitter and crop", "INPUT.SCALE_JITTER", "()"),
            recipe(
                "without rotation and colours", "INPUT.ROTATION", "0.0", "INPUT.COLOR_JITTER", "0.0"
            ),
            recipe("without the average of weights", "SOLVER.EMA_DECAY", "0.0"),
            recipe(
                "decoded at the peaks",
                test=(
                    *("MODEL.INSPOSE.DECODING_TEST", "peaks"),
                    *("MODEL.INSPOSE.KEYPOINT_SCORE_WEIGHT_TEST", "0.0"),
                ),
            ),
        ),
    ),
}


INSPOSE = Row("InsPose_R50_3x.yaml", "InsPose", R50)
KEYPOINT_RCNN = Row(
    "peer/KeypointRCNN_R50_3x.yaml",
    "Keypoint R-CNN",
    (62.7, 87.0, 68.4, 57.4, 71.1),  # there "Mask-RCNN"
    small="quick/keypoint_rcnn.yaml",
)
PEER = Table(
    "The peer: Keypoint R-CNN on the same images",
    "COCO test-dev, 100 epochs (Table 5)",
    (INSPOSE, KEYPOINT_RCNN),
    # Small images show small people: there finer maps are worth a row of their own.
    small_rows=(INSPOSE, ablation("stride4", "InsPose, maps at 1/4"), KEYPOINT_RCNN),
)


@dataclass(frozen=True)
class Run:
    """One training, or with ``test`` one evaluation, of a row.

    Attributes:
        row: its row.
        seed: its seed.
        config_file: YAML that it starts from.
        opts: changes of that config, as on the command line of ``train_net.py``.
        folder: what it writes.
        num_gpus: workers that train, to which Detectron2 fits the schedule.
    """

    row: Row
    seed: int
    config_file: Path
    opts: tuple[str, ...]
    folder: Path
    num_gpus: int

    def cfg(self) -> CfgNode:
        """The whole config."""
        return get_cfg(self.config_file, self.opts)

    def steps_and_batch(self) -> tuple[int, int]:
        """Training steps of this many workers, none for a test, and images a step."""
        solver = Trainer.auto_scale_workers(self.cfg(), self.num_gpus).SOLVER
        return 0 if self.row.test else solver.MAX_ITER, solver.IMS_PER_BATCH

    def command(self) -> list[str]:
        """What a person would type in the project's folder."""
        action = "--eval-only" if self.row.test else "--resume"
        program = ["train_net.py"]
        if self.row.config.startswith("peer/"):
            program = ["-m", "experiments.peer"]
        command = [*program, "--config-file", os.path.relpath(self.config_file, ROOT), action]
        if self.num_gpus > 1:
            command += ["--num-gpus", str(self.num_gpus)]
        return [*command, *self.opts]


def own_keys(config_file: Path) -> tuple[str, ...]:
    """What a YAML says without its ``_BASE_``, as KEY VALUE KEY VALUE ..."""
    keys = yaml.safe_load(config_file.read_text())
    keys.pop("_BASE_", None)
    return tuple(str(x) for item in leaves(keys) for x in item)


def make_run(
    row: Row, seed: int, runs: Path, steps: int | None, opts: Sequence[str], num_gpus: int = 1
) -> Run:
    """Say what a row means: its full config, or with ``steps`` the small setting.

    Args:
        row: the row.
        seed: the run's seed.
        runs: folder of all runs.
        steps: training steps of the small setting, None for the full one.
        opts: config changes of all rows.
        num_gpus: workers that train.
    """
    config_file = CONFIGS / row.config
    folder = runs / ("full" if steps is None else "small") / row.name / f"seed{seed}"
    values: list[str] = []
    if steps is not None:
        if row.config.startswith("ablations/"):
            values += own_keys(config_file)
        config_file = CONFIGS / row.small
        values += ["SOLVER.MAX_ITER", str(steps), "SOLVER.WARMUP_ITERS", str(min(100, steps // 5))]
        values += ["SOLVER.CHECKPOINT_PERIOD", str(CHECKPOINT_STEPS), "TEST.EVAL_PERIOD", "0"]
    values += [*opts, *row.keys]
    if row.test:
        trained = folder.parent.with_name(Path(row.config).stem) / folder.name
        values += [*row.test, "MODEL.WEIGHTS", os.path.relpath(trained / "model_final.pth", ROOT)]
    values += ["OUTPUT_DIR", os.path.relpath(folder, ROOT), "SEED", str(seed)]
    return Run(row, seed, config_file, tuple(values), folder, num_gpus)


def settings_of(cfg: CfgNode) -> dict[str, Any]:
    """All keys of a config that a result depends on, in JSON's types."""
    settings = dict(leaves(yaml.safe_load(cfg.dump())))
    del settings["OUTPUT_DIR"]
    return settings


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare the settings of a run on disk with those asked for.

    A key that did not exist then had the value that is its default now.
    """
    then = settings_of(get_cfg()) | old
    return {k: (then.get(k), v) for k, v in new.items() if v != then.get(k)}


def is_done(run: Run) -> bool:
    """Say whether a run has a result.

    Raises:
        ValueError: if its folder belongs to a run with other settings.
    """
    file = run.folder / "settings.json"
    if not file.exists():
        return False
    changes = changed_settings(json.loads(file.read_text()), settings_of(run.cfg()))
    if changes:
        what = ", ".join(f"{k} was {old!r}, is {new!r}" for k, (old, new) in changes.items())
        raise ValueError(
            f"{run.folder} was run with other settings ({what}): remove that folder, ask for the "
            "same settings, or give another folder with --runs"
        )
    return (run.folder / "result.json").exists()


def missing_data(runs: Iterable[Run]) -> list[str]:
    """Files and folders of data sets that are not there; synthetic people are made first."""
    names = {name for run in runs for name in (*run.cfg().DATASETS.TRAIN, *run.cfg().DATASETS.TEST)}
    missing = []
    for name in sorted(names):
        meta = MetadataCatalog.get(name)
        json_file = PathManager.get_local_path(meta.json_file)
        missing += [x for x in (json_file, meta.image_root) if not os.path.exists(x)]
    return missing


def step_of(run: Run) -> int:
    """Training steps that a run has behind it."""
    return max((line["iteration"] + 1 for line in metric_lines(run)), default=0)


def metric_lines(run: Run) -> Iterator[dict[str, Any]]:
    """Lines of a run's ``metrics.json``, but for one that is just being written."""
    file = run.folder / "metrics.json"
    for line in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def start(run: Run, jobs: int) -> subprocess.Popen[bytes]:
    """Start a run; its output is appended to ``console.txt`` in its folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / "settings.json", settings_of(run.cfg()))
    environment = dict(os.environ)
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // jobs, 1))
    with (run.folder / "console.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", *run.command()],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def run_all(runs: Sequence[Run], args: argparse.Namespace) -> list[Run]:
    """Run what has no result yet, ``args.jobs`` at a time; return the runs that failed."""
    waiting = [run for run in runs if not is_done(run)]
    active: dict[Run, subprocess.Popen[bytes]] = {}
    failed: list[Run] = []
    total = {run: run.steps_and_batch()[0] for run in runs}
    done = sum(total[run] for run in runs if run not in waiting)
    begun = done + sum(min(step_of(run), total[run]) for run in waiting)
    bar = tqdm(total=sum(total.values()), initial=begun, unit="step", mininterval=1)
    try:
        while waiting or active:
            while waiting and len(active) < args.jobs:
                run = waiting.pop(0)
                active[run] = start(run, args.jobs)
            time.sleep(0.5)
            for run, process in list(active.items()):
                if process.poll() is None:
                    continue
                del active[run]
                done += total[run]
                if not finish(run, process.returncode):
                    failed.append(run)
            names = ", ".join(f"{r.row.name} {r.seed}" for r in active)
            bar.set_description(names or "done", refresh=False)
            behind = done + sum(min(step_of(r), total[r]) for r in (*active, *waiting))
            bar.update(behind - bar.n)
    finally:
        for process in active.values():
            process.terminate()
            process.wait()
        bar.close()
    return failed


def finish(run: Run, exit_status: int) -> bool:
    """Write the result of a run that ended; say so if it failed."""
    if exit_status == 0:
        write_json(run.folder / "result.json", result_of(run))
        for checkpoint in run.folder.glob("model_[0-9]*.pth*"):  # and checksums
            checkpoint.unlink()
        return True
    log = (run.folder / "console.txt").read_text(errors="replace").splitlines()
    tqdm.write(f"FAILED with status {exit_status}: {shlex.join(run.command())}", sys.stderr)
    tqdm.write("\n".join(f"    {line}" for line in log[-LOG_TAIL:]), sys.stderr)
    return False


def truth_of(cfg: CfgNode, number: int = 0) -> COCO:
    """A test set of a config."""
    meta = MetadataCatalog.get(cfg.DATASETS.TEST[number])
    return load_truth(PathManager.get_local_path(meta.json_file))


def detections_of(run: Run, number: int = 0) -> list[dict[str, Any]]:
    """What a run found in a test set."""
    cfg = run.cfg()
    folder = ROOT / inference_folder(cfg, cfg.DATASETS.TEST[number])
    return json.loads((folder / RESULTS).read_text())


def result_of(run: Run) -> dict[str, Any]:
    """What the report needs of a run that has just ended."""
    cfg = run.cfg()
    truth, detections = truth_of(cfg), detections_of(run)
    result = average_precision(truth, detections)
    for number, name in enumerate(cfg.DATASETS.TEST[1:], start=1):
        of_set = average_precision(truth_of(cfg, number), detections_of(run, number))
        result[ELSEWHERE + name] = of_set["AP"]
    if run.row.config.endswith("box_head.yaml"):
        result["box AP"] = average_precision(truth, detections, "bbox")["AP"]
    # The writer's times are medians of 20 steps; the median of these is no matter of pauses.
    times = [line["time"] for line in metric_lines(run) if "time" in line]
    steps, batch = run.steps_and_batch()
    return result | {
        "seconds per step": float(np.median(times)) if times else None,
        "steps": steps,
        "images": steps * batch,
        "test set": cfg.DATASETS.TEST[0],
        "torch": torch.__version__,
        "processor": processor(),
    }


def processor() -> str:
    """The GPU, or the CPU and its number of cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{cpu_name()}, {os.cpu_count()} cores"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", choices=list(TABLES))
    what.add_argument("--peer", action="store_true", help="Keypoint R-CNN on the same images")
    parser.add_argument(
        "--small",
        action="store_true",
        help="scaled down, on synthetic people; recipe: on photographs",
    )
    parser.add_argument("--steps", type=int, default=SMALL_STEPS, help="of a small run")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 1 2 if small, else 1")
    parser.add_argument("--jobs", type=int, help="small runs side by side, default 2")
    parser.add_argument("--num-gpus", type=int, default=1, help="of a full run")
    parser.add_argument("--runs", type=Path, default=ROOT / "output/reproduce", help="their folder")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "output/reproduce", help="folder of the report"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config changes: KEY VALUE ...")
    args = parser.parse_args(argv)
    args.seeds = args.seeds or ([1, 2] if args.small else [1])
    args.jobs = (args.jobs or 2) if args.small else 1
    args.runs = args.runs.resolve()
    return args


def make_report(table: Table, runs: Sequence[Run], args: argparse.Namespace) -> Report:
    """Collect the results of a table's runs, each of them done or not."""
    results = {
        run: json.loads((run.folder / "result.json").read_text()) for run in runs if is_done(run)
    }
    lines = [
        Line(
            row.label,
            {run.seed: result for run, result in results.items() if run.row == row},
            dict(zip(METRICS, row.paper, strict=False))
            | ({"box AP": row.paper_box} if row.paper_box else {}),
        )
        for row in dict.fromkeys(run.row for run in runs)
    ]
    cfg = runs[0].cfg()
    steps, batch = runs[0].steps_and_batch()
    test_set = cfg.DATASETS.TEST[0]
    if args.small:
        data = "synthetic people" if test_set.startswith("synthetic") else f"`{test_set}`"
        data += f", {steps} steps"
    else:
        data = "COCO val2017"
    what = ["--peer"] if args.peer else ["--table", args.table]
    if args.small:
        what += ["--small", "--steps", str(args.steps), "--jobs", str(args.jobs)]
    else:
        what += ["--num-gpus", str(args.num_gpus)]
    command = ["python", "-m", "experiments.reproduce", *what, "--seeds", *map(str, args.seeds)]
    command += args.opts
    notes = [f"`{shlex.join(command)}`", f"{steps} steps of {batch} images: {steps * batch} seen"]
    notes += [f"Tested on `{test_set}`"]
    for what_with, key in (("torch", "torch"), ("Processor", "processor")):
        notes += sorted({f"{what_with}: {result[key]}" for result in results.values()})
    if args.table == "5":
        notes += ["The paper tested on test-dev, whose labels are not public; its servers are down"]
    return Report(table.title, data, table.paper_data, lines, notes)


def add_peer_report(runs: Sequence[Run], report: Report, stem: Path) -> None:
    """Add to the report of ``PEER`` what is said of nothing else: crowds and cost."""
    rows = dict.fromkeys(run.row for run in runs)
    done = {row: [r for r in runs if r.row == row and is_done(r)] for row in rows}
    truth = truth_of(runs[0].cfg())
    aps = {
        row.label: ap_by_people(truth, [detections_of(run) for run in of_row])
        for row, of_row in done.items()
    }
    costs = {}
    if all(done.values()):  # they take turns
        cfgs = [of_row[0].cfg() for of_row in done.values()]
        for cfg in cfgs:
            cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
        weights = [of_row[0].folder / "model_final.pth" for of_row in done.values()]
        costs = dict(zip(aps, measure(cfgs, weights), strict=True))
    num_images = {count: len(ids) for count, ids in images_by_people(truth).items()}
    write_people_report(stem, num_images, aps, costs, report.data)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a table and report it; the exit status is 1 if a run failed."""
    args = parse_arguments(argv)
    logging.disable(logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    table = PEER if args.peer else TABLES[args.table]
    steps = args.steps if args.small else None
    rows = (args.small and table.small_rows) or table.rows
    runs = [
        make_run(row, seed, args.runs, steps, args.opts, args.num_gpus)
        for seed in args.seeds
        for row in rows
    ]
    missing = missing_data(runs)
    if missing:
        where = "README.md says where COCO goes; --small needs none of it."
        if args.small:
            where = "docs/photographs.md says where photographs go."
        print(
            f"{table.title} needs what is missing here: {', '.join(missing)}. {where}",
            file=sys.stderr,
        )
        return 1
    try:
        failed = run_all([run for run in runs if not run.row.test], args)
        tests = [run for run in runs if run.row.test]
        failed += run_all(tests, args) if tests else []
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    report = make_report(table, runs, args)
    name = "peer" if args.peer else f"table{args.table}"
    stem = args.output / (name + "_small" * args.small)
    report.write(stem)
    if args.peer:
        add_peer_report(runs, report, stem)
    print(stem.with_suffix(".md").read_text())
    for run in failed:
        print(f"FAILED: {run.folder}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
