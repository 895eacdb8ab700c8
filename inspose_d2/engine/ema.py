"""Exponential moving average of the weights."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..checkpoint import InsPoseCheckpointer


class EMA(HookBase):
    """Averages the weights after each step with PyTorch's ``AveragedModel`` (ours).

    Evaluation sees the average, and a checkpoint's "model" is the average; the weights that are
    trained are in the state of this hook, from which a run resumes exactly. In the first steps the
    decay is (1 + step) / (10 + step), or the average would be that of the untrained weights.

    Attributes:
        averaged: the model with averaged weights and batch norm statistics.
    """

    def __init__(self, model: nn.Module, decay: float, checkpointer: InsPoseCheckpointer) -> None:
        """Copy the model.

        Args:
            model: that is trained, without DistributedDataParallel around it.
            decay: share of the old average that stays in a step, in (0, 1).
            checkpointer: of this model; it saves the average from now on.
        """
        self.model = model
        self.decay = decay
        self._average = AveragedModel(model, multi_avg_fn=self._mix, use_buffers=True)
        self.averaged: nn.Module = self._average.module
        checkpointer.model_to_save = self.averaged

    def after_step(self) -> None:
        """Average once more; the first step's weights are taken as they are."""
        self._average.update_parameters(self.model)

    @torch.no_grad()
    def _mix(self, averaged: Sequence[Tensor], current: Sequence[Tensor], _: Tensor | int) -> None:
        """Bring tensors of one type a step nearer to the weights."""
        step = int(self._average.n_averaged)
        keep = min(self.decay, (1 + step) / (10 + step))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(list(averaged), list(current), 1 - keep)
        else:  # batch norms count their batches
            torch._foreach_copy_(list(averaged), list(current))

    def state_dict(self) -> dict[str, Any]:
        """Hold what a checkpoint's "model" does not: the weights that are trained."""
        return {"weights": self.model.state_dict(), "steps": self._average.n_averaged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, once the checkpoint's "model" is in the model."""
        self.averaged.load_state_dict(self.model.state_dict())
        self.model.load_state_dict(state_dict["weights"])
        self._average.n_averaged.copy_(state_dict["steps"])
