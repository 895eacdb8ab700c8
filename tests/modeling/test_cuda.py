"""The model on a CUDA device, in float32 and under mixed precision; skipped without one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from inspose_d2.modeling import kp_net_check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Make = Callable[..., Any]
SIZE = (96, 128)


def inputs_of(make_instances: Make, *counts: int) -> list[dict[str, Any]]:
    """Images with so many persons each."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for n in counts:
        keypoints = torch.rand(n, 17, 3, generator=generator) * torch.tensor([128, 96, 2.0])
        keypoints[..., 2] = 2
        image = torch.rand(3, *SIZE, generator=generator) * 255
        inputs.append({"image": image, "instances": make_instances(keypoints, SIZE)})
    return inputs


@pytest.mark.parametrize("counts", [(2, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_training_step_is_finite(
    tiny_cfg: Make, make_instances: Make, counts: tuple[int, int], dtype: torch.dtype
) -> None:
    model = build_model(tiny_cfg(**{"MODEL.DEVICE": "cuda"}))
    mixed = dtype != torch.float32
    with EventStorage(), torch.autocast("cuda", dtype=dtype, enabled=mixed):
        losses = model(inputs_of(make_instances, *counts))
    sum(losses.values()).backward()
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("backend", ["auto", "torch", "grouped"])
def test_losses_and_poses_equal_those_of_the_cpu(
    tiny_cfg: Make, make_instances: Make, backend: str
) -> None:
    torch.manual_seed(0)
    cpu = build_model(tiny_cfg())
    cuda = build_model(
        tiny_cfg(**{"MODEL.DEVICE": "cuda", "MODEL.INSPOSE.KP_NET.BACKEND": backend})
    )
    if backend == "auto":
        pytest.importorskip("inspose_d2.modeling.kp_net_triton", exc_type=ImportError)
        assert cuda.kp_net._kernels(torch.zeros(1, device="cuda")) is not None
    cuda.load_state_dict(cpu.state_dict())
    inputs = inputs_of(make_instances, 2, 1)
    with EventStorage():
        on_cpu, on_cuda = cpu(inputs), cuda(inputs)
    for name, loss in on_cpu.items():
        torch.testing.assert_close(on_cuda[name].cpu(), loss, rtol=1e-3, atol=1e-4)
    for model in (cpu, cuda):
        model.eval()
        model.pose_inference.score_threshold = 0.0
    with torch.no_grad():
        results = zip(*(m(inputs) for m in (cpu, cuda)), strict=True)
    for poses, cuda_poses in ([x["instances"].to("cpu") for x in pair] for pair in results):
        torch.testing.assert_close(cuda_poses.scores, poses.scores, rtol=1e-2, atol=1e-3)
    assert not kp_net_check._problems  # or "auto" has compared matrix products
