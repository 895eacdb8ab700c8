"""Weights of neighbouring projects as the start of a training, in made-up files of their form."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from torch import nn

from inspose_d2 import get_cfg as get_inspose_cfg
from inspose_d2.checkpoint import InsPoseCheckpointer


def begin_with(model: nn.Module, path: Path, tmp_path: Path) -> None:
    checkpointer = InsPoseCheckpointer(model, str(tmp_path / "output"))
    checkpointer.resume_or_load(str(path), resume=False)


def test_keypoint_rcnn_gives_backbone_and_pyramid(
    tiny_cfg: Callable[..., CfgNode], tmp_path: Path
) -> None:
    resnet = {
        "MODEL.BACKBONE.NAME": "build_inspose_resnet_fpn_backbone",
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
        "MODEL.FPN.NORM": "",
    }
    cfg = tiny_cfg(**resnet)
    theirs = get_cfg()
    theirs.MODEL.FPN.OUT_CHANNELS = cfg.MODEL.FPN.OUT_CHANNELS
    for key in ("STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "WIDTH_PER_GROUP"):
        theirs.MODEL.RESNETS[key] = cfg.MODEL.RESNETS[key]
    levels = ["res2", "res3", "res4", "res5"]
    theirs.MODEL.RESNETS.OUT_FEATURES = theirs.MODEL.FPN.IN_FEATURES = levels
    torch.manual_seed(1)
    peer = build_resnet_fpn_backbone(theirs, ShapeSpec(channels=3))
    state = {f"backbone.{name}": value.numpy() for name, value in peer.state_dict().items()}
    state["roi_heads.keypoint_head.conv_fcn1.weight"] = torch.zeros(2, 2).numpy()
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": state, "__author__": "Detectron2 Model Zoo"}))

    model = build_model(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    begin_with(model, path, tmp_path)
    loaded = set()
    for name, value in model.state_dict().items():
        if name in state:
            assert torch.equal(value, torch.from_numpy(state[name])), name
            loaded.add(name)
        else:
            assert torch.equal(value, before[name]), name
    left = {name for name in before if name.startswith("backbone.")} - loaded
    assert {name.rsplit(".", 1)[0] for name in left} == {
        "backbone.top_block.p6",
        "backbone.top_block.p7",
    }


@pytest.mark.parametrize("wrapped", [False, True])
def test_resnet_of_torchvision_computes_the_same_features(wrapped: bool, tmp_path: Path) -> None:
    """Plain state of torchvision or timm, or under "model" as training scripts save it."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(weights=None).eval()
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.running_mean, -0.1, 0.1)
    path = tmp_path / "resnet50.pth"
    state: dict[str, Any] = dict(theirs.state_dict())
    torch.save({"model": state} if wrapped else state, path)
    options = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.STRIDE_IN_1X1", False]
    model = build_model(get_inspose_cfg("InsPose_R50_3x", options)).eval()
    begin_with(model, path, tmp_path)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = model.backbone.bottom_up(image)
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        for name, layer in (("res2", "layer1"), ("res3", "layer2"), ("res4", "layer3")):
            x = getattr(theirs, layer)(x)
            if name in features:
                scale = x.abs().max().item()
                torch.testing.assert_close(features[name], x, atol=1e-4 * scale, rtol=0)
