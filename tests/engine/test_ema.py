"""The average of the weights: its values, what is evaluated and saved, and an exact resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import Tensor, nn

from inspose_d2.checkpoint import InsPoseCheckpointer
from inspose_d2.engine.ema import EMA
from inspose_d2.engine.signals import Interrupted
from inspose_d2.engine.trainer import Trainer
from tests.engine.test_trainer import assert_same, run, short_cfg, state

__all__ = ["short_cfg"]  # a fixture


def test_average_by_hand(tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False)
    checkpointer = InsPoseCheckpointer(model, str(tmp_path))
    ema = EMA(model, 0.3, checkpointer)
    seen = []
    for weight in (1.0, 2.0, 4.0):
        nn.init.constant_(model.weight, weight)
        ema.after_step()
        seen.append(ema.averaged.weight.item())
    # The first as it is; then the decay is (1 + 1) / (10 + 1) and (1 + 2) / (10 + 2) = 0.25.
    second = 2 / 11 * 1 + 9 / 11 * 2
    assert seen == pytest.approx([1.0, second, 0.25 * second + 0.75 * 4], rel=1e-6)
    checkpointer.save("x")
    saved = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    assert saved["weight"].item() == seen[-1]
    assert model.weight.item() == 4.0


class Record(HookBase):
    """Keeps the weights of every step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def after_step(self) -> None:
        model = self.trainer._trainer.model
        self.weights.append(model.head.cls_score.weight.detach().clone())


def test_run_saves_and_evaluates_the_average(
    short_cfg: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = []

    def test(_: CfgNode, model: nn.Module) -> dict[str, Any]:
        evaluated.append(model.head.cls_score.weight.detach().clone())
        return {}

    monkeypatch.setattr(Trainer, "test", staticmethod(test))
    names = {"DATASETS.TEST": ("synthetic_people_val",), "TEST.EVAL_PERIOD": 6}
    cfg = short_cfg("run", **names, **{"SOLVER.EMA_DECAY": 0.2, "SOLVER.MAX_ITER": 6})
    trainer, record = Trainer(cfg), Record()
    trainer.resume_or_load(False)
    trainer.register_hooks([record])
    trainer.train()
    average = record.weights[0]
    for step, weight in enumerate(record.weights[1:], start=1):
        average = average.lerp(weight, 1 - min(0.2, (1 + step) / (10 + step)))
    torch.testing.assert_close(evaluated[0], average)
    saved = state(cfg)
    torch.testing.assert_close(saved["model"]["head.cls_score.weight"], average)
    trained = saved["trainer"]["hooks"]["EMA"]["weights"]["head.cls_score.weight"]
    assert torch.equal(trained, record.weights[-1])


@pytest.mark.fault
def test_run_with_an_average_resumes_exactly(short_cfg: Callable[..., CfgNode]) -> None:
    ema = {"SOLVER.EMA_DECAY": 0.9}
    whole, parts = short_cfg("whole", **ema), short_cfg("parts", **ema)
    run(whole)
    with pytest.raises(Interrupted):
        run(parts, steps=4)
    run(parts, resume=True)
    assert_same(state(parts), state(whole))
