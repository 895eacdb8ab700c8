#!/usr/bin/env python
"""Watch a small InsPose learn: make synthetic people, train, evaluate, draw (``make demo``)."""

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor, HookBase
from detectron2.structures import Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter
from detectron2.utils.logger import setup_logger
from matplotlib.cbook import get_sample_data
from tqdm import tqdm

from inspose_d2 import get_cfg
from inspose_d2.cli import main as inspose
from inspose_d2.engine.trainer import Trainer
from inspose_d2.visualization.poses import draw_poses

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "quick" / "synthetic_people.yaml"
TIMED_STEPS = 24  # of them the second half is timed
RESERVE = 0.1  # share of the budget kept back for a machine that becomes slower
DRAWN_SCORE = 0.4

logger = logging.getLogger("inspose_d2.demo")


class OutOfTime(BaseException):
    """The training time is used up: no error, so Detectron2's loop must not log it as one."""


class ProgressBar(HookBase):
    """One line that shows steps, loss and time left; stops training at the deadline."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def before_train(self) -> None:
        self.start = time.perf_counter()
        self.bar = tqdm(total=self.trainer.max_iter, desc="training", unit="step", smoothing=0.1)

    def after_step(self) -> None:
        latest = self.trainer.storage.latest_with_smoothing_hint(20)
        shown = {"loss": "total_loss", "keypoint": "loss_keypoint", "offset": "loss_disk_offset"}
        values = {name: f"{latest[key][0]:.2f}" for name, key in shown.items() if key in latest}
        self.bar.set_postfix(values, refresh=False)
        self.bar.update()
        if time.perf_counter() - self.start > self.seconds:
            raise OutOfTime

    def after_train(self) -> None:
        self.bar.close()


class StepTimer(HookBase):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def before_step(self) -> None:
        self.start = time.perf_counter()

    def after_step(self) -> None:
        self.seconds.append(time.perf_counter() - self.start)


class DemoTrainer(Trainer):
    """The project's trainer with files instead of lines for its metrics."""

    def build_writers(self) -> list[EventWriter]:
        folder = self.cfg.OUTPUT_DIR
        return [JSONWriter(os.path.join(folder, "metrics.json")), TensorboardXWriter(folder)]


def load_config(output: Path, seed: int, opts: Sequence[str] = ()) -> CfgNode:
    """Read the quick config for this machine and this run."""
    return get_cfg(CONFIG, ["OUTPUT_DIR", str(output), "SEED", seed, *opts])


def seconds_per_step(cfg: CfgNode) -> float:
    """Train a throw-away model for a few steps to learn how fast this machine is."""
    cfg = cfg.clone()
    cfg.SOLVER.MAX_ITER = TIMED_STEPS
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.BASE_LR = 0, 1e-6  # too few steps for a warm-up
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "timing")
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    timer = StepTimer()
    trainer = Trainer(cfg)
    trainer._hooks = [timer]
    trainer.train()
    return float(np.median(timer.seconds[TIMED_STEPS // 2 :]))


def train(cfg: CfgNode, minutes: float) -> int:
    """Train as many steps as fit into the budget, with the learning rate's whole course.

    Returns:
        The steps.
    """
    start = time.perf_counter()
    cfg = cfg.clone()
    cfg.DATASETS.TEST = ()  # evaluated once, afterwards
    step = seconds_per_step(cfg)
    left = minutes * 60 - (time.perf_counter() - start)
    cfg.SOLVER.MAX_ITER = max(int(left * (1 - RESERVE) / step), 1)
    cfg.SOLVER.WARMUP_ITERS = min(cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_ITER // 5)
    logger.info(
        f"{step:.2f} s per step of {cfg.SOLVER.IMS_PER_BATCH} images: "
        f"{cfg.SOLVER.MAX_ITER} steps in {minutes:g} minutes"
    )
    seed_all_rng(cfg.SEED)
    trainer = DemoTrainer(cfg)
    trainer.register_hooks([ProgressBar(left)])
    try:
        trainer.train()
        return trainer.max_iter
    except OutOfTime:
        logger.warning(
            f"The machine became slower: stopped after {trainer.iter + 1} of "
            f"{trainer.max_iter} steps, with the learning rate still high"
        )
        trainer.checkpointer.save("model_final")
        return trainer.iter + 1


def draw_grid(cfg: CfgNode, path: Path, title: str, num_images: int = 8, zoom: int = 2) -> None:
    """Draw held-out images, ground truth beside prediction, and the loss curve below.

    Args:
        cfg: config with the weights to use.
        path: where the picture goes.
        title: headline.
        num_images: how many images.
        zoom: how much the images are enlarged.
    """
    predictor = DefaultPredictor(cfg)
    meta = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])[:num_images]
    figure = plt.figure(figsize=(16, 21))
    grid = figure.add_gridspec(num_images // 2 + 1, 4, hspace=0.12, wspace=0.03)
    for i, record in enumerate(records):
        image = cv2.imread(record["file_name"])
        found = predictor(image)["instances"].to("cpu")
        image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
        annotated = [x["keypoints"] for x in record["annotations"]]
        annotated = np.reshape(annotated, (-1, len(meta.keypoint_names), 3))
        # COCO counts from the first pixel's centre, and says how visible a keypoint is.
        annotated = np.dstack([annotated[..., :2] + 0.5, annotated[..., 2:] > 0])
        pictures = []
        for keypoints in (annotated, found[found.scores > DRAWN_SCORE].pred_keypoints.numpy()):
            scaled = torch.from_numpy(keypoints * [zoom, zoom, 1])
            poses = Instances(image.shape[:2], pred_keypoints=scaled)
            pictures.append(draw_poses(image, poses, metadata=meta)[:, :, ::-1])
        truth, guess = pictures
        for column, (picture, label) in enumerate(((truth, "ground truth"), (guess, "InsPose"))):
            axes = figure.add_subplot(grid[i // 2, 2 * (i % 2) + column])
            axes.imshow(picture)
            axes.set_title(label, fontsize=11)
            axes.axis("off")
    _draw_losses(figure.add_subplot(grid[-1, :]), Path(cfg.OUTPUT_DIR) / "metrics.json")
    figure.suptitle(title, fontsize=16, y=0.91)
    figure.savefig(path, dpi=70, bbox_inches="tight")
    plt.close(figure)


def _draw_losses(axes: Any, metrics: Path) -> None:
    """Plot every loss of a metrics file against the step."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines = [line for line in lines if "total_loss" in line]
    for key in sorted({key for line in lines for key in line if "loss" in key}):
        axes.plot([x["iteration"] for x in lines], [x[key] for x in lines], label=key)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(ncols=5, loc="upper right")


def show_photograph(output: Path) -> None:
    """Draw what the model of the package finds in Matplotlib's photograph of Grace Hopper."""
    photograph = get_sample_data("grace_hopper.jpg", asfileobj=False)
    logger.info(f"The model for photographs that the package carries: {photograph}")
    inspose(["predict", "--input", str(photograph), "--output", str(output)])
    logger.info(f"Picture: {output / 'poses' / 'grace_hopper.jpg'}")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="time for training")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "demo")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config changes: KEY VALUE ...")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "metrics.json").unlink(missing_ok=True)

    setup_logger(name="inspose_d2", abbrev_name="inspose")
    detectron2_logger = setup_logger(str(args.output / "log.txt"), name="detectron2")
    detectron2_logger.handlers[0].setLevel(logging.WARNING)  # the terminal; all goes to the file
    cfg = load_config(args.output, args.seed, args.opts)
    show_photograph(args.output)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        logger.info(f"{name}: {len(DatasetCatalog.get(name))} images")

    start = time.perf_counter()
    train(cfg, args.minutes)
    trained = time.perf_counter() - start
    cfg.MODEL.WEIGHTS = str(args.output / "model_final.pth")
    model = DefaultPredictor(cfg).model
    results = Trainer.test(cfg, model)["keypoints"]
    num_params = sum(p.numel() for p in model.parameters())
    headline = (
        f"InsPose, {num_params / 1e6:.1f} M parameters, trained {trained / 60:.1f} minutes: "
        f"keypoint AP {results['AP']:.1f} on held-out synthetic people"
    )
    draw_grid(cfg, args.output / "demo.png", headline)
    logger.info(headline)
    logger.info(f"Picture: {args.output / 'demo.png'}")


if __name__ == "__main__":
    main()
