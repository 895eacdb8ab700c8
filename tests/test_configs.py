"""The YAML files and the declared keys."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from inspose_d2 import add_inspose_config
from inspose_d2.trainer import Trainer

CONFIGS = Path(__file__).parent.parent / "configs"
RUNNABLE = sorted(p for p in CONFIGS.rglob("*.yaml") if not p.name.startswith("Base"))


def load(path: Path) -> CfgNode:
    cfg = get_cfg()
    add_inspose_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def is_peer(path: Path) -> bool:
    return "rcnn" in path.stem.lower()


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda p: p.stem)
def test_every_config_builds_model_optimizer_and_schedule(path: Path) -> None:
    cfg = load(path)
    model = build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    Trainer.build_lr_scheduler(cfg, optimizer)
    assert type(model).__name__ == ("GeneralizedRCNN" if is_peer(path) else "InsPose")
    assert [x for group in optimizer.param_groups for x in group["params"]]


def test_base_is_not_a_config_of_its_own() -> None:
    assert len(RUNNABLE) >= 2
    assert "InsPose_R50_3x" in [p.stem for p in RUNNABLE]


def test_r50_3x_is_the_schedule_of_the_paper() -> None:
    cfg = load(CONFIGS / "InsPose_R50_3x.yaml")
    # 36 epochs of 56,599 images, 16 at a time, drops after 27 and 33 (sec. 4 of the paper).
    for step, epochs in zip((*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER), (27, 33, 36), strict=True):
        assert step == pytest.approx(epochs * 56599 / 16, abs=5)
    assert cfg.SOLVER.IMS_PER_BATCH == 16
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM) == (0.01, 0.9)
    assert (cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.GAMMA) == (0.0001, 0.1)
    assert cfg.SOLVER.OPTIMIZER == "SGD"
    assert (tuple(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN) == ((640, 800), 1333)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 1333)
    assert cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    assert cfg.INPUT.RANDOM_FLIP == "horizontal"
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 2


def test_r50_has_a_kp_net_of_313_parameters() -> None:
    model = build_model(load(CONFIGS / "InsPose_R50_3x.yaml"))
    assert model.head.params_pred.out_channels == 313
    assert model.strides == [8, 16, 32, 64, 128]


class Recorder(CfgNode):
    """A node that remembers which keys were read from it."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if not name.startswith("_"):
            self.__dict__.setdefault("_read", set()).add(name)
        return value

    def items(self) -> Any:
        self.__dict__.setdefault("_read", set()).update(self)
        return super().items()


def leaves(node: CfgNode, prefix: str, read_only: bool) -> set[str]:
    """Names of all keys below a node, or of those that were read."""
    found = set()
    for key in list(node):
        value = dict.__getitem__(node, key)
        if isinstance(value, CfgNode):
            found |= leaves(value, f"{prefix}{key}.", read_only)
        elif not read_only or key in node.__dict__.get("_read", set()):
            found.add(prefix + key)
    return found


def recording(node: CfgNode) -> Recorder:
    """Copy of a config made of recorders."""
    copy = Recorder()
    for key, value in node.items():
        dict.__setitem__(copy, key, recording(value) if isinstance(value, CfgNode) else value)
    return copy


def test_no_config_key_is_unread() -> None:
    declared = get_cfg()
    add_inspose_config(declared)
    declared.MODEL.DEVICE = "cpu"
    declared.merge_from_file(str(CONFIGS / "quick" / "synthetic_people.yaml"))
    cfg = recording(declared)
    model = build_model(cfg)
    Trainer.build_optimizer(cfg, model)
    added = leaves(cfg.MODEL.INSPOSE, "MODEL.INSPOSE.", read_only=False)
    read = leaves(cfg.MODEL.INSPOSE, "MODEL.INSPOSE.", read_only=True)
    assert len(added) > 30
    assert added - read == set()
    assert "OPTIMIZER" in cfg.SOLVER.__dict__["_read"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.INSPOSE.UNLABELED_PERSONS", "ignored"),
        ("MODEL.INSPOSE.SIZES_OF_INTEREST", [64, 128]),
        ("MODEL.INSPOSE.NUM_CONVS", 0),
        ("MODEL.INSPOSE.HEATMAP.NUM_CONVS", 0),
        ("MODEL.INSPOSE.KP_NET.NUM_LAYERS", 0),
        ("SOLVER.OPTIMIZER", "ADAM"),
    ],
)
def test_wrong_value_is_refused_by_the_name_of_its_key(
    tiny_cfg: Callable[..., CfgNode], key: str, value: Any
) -> None:
    cfg = tiny_cfg([key, value])
    with pytest.raises(ValueError, match=re.escape(key)):
        Trainer.build_optimizer(cfg, build_model(cfg))
