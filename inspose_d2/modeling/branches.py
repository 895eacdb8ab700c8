"""The three branches on P3, which see no person in particular (fig. 3)."""

from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from .head import conv_tower, init_as_retinanet, prior_bias


class _Branch(nn.Module):
    """A tower, a last 3x3 convolution without norm or ReLU, and the wanted resolution."""

    untrained_output = 0.0

    @configurable
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

    @classmethod
    def from_config(cls, cfg: CfgNode, feature: ShapeSpec) -> dict[str, Any]:
        """Read all; the output is at the maps' stride where features are resampled (ours)."""
        node = cfg.MODEL.INSPOSE
        scale = feature.stride / node.MAP_STRIDE if node.RESAMPLE == "features" else 1
        branch = node.KEYPOINT_BRANCH
        return _arguments(cfg, branch, feature, branch.OUT_CHANNELS, scale)


class DiskOffsetBranch(_Branch):
    """Offsets from cells to the keypoints near them, sec. 3.3: 2K channels x0, y0, x1, ..."""

    @classmethod
    def from_config(cls, cfg: CfgNode, feature: ShapeSpec) -> dict[str, Any]:
        """Read all; the output is at the maps' stride."""
        node = cfg.MODEL.INSPOSE
        scale = feature.stride / node.MAP_STRIDE
        return _arguments(cfg, node.DISK_OFFSET, feature, 2 * node.NUM_KEYPOINTS, scale)


class HeatmapBranch(_Branch):
    """Logits of multi-person heatmaps, K channels: auxiliary task of sec. 3.4, training only."""

    untrained_output = prior_bias(0.1)  # heatmaps begin low (CornerNet)

    @classmethod
    def from_config(cls, cfg: CfgNode, feature: ShapeSpec) -> dict[str, Any]:
        """Read all; the output is at the stride of the feature."""
        node = cfg.MODEL.INSPOSE
        return _arguments(cfg, node.HEATMAP, feature, node.NUM_KEYPOINTS)


def _arguments(
    cfg: CfgNode, branch: CfgNode, feature: ShapeSpec, out_channels: int, scale: float = 1
) -> dict[str, Any]:
    return {
        "in_channels": feature.channels,
        "num_convs": branch.NUM_CONVS,
        "conv_dim": branch.CONV_DIM,
        "norm": cfg.MODEL.INSPOSE.NORM,
        "out_channels": out_channels,
        "scale": scale,
    }
