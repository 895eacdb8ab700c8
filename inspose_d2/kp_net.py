"""KP-Nets: one tiny network per person over features that all persons share (sec. 3.2)."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import compute_locations, coordinate_scale

# KP-Nets whose maps are in memory at once at inference: 16 x 17 maps of 100 x 168 cells are 18 MB.
CHUNK = 16


class KPNet:
    """The shape of a KP-Net and the ways to run N of them over one image.

    A KP-Net is a chain of 1x1 convolutions with ReLU between them. Its input is the shared
    features and, behind them, the coordinates of each cell relative to the person's location
    (x, then y). It has no weights of its own: they come as vectors of ``num_params`` numbers,
    for each layer the weight (out, in), then the bias (out).
    """

    def __init__(
        self,
        *,
        stride: int,
        feature_channels: int,
        channels: int,
        num_layers: int,
        num_keypoints: int,
    ) -> None:
        """Fix the layer widths.

        Args:
            stride: image pixels per cell of the shared features and the maps.
            feature_channels: channels of the shared features.
            channels: channels between the layers.
            num_layers: depth, at least 1.
            num_keypoints: K, the maps at the end.

        Raises:
            ValueError: the depth is below 1.
        """
        if num_layers < 1:
            raise ValueError(
                f"MODEL.INSPOSE.KP_NET.NUM_LAYERS must be at least 1, got {num_layers}"
            )
        widths = [feature_channels + 2, *[channels] * (num_layers - 1), num_keypoints]
        self.layers = list(itertools.pairwise(widths))
        self.num_params = sum(n_in * n_out + n_out for n_in, n_out in self.layers)
        self.num_keypoints = num_keypoints
        self.stride = stride

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

        Arguments and result are those of :meth:`maps`, which is equal and faster.
        """
        n, (height, width) = len(params), features.shape[1:]
        cells = compute_locations((height, width), self.stride, features.device)
        scale = coordinate_scale(strides)[:, None, None]
        relative = ((cells - points[:, None]) / scale).mT.reshape(n, 2, height, width)
        x = torch.cat([features.expand(n, -1, -1, -1), relative], dim=1)
        x = x.reshape(1, -1, height, width)
        for i, (weight, bias) in enumerate(self.split(params)):
            x = F.relu(x) if i > 0 else x
            x = F.conv2d(x, weight.flatten(0, 1)[..., None, None], bias.flatten(), groups=n)
        return x.reshape(n, self.num_keypoints, height, width)

    def maps(self, params: Tensor, points: Tensor, strides: Tensor, features: Tensor) -> Tensor:
        """Run N KP-Nets over the features of their image, as matrix products.

        Relative coordinates are affine in the cell's position. So the first layer of all N nets
        is one product with the same input: the features and the plain coordinates of the cells;
        the scale goes into the weights, the person's location into the bias.

        Args:
            params: (N, P) parameters.
            points: (N, 2) locations, x, y in image pixels, that the parameters come from.
            strides: (N,) strides of the pyramid levels that they come from.
            features: (C, H, W) shared features of the image.

        Returns:
            (N, K, H, W) keypoint maps (logits), float32 even under autocast.
        """
        height, width = features.shape[1:]
        # Coordinates up to the image's width lose too much in half precision.
        with torch.autocast(features.device.type, enabled=False):
            cells = compute_locations((height, width), self.stride, features.device)
            shared = torch.cat([features.float().flatten(1), cells.T])  # (C + 2, H*W)
            (weight, bias), *others = self.split(params.float())
            coordinate_weight = weight[..., -2:] / coordinate_scale(strides)[:, None, None]
            bias = bias - (coordinate_weight @ points[..., None])[..., 0]
            weight = torch.cat([weight[..., :-2], coordinate_weight], dim=-1)
            x = (weight.flatten(0, 1) @ shared).unflatten(0, weight.shape[:2]) + bias[..., None]
            for weight, bias in others:
                x = torch.baddbmm(bias[..., None], weight, F.relu(x))
        return x.unflatten(2, (height, width))

    def peaks(
        self, params: Tensor, points: Tensor, strides: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Find the peak of every keypoint map (eq. 2), a chunk of persons at a time.

        Arguments are those of :meth:`maps`.

        Returns:
            (N, K) int64 cell indices, row * W + column, and (N, K) scores: the softmax
            probability of the map at its peak, in [0, 1].
        """
        scores = features.new_empty(len(params), self.num_keypoints, dtype=torch.float32)
        cells = torch.empty_like(scores, dtype=torch.int64)
        for start in range(0, len(params), CHUNK):
            chunk = slice(start, start + CHUNK)
            maps = self.maps(params[chunk], points[chunk], strides[chunk], features)
            logits = maps.flatten(2)
            peak, cells[chunk] = logits.max(dim=-1)
            scores[chunk] = (peak - logits.logsumexp(dim=-1)).exp()
        return cells, scores
