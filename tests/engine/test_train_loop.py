"""Steps that must not be taken: losses and gradients that are not finite, batches that fail."""

import json
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import launch
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from inspose_d2.engine.signals import Interrupted, StopRequest
from inspose_d2.engine.train_loop import (
    DEAD_STEPS,
    DataLoaderError,
    DeadKPNetsError,
    DivergedError,
    TrainLoop,
)

pytestmark = pytest.mark.fault

BATCH = [{"image_id": 31}, {"image_id": 17}]
SETTINGS = [(1, False), (20, False), (20, True)]  # gather_metric_period, async_write_metrics


class Toy(nn.Module):
    """Two parameters with one loss each; `spoil` changes the second loss."""

    def __init__(self, spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        self.spoil = spoil

    def forward(self, _: Any) -> dict[str, Tensor]:
        return {"loss_a": self.a.sum(), "loss_b": self.spoil(self.b).sum()}


def make_loop(spoil: Callable[[Tensor], Tensor], **settings: Any) -> TrainLoop:
    model = Toy(spoil)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return TrainLoop(model, iter(lambda: BATCH, None), optimizer, stop=StopRequest(), **settings)


def step(loop: TrainLoop) -> None:
    with EventStorage():
        loop.run_step()
        loop.concurrent_executor.shutdown(wait=True)


def values(loop: TrainLoop) -> list[float]:
    return [p.item() for p in loop.model.parameters()]


def test_step_follows_the_gradient() -> None:
    loop = make_loop(lambda b: 2 * b)
    step(loop)
    assert values(loop) == [0.5, 0.0]  # 1 - 0.5 * 1, 1 - 0.5 * 2
    assert not loop.is_updating


@pytest.mark.parametrize(("period", "is_async"), SETTINGS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_loss_that_is_not_finite_stops_before_the_step(
    bad: float, period: int, is_async: bool
) -> None:
    settings = {"gather_metric_period": period, "async_write_metrics": is_async}
    loop = make_loop(lambda b: b * bad, **settings)
    message = r"iteration 0: loss_b not finite \(loss_a 1, loss_b .*\) on images \[31, 17\]"
    with pytest.raises(DivergedError, match=message):
        step(loop)
    assert values(loop) == [1.0, 1.0]


@pytest.mark.parametrize(("period", "is_async"), SETTINGS)
def test_finite_loss_with_nan_gradient_stops_before_the_step(period: int, is_async: bool) -> None:
    settings = {"gather_metric_period": period, "async_write_metrics": is_async}
    loop = make_loop(lambda b: (0 * b).sqrt() * 0, **settings)  # 0 * inf in the gradient
    message = r"losses finite \(loss_a 1, loss_b 0\), but not the gradient of b on images"
    with pytest.raises(DivergedError, match=message):
        step(loop)
    assert values(loop) == [1.0, 1.0]


def test_constant_loss_that_is_not_finite_stops_too() -> None:
    # It has no gradient, so the gradients alone would not tell.
    loop = make_loop(lambda b: b * 0 + torch.tensor(float("inf")))
    with pytest.raises(DivergedError, match="loss_b not finite"):
        step(loop)


def test_half_precision_skips_an_overflow_and_stops_when_the_scale_is_used_up() -> None:
    loop = make_loop(lambda b: (0 * b).sqrt() * 0, precision=torch.float16)
    for _ in range(17):  # 65536 = 2 ** 16, halved each time
        with EventStorage():
            loop.run_step()
    assert values(loop) == [1.0, 1.0]
    with pytest.raises(DivergedError, match="overflow in half precision at any scale"):
        step(loop)


def test_scale_survives_a_resume() -> None:
    loop = make_loop(lambda b: (0 * b).sqrt() * 0, precision=torch.float16)
    step(loop)
    other = make_loop(lambda b: b, precision=torch.float16)
    other.load_state_dict(loop.state_dict())
    assert other.grad_scaler.get_scale() == 2.0**15


def test_request_to_stop_is_obeyed_before_the_next_step() -> None:
    loop = make_loop(lambda b: b)
    with loop.stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            step(loop)
    assert caught.value.code == 143
    assert values(loop) == [1.0, 1.0]


def test_batch_that_fails_leaves_the_weights() -> None:
    def fail() -> Iterator[Any]:
        raise OSError("image 7 is gone")
        yield

    loop = make_loop(lambda b: b)
    loop.data_loader = fail()
    with pytest.raises(OSError, match="image 7 is gone"):
        step(loop)
    assert values(loop) == [1.0, 1.0]


def test_failure_of_another_worker_ends_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make_loop(lambda b: b)
    others = [(0, "OSError: image 7 is gone")]
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda own: [own, *others])
    with pytest.raises(DataLoaderError, match="worker 1 got no batch: OSError: image 7 is gone"):
        step(loop)
    assert values(loop) == [1.0, 1.0]


class Nets(Toy):
    """Says how alive its KP-Nets are, step by step; None is a batch without persons."""

    def __init__(self, shares: Sequence[float | None]) -> None:
        super().__init__(lambda b: b)
        self.shares = iter(shares)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        share = next(self.shares)
        if share is not None:
            get_event_storage().put_scalar("active_units", share)
        return super().forward(batch)


def steps_until_dead(shares: Sequence[float | None]) -> int | None:
    """Number of whole steps before the alarm; None without alarm."""
    model = Nets(shares)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loop = TrainLoop(model, iter(lambda: BATCH, None), optimizer, stop=StopRequest())
    with EventStorage() as storage:
        for i in range(len(shares)):
            try:
                loop.run_step()
            except DeadKPNetsError:
                assert values(loop) == [1 - 0.5 * i, 1 - 0.5 * i]  # the bad step was not taken
                return i
            storage.step()
    return None


def test_dead_nets_stop_training_and_living_ones_do_not() -> None:
    dead: list[float | None] = [0.0] * DEAD_STEPS
    assert steps_until_dead([0.5, 0.1, *dead]) == DEAD_STEPS + 1
    assert steps_until_dead([*dead[1:], 0.03, *dead[1:]]) is None
    assert steps_until_dead([0.03] * 3 * DEAD_STEPS) is None
    stray: list[float | None] = [0.0, 0.01] * DEAD_STEPS
    assert steps_until_dead(stray) == DEAD_STEPS - 1


def test_batches_without_persons_neither_start_nor_end_the_count() -> None:
    dead: list[float | None] = [0.0] * DEAD_STEPS
    assert steps_until_dead([None] * 3 * DEAD_STEPS) is None
    assert steps_until_dead([*dead[:10], *[None] * 50, *dead[10:]]) == DEAD_STEPS + 49


@pytest.mark.parametrize(
    ("other", "fires"), [(0.0, True), (None, True), (0.2, False)], ids=["dead", "empty", "alive"]
)
def test_alarm_needs_all_workers(
    monkeypatch: pytest.MonkeyPatch, other: float | None, fires: bool
) -> None:
    def gather(own: tuple[Any, Any]) -> list[tuple[Any, Any]]:
        return [own, (0, "") if isinstance(own[0], int) else ("", other)]

    monkeypatch.setattr("detectron2.utils.comm.all_gather", gather)
    assert (steps_until_dead([0.0] * DEAD_STEPS) is not None) == fires


def test_norms_of_gradients_are_written() -> None:
    loop = make_loop(lambda b: 2 * b)
    loop.model.params_pred = nn.Linear(1, 1, bias=False)
    loop.optimizer.add_param_group({"params": loop.model.params_pred.parameters()})
    forward = loop.model.forward
    loop.model.forward = lambda x: {
        **forward(x),
        "loss_c": loop.model.params_pred(torch.full((1,), -2.0)).sum(),
    }
    with EventStorage() as storage:
        loop.run_step()
        assert storage.latest()["gradient_norm"][0] == pytest.approx(3)  # of 1, 2 and -2
        assert storage.latest()["gradient_norm_params_pred"][0] == pytest.approx(2)


def train_two(folder: str) -> None:
    """One of two workers; the second one's loss is not finite in the second step."""
    rank = comm.get_rank()
    toy = Toy(lambda b: b * (math.nan if rank and calls else 1.0))
    model = create_ddp_model(toy, device_ids=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    calls: list[int] = []
    loop = TrainLoop(model, iter(lambda: BATCH, None), optimizer, stop=StopRequest())
    with EventStorage():
        loop.run_step()
        calls.append(1)
        try:
            loop.run_step()
        except DivergedError as error:
            said = {"error": str(error), "values": values(loop)}
            Path(folder, f"{rank}.json").write_text(json.dumps(said))
    comm.synchronize()  # gloo does not like an early end of the other


def train_two_dead(folder: str) -> None:
    """One of two workers: the nets are dead on the first at once, on the second from step 5."""
    late = comm.get_rank() * 5
    nets = Nets([0.5] * late + [0.0] * (DEAD_STEPS + 5))
    optimizer = torch.optim.SGD(nets.parameters(), lr=0.0)
    model = create_ddp_model(nets, device_ids=None)
    loop = TrainLoop(model, iter(lambda: BATCH, None), optimizer, stop=StopRequest())

    def run() -> None:
        while True:
            loop.run_step()
            storage.step()

    with EventStorage() as storage, pytest.raises(DeadKPNetsError):
        run()
    Path(folder, str(comm.get_rank())).write_text(str(storage.iter))
    comm.synchronize()


def train_both(folder: str) -> None:
    train_two(folder)
    train_two_dead(folder)


@pytest.mark.slow
def test_two_workers_stop_together_where_one_diverges_and_once_the_nets_of_both_are_dead(
    tmp_path: Path,
) -> None:
    url = f"file://{tmp_path / 'rendezvous'}"
    launch(train_both, 2, dist_url=url, args=(str(tmp_path),))
    for rank in (0, 1):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert "loss_b not finite (loss_a 0.5, loss_b nan) on images" in said["error"]
        assert "not the gradient of module.b on images [31, 17] of worker 0" in said["error"]
        assert said["values"] == [0.5, 0.5]  # of the first step
        assert (tmp_path / str(rank)).read_text() == str(5 + DEAD_STEPS - 1)
