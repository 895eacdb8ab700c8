"""Weights of neighbouring projects as the start of a training, in made-up files of their form."""

import pickle
import re
import shlex
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
from inspose_d2.checkpoint import CheckpointError, InsPoseCheckpointer

DOCUMENT = Path(__file__).parents[2] / "docs" / "getting_started.md"


def documented_options(weights: str) -> list[str]:
    """What the command of the document sets beside these weights."""
    (command,) = re.findall(
        rf"--config-file configs/InsPose_R50_3x.*{weights}(.*)", DOCUMENT.read_text()
    )
    return shlex.split(command)


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


def test_images_are_prepared_as_for_keypoint_rcnn() -> None:
    ours, theirs = get_inspose_cfg("InsPose_R50_3x"), get_cfg()  # its config keeps the defaults
    assert ours.INPUT.FORMAT == theirs.INPUT.FORMAT == "BGR"
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        assert ours.MODEL[key] == theirs.MODEL[key]
    for key in ("STRIDE_IN_1X1", "STEM_OUT_CHANNELS", "DEPTH", "NORM"):
        assert ours.MODEL.RESNETS[key] == theirs.MODEL.RESNETS[key]


@pytest.mark.parametrize("form", ["plain.pth", "wrapped.pth", "timm.safetensors"])
def test_resnet_of_torchvision_and_timm_computes_the_same_features(
    form: str, tmp_path: Path
) -> None:
    """Plain state, under "model" as training scripts save it, or as timm publishes it."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(weights=None).eval()  # timm's has the same names
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.running_mean, -0.1, 0.1)
    path = tmp_path / form
    state: dict[str, Any] = dict(theirs.state_dict())
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save({"model": state} if form.startswith("wrapped") else state, path)
    options = ["MODEL.DEVICE", "cpu", *documented_options("MODEL.WEIGHTS resnet50.pth")]
    cfg = get_inspose_cfg("InsPose_R50_3x", options)
    assert cfg.INPUT.FORMAT == "RGB"
    model = build_model(cfg).eval()
    for value in model.backbone.bottom_up.state_dict().values():
        value.fill_(torch.nan)
    begin_with(model, path, tmp_path)
    for name, value in model.backbone.bottom_up.state_dict().items():
        assert value.isfinite().all(), name
    pixels = torch.randint(256, (3, 64, 96), dtype=torch.uint8)  # RGB
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = (pixels / 255 - mean[:, None, None])[None] / std[:, None, None]
    with torch.no_grad():
        features = model.backbone.bottom_up(model.preprocess_image([{"image": pixels}]).tensor)
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        x = theirs.layer1(x)
        for number in (3, 4, 5):
            x = getattr(theirs, f"layer{number - 1}")(x)
            scale = x.abs().max().item()
            torch.testing.assert_close(features[f"res{number}"], x, atol=1e-4 * scale, rtol=0)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("content", "problem"), [(b"", "is empty"), (b"\x05<html>", "is no checkpoint")]
)
def test_bad_safetensors_are_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "resnet50.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=problem):
        begin_with(nn.Linear(1, 1), path, tmp_path)
