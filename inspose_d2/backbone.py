"""Backbones with the pyramid P3 to P7 (fig. 3)."""

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
from torch import Tensor
from torch.nn import functional as F

SMALL_WIDTHS = {"res2": 32, "res3": 64, "res4": 128, "res5": 256}


@BACKBONE_REGISTRY.register()
def build_inspose_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build ResNet + FPN with P6 and P7 made from P5, as in FCOS.

    Detectron2's RetinaNet pyramid makes them from C5 instead.

    Args:
        cfg: reads ``MODEL.RESNETS`` and ``MODEL.FPN``.
        input_shape: channels of the image.

    Returns:
        A backbone with the features p3, ..., p7 of strides 8, ..., 128.
    """
    return _add_fpn(cfg, build_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_inspose_small_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a small residual network + FPN that trains on CPU cores (ours, for configs/quick).

    Two strided convolutions, one block at stride 4 and two each at 8, 16 and 32: few layers
    and few large maps, since on a CPU these cost more than multiplications.

    Args:
        cfg: reads ``MODEL.RESNETS.{NORM, OUT_FEATURES}`` and ``MODEL.FPN``.
        input_shape: channels of the image.

    Returns:
        A backbone with the features p3, ..., p7 of strides 8, ..., 128.
    """
    norm = cfg.MODEL.RESNETS.NORM
    in_channels = SMALL_WIDTHS["res2"]
    stages = []
    for name, channels in SMALL_WIDTHS.items():
        first = name == "res2"
        num_blocks = 1 if first else 2
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                num_blocks,
                stride_per_block=[1 if first else 2, 1][:num_blocks],
                in_channels=in_channels,
                out_channels=channels,
                norm=norm,
            )
        )
        in_channels = channels
    stem = SmallStem(input_shape.channels, SMALL_WIDTHS["res2"], norm)
    return _add_fpn(cfg, ResNet(stem, stages, out_features=cfg.MODEL.RESNETS.OUT_FEATURES))


class SmallStem(CNNBlockBase):
    """Two 3x3 convolutions of stride 2, each with norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        """Build the layers; the first has half the channels."""
        super().__init__(in_channels, out_channels, stride=4)
        half = out_channels // 2
        self.conv1 = Conv2d(
            in_channels, half, 3, stride=2, padding=1, bias=False, norm=get_norm(norm, half)
        )
        self.conv2 = Conv2d(
            half,
            out_channels,
            3,
            stride=2,
            padding=1,
            bias=False,
            norm=get_norm(norm, out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, out_channels, H / 4, W / 4)."""
        return F.relu_(self.conv2(F.relu_(self.conv1(x))))


def _add_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Put the pyramid of ``MODEL.FPN`` on a network, P6 and P7 made from P5."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelP6P7(channels, channels, in_feature="p5"),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
