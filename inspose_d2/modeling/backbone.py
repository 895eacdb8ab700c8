"""Backbones with the pyramid P3 to P7 (fig. 3)."""

import logging
import os
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
SMALL_WIDTHS = {"res2": 32, "res3": 64, "res4": 128, "res5": 256}
TINY_WIDTHS = {**SMALL_WIDTHS, "res5": 160}


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
    return _add_fpn(cfg, fold_frozen_batch_norms(build_resnet_backbone(cfg, input_shape)))


class Folded(nn.Conv2d):
    """A convolution with its frozen batch norm folded into weight and bias.

    At each call: the weights are few beside the activations, over which one pass is saved (in
    training three). Of small images that is 6 % of the time of a model, which :func:`keep_folded`
    saves.
    """

    kept: tuple[Tensor, Tensor] | None = None

    @property
    def frozen_norm(self) -> Any:
        """The batch norm."""
        raise NotImplementedError

    def fold(self) -> tuple[Tensor, Tensor]:
        """Give weight and bias."""
        norm = self.frozen_norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        return self.weight * scale[:, None, None, None], bias

    def folded(self) -> tuple[Tensor, Tensor]:
        """Give weight and bias as they were kept, if they were."""
        return self.fold() if self.kept is None else self.kept

    def train(self, mode: bool = True) -> Any:
        """Forget what was kept, where training begins."""
        self.kept = None if mode else self.kept
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # as for another device
        self.kept = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.kept = None
        super()._load_from_state_dict(*args, **kwargs)


@torch.no_grad()
def keep_folded(model: nn.Module) -> None:
    """Fold frozen batch norms once, for a model in evaluation whose weights stay.

    They are forgotten where the model is trained, moved or loaded. Not where one writes into its
    parameters.
    """
    for module in model.modules():
        if isinstance(module, Folded):
            module.kept = module.fold()


class FoldedConv2d(Folded, Conv2d):
    """Detectron2's ``Conv2d`` with ``FrozenBatchNorm2d``, whose parameters and results it has."""

    norm: Any
    activation: Any

    @property
    def frozen_norm(self) -> Any:
        """The batch norm."""
        return self.norm

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, out_channels, H', W')."""
        weight, bias = self.folded()
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


def fold_frozen_batch_norms(module: nn.Module) -> nn.Module:
    """Make each convolution of Detectron2 with a frozen batch norm a :class:`FoldedConv2d`."""
    for conv in module.modules():
        # Same parameters under the same names, another forward: checkpoints are not affected.
        if type(conv) is Conv2d and conv.bias is None and isinstance(conv.norm, FrozenBatchNorm2d):
            conv.__class__ = FoldedConv2d
    return module


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
    return _build_small(cfg, input_shape, SMALL_WIDTHS)


@BACKBONE_REGISTRY.register()
def build_inspose_tiny_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the small backbone with a thinner last stage, which has most of its weights (ours).

    A checkpoint in half precision is 4.4 MB, so the package can carry one.

    Args:
        cfg: as :func:`build_inspose_small_fpn_backbone`.
        input_shape: channels of the image.

    Returns:
        A backbone with the features p3, ..., p7 of strides 8, ..., 128.
    """
    return _build_small(cfg, input_shape, TINY_WIDTHS)


def _build_small(cfg: CfgNode, input_shape: ShapeSpec, widths: dict[str, int]) -> FPN:
    """Build the small residual network with these widths of its stages."""
    norm = cfg.MODEL.RESNETS.NORM
    in_channels = widths["res2"]
    stages = []
    for name, channels in widths.items():
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
    stem = SmallStem(input_shape.channels, widths["res2"], norm)
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


@BACKBONE_REGISTRY.register()
def build_inspose_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build any timm network with features of strides 8, 16 and 32, such as HRNet, + FPN.

    The batch norms of a pretrained network are frozen, as Detectron2 does with ResNets: a few
    images per GPU give no better statistics.

    Args:
        cfg: reads ``MODEL.TIMM``, ``MODEL.FPN``, ``MODEL.WEIGHTS``, ``MODEL.PIXEL_MEAN``,
            ``MODEL.PIXEL_STD`` and ``INPUT.FORMAT``.
        input_shape: channels of the image.

    Returns:
        A backbone with the features p3, ..., p7 of strides 8, ..., 128.

    Raises:
        ImportError: timm is not installed.
        ValueError: the network does not fit, or its weights cannot be had.
    """
    node = cfg.MODEL.TIMM
    if node.WEIGHTS and not node.PRETRAINED:
        raise ValueError("MODEL.TIMM.WEIGHTS is set, so MODEL.TIMM.PRETRAINED must be True")
    try:
        net = _create_timm(node.NAME, input_shape.channels)
    except ImportError as error:
        raise ImportError(
            "The backbone build_inspose_timm_fpn_backbone needs timm: pip install timm"
        ) from error
    except Exception as error:
        raise ValueError(f"timm cannot build MODEL.TIMM.NAME {node.NAME!r}: {error}") from error
    backbone = TimmBackbone(net, cfg.MODEL.FPN.IN_FEATURES)
    _try_out(backbone, input_shape.channels, node.NAME)
    if node.PRETRAINED:
        _check_pixels(cfg, net.pretrained_cfg)
        if cfg.MODEL.WEIGHTS:
            logger.info("The backbone's weights are expected in MODEL.WEIGHTS: no others loaded.")
        else:
            net.load_state_dict(_pretrained_weights(node, net, input_shape.channels))
        backbone.freeze_batch_norms()
    if node.FREEZE_STRIDE:
        backbone.freeze_up_to(node.FREEZE_STRIDE, input_shape.channels)
    return _add_fpn(cfg, backbone)


class TimmBackbone(Backbone):
    """A feature network of timm whose features are named by their strides, res2 to res5."""

    def __init__(self, net: Any, out_features: list[str]) -> None:
        """Choose the features.

        Args:
            net: made by ``timm.create_model`` with ``features_only``.
            out_features: names, finest first: res2, ..., res5 have strides 4, ..., 32.

        Raises:
            ValueError: the network has no feature of such a stride.
        """
        super().__init__()
        info = net.feature_info
        index = {stride: i for i, stride in enumerate(info.reduction())}  # the last of a stride
        needed = [STRIDES.get(name) for name in out_features]
        if not set(needed) <= index.keys():
            raise ValueError(
                f"MODEL.FPN.IN_FEATURES {out_features} needs features of strides {needed}; "
                f"the network of MODEL.TIMM.NAME has them at {sorted(index)}"
            )
        self.net = net
        self._index = {name: index[STRIDES[name]] for name in out_features}
        self._out_features = out_features
        self._out_feature_strides = {name: STRIDES[name] for name in out_features}
        self._out_feature_channels = {x: info.channels()[i] for x, i in self._index.items()}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map (B, C, H, W), H and W multiples of 32, to the features by name."""
        features = self.net(x)
        return {name: features[i] for name, i in self._index.items()}

    def freeze_up_to(self, stride: int, in_channels: int) -> None:
        """Freeze the parameters that the network's feature of a stride depends on.

        Args:
            stride: of the feature.
            in_channels: of the image.

        Raises:
            ValueError: the network has no feature of this stride.
        """
        strides = self.net.feature_info.reduction()
        if stride not in strides:
            raise ValueError(
                f"MODEL.TIMM.FREEZE_STRIDE {stride}: the network of MODEL.TIMM.NAME has features "
                f"of strides {strides}"
            )
        self.eval()  # leaves the statistics of batch norms alone
        last = len(strides) - 1 - strides[::-1].index(stride)
        feature = self.net(torch.zeros(1, in_channels, 96, 160))[last]
        parameters = [x for x in self.net.parameters() if x.requires_grad]
        gradients = torch.autograd.grad(feature.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is None)
        self.train()

    def freeze_batch_norms(self) -> None:
        """Keep statistics and affine parameters of all batch norms as they are, and fold them."""
        from timm.layers import freeze_batch_norm_2d  # Detectron2's would drop their activations

        self.net = freeze_batch_norm_2d(self.net)
        # Same parameters under the same names, another forward: checkpoints are not affected.
        classes: dict[type, type] = {}
        for conv, norm in _convolutions_with_norms(self.net):
            conv.folded_norm = (norm,)  # a tuple, or it would be registered a second time
            for module, folded in ((conv, FoldedTimmConv2d), (norm, FoldedTimmNorm)):
                plain = type(module)
                if plain not in classes:
                    classes[plain] = type(f"Folded{plain.__name__}", (folded, plain), {})
                module.__class__ = classes[plain]


class FoldedTimmConv2d(Folded):
    """The same for timm's networks, where norms are modules beside convolutions."""

    folded_norm: tuple[Any]

    @property
    def frozen_norm(self) -> Any:
        """The batch norm."""
        return self.folded_norm[0]

    def fold(self) -> tuple[Tensor, Tensor]:
        """Give weight and bias.

        Where a side of the image is padded by one cell more at its end than at its beginning, the
        kernel is padded instead, at its beginning and with zeros: a way through the memory less.
        """
        weight, bias = super().fold()
        height, width = self._padding()
        if height % 2 or width % 2:
            weight = F.pad(weight, (width % 2, 0, height % 2, 0))
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, out_channels, H', W')."""
        weight, bias = self.folded()
        padding = [(total + 1) // 2 for total in self._padding()]
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _padding(self) -> list[int]:
        """Cells that height and width grow by.

        TensorFlow's "same" padding is that of sides which are multiples of the stride, as all are
        here. timm's own depends on the size, in terms that grow from layer to layer: an export to
        open sizes did not end within minutes.
        """
        if not type(self).__name__.endswith("Same"):
            return [2 * int(x) for x in self.padding]
        sides = zip(self.kernel_size, self.stride, strict=True)
        return [max(kernel - stride, 0) for kernel, stride in sides]


class FoldedTimmNorm(nn.Module):
    """What is left of a batch norm that is folded: the activation that timm puts into it."""

    act: nn.Module
    drop: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same."""
        return self.act(self.drop(x)) if hasattr(self, "act") else x


def _convolutions_with_norms(net: nn.Module) -> list[tuple[Any, nn.Module]]:
    """Find the frozen batch norms whose input is just what a convolution puts out."""
    from timm.layers import Conv2dSame, FrozenBatchNormAct2d
    from torchvision.ops.misc import FrozenBatchNorm2d

    makers: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensor is kept, or its id could return
    pairs: list[tuple[Any, nn.Module]] = []

    def note_output(module: nn.Module, _: Any, output: Tensor) -> None:
        makers[id(output)] = module, output

    def note_input(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if id(inputs[0]) in makers:
            pairs.append((makers[id(inputs[0])][0], module))

    hooks: list[Any] = []
    for module in net.modules():
        folds = type(module) is nn.Conv2d or (
            type(module) is Conv2dSame and module.dilation == (1, 1)
        )
        if folds and module.bias is None and not isinstance(module.padding, str):
            hooks.append(module.register_forward_hook(note_output))
        elif isinstance(module, FrozenBatchNormAct2d | FrozenBatchNorm2d):
            hooks.append(module.register_forward_pre_hook(note_input))
    first = next(net.parameters())
    with torch.no_grad():
        net(first.new_zeros(1, first.shape[1], 96, 160))
    for hook in hooks:
        hook.remove()
    return pairs


def _create_timm(name: str, in_channels: int, **pretrained: Any) -> Any:
    """Make a feature network, without weights unless ``pretrained`` asks for them."""
    import timm  # optional, and slow to import

    # HRNet's own branches, not the wider ones of its classifier.
    hrnet: dict[str, Any] = {"feature_location": ""} if "hrnet" in name else {}
    return timm.create_model(name, features_only=True, in_chans=in_channels, **hrnet, **pretrained)


def _try_out(backbone: TimmBackbone, in_channels: int, name: str) -> None:
    """Run a small image, and freeze the parameters that no feature depends on.

    Some networks take one image size only. Some have parameters that reach no feature (HRNet's
    last step to stride 4), whose gradient DistributedDataParallel would miss.
    """
    height, width = 96, 160
    expected = {
        key: (1, shape.channels, height // shape.stride, width // shape.stride)
        for key, shape in backbone.output_shape().items()
    }
    backbone.eval()  # leaves the statistics of batch norms alone
    try:
        features = backbone(torch.zeros(1, in_channels, height, width))
        got = {key: tuple(x.shape) for key, x in features.items()}
    except Exception as error:
        raise ValueError(
            f"MODEL.TIMM.NAME {name!r} takes no image of {height}x{width}, but a backbone must "
            f"take every multiple of 32: {error}"
        ) from error
    if got != expected:
        raise ValueError(
            f"MODEL.TIMM.NAME {name!r} should make features of shapes (B, C, H, W) {expected} of "
            f"an image of {height}x{width}, but makes {got}"
        )
    parameters = list(backbone.parameters())
    total = sum(x.sum() for x in features.values())
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    backbone.train()


def _check_pixels(cfg: CfgNode, pretrained_cfg: dict[str, Any]) -> None:
    """Refuse other colours than those that the weights know."""
    mean, std = ([round(255 * x, 3) for x in pretrained_cfg[key]] for key in ("mean", "std"))
    given, right = [*cfg.MODEL.PIXEL_MEAN, *cfg.MODEL.PIXEL_STD], [*mean, *std]
    same = len(given) == len(right) and np.allclose(given, right, atol=0.1)
    if cfg.INPUT.FORMAT != "RGB" or not same:
        raise ValueError(
            f"The weights of MODEL.TIMM.NAME {cfg.MODEL.TIMM.NAME!r} need INPUT.FORMAT 'RGB', "
            f"MODEL.PIXEL_MEAN {mean} and MODEL.PIXEL_STD {std}; got {cfg.INPUT.FORMAT!r}, "
            f"{cfg.MODEL.PIXEL_MEAN} and {cfg.MODEL.PIXEL_STD}"
        )


def _pretrained_weights(node: CfgNode, net: Any, in_channels: int) -> dict[str, Tensor]:
    """Read the weights of a network from the file ``MODEL.TIMM.WEIGHTS``, or from timm's hub."""
    file = {"pretrained_cfg_overlay": {"file": node.WEIGHTS}} if node.WEIGHTS else {}
    try:
        if node.WEIGHTS:
            _check_names(node.WEIGHTS, net)
        return _create_timm(node.NAME, in_channels, pretrained=True, **file).state_dict()
    except Exception as error:
        hub = f"https://huggingface.co/{net.pretrained_cfg.get('hf_hub_id')}"
        problem = (
            f"MODEL.TIMM.WEIGHTS {node.WEIGHTS} does not hold the weights of {node.NAME}"
            if node.WEIGHTS
            else f"The weights of MODEL.TIMM.NAME {node.NAME!r} cannot be downloaded. Put "
            f"model.safetensors of {hub} here and set MODEL.TIMM.WEIGHTS to its path, or begin "
            "with random weights: MODEL.TIMM.PRETRAINED False"
        )
        raise ValueError(f"{problem} ({error})") from error


def _check_names(path: str, net: nn.Module) -> None:
    """Refuse a file without the network's parameters: timm would leave those at random."""
    from timm.models import load_state_dict

    if not os.path.isfile(path):
        raise FileNotFoundError("there is no such file")

    def plain(name: str) -> str:  # feature networks say stages_0 or model.stages.0 for stages.0
        return name.removeprefix("model.").replace(".", "_")

    found = {plain(name) for name in load_state_dict(path)}
    missing = [x for x in net.state_dict() if plain(x) not in found and "num_batches" not in x]
    if missing:
        raise ValueError(f"it lacks {len(missing)} parameters, first {missing[0]}")


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
