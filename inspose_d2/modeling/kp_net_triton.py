"""KP-Nets as fused Triton kernels: the keypoint maps are never in memory.

A program is one warp. It runs the network of one person over one tile of cells, keeps all
activations in registers and writes sums over the tile, which PyTorch adds up in a fixed order.
The layers are too narrow for tensor cores, so all of it is plain float32 arithmetic.

PyTorch for CUDA brings Triton along, PyTorch for the CPU does not: import this module only where
the tensors are on a CUDA device.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

if tuple(int(x) for x in triton.__version__.split(".")[:2]) < (3, 3):
    # Before, a kernel cannot hold tuples of tensors. PyTorch 2.7 brought 3.3.
    raise ImportError(f"Needs Triton 3.3, found {triton.__version__}")

# Cells of a tile: 8 for each of the 32 threads of a warp. At the default depth, 3, these are the
# most whose activations and gradients fit into the registers.
BLOCK = tl.constexpr(256)
# Persons, on average, over whom a program adds up the gradient of the features. With 8, all
# partial sums of 500 persons in 16 images with maps of 100 x 168 cells take 76 MB (of 400 x 668
# cells, at stride 2, 1.2 GB).
PERSONS_PER_PROGRAM = 8


def peaks(
    params: Tensor,
    points: Tensor,
    scales: Tensor,
    image: Tensor,
    features: Tensor,
    sizes: Tensor,
    *,
    stride: int,
    widths: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the peak of every keypoint map (eq. 2); without gradients.

    Args:
        params: (N, P) parameters in the order of ``KPNet.split``.
        points: (N, 2) float32 locations of the persons, x, y in image pixels.
        scales: (N,) float32 pixels that become 1 in the relative coordinates.
        image: (N,) int64 number of each person's image in the batch.
        features: (B, C, H, W) shared features.
        sizes: (B, 2) int64 (height, width), in cells, of the part of each map without padding.
        stride: image pixels per cell.
        widths: channels before the first layer, C + 2, and after each, the last being K.

    Returns:
        (N, K) int64 cells, row * width + column by the width without padding, the first of
        equals; (N, K) float32 logits there; (N, K) float32 log-sum-exp of the unpadded logits.
    """
    inputs = _contiguous(params, points, scales, image, features)
    maxima, sums, firsts = _maxima_and_sums(inputs, sizes.contiguous(), stride, widths)
    logits, tile = maxima.max(dim=1)  # of equal tiles the first
    cells = firsts.gather(1, tile[:, None])[:, 0].long()
    map_width = features.shape[3]
    cells = cells // map_width * sizes[image, 1:] + cells % map_width
    # NaN equals no cell, not even itself: its index must be one that can be looked up all the same.
    cells = cells.minimum(sizes.prod(dim=1)[image, None] - 1)
    return cells, logits, _log_sum_exp(maxima, sums)


def log_probs(
    params: Tensor,
    points: Tensor,
    scales: Tensor,
    image: Tensor,
    features: Tensor,
    cells: Tensor,
    *,
    stride: int,
    widths: tuple[int, ...],
) -> Tensor:
    """Take the log-softmax of every keypoint map at one cell (eq. 4).

    Args:
        params: (N, P) parameters in the order of ``KPNet.split``.
        points: (N, 2) float32 locations of the persons, x, y in image pixels.
        scales: (N,) float32 pixels that become 1 in the relative coordinates.
        image: (N,) int64 number of each person's image in the batch, ascending.
        features: (B, C, H, W) shared features.
        cells: (N, K) int64, row * W + column.
        stride: image pixels per cell.
        widths: channels before the first layer, C + 2, and after each, the last being K.

    Returns:
        (N, K) float32 log-probabilities, with gradients to ``params`` and ``features`` only.
    """
    inputs = _contiguous(params, points, scales, image, features)
    return _LogProbs.apply(*inputs, cells.contiguous(), stride, widths)


class _LogProbs(torch.autograd.Function):
    """:func:`log_probs`; the backward pass computes the maps anew."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *inputs, cells, stride, widths = arguments
        num_images, _, height, width = inputs[-1].shape
        sizes = cells.new_empty(num_images, 2)
        sizes[:, 0], sizes[:, 1] = height, width
        maxima, sums, _ = _maxima_and_sums(inputs, sizes, stride, widths)
        lse = _log_sum_exp(maxima, sums)
        logits = torch.empty_like(lse)
        _launch(_logits_kernel, (len(lse),), inputs, cells, logits, stride=stride, widths=widths)
        ctx.save_for_backward(*inputs, cells, lse)
        ctx.stride, ctx.widths = stride, widths
        return logits - lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, cells, lse = ctx.saved_tensors
        params, _, _, image, features = inputs
        n, (num_images, _, height, width) = len(params), features.shape
        tiles = triton.cdiv(height * width, BLOCK.value)
        splits = triton.cdiv(n, num_images * PERSONS_PER_PROGRAM)
        numbers = torch.arange(num_images + 1, device=image.device)
        starts = torch.searchsorted(image, numbers, out_int32=True)
        d_params = params.new_empty(n, tiles, params.shape[1])
        d_features = features.new_zeros(splits, *features.shape)
        _launch(
            _backward_kernel,
            (splits, tiles, num_images),
            inputs,
            cells,
            lse,
            grads.contiguous(),
            starts,
            d_params,
            d_features,
            stride=ctx.stride,
            widths=ctx.widths,
        )
        return d_params.sum(dim=1), None, None, None, d_features.sum(dim=0), None, None, None


def _contiguous(
    params: Tensor, points: Tensor, scales: Tensor, image: Tensor, features: Tensor
) -> list[Tensor]:
    """Lay out what every kernel takes as its first arguments."""
    inputs = params.float(), points, scales, image, features.float()
    return [x.contiguous() for x in inputs]


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    inputs: list[Tensor],
    *others: Tensor,
    stride: int,
    widths: tuple[int, ...],
) -> None:
    """Run a kernel on the device of its tensors."""
    height, width = inputs[-1].shape[2:]
    with torch.cuda.device_of(inputs[0]):
        kernel[grid](
            *inputs,
            *others,
            height * width,
            width,
            STRIDE=stride,
            C=widths[0] - 2,
            HIDDEN=widths[1],  # KPNet has them all of one width
            LAST=len(widths) - 2,
            K=widths[-1],
            NUM_PARAMS=inputs[0].shape[1],
            num_warps=1,
            enable_fp_fusion=True,
        )


def _maxima_and_sums(
    inputs: list[Tensor], sizes: Tensor, stride: int, widths: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce the maps over each of T tiles, leaving out padding.

    Returns:
        (N, T, K) float32 maximum of the logits, -inf where a tile is all padding; float32 sum of
        exp(logit - maximum); int32 first cell of the maximum, row * W + column.
    """
    n, (height, width) = len(inputs[0]), inputs[-1].shape[2:]
    tiles = triton.cdiv(height * width, BLOCK.value)
    maxima = inputs[0].new_empty(n, tiles, widths[-1])
    sums, firsts = torch.empty_like(maxima), torch.empty_like(maxima, dtype=torch.int32)
    _launch(
        _maxima_and_sums_kernel,
        (n, tiles),
        inputs,
        sizes,
        maxima,
        sums,
        firsts,
        stride=stride,
        widths=widths,
    )
    return maxima, sums, firsts


def _log_sum_exp(maxima: Tensor, sums: Tensor) -> Tensor:
    """Join tiles: (N, T, K) maxima and sums to (N, K)."""
    return (maxima + sums.log()).logsumexp(dim=1)


@triton.jit
def _neuron(weight: tl.tensor, bias: tl.tensor, x: tl.tuple) -> tl.tensor:
    """Run one output channel of a layer."""
    y = tl.load(bias)
    for i in tl.static_range(len(x)):
        y += tl.load(weight + i) * x[i]
    return y


@triton.jit
def _input_of_layer(
    params: tl.tensor,
    others: tl.tuple,
    n: tl.tensor,
    cells: tl.tensor,
    area: tl.tensor,
    width: tl.tensor,
    STRIDE: tl.constexpr,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    LAYER: tl.constexpr,
) -> tl.tuple:
    """Run the network of person n at some cells as far as what goes into a layer.

    ``others`` are points, scales, image and features.
    """
    points, scales, image, features = others
    features += tl.load(image + n) * C * area + cells
    x: tl.tuple = ()
    for c in tl.static_range(C):
        x += (tl.load(features + c * area, mask=cells < area, other=0.0),)
    per_pixel = 1.0 / tl.load(scales + n)
    for axis in tl.static_range(2):
        index = cells % width if axis == 0 else cells // width
        location = index * STRIDE + STRIDE // 2
        x += ((location - tl.load(points + 2 * n + axis)) * per_pixel,)
    for _ in tl.static_range(LAYER):
        bias = params + HIDDEN * len(x)
        y: tl.tuple = ()
        for o in tl.static_range(HIDDEN):
            y += (tl.maximum(_neuron(params + o * len(x), bias + o, x), 0.0),)
        x, params = y, bias + HIDDEN
    return x


@triton.jit(do_not_specialize=["width"])
def _maxima_and_sums_kernel(
    params: tl.tensor,
    points: tl.tensor,
    scales: tl.tensor,
    image: tl.tensor,
    features: tl.tensor,
    sizes: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    firsts: tl.tensor,
    area: tl.tensor,
    width: tl.tensor,
    STRIDE: tl.constexpr,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    LAST: tl.constexpr,
    K: tl.constexpr,
    NUM_PARAMS: tl.constexpr,
) -> None:
    """Program (n, tile): see `_maxima_and_sums`."""
    LANES: tl.constexpr = triton.next_power_of_2(K)
    n, tile = tl.program_id(0), tl.program_id(1)
    cells = tile * BLOCK + tl.arange(0, BLOCK)
    params += n * NUM_PARAMS
    others = (points, scales, image, features)
    x = _input_of_layer(params, others, n, cells, area, width, STRIDE, C, HIDDEN, LAST)
    sizes += 2 * tl.load(image + n)
    inside = (cells // width < tl.load(sizes)) & (cells % width < tl.load(sizes + 1))
    weight = params + NUM_PARAMS - (len(x) + 1) * K
    # One keypoint per lane, so that what the loop finds is stored at once.
    lanes = tl.arange(0, LANES)
    all_maxima = tl.zeros((LANES,), tl.float32)
    all_sums = tl.zeros((LANES,), tl.float32)
    all_firsts = tl.zeros((LANES,), tl.int32)
    # Two keypoints at a time: the reductions of one hide the latency of the other's.
    for k in tl.range(K, loop_unroll_factor=2):
        y = _neuron(weight + k * len(x), weight + K * len(x) + k, x)
        y = tl.where(inside, y, float("-inf"))
        maximum = tl.max(y)
        # -inf - -inf would be NaN.
        finite = tl.where(maximum == float("-inf"), 0.0, maximum)
        all_maxima = tl.where(lanes == k, maximum, all_maxima)
        all_sums = tl.where(lanes == k, tl.sum(tl.exp(y - finite)), all_sums)
        first = tl.min(tl.where(y == maximum, cells, area - 1))
        all_firsts = tl.where(lanes == k, first, all_firsts)
    out = (n * tl.num_programs(1) + tile) * K + lanes
    tl.store(maxima + out, all_maxima, mask=lanes < K)
    tl.store(sums + out, all_sums, mask=lanes < K)
    tl.store(firsts + out, all_firsts, mask=lanes < K)


@triton.jit(do_not_specialize=["width"])
def _logits_kernel(
    params: tl.tensor,
    points: tl.tensor,
    scales: tl.tensor,
    image: tl.tensor,
    features: tl.tensor,
    cells: tl.tensor,
    logits: tl.tensor,
    area: tl.tensor,
    width: tl.tensor,
    STRIDE: tl.constexpr,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    LAST: tl.constexpr,
    K: tl.constexpr,
    NUM_PARAMS: tl.constexpr,
) -> None:
    """Program n: the logit of each keypoint at its cell; a lane is a keypoint."""
    LANES: tl.constexpr = triton.next_power_of_2(K)
    n = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    params += n * NUM_PARAMS
    own = tl.load(cells + n * K + lanes, mask=lanes < K, other=0).to(tl.int32)
    others = (points, scales, image, features)
    x = _input_of_layer(params, others, n, own, area, width, STRIDE, C, HIDDEN, LAST)
    weight = params + NUM_PARAMS - (len(x) + 1) * K
    y = tl.zeros((LANES,), tl.float32)
    for k in range(K):
        z = _neuron(weight + k * len(x), weight + K * len(x) + k, x)
        y = tl.where(lanes == k, z, y)
    tl.store(logits + n * K + lanes, y, mask=lanes < K)


@triton.jit
def _layer_backward(
    x: tl.tuple,
    d_y: tl.tuple,
    weight: tl.tensor,
    d_weight: tl.tensor,
) -> tl.tuple:
    """Store the sums over the tile for weight and bias, and return the gradient of x."""
    for o in tl.static_range(len(d_y)):
        tl.store(d_weight + len(d_y) * len(x) + o, tl.sum(d_y[o]))
    d_x: tl.tuple = ()
    for i in tl.static_range(len(x)):
        d = tl.zeros_like(d_y[0])
        for o in tl.static_range(len(d_y)):
            tl.store(d_weight + o * len(x) + i, tl.sum(d_y[o] * x[i]))
            d += tl.load(weight + o * len(x) + i) * d_y[o]
        d_x += (d,)
    return d_x


@triton.jit(do_not_specialize=["width"])
def _backward_kernel(
    params: tl.tensor,
    points: tl.tensor,
    scales: tl.tensor,
    image: tl.tensor,
    features: tl.tensor,
    targets: tl.tensor,
    lse: tl.tensor,
    grads: tl.tensor,
    starts: tl.tensor,
    d_params: tl.tensor,
    d_features: tl.tensor,
    area: tl.tensor,
    width: tl.tensor,
    STRIDE: tl.constexpr,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    LAST: tl.constexpr,
    K: tl.constexpr,
    NUM_PARAMS: tl.constexpr,
) -> None:
    """Program (split, tile, image): every so many-th person of the image.

    It stores (N, T, P) sums over the tile for the parameters and adds to the (S, B, C, H, W)
    gradient of the features, in which its split, image and tile are its own.
    """
    split, tile, number = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cells = tile * BLOCK + tl.arange(0, BLOCK)
    inside = cells < area
    d_features += (split * tl.num_programs(2) + number).to(tl.int64) * C * area + cells
    # 64 bits, for the sums of thousands of persons on large maps are more than 2^31 numbers.
    start = tl.load(starts + number).to(tl.int64)
    stop = tl.load(starts + number + 1).to(tl.int64)
    others = (points, scales, image, features)
    for n in range(start + split, stop, tl.num_programs(0)):
        weights = params + n * NUM_PARAMS
        d_weights = d_params + (n * tl.num_programs(1) + tile) * NUM_PARAMS
        x = _input_of_layer(weights, others, n, cells, area, width, STRIDE, C, HIDDEN, LAST)
        begin = NUM_PARAMS - (len(x) + 1) * K
        weight, d_weight = weights + begin, d_weights + begin
        d_x = (tl.zeros_like(x[0]),) * len(x)
        for k in range(K):
            y = _neuron(weight + k * len(x), weight + K * len(x) + k, x)
            probability = tl.exp(y - tl.load(lse + n * K + k))
            at_target = tl.where(cells == tl.load(targets + n * K + k), 1.0, 0.0)
            d_y = tl.load(grads + n * K + k) * (at_target - probability)
            d_y = tl.where(inside, d_y, 0.0)
            tl.store(d_weight + K * len(x) + k, tl.sum(d_y))
            sums: tl.tuple = ()
            for i in tl.static_range(len(x)):
                tl.store(d_weight + k * len(x) + i, tl.sum(d_y * x[i]))
                sums += (d_x[i] + tl.load(weight + k * len(x) + i) * d_y,)
            d_x = sums
        for i in tl.static_range(LAST - 1, -1, -1):
            behind_relu: tl.tuple = ()
            for o in tl.static_range(HIDDEN):
                behind_relu += (tl.where(x[o] > 0, d_x[o], 0.0),)
            # Computing it again costs less than the registers to keep it.
            x = _input_of_layer(weights, others, n, cells, area, width, STRIDE, C, HIDDEN, i)
            weight -= (len(x) + 1) * HIDDEN
            d_weight -= (len(x) + 1) * HIDDEN
            d_x = _layer_backward(x, behind_relu, weight, d_weight)
        for c in tl.static_range(C):
            here = d_features + c * area
            tl.store(here, tl.load(here, mask=inside) + d_x[c], mask=inside)
        # Another thread may load for the next person what this one has stored.
        tl.debug_barrier()
