"""The three branches on P3, which see no person in particular (fig. 3)."""

import torch.nn.functional as F
from torch import Tensor, nn

from .head import conv_tower, init_as_retinanet, prior_bias


class _Branch(nn.Module):
    """A tower, a last 3x3 convolution without norm or ReLU, and the wanted resolution."""

    untrained_output = 0.0

    def __init__(
        self,
        *,
        in_channels: int,
        num_convs: int,
        conv_dim: int,
        norm: str,
        out_channels: int,
        scale: float = 1,
    ) -> None:
        """Build the layers.

        Args:
            in_channels: channels of the feature map.
            num_convs: hidden convolutions.
            conv_dim: their width.
            norm: their norm.
            out_channels: channels of the output.
            scale: cells of the output per cell of the feature map, along each side (Table 3).
        """
        super().__init__()
        self.scale = scale
        self.tower = conv_tower(in_channels, conv_dim, num_convs, norm)
        self.predictor = nn.Conv2d(conv_dim, out_channels, 3, padding=1)
        init_as_retinanet(self)
        nn.init.constant_(self.predictor.bias, self.untrained_output)  # type: ignore[arg-type]

    def forward(self, feature: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, out_channels, scale * H, scale * W).

        Resampling keeps the corners of the maps in place, so a cell of stride s is still the
        square [i*s, (i+1)*s) of the image. At half the resolution it is the mean of four cells.
        """
        x = self.predictor(self.tower(feature))
        return x if self.scale == 1 else F.interpolate(x, scale_factor=self.scale, mode="bilinear")


class KeypointFeatureBranch(_Branch):
    """The shared input of all KP-Nets, F_kp of sec. 3.2: 8 channels in the paper."""


class DiskOffsetBranch(_Branch):
    """Offsets from cells to the keypoints near them, sec. 3.3: 2K channels x0, y0, x1, ..."""


class HeatmapBranch(_Branch):
    """Logits of multi-person heatmaps, K channels: auxiliary task of sec. 3.4, training only."""

    untrained_output = prior_bias(0.1)  # heatmaps begin low (CornerNet)
