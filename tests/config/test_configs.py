"""The YAML files and the declared keys."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from inspose_d2 import add_inspose_config
from inspose_d2.engine.trainer import Trainer

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
ZOO = (ROOT / "MODEL_ZOO.md").read_text(encoding="utf-8")
RUNNABLE = sorted(p for p in CONFIGS.rglob("*.yaml") if not p.name.startswith("Base"))


def load(path: Path) -> CfgNode:
    cfg = get_cfg()
    add_inspose_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.MODEL.DEVICE = "cpu"
    if not cfg.MODEL.WEIGHTS:
        cfg.MODEL.WEIGHTS = "checkpoint.pth"  # never loaded; else a timm backbone downloads
    return cfg


def is_peer(path: Path) -> bool:
    return "rcnn" in path.stem.lower()


def cfg_architecture(path: Path) -> str:
    return "InsPoseOfficial" if "Official" in path.stem else "InsPose"


def rows() -> list[dict[str, str]]:
    """Rows of all tables of MODEL_ZOO.md, each from the heads of its columns to its cells."""
    found, header = [], []
    for line in ZOO.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "Name":
            header = cells
        elif line.startswith("| "):
            found.append(dict(zip(header, cells, strict=True)))
    return found


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda p: p.stem)
def test_every_config_builds_all_and_has_a_row_in_the_zoo_with_its_parameters(path: Path) -> None:
    cfg = load(path)
    cfg.MODEL.DEVICE = "meta"  # shapes alone: no memory, no time
    with torch.device("meta"):
        model = build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    Trainer.build_lr_scheduler(cfg, optimizer)
    assert type(model).__name__ == ("GeneralizedRCNN" if is_peer(path) else cfg_architecture(path))
    assert [x for group in optimizer.param_groups for x in group["params"]]
    if path.parent.name in ("quick", "peer"):
        return
    training_alone = re.compile("heatmap_branch|regression_pred|heatmap_pred|tag_pred")
    parameters = model.named_parameters()
    at_inference = [p for name, p in parameters if not training_alone.search(name)]
    millions = sum(p.numel() for p in at_inference) / 1e6
    link = f"[{path.stem}]({path.relative_to(ROOT).as_posix()})"
    own = [row for row in rows() if row["Name"] == link]
    assert own, f"MODEL_ZOO.md lacks {link}: run python -m benchmarks.update_model_zoo"
    for row in own:
        assert float(row["params (M)"]) == pytest.approx(millions, abs=0.006)
        assert float(row["GMACs"]) > 0


# Epochs of the drops and of the end (sec. 4 of the paper: 36 epochs; 100 for Table 5, and ours).
SCHEDULES = {
    "InsPose_R50_3x": (27, 33, 36),
    "InsPose_R50_100ep": (75, 90, 100),
    "InsPosePlus_R50_100ep": (75, 90, 100),
    "InsPose_R101_100ep": (75, 90, 100),
    "InsPose_HRNet_W32_100ep": (75, 90, 100),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_the_paper(name: str) -> None:
    cfg = load(CONFIGS / f"{name}.yaml")
    # 56,599 images of train2017 have keypoints; 16 a step.
    steps = (*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER)
    for step, epochs in zip(steps, SCHEDULES[name], strict=True):
        assert step == pytest.approx(epochs * 56599 / 16, abs=7)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE) == (16, 8)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM) == (0.01, 0.9)
    assert (cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.GAMMA) == (0.0001, 0.1)
    assert cfg.SOLVER.OPTIMIZER == "SGD"
    assert (tuple(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN) == ((640, 800), 1333)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 1333)
    assert cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    assert cfg.INPUT.RANDOM_FLIP == "horizontal"
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 2


def test_r101_differs_from_r50_in_depth_and_weights_only() -> None:
    r50, r101 = (load(CONFIGS / f"InsPose_{name}_100ep.yaml") for name in ("R50", "R101"))
    assert r101.MODEL.RESNETS.DEPTH == 101
    assert r101.MODEL.WEIGHTS == "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
    r101.MODEL.RESNETS.DEPTH, r101.MODEL.WEIGHTS = 50, r50.MODEL.WEIGHTS
    assert r101 == r50


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


def read_and_declared(cfg: CfgNode, *names: str) -> tuple[set[str], set[str]]:
    """Build everything, and say which keys below the nodes of MODEL that read."""
    cfg = recording(cfg)
    Trainer.build_optimizer(cfg, build_model(cfg))
    assert "OPTIMIZER" in cfg.SOLVER.__dict__["_read"]
    nodes = [(getattr(cfg.MODEL, name), f"{name}.") for name in names]
    read, declared = (set().union(*(leaves(*x, only) for x in nodes)) for only in (True, False))
    return read, declared


def test_no_config_key_is_unread() -> None:
    read, declared = read_and_declared(load(CONFIGS / "quick" / "synthetic_people.yaml"), "INSPOSE")
    assert len(declared) > 30
    assert declared - read == set()


def test_no_key_of_timm_is_unread(tiny_cfg: Callable[..., CfgNode]) -> None:
    name = ["MODEL.BACKBONE.NAME", "build_inspose_timm_fpn_backbone"]
    network = ["MODEL.TIMM.NAME", "mobilenetv3_small_050", "MODEL.TIMM.PRETRAINED", False]
    read, declared = read_and_declared(tiny_cfg([*name, *network]), "TIMM")
    assert declared == {
        *("TIMM.NAME", "TIMM.PRETRAINED", "TIMM.WEIGHTS"),
        "TIMM.FREEZE_STRIDE",
    }
    assert declared == read
