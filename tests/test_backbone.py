from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone.fpn import FPN
from detectron2.structures import ImageList
from torch import Tensor

NAMES = ["p3", "p4", "p5", "p6", "p7"]
CHANNELS = 32  # FPN.OUT_CHANNELS of tiny_cfg


@pytest.fixture(params=["build_inspose_resnet_fpn_backbone", "build_inspose_small_fpn_backbone"])
def backbone(request: pytest.FixtureRequest, tiny_cfg: Callable[..., CfgNode]) -> FPN:
    torch.manual_seed(0)
    return build_backbone(tiny_cfg(["MODEL.BACKBONE.NAME", request.param])).eval()


def run(backbone: FPN, size: tuple[int, int] = (64, 96)) -> dict[str, Tensor]:
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(1))
    batch = ImageList.from_tensors([image], backbone.size_divisibility)
    with torch.no_grad():
        return backbone(batch.tensor)


def test_levels_are_p3_to_p7(backbone: FPN) -> None:
    shapes = backbone.output_shape()
    assert list(shapes) == NAMES
    assert [shapes[name].stride for name in NAMES] == [8, 16, 32, 64, 128]
    assert [shapes[name].channels for name in NAMES] == [CHANNELS] * 5


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        # 200 x 300 is padded to multiples of 32, 224 x 320; every level halves and rounds up.
        ((200, 300), [(28, 40), (14, 20), (7, 10), (4, 5), (2, 3)]),
        ((31, 33), [(4, 8), (2, 4), (1, 2), (1, 1), (1, 1)]),
    ],
)
def test_sizes_of_levels_when_image_is_odd(
    backbone: FPN, size: tuple[int, int], expected: list[tuple[int, int]]
) -> None:
    features = run(backbone, size)
    assert [tuple(features[name].shape) for name in NAMES] == [(1, CHANNELS, *x) for x in expected]


def test_p6_and_p7_are_made_from_p5(backbone: FPN) -> None:
    features, block = run(backbone), backbone.top_block
    assert block.p6.weight.shape == block.p7.weight.shape == (CHANNELS, CHANNELS, 3, 3)
    p6 = F.conv2d(features["p5"], block.p6.weight, block.p6.bias, stride=2, padding=1)
    torch.testing.assert_close(features["p6"], p6)
    p7 = F.conv2d(F.relu(p6), block.p7.weight, block.p7.bias, stride=2, padding=1)
    torch.testing.assert_close(features["p7"], p7)


def test_output_convolution_of_p5_changes_p6(backbone: FPN) -> None:
    before = run(backbone)
    with torch.no_grad():
        backbone.fpn_output5.weight.mul_(-2)
    after = run(backbone)
    for name in ("p5", "p6", "p7"):
        assert not after[name].allclose(before[name])
    for name in ("p3", "p4"):
        assert after[name].equal(before[name])


def test_small_backbone_trains_as_a_whole(tiny_cfg: Callable[..., CfgNode]) -> None:
    # It begins without weights, so nothing is frozen, whatever FREEZE_AT says.
    backbone = build_backbone(
        tiny_cfg(["MODEL.BACKBONE.NAME", "build_inspose_small_fpn_backbone"])
    ).train()
    features = backbone(torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1)))
    sum(x.square().sum() for x in features.values()).backward()
    unreached = [n for n, p in backbone.named_parameters() if p.grad is None or (p.grad == 0).all()]
    assert unreached == []
