import math
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from inspose_d2.modeling import kp_net as kp_net_module
from inspose_d2.modeling.candidates import Candidates
from inspose_d2.modeling.geometry import compute_locations, coordinate_scale, map_size
from inspose_d2.modeling.kp_net import KPNet

HEIGHT, WIDTH = 5, 7


class Input(NamedTuple):
    """Persons of one image: what the definition takes, in its order."""

    params: Tensor
    points: Tensor
    strides: Tensor
    features: Tensor


def make_kp_net(
    num_layers: int = 3, num_keypoints: int = 17, map_stride: int | None = None
) -> KPNet:
    return KPNet(
        stride=8,
        map_stride=map_stride,
        feature_channels=8,
        channels=8,
        num_layers=num_layers,
        num_keypoints=num_keypoints,
    )


def make_input(
    kp_net: KPNet, n: int, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)
) -> Input:
    generator = torch.Generator().manual_seed(seed)
    return Input(
        0.5 * torch.randn(n, kp_net.num_params, generator=generator),
        torch.rand(n, 2, generator=generator) * 8 * torch.tensor(size).flip(0),
        2.0 ** torch.randint(3, 8, (n,), generator=generator),
        torch.randn(8, *size, generator=generator),
    )


class Batch(NamedTuple):
    """The persons of several images: what `peaks` and `log_probs` take first."""

    params: Tensor
    candidates: Candidates
    features: Tensor


def batch_of(*images: Input) -> Batch:
    counts = [len(x.params) for x in images]
    number = torch.arange(len(images)).repeat_interleave(torch.tensor(counts))
    points, strides = (torch.cat([x[i] for x in images]) for i in (1, 2))
    return Batch(
        torch.cat([x.params for x in images]),
        Candidates(number, torch.zeros_like(number), points, strides, counts),
        torch.stack([x.features for x in images]),
    )


def peaks_of(kp_net: KPNet, *images: Input) -> tuple[Tensor, Tensor]:
    """Peaks in images without padding."""
    return kp_net.peaks(*batch_of(*images), [(HEIGHT, WIDTH)] * len(images))


def maps_of(kp_net: KPNet, x: Input) -> Tensor:
    """The fast form: (N, K, H, W)."""
    logits = kp_net.logits(*x[:3], kp_net.shared_input(x.features))
    return logits.unflatten(2, x.features.shape[1:])


def hold_four_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four persons with 17 keypoints at a time."""
    monkeypatch.setitem(kp_net_module.MAPS_BYTES, "cpu", 4 * 4 * 17 * HEIGHT * WIDTH)


def maps_by_loop(kp_net: KPNet, x: Input) -> Tensor:
    """Each person's network by itself, in float64, its parameters cut by hand."""
    widths = [10, *[8] * (len(kp_net.layers) - 1), kp_net.num_keypoints]
    column, row = torch.arange(WIDTH).double(), torch.arange(HEIGHT).double()
    result = []
    for vector, (px, py), stride in zip(x.params, x.points, x.strides, strict=True):
        relative_x = (8 * column + 4 - px) / (8 * stride)
        relative_y = (8 * row + 4 - py) / (8 * stride)
        coordinates = torch.stack(
            [relative_x.expand(HEIGHT, -1), relative_y[:, None].expand(-1, WIDTH)]
        )
        y = torch.cat([x.features.double(), coordinates])[None]
        rest = vector.double()
        for i, (n_in, n_out) in enumerate(pairwise(widths)):
            weight, bias, rest = rest.split([n_in * n_out, n_out, len(rest) - n_in * n_out - n_out])
            y = F.conv2d(F.relu(y) if i else y, weight.view(n_out, n_in, 1, 1), bias)
        result.append(y[0])
    return torch.stack(result)


@pytest.mark.parametrize(
    # method.md, section 2: 10*17+17; 10*8+8 + 8*17+17; one or two more 8*8+8 between them.
    ("num_layers", "num_params"),
    [(1, 187), (2, 241), (3, 313), (4, 385)],
)
def test_num_params_of_depth(num_layers: int, num_params: int) -> None:
    assert make_kp_net(num_layers).num_params == num_params


def test_depth_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"KP_NET\.NUM_LAYERS must be at least 1, got 0"):
        make_kp_net(num_layers=0)


def test_split_takes_weight_then_bias_of_each_layer() -> None:
    kp_net = KPNet(stride=8, feature_channels=1, channels=2, num_layers=2, num_keypoints=3)
    # 3 -> 2: weight 0..5 (row = output), bias 6, 7; 2 -> 3: weight 8..13, bias 14..16.
    params = torch.stack([torch.arange(17.0), torch.arange(17.0) + 100])
    (weight1, bias1), (weight2, bias2) = kp_net.split(params)
    assert weight1[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert bias1[0].tolist() == [6, 7]
    assert weight2[0].tolist() == [[8, 9], [10, 11], [12, 13]]
    assert bias2[0].tolist() == [14, 15, 16]
    assert weight2[1].equal(weight2[0] + 100)
    assert bias1[1].equal(bias1[0] + 100)


def test_wrong_number_of_params_is_told() -> None:
    x = make_input(make_kp_net(2), 3)
    with pytest.raises(ValueError, match="expected 313 per KP-Net, got 241"):
        maps_of(make_kp_net(3), x)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_maps_equal_grouped_convolution_and_loop(num_layers: int) -> None:
    kp_net = make_kp_net(num_layers)
    x = make_input(kp_net, 5, seed=num_layers)
    maps = maps_of(kp_net, x)
    assert maps.shape == (5, 17, HEIGHT, WIDTH)
    torch.testing.assert_close(maps, kp_net.maps_by_grouped_convolution(*x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(maps, maps_by_loop(kp_net, x).float(), atol=1e-4, rtol=1e-4)


def test_maps_equal_authors(golden: Callable[[str], dict[str, Tensor]]) -> None:
    expected = golden("kpnet")
    strides = 8 * 2.0 ** expected["level"]
    assert coordinate_scale(strides).equal(expected["coord_normalize"])
    kp_net = make_kp_net()
    x = expected["params"], expected["location"], strides, expected["shared_feat"]
    maps = maps_of(kp_net, Input(*x))
    torch.testing.assert_close(maps, expected["keypoint_maps"], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        kp_net.maps_by_grouped_convolution(*x), expected["keypoint_maps"], atol=1e-4, rtol=0
    )
    assert kp_net.peaks(*batch_of(Input(*x)), [(32, 40)])[0].equal(expected["argmax_stride8"])


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 8, 9])
def test_peaks_equal_those_of_all_maps_at_once(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hold_four_maps(monkeypatch)
    kp_net = make_kp_net()
    x = make_input(kp_net, n)
    cells, scores = peaks_of(kp_net, x)
    assert cells.shape == scores.shape == (n, 17)
    assert (cells.dtype, scores.dtype) == (torch.int64, torch.float32)
    probability = maps_of(kp_net, x).flatten(2).softmax(dim=-1)
    expected_scores, expected_cells = probability.max(dim=-1)
    assert cells.equal(expected_cells)
    torch.testing.assert_close(scores, expected_scores)


def test_peak_is_the_first_of_equal_maxima() -> None:
    # Depth 1: the map is feature 0, which is 1 at (row 1, column 6), (2, 0) and (2, 6).
    kp_net = make_kp_net(num_layers=1, num_keypoints=1)
    params = torch.zeros(1, kp_net.num_params)
    params[0, 0] = 1
    features = torch.zeros(8, HEIGHT, WIDTH)
    features[0, [1, 2, 2], [6, 0, 6]] = 1
    cells, _ = peaks_of(kp_net, Input(params, torch.zeros(1, 2), torch.ones(1), features))
    assert cells.tolist() == [[1 * 7 + 6]]


def test_peaks_of_a_batch_are_those_of_its_images_without_their_padding() -> None:
    kp_net = make_kp_net()
    images = [make_input(kp_net, n, seed=n) for n in (3, 0, 5)]
    sizes = [(HEIGHT, WIDTH), (2, 3), (4, 6)]  # rows are searched 1, 2 and 4 at a time
    cells, scores = kp_net.peaks(*batch_of(*images), sizes)
    same_cells, logits = kp_net.peaks(*batch_of(*images), sizes, normalize=False)
    assert same_cells.equal(cells)
    start = 0
    for x, (height, width) in zip(images, sizes, strict=True):
        unpadded = x._replace(features=x.features[:, :height, :width])
        if len(x.params) == 0:  # groups of a convolution cannot be none
            continue
        maps = kp_net.maps_by_grouped_convolution(*unpadded).flatten(2)
        expected, own = maps.softmax(dim=2).max(dim=2), slice(start, start + len(maps))
        assert cells[own].equal(expected.indices)
        torch.testing.assert_close(scores[own], expected.values)
        torch.testing.assert_close(logits[own], maps.amax(dim=2))
        start = own.stop
    assert start == 8


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_peaks_of_damaged_maps_are_not_finite_even_as_logits(bad: float) -> None:
    kp_net = make_kp_net()
    x = make_input(kp_net, 3)
    x.params[1] = bad
    for normalize in (True, False):
        _, scores = kp_net.peaks(*batch_of(x), [(HEIGHT, WIDTH)], normalize=normalize)
        assert scores.isfinite().all(dim=1).tolist() == [True, False, True]


def resampled_by_definition(kp_net: KPNet, x: Input) -> Tensor:
    """Whole maps of a grouped convolution in float64, resampled at once: (N, K, H, W)."""
    maps = kp_net.maps_by_grouped_convolution(*[part.double() for part in x])
    scale = kp_net.stride / kp_net.map_stride
    return F.interpolate(maps, scale_factor=scale, mode="bilinear")


@pytest.mark.parametrize(
    ("num_layers", "map_stride"), [(1, 8), (2, 8), (3, 8), (4, 8), (3, 2), (3, 4), (3, 16)]
)
def test_log_probs_and_gradients_equal_those_of_the_definition(
    num_layers: int, map_stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kp_net = make_kp_net(num_layers, map_stride=map_stride)
    images = [make_input(kp_net, n, seed=n, size=(6, 8)) for n in (5, 0, 1)]
    batch = batch_of(*images)
    num_cells = 6 * 8 * 64 // map_stride**2
    # Two persons at a time, or their maps at stride 8 where these are the larger ones.
    monkeypatch.setitem(kp_net_module.MAPS_BYTES, "cpu", 2 * 4 * 17 * max(num_cells, 48))
    inputs = [shared[:, :48] for shared in map(kp_net.shared_input, batch.features)]
    chunks = [(i, own.stop - own.start) for i, own in kp_net.chunks(batch.candidates, inputs)]
    assert chunks == [(0, 2), (0, 2), (0, 1), (2, 1)]

    inputs = batch.params.requires_grad_(), batch.features.requires_grad_()
    cells = torch.randint(num_cells, (6, 17), generator=torch.Generator().manual_seed(0))
    weight = torch.randn(6, 17, generator=torch.Generator().manual_seed(1))
    log_probs = kp_net.log_probs(*batch, cells)
    assert log_probs.shape == (6, 17)
    gradients = torch.autograd.grad((log_probs * weight).sum(), inputs)

    points, strides = batch.candidates.points, batch.candidates.strides
    parts = []
    for image, own in ((0, slice(0, 5)), (2, slice(5, 6))):
        x = Input(inputs[0][own], points[own], strides[own], inputs[1][image])
        maps = resampled_by_definition(kp_net, x).flatten(2)
        parts.append(maps.log_softmax(dim=2).gather(2, cells[own, :, None])[..., 0])
    expected = torch.cat(parts)
    torch.testing.assert_close(log_probs, expected.float(), atol=1e-4, rtol=1e-4)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("map_stride", [2, 4, 16])
def test_resampled_peaks_are_those_of_the_maps_without_their_padding(
    map_stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kp_net = make_kp_net(map_stride=map_stride)
    monkeypatch.setitem(kp_net_module.MAPS_BYTES, "cpu", 1)  # a person at a time
    images = [make_input(kp_net, n, seed=n, size=(6, 8)) for n in (3, 5)]
    image_size = (35, 52)  # of the first, in pixels; 16 divides neither, nor 8
    sizes = [map_size(image_size, map_stride), (48 // map_stride, 64 // map_stride)]
    cells, scores = kp_net.peaks(*batch_of(*images), sizes)
    # Features of the cells that the image touches, or half touches at 1/16.
    feature_sizes = [(6, 8) if map_stride == 16 else (5, 7), (6, 8)]
    start = 0
    for x, size, (height, width) in zip(images, sizes, feature_sizes, strict=True):
        x = x._replace(features=x.features[:, :height, :width])
        maps = resampled_by_definition(kp_net, x)[..., : size[0], : size[1]].flatten(2)
        probs, own = maps.softmax(dim=2).float(), slice(start, start + len(maps))
        # At the border of an enlarged map neighbours are equal; which is first, rounding says.
        at_cells = probs.gather(2, cells[own, :, None])[..., 0]
        torch.testing.assert_close(at_cells, probs.amax(dim=2), atol=0, rtol=1e-5)
        torch.testing.assert_close(scores[own], probs.amax(dim=2))
        start = own.stop
    assert start == 8


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"backend": "triton", "map_stride": 4}, "do not resample maps: set it to 'auto' or 't"),
        ({"backend": "cuda"}, r"KP_NET\.BACKEND must be one of .*'torch'.*'cuda'"),
    ],
)
def test_backend_that_does_not_fit_is_refused(settings: dict[str, Any], problem: str) -> None:
    channels = {"feature_channels": 8, "channels": 8}
    with pytest.raises(ValueError, match=problem):
        KPNet(stride=8, **channels, num_layers=3, num_keypoints=17, **settings)


def test_log_probs_without_persons_keep_the_graph() -> None:
    kp_net = make_kp_net()
    batch = batch_of(make_input(kp_net, 0), make_input(kp_net, 0))
    inputs = batch.params.requires_grad_(), batch.features.requires_grad_()
    log_probs = kp_net.log_probs(*batch, torch.zeros(0, 17, dtype=torch.int64))
    assert log_probs.shape == (0, 17)
    gradients = torch.autograd.grad(log_probs.sum(), inputs)
    assert gradients[1].equal(torch.zeros_like(batch.features))


@pytest.mark.parametrize("size", [10.0, 1e4])
def test_log_probs_are_finite_when_maps_are_extreme(size: float) -> None:
    kp_net = make_kp_net(num_layers=1)
    batch = batch_of(make_input(kp_net, 3))
    params = (size * batch.params).requires_grad_()
    cells = torch.arange(51).view(3, 17) % 35
    log_probs = kp_net.log_probs(params, *batch[1:], cells)
    assert log_probs.isfinite().all()
    assert log_probs.min() < -size / 10
    assert torch.autograd.grad(log_probs.sum(), params)[0].isfinite().all()


@pytest.mark.parametrize("num_layers", [2, 3, 4])
def test_active_units_are_those_of_the_last_hidden_layer(num_layers: int) -> None:
    kp_net = make_kp_net(num_layers)
    x = make_input(kp_net, 6)
    x.features.mul_(0.1)
    cells = compute_locations((HEIGHT, WIDTH), 8, x.features.device)
    expected = []
    for i in range(6):
        hidden = torch.cat([x.features.flatten(1).T, (cells - x.points[i]) / (8 * x.strides[i])], 1)
        for weight, bias in kp_net.split(x.params[i : i + 1])[:-1]:
            hidden = F.relu(hidden @ weight[0].T + bias[0])
        expected.append((hidden.amax(dim=0) > hidden.amin(dim=0)).float())
    share = kp_net.active_units(*batch_of(x))
    assert 0 < share < 1
    assert share.item() == pytest.approx(torch.stack(expected).mean().item())


def test_active_units_of_dead_nets_and_of_nobody() -> None:
    kp_net = make_kp_net()
    x, nobody = make_input(kp_net, 40), make_input(kp_net, 0)
    last = slice(80 + 8, 80 + 8 + 64 + 8)  # weights and biases of the second layer
    x.params[:, last] = -x.params[:, last].abs()
    assert kp_net.active_units(*batch_of(x, nobody)).item() == 0
    x.params[:, last] = 1.0
    x.params[:, :80], x.params[:, 80:88] = 0.0, -1.0  # the first layer is dead, the second constant
    assert kp_net.active_units(*batch_of(x, nobody)).item() == 0
    x.params[0, 80:88] = 1.0
    x.params[0, :80] = 1.0  # the first person is one of the sample
    assert kp_net.active_units(*batch_of(x, nobody)).item() == pytest.approx(1 / 8)
    assert kp_net.active_units(*batch_of(nobody)).isnan()
    shallow = make_kp_net(num_layers=1)
    assert shallow.active_units(*batch_of(make_input(shallow, 3))).isnan()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU tests/modeling/test_cuda.py compares the backends"
)
def test_backends_give_the_same_in_tritons_interpreter() -> None:
    pytest.importorskip("inspose_d2.modeling.kp_net_triton", exc_type=ImportError)
    kp_net, fused = make_kp_net(), make_kp_net()
    fused.backend = "triton"
    images = [make_input(kp_net, n, seed=n) for n in (1, 0, 1)]
    sizes = [(HEIGHT, WIDTH), (3, 3), (4, 6)]
    batch = batch_of(*images)
    for normalize in (True, False):
        got, expected = (x.peaks(*batch, sizes, normalize=normalize) for x in (fused, kp_net))
        torch.testing.assert_close(got, expected)

    inputs = batch.params.requires_grad_(), batch.features.requires_grad_()
    cells = torch.arange(34).view(2, 17)
    values = [net.log_probs(*batch, cells) for net in (fused, kp_net)]
    torch.testing.assert_close(*values, atol=1e-4, rtol=1e-4)
    gradients = [torch.autograd.grad(x.square().sum(), inputs) for x in values]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("counts", [(2, 0, 1), (0, 0)])
def test_grouped_backend_gives_what_matrix_products_give(
    counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold_four_maps(monkeypatch)
    kp_net, grouped = make_kp_net(), make_kp_net()
    grouped.backend = "grouped"
    convolutions = []
    conv2d = F.conv2d

    def counted(*args: Tensor, groups: int) -> Tensor:
        convolutions.append(groups)
        return conv2d(*args, groups=groups)

    monkeypatch.setattr(F, "conv2d", counted)
    batch = batch_of(*(make_input(kp_net, n, seed=n) for n in counts))
    sizes = [(HEIGHT, WIDTH), (3, 3), (4, 6)][: len(counts)]
    with torch.autocast("cpu", torch.bfloat16):
        cells, scores = grouped.peaks(*batch, sizes)
    expected = kp_net.peaks(*batch, sizes)
    assert cells.equal(expected[0])
    torch.testing.assert_close(scores, expected[1])
    assert convolutions == [n for n in counts if n for _ in range(3)]

    inputs = batch.params.requires_grad_(), batch.features.requires_grad_()
    cells = torch.arange(17).expand(sum(counts), 17)
    values = [net.log_probs(*batch, cells) for net in (grouped, kp_net)]
    torch.testing.assert_close(*values)
    gradients = [torch.autograd.grad(x.square().sum(), inputs) for x in values]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.fixture
def uncached_kernels() -> Iterator[None]:
    """Neither take nor leave an earlier answer to what can run."""
    kp_net_module._triton_kernels.cache_clear()
    yield
    kp_net_module._triton_kernels.cache_clear()


@pytest.mark.usefixtures("uncached_kernels")
@pytest.mark.parametrize("has_triton", [True, False])
def test_kernels_that_cannot_run_give_way_or_tell_why(
    has_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    module = "inspose_d2.modeling.kp_net_triton"
    monkeypatch.setitem(sys.modules, module, ModuleType(module) if has_triton else None)
    nets = make_kp_net(), make_kp_net()
    x = make_input(nets[0], 3)
    nets[0].backend, nets[1].backend = "torch", "auto"
    expected, got = (peaks_of(net, x) for net in nets)
    assert got[0].equal(expected[0])
    nets[1].backend = "triton"
    problem = "the device 'cpu', not on a CUDA device" if has_triton else "cannot be imported"
    with pytest.raises(ValueError, match=rf"KP_NET\.BACKEND is 'triton', but .*{problem}.*'auto'"):
        peaks_of(nets[1], x)


def test_chunks_fill_their_budget_whatever_the_size_of_the_maps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 1000 bytes are 250 cells of float32: for K = 1, 25 maps of 10 cells, 2 of 100, and one of 999.
    monkeypatch.setitem(kp_net_module.MAPS_BYTES, "cpu", 1000)
    kp_net = make_kp_net(num_keypoints=1)
    number = torch.zeros(0)
    candidates = Candidates(number, number, number, number, counts=[30, 3, 2, 0])
    inputs = [torch.empty(10, cells) for cells in (10, 100, 999, 10)]
    chunks = [(i, x.start, x.stop) for i, x in kp_net.chunks(candidates, inputs)]
    assert chunks == [(0, 0, 25), (0, 25, 30), (1, 30, 32), (1, 32, 33), (2, 33, 34), (2, 34, 35)]


def test_peaks_never_hold_more_maps_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Recording(KPNet):
        def logits(self, params: Tensor, *others: Tensor) -> Tensor:
            sizes.append(len(params))
            return super().logits(params, *others)

    hold_four_maps(monkeypatch)
    kp_net = Recording(stride=8, feature_channels=8, channels=8, num_layers=3, num_keypoints=17)
    peaks_of(kp_net, make_input(kp_net, 11), make_input(kp_net, 0), make_input(kp_net, 2))
    assert sizes == [4, 4, 3, 2]


@given(order=st.permutations(range(6)))
def test_peaks_do_not_depend_on_order_of_persons(order: list[int]) -> None:
    kp_net = make_kp_net()
    x = make_input(kp_net, 6)
    cells, scores = peaks_of(kp_net, x)
    order_of = Input(x.params[order], x.points[order], x.strides[order], x.features)
    permuted = peaks_of(kp_net, order_of)
    assert permuted[0].equal(cells[order])
    torch.testing.assert_close(permuted[1], scores[order])


@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=3), maps=st.integers(0, 200))
def test_peaks_do_not_depend_on_chunks(counts: list[int], maps: int) -> None:
    kp_net = make_kp_net()
    images = [make_input(kp_net, n, seed=n) for n in counts]
    expected = [peaks_of(kp_net, x) for x in images]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(kp_net_module.MAPS_BYTES, "cpu", 4 * maps * HEIGHT * WIDTH)
        cells, scores = peaks_of(kp_net, *images)
    assert cells.equal(torch.cat([x for x, _ in expected]))
    torch.testing.assert_close(scores, torch.cat([x for _, x in expected]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_and_softmax_are_float32_under_autocast(dtype: torch.dtype) -> None:
    kp_net = make_kp_net()
    x = make_input(kp_net, 3)
    x = x._replace(params=x.params.to(dtype), features=x.features.to(dtype))
    cells = torch.zeros(3, 17, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        maps = maps_of(kp_net, x)
        scores = peaks_of(kp_net, x)[1]
        log_probs = kp_net.log_probs(*batch_of(x), cells)
    assert maps.dtype == scores.dtype == log_probs.dtype == torch.float32
    # Rounding of the input is all that half precision may change.
    rounded = x._replace(params=x.params.float(), features=x.features.float())
    torch.testing.assert_close(maps, maps_of(kp_net, rounded))
    torch.testing.assert_close(log_probs, kp_net.log_probs(*batch_of(rounded), cells))
