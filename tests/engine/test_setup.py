"""The lines and files of a run's beginning."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from inspose_d2.engine.setup import count_macs, describe_model, input_size, setup_run


class Predicting(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self.model.predict(images)
        return (
            found.person_logits,
            *found.params_features,
            found.keypoint_features,
            found.disk_offsets,
        )


def test_few_lines_are_told_and_all_else_lies_in_files(
    tiny_cfg: Callable[..., CfgNode], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny_cfg(OUTPUT_DIR=str(tmp_path))
    for name in ("detectron2", "fvcore", "inspose_d2"):  # a run of another module may be set up
        logging.getLogger(name).handlers.clear()
    setup_logger.cache_clear()
    setup_run(cfg)
    model = build_model(cfg)
    describe_model(cfg, model)
    told = capfd.readouterr().out
    assert told.count("\n") <= 6
    assert "Detectron2 0.6" in told
    millions = sum(x.numel() for x in model.parameters()) / 1e6
    assert f"{millions:.1f} M parameters" in told
    assert "128 x 96 pixels" in told
    with_colours = [x for x in tmp_path.iterdir() if "\x1b" in x.read_text()]
    assert with_colours == []
    assert CfgNode(yaml.safe_load((tmp_path / "config.yaml").read_text())) == CfgNode(
        yaml.safe_load(cfg.dump())
    )
    assert "(keypoint_branch)" in (tmp_path / "model.txt").read_text()
    assert torch.__version__ in (tmp_path / "environment.txt").read_text()
    assert not logging.getLogger("detectron2.data").isEnabledFor(logging.INFO)


def test_multiply_adds_are_those_that_fvcore_counts(tiny_cfg: Callable[..., CfgNode]) -> None:
    cfg = tiny_cfg()
    model = build_model(cfg).eval()
    size = input_size(cfg, model)
    counted = FlopCountAnalysis(Predicting(model), torch.zeros(1, 3, *size))
    convolutions = counted.unsupported_ops_warnings(False).by_operator()["conv"]
    assert count_macs(model, size) == convolutions
    assert next(model.parameters()).device.type == "cpu"  # it is as it was
