"""The fused kernels, on a CUDA device if there is one, else in Triton's interpreter."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from inspose_d2.modeling.geometry import coordinate_scale
from inspose_d2.modeling.kp_net import KPNet

kernels = pytest.importorskip("inspose_d2.modeling.kp_net_triton", exc_type=ImportError)
import triton  # noqa: E402

ROOT = Path(__file__).parents[2]

# 323 cells: a full tile of 256 and a part of the next, which starts in row 13.
HEIGHT, WIDTH = 17, 19
# Unpadded parts of the images: all of it, one without persons, one that ends in the first tile.
SIZES = [(17, 19), (5, 6), (12, 15)]
PERSONS = [1, 0, 2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Case(NamedTuple):
    """A KP-Net, its persons and their features, on the CPU."""

    kp_net: KPNet
    widths: tuple[int, ...]
    params: Tensor
    points: Tensor
    strides: Tensor
    image: Tensor
    features: Tensor

    def arguments(self) -> tuple[Tensor, ...]:
        """Say what both functions take first, on the device of the kernels."""
        scales = coordinate_scale(self.strides)
        inputs = self.params, self.points, scales, self.image, self.features
        return tuple(x.to(DEVICE) for x in inputs)

    def maps(self) -> Tensor:
        """Run the definition image by image: (N, K, H, W)."""
        own = [self.image == b for b in range(len(self.features))]
        return torch.cat(
            [
                self.kp_net.maps_by_grouped_convolution(
                    self.params[i], self.points[i], self.strides[i], features
                )
                for i, features in zip(own, self.features, strict=True)
                if i.any()
            ]
        )


def make_case(
    num_layers: int, num_keypoints: int, feature_channels: int = 8, channels: int = 8
) -> Case:
    generator = torch.Generator().manual_seed(num_layers)
    kp_net = KPNet(
        stride=8,
        feature_channels=feature_channels,
        channels=channels,
        num_layers=num_layers,
        num_keypoints=num_keypoints,
    )
    n = sum(PERSONS)
    return Case(
        kp_net,
        (feature_channels + 2, *[channels] * (num_layers - 1), num_keypoints),
        0.5 * torch.randn(n, kp_net.num_params, generator=generator),
        torch.rand(n, 2, generator=generator) * 8 * torch.tensor([WIDTH, HEIGHT]),
        2.0 ** torch.randint(3, 8, (n,), generator=generator),
        torch.arange(len(PERSONS)).repeat_interleave(torch.tensor(PERSONS)),
        torch.randn(len(PERSONS), feature_channels, HEIGHT, WIDTH, generator=generator),
    )


def peaks(case: Case, sizes: list[tuple[int, int]] = SIZES) -> tuple[Tensor, ...]:
    found = kernels.peaks(
        *case.arguments(), torch.tensor(sizes, device=DEVICE), stride=8, widths=case.widths
    )
    return tuple(x.cpu() for x in found)


def log_probs(case: Case, cells: Tensor) -> Tensor:
    y = kernels.log_probs(*case.arguments(), cells.to(DEVICE), stride=8, widths=case.widths)
    return y.cpu()


@pytest.mark.parametrize(("num_layers", "num_keypoints"), [(1, 5), (2, 5), (3, 17), (4, 1)])
def test_peaks_equal_definition(num_layers: int, num_keypoints: int) -> None:
    case = make_case(num_layers, num_keypoints)
    cells, logits, lse = peaks(case)
    assert (cells.dtype, logits.dtype, lse.dtype) == (torch.int64, torch.float32, torch.float32)
    for n, maps in enumerate(case.maps()):
        height, width = SIZES[case.image[n]]
        expected = maps[:, :height, :width].flatten(1)
        assert cells[n].equal(expected.argmax(dim=1))
        torch.testing.assert_close(logits[n], expected.amax(dim=1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[n], expected.logsumexp(dim=1), atol=1e-5, rtol=1e-5)


def test_peak_is_first_of_equal_cells() -> None:
    # Depth 1: the two maps are features 0 and 1.
    case = make_case(num_layers=1, num_keypoints=2, feature_channels=2)
    params = torch.zeros(3, 2 * 4 + 2)
    params[:, 0] = params[:, 5] = 1
    features = torch.zeros(3, 2, HEIGHT * WIDTH)
    features[:, 0, [40, 44, 300]] = 2  # within a tile and in both tiles
    features[:, 1, [270, 322]] = 2  # within the second tile
    case = case._replace(params=params, features=features.unflatten(2, (HEIGHT, WIDTH)))
    cells, logits, lse = peaks(case)
    # Image 0 is 19 wide. Image 2 is 12 x 15: 40 = 2 * 19 + 2 is there 2 * 15 + 2, and its second
    # map is zero everywhere.
    assert cells.tolist() == [[40, 270]] + [[32, 0]] * 2
    assert logits.tolist() == [[2, 2]] + [[2, 0]] * 2
    expected = [3 * math.exp(2) + 320, 2 * math.exp(2) + 321]
    assert lse[0].tolist() == pytest.approx([math.log(x) for x in expected])
    expected = [2 * math.exp(2) + 178, 180]
    assert lse[2].tolist() == pytest.approx([math.log(x) for x in expected])


@pytest.mark.filterwarnings("ignore:All-NaN")  # of NumPy, in the interpreter
def test_peak_of_nan_is_a_cell_inside_the_unpadded_map() -> None:
    case = make_case(1, 2)
    case.params[:] = math.nan
    cells = peaks(case)[0]
    for n, image in enumerate(case.image.tolist()):
        height, width = SIZES[image]
        assert (cells[n] < height * width).all()


def test_features_of_any_layout_and_precision() -> None:
    case = make_case(2, 2, channels=2)
    features = case.features.bfloat16()
    exact = peaks(case._replace(features=features.float()))
    for other in (features, features.float().contiguous(memory_format=torch.channels_last)):
        for x, y in zip(peaks(case._replace(features=other)), exact, strict=True):
            assert x.equal(y)


def gradients(case: Case, result: Tensor, seed: int = 0) -> tuple[Tensor, ...]:
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad((result * weights).sum(), [case.params, case.features])


@pytest.mark.parametrize(
    ("num_layers", "num_keypoints", "channels", "persons_per_program"),
    [(1, 5, 8, 8), (2, 1, 8, 1), (3, 17, 8, 8), (4, 5, 3, 1)],
)
def test_log_probs_and_gradients_equal_definition(
    num_layers: int,
    num_keypoints: int,
    channels: int,
    persons_per_program: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "PERSONS_PER_PROGRAM", persons_per_program)
    case = make_case(num_layers, num_keypoints, channels=channels)
    case.params.requires_grad_()
    case.features.requires_grad_()
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(HEIGHT * WIDTH, (3, num_keypoints), generator=generator)
    actual = log_probs(case, cells)
    expected = case.maps().flatten(2).log_softmax(dim=-1).gather(2, cells[..., None])[..., 0]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for x, y in zip(gradients(case, actual), gradients(case, expected), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_nothing_of_the_size_of_maps_is_kept_for_backward() -> None:
    case = make_case(2, 4, feature_channels=1, channels=1)
    case.params.requires_grad_()
    case.features.requires_grad_()
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        log_probs(case, torch.zeros(3, 4, dtype=torch.int64))
    assert max(kept) == case.features.numel()
    assert sum(kept) < 3 * 4 * HEIGHT * WIDTH


def test_gradients_are_the_same_every_time() -> None:
    case = make_case(2, 2, feature_channels=2, channels=2)
    case.params.requires_grad_()
    case.features.requires_grad_()
    cells = torch.zeros(3, 2, dtype=torch.int64)
    first, second = (gradients(case, log_probs(case, cells)) for _ in range(2))
    assert first[0].equal(second[0])
    assert first[1].equal(second[1])


def test_without_persons() -> None:
    case = make_case(3, 17)
    case = case._replace(
        params=case.params[:0].requires_grad_(),
        points=case.points[:0],
        strides=case.strides[:0],
        image=case.image[:0],
    )
    case.features.requires_grad_()
    assert [x.shape for x in peaks(case)] == [(0, 17)] * 3
    result = log_probs(case, torch.zeros(0, 17, dtype=torch.int64))
    assert result.shape == (0, 17)
    d_params, d_features = gradients(case, result)
    assert d_params.shape == (0, 313)
    assert d_features.equal(torch.zeros_like(case.features))


# Compiles all kernels, for devices that need not be there, and prints the bytes of stack that each
# uses: mostly for registers that it spills.
COMPILE = """
import itertools, json, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from inspose_d2.modeling import kp_net_triton as kernels

widths, *capabilities = json.loads(sys.argv[1])
constants = {"STRIDE": 8, "C": widths[0] - 2, "HIDDEN": widths[1], "LAST": len(widths) - 2}
constants |= {"K": widths[-1], "NUM_PARAMS": sum(a * b + b for a, b in itertools.pairwise(widths))}
types = dict.fromkeys(constants, "constexpr") | {"area": "i32", "width": "i32"}
types |= dict.fromkeys(["image", "sizes", "cells", "targets"], "*i64")
types |= dict.fromkeys(["firsts", "starts"], "*i32")
names = [name for name in vars(kernels) if name.endswith("_kernel")]
for name, capability in itertools.product(names, capabilities):
    kernel = getattr(kernels, name)
    signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": 1, "enable_fp_fusion": True}
    # As in practice: tensors are aligned, and the number of cells is a multiple of 16.
    aligned = [i for i, x in enumerate(signature) if signature[x][0] == "*" or x == "area"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target, options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.check_output(command, text=True)
    print(name, capability, re.search(r"STACK:(\\d+)", usage)[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("widths", "capabilities"), [([4, 2, 2, 3], [80, 90]), ([10, 8, 8, 17], [90])]
)
def test_kernels_compile_and_hardly_spill(
    widths: list[int], capabilities: list[int], tmp_path: Path
) -> None:
    try:
        triton.knobs.nvidia.cuobjdump.path  # noqa: B018
    except RuntimeError as error:
        pytest.skip(f"this Triton has no compiler for NVIDIA devices: {error}")
    # In a process of its own, because what the interpreter runs cannot be compiled.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, json.dumps([widths, *capabilities])]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    stacks = [int(line.split()[-1]) for line in result.stdout.splitlines()]
    assert len(stacks) == 3 * len(capabilities)
    assert max(stacks) <= 64  # 16 of 255 registers
