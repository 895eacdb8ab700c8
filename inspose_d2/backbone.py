"""Backbones with the pyramid P3 to P7 (fig. 3)."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7


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
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelP6P7(channels, channels, in_feature="p5"),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
