"""Seconds of training steps of InsPose and Keypoint R-CNN, and what an InsPose step consists of."""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.utils.events import EventStorage

from benchmarks.models import (
    INSPOSE,
    MODELS,
    Inputs,
    Setting,
    build_one,
    configs,
    images_with_persons,
)
from benchmarks.timing import Stage, Stopwatch, by_turns, stage_seconds
from inspose_d2.engine.trainer import Trainer

COCO, SYNTHETIC = "keypoints_coco_2017_train", "synthetic_people_train"
LOADED_IMAGES = 100


class Training:
    """A model that trains. Its learning rate is 0: every step starts from the same weights."""

    def __init__(self, setting: Setting, name: str) -> None:
        self.setting = setting
        self.model = build_one(setting, name).train()
        inspose, peer = configs(setting)
        self.optimizer = Trainer.build_optimizer(inspose if name == INSPOSE else peer, self.model)
        kind = torch.device(setting.device).type
        self.scaler = torch.amp.GradScaler(kind, enabled=setting.amp == "fp16")

    def step(
        self,
        inputs: Inputs,
        stage: Callable[[str], AbstractContextManager[Any]] = lambda _: nullcontext(),
    ) -> None:
        """Train one step; ``stage`` gets the names of what is no function of the model."""
        with EventStorage(), self.setting.autocast():
            total = sum(self.model(inputs).values())
        with stage("optimizer"):
            self.optimizer.zero_grad()
        with stage("backward"):
            self.scaler.scale(total).backward()
        with stage("optimizer"):
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def check(self, inputs: Inputs) -> int:
        """Make sure that the losses are finite; say for how many regions keypoints are learned.

        These are InsPose's positive locations, or what the peer's sampling gives its keypoint head,
        of all images: the annotated boxes and the few proposals of random weights that hit one.
        """
        with EventStorage() as storage, self.setting.autocast(), torch.no_grad():
            losses = self.model(inputs)
            latest = storage.latest()
        bad = [name for name, loss in losses.items() if not loss.isfinite()]
        if bad:
            raise FloatingPointError(f"losses of random weights are not finite: {bad}")
        keys = ("num_positives", "keypoint_head/num_fg_samples")  # per image in the latter
        key = next(key for key in keys if key in latest)
        return round(latest[key][0] * (1 if key == keys[0] else len(inputs)))


def measure_training(setting: Setting, persons: list[int], repeats: int) -> dict[str, Any]:
    """Time the steps by turns, then the parts of InsPose's."""
    trainings = {name: Training(setting, name) for name in MODELS}
    cases, steps = [], []
    for n in persons:
        inputs = images_with_persons(setting, n)
        for name, training in trainings.items():
            cases.append({"model": name, "persons": n, "regions": training.check(inputs)})
            steps.append(lambda _, training=training, inputs=inputs: training.step(inputs))
    return {
        "steps": [
            case | asdict(seconds)
            for case, seconds in zip(cases, by_turns(steps, repeats, warm_up=1), strict=True)
        ],
        "stages": [step_stages(trainings[INSPOSE], n, repeats) for n in persons],
    }


def step_stages(training: Training, num_persons: int, repeats: int) -> dict[str, Any]:
    """Time the parts of a step of InsPose."""
    inputs, model = images_with_persons(training.setting, num_persons), training.model
    stages = [
        Stage("backbone, heads and branches", model, "predict"),
        Stage("targets", model, "target_generator"),
        Stage("losses without targets", model, "losses"),
    ]

    def step(stopwatch: Stopwatch) -> None:
        training.step(inputs, stopwatch.stage)

    return {"persons": num_persons, "seconds": stage_seconds(step, stages, repeats)}


def loading_rate(cfg: CfgNode) -> dict[str, Any]:
    """Read training images one after another, as a worker of the data loader does.

    Args:
        cfg: how they are augmented and to what sizes.

    Returns:
        The data set, COCO if it is there, and images per second.
    """
    has_coco = os.path.isfile(MetadataCatalog.get(COCO).json_file)
    data = COCO if has_coco else SYNTHETIC
    mapper = Trainer.build_mapper(cfg, is_train=True)
    records = get_detection_dataset_dicts(data)[:LOADED_IMAGES]
    begin = time.perf_counter()
    for record in records:
        mapper(record)
    return {"data": data, "images per second": len(records) / (time.perf_counter() - begin)}
