"""The demo's own parts; what it trains is tested elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from torch import nn

from experiments import demo_synthetic


def test_deadline_ends_training_without_an_error_message(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    class Model(nn.Linear):
        def forward(self, _: object) -> dict[str, torch.Tensor]:
            return {"loss": self.weight.sum()}

    model = Model(1, 1)
    trainer = SimpleTrainer(model, [0] * 10, torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.register_hooks([demo_synthetic.ProgressBar(seconds=0)])
    with pytest.raises(demo_synthetic.OutOfTime):
        trainer.train(0, 10)
    assert trainer.iter == 0
    assert not [x for x in caplog.records if x.levelname == "ERROR"]
    assert "Traceback" not in capsys.readouterr().err


def test_steps_are_timed(
    tiny_cfg: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo_synthetic, "TIMED_STEPS", 4)
    monkeypatch.setattr(demo_synthetic.Trainer, "build_writers", lambda _: [])  # left open
    names = {"DATASETS.TRAIN": ("synthetic_people_val",), "OUTPUT_DIR": str(tmp_path)}
    assert 0 < demo_synthetic.seconds_per_step(tiny_cfg(**names)) < 60


def test_losses_are_plotted_from_the_metrics_file(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.json"
    lines = [{"iteration": i, "total_loss": 3 - i, "loss_cls": 1, "lr": 0.1} for i in range(2)]
    metrics.write_text("\n".join(json.dumps(x) for x in [*lines, {"iteration": 2}]))
    axes = demo_synthetic.plt.figure().add_subplot()
    demo_synthetic._draw_losses(axes, metrics)
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn == {"total_loss": [3, 2], "loss_cls": [1, 1]}


def test_photograph_is_shown_with_a_pose(tmp_path: Path) -> None:
    demo_synthetic.show_photograph(tmp_path)
    assert (tmp_path / "poses" / "grace_hopper.jpg").is_file()
    assert len(json.loads((tmp_path / "results.json").read_text())) == 1
