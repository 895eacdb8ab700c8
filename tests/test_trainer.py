"""Batch, rate and steps on other numbers of workers than the configs are made for."""

from collections.abc import Callable
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from inspose_d2 import add_inspose_config
from inspose_d2.data.images import ImageError
from inspose_d2.trainer import Trainer

CONFIGS = Path(__file__).parent.parent / "configs"


def load(name: str) -> CfgNode:
    cfg = get_cfg()
    add_inspose_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    return cfg


# 16 images, rate 0.01, 353,750 steps, 1000 of warm-up and evaluations every 10,000 on 8 workers.
@pytest.mark.parametrize(
    ("workers", "batch", "rate", "steps", "warmup", "eval_period"),
    [
        (1, 2, 0.00125, (2122496, 2547000, 2830000), 8000, 80000),
        (4, 8, 0.005, (530624, 636750, 707500), 2000, 20000),
        (8, 16, 0.01, (265312, 318375, 353750), 1000, 10000),
        (16, 32, 0.02, (132656, 159188, 176875), 500, 5000),
    ],
)
def test_workers_keep_their_two_images(
    workers: int, batch: int, rate: float, steps: tuple[int, ...], warmup: int, eval_period: int
) -> None:
    cfg = Trainer.auto_scale_workers(load("InsPose_R50_100ep.yaml"), workers)
    solver = cfg.SOLVER
    scaled = (solver.IMS_PER_BATCH, solver.BASE_LR, (*solver.STEPS, solver.MAX_ITER))
    assert scaled == (batch, pytest.approx(rate), steps)
    periods = (solver.WARMUP_ITERS, cfg.TEST.EVAL_PERIOD)
    assert periods == (warmup, eval_period)
    assert Trainer.auto_scale_workers(cfg, workers) == cfg  # once is enough


@pytest.mark.parametrize("name", ["synthetic_people", "coco_by_heart"])
def test_quick_configs_are_the_same_on_any_number_of_workers(name: str) -> None:
    cfg = load(f"quick/{name}.yaml")
    assert Trainer.auto_scale_workers(cfg, 2) == cfg


@pytest.mark.parametrize("workers", [1, 8])
def test_batch_that_the_workers_cannot_share_is_refused(workers: int) -> None:
    cfg = load("InsPose_R50_3x.yaml")
    cfg.SOLVER.IMS_PER_BATCH = 4
    message = r"SOLVER\.IMS_PER_BATCH 4 .* SOLVER\.REFERENCE_WORLD_SIZE 8.*WORLD_SIZE 0 takes"
    with pytest.raises(ValueError, match=message):
        Trainer.auto_scale_workers(cfg, workers)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    assert Trainer.auto_scale_workers(cfg, workers) == cfg


@pytest.mark.fault
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_stops_at_an_image_that_cannot_be_read(
    tiny_cfg: Callable[..., CfgNode], tmp_path: Path, workers: int
) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(b"no image")
    record = {"file_name": str(path), "image_id": 7, "height": 4, "width": 4}
    name = "one_bad_image"
    DatasetCatalog.register(name, lambda: [record])
    try:
        cfg = tiny_cfg(**{"DATALOADER.NUM_WORKERS": workers})
        loader = Trainer.build_test_loader(cfg, name)
        with pytest.raises(ImageError, match=rf"image id 7, {path}: no image that Pillow knows"):
            next(iter(loader))
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
