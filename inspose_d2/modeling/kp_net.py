"""KP-Nets: one tiny network per person over features that all persons share (sec. 3.2)."""

import functools
import importlib
import itertools
import logging
import math
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor
from torch.autograd.function import once_differentiable

from .candidates import Candidates
from .geometry import compute_locations, coordinate_scale
from .kp_net_check import Check, differing_log_probs, differing_peaks, find_problem

# Maps that are in memory at once, bytes. On a CPU those of 4 persons at 100 x 168 cells: more of
# them leave the cache, and the allocator asks the system for new pages each time (4 times slower).
MAPS_BYTES = {"cpu": 4_700_000, "cuda": 256_000_000}
BACKENDS = ("auto", "torch", "grouped", "triton")
MIN_CAPABILITY = (7, 0)  # of a CUDA device, for Triton
# The kernels hold all channels of a layer in registers; wider ones compile for minutes and spill.
MAX_FUSED_WIDTH = 10

logger = logging.getLogger(__name__)


class KPNet:
    """The shape of a KP-Net and the ways to run N of them over one image.

    A KP-Net is a chain of 1x1 convolutions with ReLU between them. Its input is the shared
    features and, behind them, the coordinates of each cell relative to the person's location
    (x, then y). It has no weights of its own: they come as vectors of ``num_params`` numbers,
    for each layer the weight (out, in), then the bias (out).
    """

    @configurable
    def __init__(
        self,
        *,
        stride: int,
        feature_channels: int,
        channels: int,
        num_layers: int,
        num_keypoints: int,
        map_stride: int | None = None,
        backend: str = "auto",
    ) -> None:
        """Fix the layer widths.

        Args:
            stride: image pixels per cell of the shared features, where the KP-Nets run.
            feature_channels: channels of the shared features.
            channels: channels between the layers.
            num_layers: depth, at least 1.
            num_keypoints: K, the maps at the end.
            map_stride: image pixels per cell of the maps. Where it is not ``stride``, the maps are
                resampled bilinearly (Table 3).
            backend: "torch" runs matrix products, "grouped" grouped convolutions, "triton" fused
                kernels in :meth:`peaks` and :meth:`log_probs`; "auto" takes these on CUDA devices
                that can run them, else matrix products.

        Raises:
            ValueError: the depth is below 1, or there is no such backend.
        """
        if num_layers < 1:
            raise ValueError(
                f"MODEL.INSPOSE.KP_NET.NUM_LAYERS must be at least 1, got {num_layers}"
            )
        if backend not in BACKENDS:
            raise ValueError(
                f"MODEL.INSPOSE.KP_NET.BACKEND must be one of {BACKENDS}, got {backend!r}"
            )
        self.stride = stride
        self.map_stride = map_stride or stride
        if backend == "triton" and self.map_stride != stride:
            raise ValueError(
                "MODEL.INSPOSE.KP_NET.BACKEND is 'triton', whose kernels do not resample maps: set "
                "it to 'auto' or 'torch', or MODEL.INSPOSE.RESAMPLE to 'features'"
            )
        self.widths = (feature_channels + 2, *[channels] * (num_layers - 1), num_keypoints)
        self.layers = list(itertools.pairwise(self.widths))
        self.backend = backend
        self.num_params = sum(n_in * n_out + n_out for n_in, n_out in self.layers)
        self.num_keypoints = num_keypoints

    @classmethod
    def from_config(cls, cfg: CfgNode, feature_stride: int) -> dict[str, Any]:
        """Read all; ``feature_stride`` is that of KEYPOINT_BRANCH.IN_FEATURE."""
        node = cfg.MODEL.INSPOSE
        return {
            "stride": node.MAP_STRIDE if node.RESAMPLE == "features" else feature_stride,
            "map_stride": node.MAP_STRIDE,
            "feature_channels": node.KEYPOINT_BRANCH.OUT_CHANNELS,
            "channels": node.KP_NET.CHANNELS,
            "num_layers": node.KP_NET.NUM_LAYERS,
            "num_keypoints": node.NUM_KEYPOINTS,
            "backend": node.KP_NET.BACKEND,
        }

    def split(self, params: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cut parameter vectors into layers.

        Args:
            params: (N, P).

        Returns:
            For each layer the weights (N, out, in) and the biases (N, out).

        Raises:
            ValueError: P is not ``num_params``.
        """
        if params.shape[1] != self.num_params:
            raise ValueError(
                f"params: expected {self.num_params} per KP-Net, got {params.shape[1]}"
            )
        sizes = [size for n_in, n_out in self.layers for size in (n_in * n_out, n_out)]
        parts = params.split(sizes, dim=1)
        return [
            (weight.reshape(-1, n_out, n_in), bias)
            for (n_in, n_out), weight, bias in zip(
                self.layers, parts[::2], parts[1::2], strict=True
            )
        ]

    def maps_by_grouped_convolution(
        self, params: Tensor, points: Tensor, strides: Tensor, features: Tensor
    ) -> Tensor:
        """Run N KP-Nets as one grouped 1x1 convolution per layer: the definition.

        Args:
            params: (N, P) parameters, N at least 1.
            points: (N, 2) locations, x, y in image pixels, that the parameters come from.
            strides: (N,) strides of the pyramid levels that they come from.
            features: (C, H, W) shared features of the image.

        Returns:
            (N, K, H, W) keypoint maps (logits) before :meth:`resample`. :meth:`logits` is equal,
            and faster with matrix products.
        """
        size = features.shape[1], features.shape[2]
        cells = compute_locations(size, self.stride, features.device)
        shared = torch.cat([features.flatten(1), cells.T])
        return self._grouped(params, points, strides, shared).unflatten(2, size)

    def _grouped(self, params: Tensor, points: Tensor, strides: Tensor, shared: Tensor) -> Tensor:
        """See :meth:`logits`, of which this is the definition; N at least 1."""
        n = len(params)
        relative = (shared[-2:] - points[..., None]) / coordinate_scale(strides)[:, None, None]
        x = torch.cat([shared[:-2].expand(n, -1, -1), relative], dim=1)
        x = x.reshape(1, -1, 1, shared.shape[1])
        for i, (weight, bias) in enumerate(self.split(params)):
            x = F.relu(x) if i > 0 else x
            x = F.conv2d(x, weight.flatten(0, 1)[..., None, None], bias.flatten(), groups=n)
        return x.reshape(n, self.num_keypoints, -1)

    def shared_input(self, features: Tensor) -> Tensor:
        """Put the coordinates of the cells under the (C, H, W) features of an image.

        Returns:
            (C + 2, H*W) float32, the input of :meth:`logits`.
        """
        size = features.shape[1], features.shape[2]
        cells = compute_locations(size, self.stride, features.device)
        return torch.cat([features.float().flatten(1), cells.T])

    def logits(self, params: Tensor, points: Tensor, strides: Tensor, shared: Tensor) -> Tensor:
        """Run N KP-Nets over one image, as matrix products unless the backend is "grouped".

        Relative coordinates are affine in the cell's position. So the first layer of all N nets
        is one product with the same input: the features and the plain coordinates of the cells;
        the scale goes into the weights, the person's location into the bias.

        Args:
            params: (N, P) parameters.
            points: (N, 2) locations, x, y in image pixels, that the parameters come from.
            strides: (N,) strides of the pyramid levels that they come from.
            shared: (C + 2, H*W) from :meth:`shared_input`.

        Returns:
            (N, K, H*W) keypoint maps before :meth:`resample`, float32 even under autocast.
        """
        # Coordinates up to the image's width lose too much in half precision.
        with torch.autocast(shared.device.type, enabled=False):
            if self.backend == "grouped" and len(params) > 0:
                return self._grouped(params.float(), points, strides, shared)
            (weight, bias), *others = self.split(params.float())
            coordinate_weight = weight[..., -2:] / coordinate_scale(strides)[:, None, None]
            bias = bias - (coordinate_weight @ points[..., None])[..., 0]
            weight = torch.cat([weight[..., :-2], coordinate_weight], dim=-1)
            x = torch.addmm(bias.reshape(-1, 1), weight.flatten(0, 1), shared)
            x = x.unflatten(0, bias.shape)
            for weight, bias in others:
                x = torch.baddbmm(bias[..., None], weight, x.relu_())
        return x

    def map_size(self, features: Tensor) -> tuple[int, int]:
        """Size of the maps that are made from whole features (..., H, W)."""
        height, width = (n * self.stride // self.map_stride for n in features.shape[-2:])
        return height, width

    def feature_size(self, map_size: tuple[int, int]) -> tuple[int, int]:
        """Size of the part of the shared features that maps of a size (H, W) are made from."""
        height, width = (n * self.map_stride + self.stride - 1 for n in map_size)
        return height // self.stride, width // self.stride

    def resample(self, logits: Tensor, map_size: tuple[int, int]) -> Tensor:
        """Bring keypoint maps to their stride.

        Corners stay in place: a cell of stride s is still the square [i*s, (i+1)*s) of the image.
        At half the resolution it is the mean of four cells.

        Args:
            logits: (N, K, h*w) from :meth:`logits`, (h, w) being :meth:`feature_size`.
            map_size: (H, W).

        Returns:
            (N, K, H*W).
        """
        if self.map_stride == self.stride:
            return logits
        maps = logits.unflatten(2, self.feature_size(map_size))
        maps = F.interpolate(maps, scale_factor=self.stride / self.map_stride, mode="bilinear")
        return self.crop(maps, map_size).flatten(2)

    @staticmethod
    def crop(maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Keep the first rows and columns of maps (..., H, W)."""
        return maps[..., : size[0], : size[1]]

    def peaks(
        self,
        params: Tensor,
        candidates: Candidates,
        features: Tensor,
        sizes: list[tuple[int, int]],
        *,
        normalize: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Find the peak of every keypoint map (eq. 2).

        Args:
            params: (N, P) parameters.
            candidates: the N locations that they come from.
            features: (B, C, H, W) shared features of the batch.
            sizes: (H, W) of each image's maps without padding; peaks lie inside.
            normalize: whether scores are probabilities, which take a third of the time.

        Returns:
            (N, K) int64 cell indices, row * W + column of the unpadded map, the first of equal
            maxima, and (N, K) scores: the softmax probability of the map at its peak, in [0, 1],
            or without ``normalize`` its logit there.
        """
        kernels = self._checked_kernels(differing_peaks, params, candidates, features, sizes)
        if kernels is not None:
            cells, peaks, log_sums = kernels.peaks(
                *self.kernel_args(params, candidates, features),
                torch.tensor(sizes).to(features.device, non_blocking=True),
                stride=self.stride,
                widths=self.widths,
            )
            return cells, (peaks - log_sums).exp() if normalize else peaks
        scores = features.new_empty(len(params), self.num_keypoints, dtype=torch.float32)
        cells = torch.empty_like(scores, dtype=torch.int64)
        find = find_peaks if normalize else find_cells
        for image, chunk, logits in self.maps(params, candidates, features, sizes):
            height, width = sizes[image]
            cells[chunk], scores[chunk] = find(logits, width * math.gcd(height, 4))
        return cells, scores

    def maps(
        self,
        params: Tensor,
        candidates: Candidates,
        features: Tensor,
        sizes: list[tuple[int, int]],
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """Make the keypoint maps, a few persons of an image at a time; arguments as for `peaks`.

        Yields:
            Number of the image, which candidates, and their (n, K, H*W) maps (logits).
        """
        inputs = [
            self.shared_input(features[image, :, :height, :width])
            for image, (height, width) in enumerate(map(self.feature_size, sizes))
        ]
        for image, chunk in self.chunks(candidates, inputs):
            logits = self.logits(
                params[chunk], candidates.points[chunk], candidates.strides[chunk], inputs[image]
            )
            yield image, chunk, self.resample(logits, sizes[image])

    def log_probs(
        self, params: Tensor, candidates: Candidates, features: Tensor, cells: Tensor
    ) -> Tensor:
        """Logarithm of the softmax probability of given cells (eq. 4), differentiable.

        The maps are made a chunk of persons at a time, and again for the gradient: they are never
        all in memory.

        Args:
            params: (N, P) parameters.
            candidates: the N locations that they come from.
            features: (B, C, H, W) shared features of the batch.
            cells: (N, K) int64, row * width + column of the maps.

        Returns:
            (N, K) float32.
        """
        kernels = self._checked_kernels(differing_log_probs, params, candidates, features, cells)
        if kernels is not None:
            return kernels.log_probs(
                *self.kernel_args(params, candidates, features),
                cells,
                stride=self.stride,
                widths=self.widths,
            )
        return _LogProbs.apply(params.float(), features.float(), self, candidates, cells)

    def active_units(self, params: Tensor, candidates: Candidates, features: Tensor) -> Tensor:
        """Measure how alive KP-Nets are, on samples: some persons of each image, some cells.

        Args:
            params: (N, P) parameters.
            candidates: the N locations that they come from.
            features: (B, C, H, W) shared features of the batch.

        Returns:
            Scalar: the share, over all sampled persons, of units of the last hidden layer that
            differ from cell to cell. At 0 all maps are constant and nothing has a gradient: no unit
            of that layer is active, or none of the layers before. NaN without persons or hidden
            layers.
        """
        if len(self.layers) == 1:
            return params.new_full((), torch.nan)
        # What comes out of all layers but the last, before its ReLU.
        hidden = KPNet(
            stride=self.stride,
            feature_channels=self.widths[0] - 2,
            channels=self.widths[1],
            num_layers=len(self.layers) - 1,
            num_keypoints=self.widths[-2],
        )
        active = []
        for image, own in enumerate(candidates.slices()):
            some = slice(own.start, own.stop, max(1, (own.stop - own.start) // 8))
            cells = self.shared_input(features[image])
            cells = cells[:, :: max(1, cells.shape[1] // 256)]
            logits = hidden.logits(
                params[some, : hidden.num_params],
                candidates.points[some],
                candidates.strides[some],
                cells,
            )
            units = logits.relu()
            active.append((units.amax(dim=2) > units.amin(dim=2)).flatten())
        return torch.cat(active).float().mean()

    def chunks(self, candidates: Candidates, inputs: list[Tensor]) -> Iterator[tuple[int, slice]]:
        """Cut candidates into runs of one image whose maps fit into ``MAPS_BYTES``.

        Args:
            candidates: of the batch.
            inputs: of each image, from :meth:`shared_input`.

        Yields:
            Number of the image, and which candidates.
        """
        for image, (own, shared) in enumerate(zip(candidates.slices(), inputs, strict=True)):
            budget = MAPS_BYTES["cuda" if shared.is_cuda else "cpu"]
            cells = shared.shape[1] * max(1, self.stride / self.map_stride) ** 2
            size = max(1, int(budget / (4 * self.num_keypoints * cells)))
            for start in range(own.start, own.stop, size):
                yield image, slice(start, min(start + size, own.stop))

    def _kernels(self, features: Tensor) -> ModuleType | None:
        """Find the module of the Triton kernels; None where they are not asked for or cannot run.

        Raises:
            ValueError: the kernels are asked for and cannot run.
        """
        if self.backend in ("torch", "grouped") or (
            self.backend == "auto" and not features.is_cuda
        ):
            return None
        if self.backend == "auto" and max(self.widths[:-1]) > MAX_FUSED_WIDTH:
            return None
        if self.map_stride != self.stride:  # the kernels do not resample
            return None
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # for tests: anywhere, slowly
        kernels, problem = _triton_kernels(features.device, interpreted)
        return self._unless(problem, kernels)

    def _checked_kernels(
        self,
        check: Check,
        params: Tensor,
        candidates: Candidates,
        features: Tensor,
        asked: object,
    ) -> ModuleType | None:
        """Choose what runs: the module of the Triton kernels, or None for what PyTorch has.

        Raises:
            ValueError: the kernels are asked for and cannot run, or fail the check.
        """
        kernels = self._kernels(features)
        if kernels is None or len(params) == 0:  # nothing to run, and nothing to check with
            return None
        problem = find_problem(check, self, kernels, params, candidates, features, asked)
        return self._unless(problem, kernels)

    def _unless(self, problem: str, kernels: ModuleType | None) -> ModuleType | None:
        if problem and self.backend == "triton":
            raise ValueError(
                f"MODEL.INSPOSE.KP_NET.BACKEND is 'triton', but {problem}: set it to 'auto' or "
                "'torch'"
            )
        return None if problem else kernels

    @staticmethod
    def kernel_args(params: Tensor, candidates: Candidates, features: Tensor) -> list[Tensor]:
        """Give what all Triton kernels take first."""
        scales = coordinate_scale(candidates.strides)
        return [params, candidates.points, scales, candidates.image, features]


def find_peaks(logits: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Find the peaks of keypoint maps (eq. 2).

    Args:
        logits: (N, K, H*W) maps.
        block: cells that are looked through at once; must divide H*W.

    Returns:
        (N, K) int64 cell indices, the first of equal maxima, and (N, K) scores: the softmax
        probability of the map at its peak.
    """
    return find_cells(logits, block)[0], logits.softmax(dim=2).amax(dim=2)


def find_cells(logits: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Find the cells (N, K) of the peaks and the logits (N, K) there; see :func:`find_peaks`."""
    # On a CPU argmax is slow, amax over long rows is not: first the best block.
    blocks = logits.unflatten(2, (-1, block))
    peaks, best = blocks.amax(dim=3).max(dim=2)  # (N, K)
    in_best = blocks.gather(2, best[..., None, None].expand(-1, -1, 1, block))[:, :, 0]
    return best * block + in_best.argmax(dim=2), peaks


class _LogProbs(torch.autograd.Function):
    """:meth:`KPNet.log_probs` as matrix products, with its arguments in float32.

    The maps of a chunk are made anew for its gradient. So no maps are kept, and all chunks write
    into the same two gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        params: Tensor,
        features: Tensor,
        kp_net: KPNet,
        candidates: Candidates,
        cells: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(params, features, cells)
        ctx.kp_net, ctx.candidates = kp_net, candidates
        log_probs = params.new_empty(cells.shape)
        sizes = [kp_net.map_size(features)] * len(features)
        for _, chunk, logits in kp_net.maps(params, candidates, features, sizes):
            at_cells = logits.log_softmax(dim=2).gather(2, cells[chunk][..., None])
            log_probs[chunk] = at_cells[..., 0]
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        params, features, cells = ctx.saved_tensors
        kp_net, candidates = ctx.kp_net, ctx.candidates
        inputs = [kp_net.shared_input(x).requires_grad_() for x in features]
        size = kp_net.map_size(features)
        grad_params, grad_features = torch.zeros_like(params), torch.zeros_like(features)
        for image, chunk in kp_net.chunks(candidates, inputs):
            own_params, own_grad = params[chunk].requires_grad_(), grad[chunk][..., None]
            with torch.enable_grad():
                logits = kp_net.logits(
                    own_params, candidates.points[chunk], candidates.strides[chunk], inputs[image]
                )
                logits = kp_net.resample(logits, size)
            # Of a log-softmax: one-hot minus softmax.
            grad_logits = logits.detach().softmax(dim=2).mul_(-own_grad)
            grad_logits.scatter_add_(2, cells[chunk][..., None], own_grad)
            grad_params[chunk], grad_input = torch.autograd.grad(
                logits, (own_params, inputs[image]), grad_logits
            )
            grad_features[image] += grad_input[:-2].view_as(features[image])  # not coordinates
        return grad_params, grad_features, None, None, None


@functools.cache
def _triton_kernels(device: torch.device, interpreted: bool) -> tuple[ModuleType | None, str]:
    """Import the Triton kernels for a device: the module, or None and why they cannot run there."""
    kernels, problem = None, ""
    try:
        kernels = importlib.import_module(".kp_net_triton", __package__)
    except ImportError as error:  # Triton comes with PyTorch for CUDA only
        problem = f"its kernels cannot be imported ({error})"
    if kernels is not None and not interpreted:
        if device.type != "cuda":
            problem = f"the model is on the device '{device.type}', not on a CUDA device"
        elif (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
            problem = f"the GPU has compute capability {capability}, below {MIN_CAPABILITY}"
    if problem and device.type == "cuda":
        logger.warning("KP-Nets run as matrix products, without Triton: %s.", problem)
    return (None if problem else kernels), problem
