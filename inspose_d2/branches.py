"""The three branches on P3, which see no person in particular (fig. 3)."""

from torch import Tensor, nn

from .head import conv_tower, init_as_retinanet, prior_bias


class _Branch(nn.Module):
    """A tower and a last 3x3 convolution without norm or ReLU."""

    def __init__(
        self, *, in_channels: int, num_convs: int, conv_dim: int, norm: str, out_channels: int
    ) -> None:
        """Build the layers.

        Args:
            in_channels: channels of the feature map.
            num_convs: hidden convolutions.
            conv_dim: their width.
            norm: their norm.
            out_channels: channels of the output.
        """
        super().__init__()
        self.tower = conv_tower(in_channels, conv_dim, num_convs, norm)
        self.predictor = nn.Conv2d(conv_dim, out_channels, 3, padding=1)
        init_as_retinanet(self)

    def forward(self, feature: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, out_channels, H, W)."""
        return self.predictor(self.tower(feature))


class KeypointFeatureBranch(_Branch):
    """The shared input of all KP-Nets, F_kp of sec. 3.2: 8 channels in the paper."""


class DiskOffsetBranch(_Branch):
    """Offsets from cells to the keypoints near them, sec. 3.3: 2K channels x0, y0, x1, ..."""


class HeatmapBranch(_Branch):
    """Logits of multi-person heatmaps, K channels: auxiliary task of sec. 3.4, training only."""

    def __init__(
        self, *, in_channels: int, num_convs: int, conv_dim: int, norm: str, out_channels: int
    ) -> None:
        """Build the layers and let untrained heatmaps be low (0.1, CornerNet)."""
        super().__init__(
            in_channels=in_channels,
            num_convs=num_convs,
            conv_dim=conv_dim,
            norm=norm,
            out_channels=out_channels,
        )
        nn.init.constant_(self.predictor.bias, prior_bias(0.1))  # type: ignore[arg-type]
