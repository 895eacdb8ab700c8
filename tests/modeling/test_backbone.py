import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import EventStorage
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn

from inspose_d2.modeling.backbone import (
    FoldedConv2d,
    FoldedTimmNorm,
    fold_frozen_batch_norms,
    keep_folded,
)

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


MOBILENET = "mobilenetv3_small_050"  # the smallest, 0.3 M parameters; its norms have activations
IMAGENET = [
    *("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53]),
    *("MODEL.PIXEL_STD", [58.395, 57.12, 57.375]),
]


def timm_settings(name: str, pretrained: bool = False) -> list[object]:
    return [
        *("MODEL.BACKBONE.NAME", "build_inspose_timm_fpn_backbone", "MODEL.TIMM.NAME", name),
        *("MODEL.TIMM.PRETRAINED", pretrained),
    ]


@pytest.fixture
def build_timm(tiny_cfg: Callable[..., CfgNode]) -> Callable[..., FPN]:
    def build(name: str, *settings: object, pretrained: bool = False) -> FPN:
        torch.manual_seed(0)
        return build_backbone(tiny_cfg([*timm_settings(name, pretrained), *settings]))

    return build


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("hrnet_w32", [64, 128, 256]),  # its branches of strides 8, 16, 32
        ("convnext_atto", [80, 160, 320]),
        (MOBILENET, [16, 24, 288]),
    ],
)
def test_timm_network_makes_the_pyramid_and_trains(
    build_timm: Callable[..., FPN], name: str, channels: list[int]
) -> None:
    backbone = build_timm(name)
    bottom_up = backbone.bottom_up.output_shape()
    assert [(x, s.stride) for x, s in bottom_up.items()] == [
        ("res3", 8),
        ("res4", 16),
        ("res5", 32),
    ]
    assert [s.channels for s in bottom_up.values()] == channels
    shapes = backbone.output_shape()
    assert [shapes[x].stride for x in NAMES] == [8, 16, 32, 64, 128]
    assert backbone.size_divisibility == 32

    # 70 x 100 is padded to multiples of 32, 96 x 128; every level halves and rounds up.
    images = torch.randn(2, 3, 70, 100, generator=torch.Generator().manual_seed(1))
    batch = ImageList.from_tensors(list(images), backbone.size_divisibility)
    features = backbone(batch.tensor)  # in training, as it was built
    sizes = [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]
    assert [tuple(features[x].shape) for x in NAMES] == [(2, CHANNELS, *x) for x in sizes]

    sum(x.square().sum() for x in features.values()).backward()
    trained = [(n, p) for n, p in backbone.named_parameters() if p.requires_grad]
    assert [n for n, p in trained if p.grad is None or (p.grad == 0).all()] == []
    # Only HRNet has more: the last step to the map of stride 4, which nobody asks for.
    frozen = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    assert bool(frozen) == (name == "hrnet_w32")
    assert all(n.startswith("bottom_up.net.stage4.2.fuse_layers.0.") for n in frozen)


@pytest.mark.parametrize("name", ["hrnet_w18_small", "convnext_atto", MOBILENET])
def test_whole_inspose_on_a_timm_network_has_finite_losses(
    tiny_cfg: Callable[..., CfgNode], make_instances: Callable[..., Instances], name: str
) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_cfg(timm_settings(name))).train()
    points = torch.rand(1, 17, 2, generator=torch.Generator().manual_seed(1)) * 60 + 10
    keypoints = torch.cat((points, torch.full((1, 17, 1), 2.0)), dim=2)
    person = make_instances(keypoints, (81, 99))
    image = torch.rand(3, 81, 99, generator=torch.Generator().manual_seed(2)) * 255
    with EventStorage():
        losses = model([{"image": image, "instances": person}] * 2)
    assert len(losses) == 4
    assert all(x.isfinite() and x > 0 for x in losses.values())
    sum(losses.values()).backward()
    unreached = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unreached == []
    with torch.no_grad():
        poses = model.eval()([{"image": image}])[0]["instances"]
    assert poses.pred_keypoints.isfinite().all()


def test_random_batch_norms_train(build_timm: Callable[..., FPN]) -> None:
    norms = [x for x in build_timm(MOBILENET).modules() if isinstance(x, nn.BatchNorm2d)]
    assert norms
    assert all(x.training and x.weight.requires_grad for x in norms)
    assert all((x.running_mean == 0).all() for x in norms)  # building ran an image


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224", r"strides \[8, 16, 32\].* MODEL\.TIMM\.NAME .*\[16\]"),
        ("hiera_tiny_224", r"MODEL\.TIMM\.NAME 'hiera_tiny_224' takes no image of 96x160"),
        ("resnet5O", r"timm cannot build MODEL\.TIMM\.NAME 'resnet5O': Unknown model"),
    ],
)
def test_network_that_does_not_fit_is_refused(
    build_timm: Callable[..., FPN], name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_timm(name)


def test_features_of_another_layout_are_refused(
    build_timm: Callable[..., FPN], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some networks (MambaOut) make (B, H, W, C).
    create = timm.create_model

    def channels_last(*args: object, **kwargs: object) -> nn.Module:
        net = create(*args, **kwargs)
        net.register_forward_hook(lambda _m, _x, out: [x.permute(0, 2, 3, 1) for x in out])
        return net

    monkeypatch.setattr(timm, "create_model", channels_last)
    with pytest.raises(ValueError, match=r"should make .*\(1, 16, 12, 20\).*\(1, 12, 20, 16\)"):
        build_timm(MOBILENET)


def test_missing_timm_is_told_by_the_name_of_the_extra(
    build_timm: Callable[..., FPN], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        build_timm(MOBILENET)


@pytest.fixture(scope="module")
def mobilenet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole classifier, as timm's hub has it; batch norms with statistics of their own."""
    torch.manual_seed(1)
    net = timm.create_model(MOBILENET).train()
    with torch.no_grad():
        net(torch.randn(4, 3, 64, 64))
    path = tmp_path_factory.mktemp("timm") / "mobilenet.pth"
    torch.save(net.state_dict(), path)
    return path


def test_local_file_gives_weights_and_frozen_batch_norms(
    build_timm: Callable[..., FPN], mobilenet_file: Path
) -> None:
    weights = ["MODEL.TIMM.WEIGHTS", str(mobilenet_file)]
    backbone = build_timm(MOBILENET, *IMAGENET, *weights, pretrained=True)
    saved = torch.load(mobilenet_file, weights_only=True)
    state = backbone.bottom_up.net.state_dict()
    assert len(state) > 100
    for key, value in state.items():
        torch.testing.assert_close(value, saved[key], rtol=0, atol=0, msg=key)

    reference = timm.create_model(MOBILENET, features_only=True)
    reference.load_state_dict({k: v for k, v in saved.items() if k in reference.state_dict()})
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference.eval()(image)[2:]  # strides 8, 16, 32
        features = backbone.train().bottom_up(image)
    for value, right in zip(features.values(), expected, strict=True):
        torch.testing.assert_close(value, right)
    assert not [x for x in backbone.modules() if isinstance(x, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    ("network", "problem"),
    [
        ("resnet18", r"it lacks \d+ parameters, first "),
        ("mobilenetv3_small_075", r".*size mismatch"),
        (None, r"there is no such file"),
        ("text", r""),
    ],
)
def test_wrong_local_file_is_refused(
    build_timm: Callable[..., FPN], tmp_path: Path, network: str | None, problem: str
) -> None:
    path = tmp_path / "weights.pth"
    if network == "text":
        path.write_text("no weights")
    elif network is not None:
        torch.save(timm.create_model(network).state_dict(), path)
    message = f"MODEL.TIMM.WEIGHTS {path} does not hold the weights of {MOBILENET} ("
    with pytest.raises(ValueError, match="(?s)" + re.escape(message) + problem):
        build_timm(MOBILENET, *IMAGENET, "MODEL.TIMM.WEIGHTS", str(path), pretrained=True)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let downloads fail as they do without a network, at once; lists what was asked for."""
    asked: list[str] = []

    def download(repo_id: str, *_args: object, **_kwargs: object) -> None:
        asked.append(repo_id)
        raise LocalEntryNotFoundError("An error happened while trying to locate the file")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    return asked


def test_failed_download_says_what_to_do(build_timm: Callable[..., FPN], no_hub: list[str]) -> None:
    message = (
        r"MODEL\.TIMM\.NAME 'mobilenetv3_small_050' cannot be downloaded.*model\.safetensors of "
        r"https://huggingface\.co/timm/mobilenetv3_small_050\.lamb_in1k .*MODEL\.TIMM\.WEIGHTS"
        r".*MODEL\.TIMM\.PRETRAINED False.*An error happened"
    )
    with pytest.raises(ValueError, match=message):
        build_timm(MOBILENET, *IMAGENET, pretrained=True)
    assert set(no_hub) == {"timm/mobilenetv3_small_050.lamb_in1k"}


def test_nothing_is_downloaded_for_a_checkpoint_or_random_weights(
    tiny_cfg: Callable[..., CfgNode], no_hub: list[str], tmp_path: Path
) -> None:
    settings = timm_settings(MOBILENET, pretrained=True) + IMAGENET
    trained = build_model(tiny_cfg([*settings, "MODEL.WEIGHTS", "first.pth"]))
    build_model(tiny_cfg(timm_settings(MOBILENET)))
    assert no_hub == []
    # A checkpoint of the whole model brings the frozen statistics too.
    for x in trained.backbone.bottom_up.buffers():
        x.uniform_(0.5, 1.5)
    torch.save({"model": trained.state_dict()}, tmp_path / "model.pth")
    cfg = tiny_cfg([*settings, "MODEL.WEIGHTS", str(tmp_path / "model.pth")])
    predictor = DefaultPredictor(cfg)
    for key, value in trained.state_dict().items():
        assert predictor.model.state_dict()[key].equal(value), key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("INPUT.FORMAT", "BGR"),
        ("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]),
        ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0]),
        ("MODEL.PIXEL_STD", [57.0]),
    ],
)
def test_other_colours_than_those_of_the_weights_are_refused(
    build_timm: Callable[..., FPN], no_hub: list[str], key: str, value: object
) -> None:
    right = (
        "need INPUT.FORMAT 'RGB', MODEL.PIXEL_MEAN [123.675, 116.28, 103.53] and "
        "MODEL.PIXEL_STD [58.395, 57.12, 57.375]"
    )
    with pytest.raises(ValueError, match=re.escape(right)):
        build_timm(MOBILENET, *IMAGENET, key, value, pretrained=True)
    assert no_hub == []


def test_weights_without_pretrained_are_refused(build_timm: Callable[..., FPN]) -> None:
    with pytest.raises(ValueError, match=r"MODEL\.TIMM\.PRETRAINED must be True"):
        build_timm(MOBILENET, "MODEL.TIMM.WEIGHTS", "file.pth")


def test_frozen_batch_norms_are_folded_into_their_convolutions(
    tiny_cfg: Callable[..., CfgNode],
) -> None:
    cfg = tiny_cfg(["MODEL.RESNETS.NORM", "FrozenBN"])
    torch.manual_seed(0)
    plain = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    for norm in plain.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            for values in (norm.weight, norm.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
            for values in (norm.bias, norm.running_mean):
                nn.init.uniform_(values, -0.5, 0.5)
    plain.double()  # in float32 a rounding error may switch a ReLU
    folded = fold_frozen_batch_norms(copy.deepcopy(plain))
    assert sum(type(x) is FoldedConv2d for x in folded.modules()) == 53  # all of ResNet-50
    assert folded.state_dict().keys() == plain.state_dict().keys()

    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)).double()
    losses = [sum(x.square().mean() for x in net(image).values()) for net in (plain, folded)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    for loss in losses:
        loss.backward()
    trained = [p for p in plain.parameters() if p.requires_grad]
    same = [p for p in folded.parameters() if p.requires_grad]
    for parameter, expected in zip(same, trained, strict=True):
        scale = expected.grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-4 * scale)


def test_resnet_backbone_has_no_frozen_batch_norm_left_to_run(
    tiny_cfg: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "build_inspose_resnet_fpn_backbone"
    cfg = tiny_cfg(["MODEL.BACKBONE.NAME", name, "MODEL.RESNETS.NORM", "FrozenBN"])
    backbone = build_backbone(cfg).eval()
    monkeypatch.delattr(FrozenBatchNorm2d, "forward")
    assert run(backbone).keys() == set(NAMES)


def test_first_stages_freeze_up_to_a_stride(build_timm: Callable[..., FPN]) -> None:
    net = build_timm(MOBILENET, "MODEL.TIMM.FREEZE_STRIDE", 4).bottom_up.net
    # Its stride 4 is the stem and the first of its stages.
    for name, parameter in net.named_parameters():
        first = name.startswith(("conv_stem.", "bn1.", "blocks.0."))
        assert parameter.requires_grad == (not first), name
    with pytest.raises(ValueError, match=r"FREEZE_STRIDE 3: .* strides \[2, 4, 8, 16, 32\]"):
        build_timm(MOBILENET, "MODEL.TIMM.FREEZE_STRIDE", 3)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "hrnet_w18_small", "resnet18"])
def test_frozen_batch_norms_of_timm_are_folded(build_timm: Callable[..., FPN], name: str) -> None:
    torch.manual_seed(0)
    plain = build_timm(name).bottom_up.eval().double()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
    folded = copy.deepcopy(plain)
    folded.freeze_batch_norms()
    norms = sum(isinstance(x, nn.BatchNorm2d) for x in plain.modules())
    assert sum(isinstance(x, FoldedTimmNorm) for x in folded.modules()) == norms
    assert {*folded.state_dict()} == {
        key for key in plain.state_dict() if not key.endswith("num_batches_tracked")
    }
    folded = copy.deepcopy(folded)  # as an average of the weights does

    image = torch.randn(2, 3, 64, 96, dtype=torch.double)
    losses = [sum(x.square().mean() for x in net(image).values()) for net in (plain, folded)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    expected = dict(plain.named_parameters())
    for key, parameter in folded.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key].grad)


@pytest.mark.parametrize("change", ["load", "train", "move"])
def test_folded_weights_are_kept_until_the_model_changes(
    build_timm: Callable[..., FPN], change: str
) -> None:
    torch.manual_seed(0)
    backbone = build_timm("tf_efficientnet_lite0").bottom_up
    backbone.freeze_batch_norms()
    backbone.eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = backbone(image)
        keep_folded(backbone)
        torch.testing.assert_close(backbone(image), expected, rtol=0, atol=0)
        for parameter in backbone.parameters():
            parameter.mul_(1.1)
        torch.testing.assert_close(backbone(image), expected, rtol=0, atol=0)  # kept indeed
        if change == "load":
            backbone.load_state_dict(backbone.state_dict())
        elif change == "train":
            backbone.train().eval()
        else:
            backbone.double().float()
        assert (backbone(image)["res5"] - expected["res5"]).abs().max() > 1e-3
