"""One step of training that never spoils the weights: Detectron2's `SimpleTrainer` with guards."""

import errno
import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from fvcore.nn.precise_bn import get_bn_modules
from torch import Tensor, nn

from ..workers import file_limit
from .signals import Interrupted, StopRequest

DEAD_STEPS = 30  # with dead KP-Nets, until training stops
DEAD_SHARE = 0.02  # of active units at most: a stray one now and then brings no net back to life
FEW_FILES = 1024  # open at once: fewer may not do for loader processes
LOWEST_SCALE = 1.0  # of the gradient scaler, which begins at 65536 and halves at each overflow


class DivergedError(FloatingPointError):
    """A loss or a gradient is not finite; the weights are those before the step.

    Attributes:
        cure: what to do, once the weights are in the file ``path``.
    """

    cure = (
        "Training stopped before this step could spoil the weights; they are in {path}. Clip with "
        "SOLVER.CLIP_GRADIENTS.ENABLED True and --resume, or start anew with a lower "
        "SOLVER.BASE_LR, from MODEL.WEIGHTS {path} if they are good"
    )


class DeadKPNetsError(DivergedError):
    """The hidden units of all KP-Nets are the same at every cell, and will stay so."""

    cure = (
        "Their maps are constant, their gradients zero: no further step would change that, while "
        "the other losses go on falling. The weights are in {path}. Start anew, in another "
        "OUTPUT_DIR or from a checkpoint before, with SOLVER.CLIP_GRADIENTS as in "
        "configs/Base-InsPose.yaml (ENABLED True, CLIP_TYPE 'full_model'), a lower SOLVER.BASE_LR "
        "or a longer SOLVER.WARMUP_ITERS; docs/training_stability.md says more"
    )


class DataLoaderError(RuntimeError):
    """A worker got no batch; the weights are those before the step."""


class TrainLoop(SimpleTrainer):
    """``SimpleTrainer`` and ``AMPTrainer`` in one, which stops before a bad step.

    All workers stop in the same step: whoever gets no batch, meets a number that is not finite or
    is asked to stop tells the others before they wait for it.

    Attributes:
        dead_steps: how many steps in a row, up to now, the KP-Nets have been dead.
        is_updating: whether an optimizer step has begun and not ended: then the weights are of no
            whole step.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        *,
        stop: StopRequest,
        precision: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        """Take what is trained.

        Args:
            model: in training it returns a dict of losses.
            data_loader: batches, each a list with a dict per image.
            optimizer: of the model's parameters.
            stop: asked before each step.
            precision: of automatic mixed precision; None trains in the parameters' own.
            others: of ``SimpleTrainer``.
        """
        super().__init__(model, data_loader, optimizer, **others)
        self.stop = stop
        self.precision = precision
        self.device_type = next(model.parameters()).device.type
        # Only half precision underflows without a scale; a disabled scaler does nothing.
        self.grad_scaler = torch.amp.GradScaler(
            self.device_type, enabled=precision is torch.float16
        )
        self.dead_steps = 0
        self.is_updating = False
        # Statistics of batch norms, which the forward pass changes already.
        self.statistics = [b for norm in get_bn_modules(model) for b in norm.buffers()]

    def run_step(self) -> None:
        """Train on one batch.

        Raises:
            DivergedError: a loss or gradient of some worker is not finite.
            DataLoaderError: some worker got no batch.
            Interrupted: some worker was asked to stop.
        """
        start = time.perf_counter()
        batch = self._next_batch()
        data_time = time.perf_counter() - start

        former = [x.clone() for x in self.statistics]
        try:
            losses = self._compute_gradients(batch)
        except BaseException:
            for statistic, value in zip(self.statistics, former, strict=True):
                statistic.copy_(value)
            raise

        if self.async_write_metrics:
            self.concurrent_executor.submit(self._write_metrics, losses, data_time, iter=self.iter)
        else:
            self._write_metrics(losses, data_time)

        self.is_updating = True
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        self.is_updating = False

    def _next_batch(self) -> list[dict[str, Any]]:
        """Take a batch, once all workers have theirs and none is to stop."""
        batch: list[dict[str, Any]] = []
        failure: Exception | None = None
        try:
            batch = next(self._data_loader_iter)
        except Exception as error:  # noqa: BLE001  the others would wait for this worker
            failure = explain(error)
        said = "" if failure is None else f"{type(failure).__name__}: {failure}"
        signums, failures = zip(*comm.all_gather((self.stop.signum, said)), strict=True)
        if failure is not None:
            raise failure
        for rank, text in enumerate(failures):
            if text:
                raise DataLoaderError(f"worker {rank} got no batch: {text}")
        if any(signums):
            raise Interrupted(max(signums))
        return batch

    def _compute_gradients(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Run the model forward and backward; returns its losses, all finite."""
        use_amp = self.precision is not None
        with torch.autocast(self.device_type, self.precision, enabled=use_amp):
            losses = self.model(batch)
        self.optimizer.zero_grad()
        self.grad_scaler.scale(torch.stack(list(losses.values())).sum()).backward()
        self._check_finite(losses, batch)
        return losses

    def _check_finite(self, losses: dict[str, Tensor], batch: list[dict[str, Any]]) -> None:
        """Stop all workers where a loss or gradient of one is not finite, or all KP-Nets are dead.

        Writes the norms of the gradients of the whole model and of the parameter head.

        Gradients in half precision may overflow: the scaler skips such a step and goes on with a
        lower scale, which only tells of a fault when it never stops falling.
        """
        gradients = {
            n: p.grad.norm() for n, p in self.model.named_parameters() if p.grad is not None
        }
        # All that the host needs to know, at once.
        of_head = [norm for name, norm in gradients.items() if ".params_pred." in f".{name}"]
        norms = torch.stack(list(gradients.values()))
        *numbers, norm, head_norm, is_finite = torch.stack(
            [
                *losses.values(),
                norms.norm(),
                torch.stack(of_head or [norms.new_zeros(())]).norm(),
                norms.isfinite().all().float(),
            ]
        ).tolist()
        storage, scale = get_event_storage(), self.grad_scaler.get_scale()
        storage.put_scalar("gradient_norm", norm / scale)
        if of_head:
            storage.put_scalar("gradient_norm_params_pred", head_norm / scale)
        values = dict(zip(losses, numbers, strict=True))
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        problem = ""
        if bad:
            problem = f"{', '.join(bad)} not finite ({_show(values)})"
        elif self.grad_scaler.is_enabled():
            if self.grad_scaler.get_scale() < LOWEST_SCALE:
                problem = "gradients overflow in half precision at any scale"
        elif not is_finite:
            name = next(name for name, norm in gradients.items() if not norm.isfinite())
            problem = f"losses finite ({_show(values)}), but not the gradient of {name}"
        if problem:
            images = [image.get("image_id", image.get("file_name")) for image in batch]
            problem = f"{problem} on images {images} of worker {comm.get_rank()}"
        texts, active = zip(*comm.all_gather((problem, self._active_units())), strict=True)
        problems = [text for text in texts if text]
        if problems:
            raise DivergedError(f"iteration {self.iter}: {'; '.join(problems)}")
        self._count_dead_steps([share for share in active if share is not None])

    def _active_units(self) -> float | None:
        """Share of active units that the model has written in this step; None without persons."""
        storage = get_event_storage()
        share, step = storage.latest().get("active_units", (0.0, -1))
        return share if step == storage.iter else None

    def _count_dead_steps(self, active: list[float]) -> None:
        """Stop where the nets of all workers that have persons were dead for `DEAD_STEPS`."""
        if active:
            self.dead_steps = 0 if max(active) > DEAD_SHARE else self.dead_steps + 1
        if self.dead_steps >= DEAD_STEPS:
            raise DeadKPNetsError(
                f"iteration {self.iter}: the KP-Nets are dead: for {DEAD_STEPS} steps at most "
                f"{DEAD_SHARE:.0%} of the units of their last hidden layer have answered to the "
                "image"
            )

    def state_dict(self) -> dict[str, Any]:
        """Add the scaler's state to `SimpleTrainer`'s, as `AMPTrainer` does."""
        state: dict[str, Any] = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def explain(error: Exception) -> Exception:
    """Say what may have ended a loader process, where that is the error; others stay.

    Torch tells of it by a signal handler, at any moment, or meets a transfer that breaks off.

    Args:
        error: one that is explained already stays too.
    """
    if isinstance(error, DataLoaderError):
        return error
    what = str(error) or type(error).__name__
    broke_off = isinstance(error, ConnectionResetError | EOFError)
    limit = file_limit()
    out_of_files = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or any(
        words in what for words in ("Too many open files", "ancdata")
    )
    if out_of_files or (broke_off and 0 < limit < FEW_FILES):
        return DataLoaderError(
            f"{what}: too few open files are allowed, ulimit -n is {limit}: raise it, or lower "
            "DATALOADER.NUM_WORKERS, then --resume"
        )
    if broke_off or "DataLoader worker (pid" in what:
        return DataLoaderError(
            f"{what}. A loader process that vanishes was mostly killed for memory (see dmesg): "
            "lower DATALOADER.NUM_WORKERS or free memory, then --resume"
        )
    return error


def _show(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
