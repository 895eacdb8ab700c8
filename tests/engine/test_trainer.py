"""Batch, rate and steps on any number of workers; runs that are interrupted, fail and resume."""

import contextlib
import logging
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.engine import HookBase, launch
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from inspose_d2 import InsPose, add_inspose_config, list_configs
from inspose_d2.data import coco_file
from inspose_d2.data.images import ImageError
from inspose_d2.engine import train_loop
from inspose_d2.engine.pictures import NUM_PICTURES
from inspose_d2.engine.signals import Interrupted
from inspose_d2.engine.train_loop import DeadKPNetsError, DivergedError
from inspose_d2.engine.trainer import Trainer
from inspose_d2.modeling.kp_net import KPNet

CONFIGS = Path(__file__).parents[2] / "configs"


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


def short_run(**solver: Any) -> CfgNode:
    """Config of a run of 60 steps with a warm-up of 100, as it reaches the schedule."""
    cfg = load("quick/synthetic_people.yaml")
    for key, value in {"MAX_ITER": 60, "WARMUP_ITERS": 100, **solver}.items():
        cfg.SOLVER[key] = value
    return cfg


@pytest.mark.parametrize("name", ["WarmupCosineLR", "WarmupMultiStepLR"])
def test_a_short_run_reaches_its_learning_rate(name: str, caplog: pytest.LogCaptureFixture) -> None:
    cfg = short_run(LR_SCHEDULER_NAME=name, STEPS=())
    cfg.freeze()
    fitted = Trainer.fit_schedule(cfg)
    assert "SOLVER.WARMUP_ITERS 100 is more than a fifth of SOLVER.MAX_ITER 60" in caplog.text
    assert fitted.is_frozen()
    assert cfg.SOLVER.WARMUP_ITERS == 100
    highest = []
    for each in (cfg, fitted):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
        scheduler = Trainer.build_lr_scheduler(each, optimizer)
        rates = []
        for _ in range(cfg.SOLVER.MAX_ITER):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        highest.append(max(rates))
    before, after = highest
    assert after > 0.9 * cfg.SOLVER.BASE_LR
    assert after > before


def test_steps_that_are_never_reached_are_named_after_scaling_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cfg = short_run(LR_SCHEDULER_NAME="WarmupMultiStepLR", STEPS=(40, 60, 90), WARMUP_ITERS=0)
    assert Trainer.fit_schedule(cfg).SOLVER.STEPS == (40,)
    assert "SOLVER.STEPS (40, 60, 90)" in caplog.text
    assert "set SOLVER.STEPS (40, 53)" in caplog.text
    caplog.clear()
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 4  # as many images a worker on one: 240 steps
    fitted = Trainer.fit_schedule(Trainer.auto_scale_workers(cfg, 1))
    assert fitted.SOLVER.STEPS == (160,)
    assert "below SOLVER.MAX_ITER 240 (as scaled to 1 worker(s))" in caplog.text


@pytest.mark.parametrize("name", list_configs())
def test_schedules_of_the_project_are_left_as_they_are(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for workers in (1, 8):
        cfg = Trainer.auto_scale_workers(load(f"{name}.yaml"), workers)
        assert Trainer.fit_schedule(cfg) == cfg
    # Detectron2 tells how it scales, where an earlier test has let its logger talk.
    assert [x.getMessage() for x in caplog.records if x.levelno >= logging.WARNING] == []


def test_cosine_ignores_steps(caplog: pytest.LogCaptureFixture) -> None:
    cfg = short_run(STEPS=(90,), WARMUP_ITERS=0)
    assert Trainer.fit_schedule(cfg) == cfg
    assert not caplog.text


@pytest.mark.parametrize("workers", [1, 8])
def test_batch_that_the_workers_cannot_share_is_refused(workers: int) -> None:
    cfg = load("InsPose_R50_3x.yaml")
    cfg.SOLVER.IMS_PER_BATCH = 4
    message = r"SOLVER\.IMS_PER_BATCH 4 .* SOLVER\.REFERENCE_WORLD_SIZE 8.*WORLD_SIZE 0 takes"
    with pytest.raises(ValueError, match=message):
        Trainer.auto_scale_workers(cfg, workers)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    assert Trainer.auto_scale_workers(cfg, workers) == cfg


def run(cfg: CfgNode, steps: int | None = None, *, resume: bool = False) -> Trainer:
    """Train, or until `steps` steps are done."""
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    if steps is not None:
        trainer.register_hooks([StopAfter(steps)])
    trainer.train()
    return trainer


class StopAfter(HookBase):
    """Ends training as Ctrl-C at a certain step does."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self.steps:
            signal.raise_signal(signal.SIGINT)


def state(cfg: CfgNode, name: str = "model_final") -> dict[str, Any]:
    return torch.load(Path(cfg.OUTPUT_DIR) / f"{name}.pth", weights_only=True)


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Bit by bit, through dicts and lists."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b or a is b or math.isnan(a), path


def reliable_kernels(precision: str | None) -> contextlib.AbstractContextManager[None]:
    """Do without oneDNN in bfloat16: on some CPUs two runs differ, or gradients are infinite."""
    return torch.backends.mkldnn.flags(enabled=precision != "bfloat16")


@pytest.fixture
def short_cfg(tiny_cfg: Callable[..., CfgNode], tmp_path: Path) -> Callable[..., CfgNode]:
    """Make the config of 6 steps, with flips and several sizes, without evaluation."""

    def make(folder: str, **settings: Any) -> CfgNode:
        return tiny_cfg(
            **{
                "OUTPUT_DIR": str(tmp_path / folder),
                "DATASETS.TRAIN": ("synthetic_people_val",),
                "DATASETS.TEST": (),
                "INPUT.MIN_SIZE_TRAIN": (64, 96),
                "SOLVER.MAX_ITER": 6,
                "SOLVER.WARMUP_ITERS": 4,
                "SOLVER.STEPS": (5,),
                **settings,
            }
        )

    return make


def test_trainer_fits_the_schedule_and_doubts_the_test_size(
    short_cfg: Callable[..., CfgNode],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Trainer, "build_writers", lambda _: [])  # who would close their files?
    sizes = {"INPUT.MIN_SIZE_TEST": 104, "DATASETS.TEST": ("synthetic_people_val",)}
    trainer = Trainer(short_cfg("short", **sizes))
    assert trainer.cfg.SOLVER.WARMUP_ITERS == 1
    assert "SOLVER.WARMUP_ITERS 4 is more than a fifth of SOLVER.MAX_ITER 6" in caplog.text
    assert "INPUT.MIN_SIZE_TEST 104 and MAX_SIZE_TEST 128 make" not in caplog.text  # 128 in both
    Trainer(short_cfg("large", **sizes, **{"INPUT.MAX_SIZE_TEST": 160}))
    assert "INPUT.MIN_SIZE_TEST 104 and MAX_SIZE_TEST 160 make" in caplog.text


AMP = {"SOLVER.AMP.ENABLED": True}
OFFICIAL = {
    "MODEL.META_ARCHITECTURE": "InsPoseOfficial",
    "MODEL.INSPOSE.KEYPOINT_SCORE_WEIGHT_TEST": 0.0,
    "INPUT.RESIZE": "opencv",
    "SOLVER.IMS_PER_BATCH": 1,
}


@pytest.mark.fault
@pytest.mark.parametrize(
    "settings",
    [
        {"DATALOADER.NUM_WORKERS": 2},  # without loader processes: test_ema.py
        pytest.param({**AMP, "SOLVER.AMP.PRECISION": "float16"}, marks=pytest.mark.slow),
        pytest.param({**AMP, "SOLVER.AMP.PRECISION": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param(OFFICIAL, marks=pytest.mark.slow),
    ],
)
def test_interrupted_and_resumed_run_equals_the_uninterrupted_one(
    short_cfg: Callable[..., CfgNode], settings: dict[str, Any]
) -> None:
    whole, parts = short_cfg("whole", **settings), short_cfg("parts", **settings)
    with reliable_kernels(settings.get("SOLVER.AMP.PRECISION")):
        run(whole)
        with pytest.raises(Interrupted):
            run(parts, steps=4)
        assert (Path(parts.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_0000003.pth"
        torch.manual_seed(99)  # the state of the random numbers is not needed
        parts.SEED = 5  # the seed comes from the checkpoint
        run(parts, resume=True)
    assert_same(state(parts), state(whole))


def run_whole_and_parts(whole: CfgNode, parts: CfgNode) -> None:
    """Be one of two workers; only the first one is asked to stop."""
    run(whole)
    with contextlib.suppress(Interrupted):
        run(parts, 4 if comm.is_main_process() else None)


def resume(cfg: CfgNode) -> None:
    run(cfg, resume=True)


@pytest.mark.fault
@pytest.mark.slow
def test_two_workers_resume_exactly(short_cfg: Callable[..., CfgNode], tmp_path: Path) -> None:
    whole, parts = short_cfg("whole"), short_cfg("parts")
    launch(run_whole_and_parts, 2, dist_url=f"file://{tmp_path / 'one'}", args=(whole, parts))
    assert (Path(parts.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_0000003.pth"
    launch(resume, 2, dist_url=f"file://{tmp_path / 'two'}", args=(parts,))
    assert_same(state(parts), state(whole))


@pytest.mark.fault
def test_same_seed_gives_the_same_run_and_another_seed_another(
    short_cfg: Callable[..., CfgNode],
) -> None:
    settings = {"SOLVER.MAX_ITER": 2}
    cfgs = [short_cfg(x, **settings) for x in ("a", "b")]
    cfgs.append(short_cfg("c", SEED=1, **settings))
    for cfg in cfgs:
        run(cfg)
    a, b, c = (state(cfg) for cfg in cfgs)
    assert_same(a, b)
    assert any(not torch.equal(a["model"][name], c["model"][name]) for name in a["model"])


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_mixed_precision_keeps_float32_where_it_must(
    short_cfg: Callable[..., CfgNode], precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.dtype]] = {"features": [], "maps": [], "losses": []}
    logits, losses = KPNet.logits, InsPose.losses

    def watch_maps(self: KPNet, *args: Any) -> torch.Tensor:
        maps = logits(self, *args)
        seen["maps"].append(maps.dtype)
        return maps

    def watch_losses(self: InsPose, predictions: Any, *args: Any) -> dict[str, torch.Tensor]:
        result = losses(self, predictions, *args)
        seen["features"].append(predictions.keypoint_features.dtype)
        seen["losses"] += [loss.dtype for loss in result.values()]
        return result

    monkeypatch.setattr(KPNet, "logits", watch_maps)
    monkeypatch.setattr(InsPose, "losses", watch_losses)
    everything = ("BOX_HEAD.ENABLED", "REGRESSION.ENABLED")
    settings = {f"MODEL.INSPOSE.{key}": True for key in everything}
    settings |= {"MODEL.INSPOSE.CLS_LOSS": "varifocal", "SOLVER.MAX_ITER": 2}
    name = str(precision).removeprefix("torch.")
    cfg = short_cfg("half", **settings, **AMP, **{"SOLVER.AMP.PRECISION": name})
    with reliable_kernels(name):
        trainer = run(cfg)
    assert set(seen["features"]) == {precision}
    assert set(seen["maps"]) == set(seen["losses"]) == {torch.float32}
    assert len(seen["losses"]) == 2 * 6
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trainer.model.parameters())

    full = run(short_cfg("full", **settings))
    for key in ("total_loss", "loss_box", "loss_regression"):
        values = [x.storage.history(key).values()[0][0] for x in (trainer, full)]
        assert values[0] == pytest.approx(values[1], rel=0.05), key
        assert values[0] != values[1]

    saved = state(cfg)["trainer"]["_trainer"]
    assert ("grad_scaler" in saved) == (precision is torch.float16)  # bfloat16 needs no scale


def test_training_with_grouped_convolutions_is_training_with_matrix_products(
    short_cfg: Callable[..., CfgNode],
) -> None:
    trained = []
    for backend in ("torch", "grouped"):
        # SGD, for AdamW makes a whole step of the sign of a gradient that is nothing but rounding.
        settings = {"SOLVER.OPTIMIZER": "SGD", "SOLVER.WARMUP_ITERS": 0, "SOLVER.MAX_ITER": 3}
        settings["SOLVER.BASE_LR"] = 0.05
        cfg = short_cfg(backend, **settings, **{"MODEL.INSPOSE.KP_NET.BACKEND": backend})
        trainer = run(cfg)
        assert trainer._trainer.model.kp_net.backend == backend
        trained.append(state(cfg)["model"])
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-5)


@pytest.mark.fault
def test_diverged_run_keeps_the_state_before_and_the_last_checkpoint(
    short_cfg: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = InsPose.losses
    calls = []

    def spoilt(self: InsPose, *args: Any) -> dict[str, torch.Tensor]:
        calls.append(0)
        result = losses(self, *args)
        if len(calls) == 5:
            result["loss_keypoint"] = result["loss_keypoint"] * float("nan")
        return result

    monkeypatch.setattr(InsPose, "losses", spoilt)
    cfg = short_cfg("spoilt", **{"SOLVER.CHECKPOINT_PERIOD": 2})
    message = (
        r"iteration 4: loss_keypoint not finite \(.*\) on images \[\d+, \d+\] of worker 0\. .*"
        r"model_0000004_diverged\.pth\. Clip with .* --resume, or .*lower SOLVER\.BASE_LR"
    )
    with pytest.raises(DivergedError, match=message):
        run(cfg)
    assert (Path(cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_0000003.pth"
    kept, before = state(cfg, "model_0000004_diverged"), state(cfg, "model_0000003")
    assert_same(kept["model"], before["model"])
    for x in (kept, before):
        x["trainer"]["_trainer"].pop("iteration")  # of the step that began
    assert_same(kept["trainer"], before["trainer"])
    monkeypatch.undo()
    run(cfg, resume=True)  # goes on
    assert state(cfg)["trainer"]["iteration"] == 5


class KillNets(HookBase):
    """Sets the KP-Nets' parameters to what has no active unit, whatever the image."""

    def before_train(self) -> None:
        conv = self.trainer._trainer.model.head.params_pred
        with torch.no_grad():
            conv.weight.zero_()
            conv.bias.zero_()
            conv.bias[80:88] = -1.0  # of the first layer; without weights no unit is above it
            conv.bias[152:160] = -1.0


@pytest.mark.fault
def test_dead_nets_stop_the_run_with_the_state_saved(
    short_cfg: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_loop, "DEAD_STEPS", 4)
    cfg = short_cfg("run", **{"SOLVER.BASE_LR": 1e-6})
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    trainer.register_hooks([KillNets()])
    with pytest.raises(DeadKPNetsError, match=r"are dead.*full_model.*training_stability\.md"):
        trainer.train()
    path = next(Path(cfg.OUTPUT_DIR).glob("model_*_diverged.pth"))
    assert (path.name, trainer.last_step) == ("model_0000003_diverged.pth", 2)
    assert not (Path(cfg.OUTPUT_DIR) / "last_checkpoint").exists()


def test_full_model_clips_the_norm_of_all_gradients(short_cfg: Callable[..., CfgNode]) -> None:
    clip = {"ENABLED": True, "CLIP_TYPE": "full_model", "CLIP_VALUE": 0.5}
    clip = {f"SOLVER.CLIP_GRADIENTS.{key}": value for key, value in clip.items()}
    for name in ("SGD", "ADAMW"):
        cfg = short_cfg("run", **clip, **{"SOLVER.OPTIMIZER": name, "SOLVER.MOMENTUM": 0.0})
        model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
        optimizer = Trainer.build_optimizer(cfg, model)
        parameters = list(model.parameters())
        for parameter, gradient in zip(parameters, (3.0, 0.0, 0.0, -4.0), strict=True):
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        clipped = [parameter.grad.item() for parameter in parameters]
        assert clipped == pytest.approx([0.3, 0, 0, -0.4], rel=1e-4)


@pytest.mark.fault
def test_any_failure_leaves_the_last_whole_step(
    short_cfg: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = short_cfg("whole"), short_cfg("parts")
    run(whole)

    losses, calls = InsPose.losses, []

    def fail(self: InsPose, *args: Any) -> dict[str, torch.Tensor]:
        calls.append(0)
        if len(calls) == 5:
            raise RuntimeError("CUDA out of memory")
        return losses(self, *args)

    monkeypatch.setattr(InsPose, "losses", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(parts)
    assert (Path(parts.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_0000003.pth"
    run(parts, resume=True)
    assert_same(state(parts), state(whole))


def test_annotations_of_training_are_parsed_once(
    short_cfg: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = short_cfg("x")
    (name,) = cfg.DATASETS.TRAIN
    expected = DatasetCatalog.get(name)
    parsed, load = [], coco_file.load_annotations

    def counted(path: str) -> Any:
        parsed.append(Path(path).name)
        return load(path)

    monkeypatch.setattr(coco_file, "load_annotations", counted)
    loader = Trainer.build_train_loader(cfg)
    assert parsed == ["person_keypoints_val.json"]
    assert_same(list(loader.dataset.dataset), expected)
    monkeypatch.undo()
    assert_same(DatasetCatalog.get(name), expected)  # and later from the file again


def test_sampler_that_cannot_be_resumed_is_refused(short_cfg: Callable[..., CfgNode]) -> None:
    cfg = short_cfg("x", **{"DATALOADER.SAMPLER_TRAIN": "RandomSubsetTrainingSampler"})
    with pytest.raises(ValueError, match="must be 'TrainingSampler'"):
        Trainer.build_train_loader(cfg)


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


def test_loader_of_detectron2_trains_and_a_resume_warns(
    short_cfg: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def build(_: Any, cfg: CfgNode) -> Any:
        return build_detection_train_loader(cfg, mapper=Trainer.build_mapper(cfg, True))

    monkeypatch.setattr(Trainer, "build_train_loader", classmethod(build))
    run(short_cfg("x", **{"SOLVER.MAX_ITER": 1}))
    assert "cannot be resumed" not in caplog.text
    run(short_cfg("x", **{"SOLVER.MAX_ITER": 2}), resume=True)
    assert "The training loader cannot be resumed" in caplog.text


@pytest.mark.slow
def test_pictures_of_evaluations_change_no_training(
    short_cfg: Callable[..., CfgNode], few_people: dict[str, Any]
) -> None:
    settings = {**few_people, "SOLVER.MAX_ITER": 3, "TEST.EVAL_PERIOD": 1}
    plain = short_cfg("plain", **{**settings, "DATASETS.TEST": ()})
    shown = short_cfg("shown", **settings)
    run(plain)
    run(shown)
    assert_same(state(shown)["model"], state(plain)["model"])
    events = EventAccumulator(shown.OUTPUT_DIR).Reload()
    assert events.Tags()["images"] == [f"few_people/{i}" for i in range(NUM_PICTURES)]
    assert len(events.Images("few_people/0")) == 3
