import math

import pytest
import torch
from torch import Tensor, nn

from inspose_d2.modeling.candidates import Candidates, candidates_at
from inspose_d2.modeling.geometry import Locations
from inspose_d2.modeling.head import InsPoseHead, conv_tower, init_as_retinanet, prior_bias

CHANNELS, NUM_PARAMS = 32, 6
SIZES = [(4, 5), (2, 3), (1, 2)]
STRIDES = [8, 16, 32]


def make_head(
    num_convs: int = 1, norm: str = "GN", prior_prob: float = 0.01, with_boxes: bool = False
) -> InsPoseHead:
    torch.manual_seed(0)
    return InsPoseHead(
        in_channels=CHANNELS,
        num_convs=num_convs,
        conv_dim=CHANNELS,
        norm=norm,
        num_params=NUM_PARAMS,
        prior_prob=prior_prob,
        with_boxes=with_boxes,
    )


def make_features(num_images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(num_images, CHANNELS, *size, generator=generator) for size in SIZES]


def all_candidates(features: list[Tensor]) -> tuple[Locations, Candidates]:
    locations = Locations.of(features, STRIDES)
    chosen = torch.ones(len(features[0]), len(locations.points), dtype=torch.bool)
    return locations, candidates_at(locations, chosen)


def test_params_equal_full_convolution_at_every_location() -> None:
    # All locations of three levels and two images, so all corners and sides too.
    head, features = make_head(), make_features()
    nn.init.normal_(head.params_pred.weight)
    nn.init.normal_(head.params_pred.bias)
    _, params_features = head(features)
    _, candidates = all_candidates(features)
    params = head.at(params_features, candidates).params
    full = [head.params_pred(x).flatten(2).mT for x in params_features]  # (B, H*W, P) per level
    torch.testing.assert_close(params, torch.cat(full, dim=1).flatten(0, 1), atol=1e-4, rtol=1e-4)


def test_params_without_candidates() -> None:
    head, features = make_head(), make_features()
    _, params_features = head(features)
    locations, _ = all_candidates(features)
    chosen = torch.zeros(2, len(locations.points), dtype=torch.bool)
    params = head.at(params_features, candidates_at(locations, chosen)).params
    assert params.shape == (0, NUM_PARAMS)
    params.sum().backward()
    for parameter in (*head.params_subnet.parameters(), *head.params_pred.parameters()):
        assert parameter.grad.equal(torch.zeros_like(parameter))


def test_boxes_are_distances_in_strides_from_the_location() -> None:
    # Without a tower and with weights that copy channels 0 to 3 of the middle cell: logarithms.
    head = make_head(num_convs=0, with_boxes=True)
    nn.init.zeros_(head.box_pred.weight)
    for i in range(4):
        head.box_pred.weight.data[i, i, 1, 1] = 1
    features = [torch.zeros(1, CHANNELS, *size) for size in SIZES]
    features[1][0, :4, 1, 2] = torch.tensor([0.5, 2.0, 1.0, 0.0]).log().clamp(min=-30)
    features[2][0, :4, 0, 0] = torch.tensor([1e4, 0.0, 0.0, 0.0])
    locations = Locations.of(features, STRIDES)
    candidates = candidates_at(locations, (torch.arange(28) >= 25)[None])
    boxes = head.at(head(features)[1], candidates).boxes
    # Cell (2, 1) at stride 16 is (40, 24): 8 to the left, 32 up, 16 to the right, nothing below.
    # Zeros are e^0 = 1 stride. A wild distance is cut at e^7 strides and stays finite.
    assert boxes[0].tolist() == pytest.approx([32, -8, 56, 24], abs=1e-4)
    assert boxes[1].tolist() == pytest.approx([16 - 32 * math.exp(7), -16, 48, 48])
    assert boxes[2].tolist() == [16, -16, 80, 48]


def test_boxes_equal_full_convolution_at_every_location() -> None:
    head, features = make_head(with_boxes=True), make_features()
    params_features = head(features)[1]
    _, candidates = all_candidates(features)
    boxes = head.at(params_features, candidates).boxes
    full = torch.cat([head.box_pred(x).flatten(2).mT for x in params_features], dim=1).flatten(0, 1)
    distances = full.exp() * candidates.strides[:, None]
    expected = candidates.points.repeat(1, 2) + distances * torch.tensor([-1, -1, 1, 1])
    torch.testing.assert_close(boxes, expected)


def test_head_without_boxes_has_none() -> None:
    head, features = make_head(), make_features()
    _, candidates = all_candidates(features)
    assert head.at(head(features)[1], candidates).boxes is None
    assert not [name for name in head.state_dict() if "box" in name]


@pytest.mark.parametrize("axis", [0, 1])
def test_logits_are_in_the_order_of_locations(axis: int) -> None:
    # Without towers and with a score that copies channel 0, which holds x or y of the location.
    head = make_head(num_convs=0)
    nn.init.zeros_(head.cls_score.weight)
    nn.init.zeros_(head.cls_score.bias)
    head.cls_score.weight.data[0, 0, 1, 1] = 1
    features = [torch.zeros(2, CHANNELS, *size) for size in SIZES]
    locations = Locations.of(features, STRIDES)
    for level, x in enumerate(features):
        own = locations.points[locations.levels == level]
        x[:, 0] = own[:, axis].view(x.shape[2:])
    logits, _ = head(features)
    assert logits.equal(locations.points[:, axis].expand(2, -1))


@pytest.mark.parametrize("prior_prob", [0.01, 0.2])
def test_untrained_probability_is_the_prior(prior_prob: float) -> None:
    # Weights of 0.01 over 9 * 32 inputs of about 1 move the logit by some 0.1.
    head = make_head(prior_prob=prior_prob)
    probability = head(make_features())[0].sigmoid()
    assert probability.mean().item() == pytest.approx(prior_prob, rel=0.1)
    assert ((probability > prior_prob / 2) & (probability < prior_prob * 2)).all()
    assert prior_bias(prior_prob) == pytest.approx(torch.logit(torch.tensor(prior_prob)).item())


def test_weights_are_shared_over_levels() -> None:
    head, x = make_head(), make_features()[0]
    logits, params_features = head([x, x])
    first, second = logits.chunk(2, dim=1)
    assert first.equal(second)
    assert params_features[0].equal(params_features[1])


def test_towers_are_separate() -> None:
    head, features = make_head(), make_features()
    logits, params_features = head(features)
    logits.sum().backward()
    assert all(p.grad is not None for p in head.cls_subnet.parameters())
    assert all(p.grad is None for p in head.params_subnet.parameters())
    sum(x.sum() for x in params_features).backward()
    assert all((p.grad != 0).any() for p in head.params_subnet.parameters())


def test_parameter_names_are_an_interface() -> None:
    # Renaming breaks checkpoints.
    expected = {
        f"{name}.{kind}" for name in ("cls_score", "params_pred") for kind in ("weight", "bias")
    }
    for tower in ("cls_subnet", "params_subnet"):
        expected |= {
            f"{tower}.{i}.{x}" for i in range(2) for x in ("weight", "norm.weight", "norm.bias")
        }
    assert set(make_head(num_convs=2).state_dict()) == expected


@pytest.mark.parametrize("norm", ["GN", ""])
def test_weights_begin_normal_and_biases_zero(norm: str) -> None:
    head = make_head(num_convs=2, norm=norm)
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d):
            # 288 weights at least: their std is known to 4 %, their mean to 0.0006.
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.15)
            assert layer.weight.mean().abs() < 0.003
            if layer.bias is not None and layer is not head.cls_score:
                assert (layer.bias == 0).all()
    # 9216 weights, their std is known to 1 %.
    assert head.cls_subnet[0].weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_init_leaves_norms_alone() -> None:
    norm = nn.GroupNorm(2, 4)
    nn.init.constant_(norm.weight, 3.0)
    init_as_retinanet(nn.Sequential(norm))
    assert (norm.weight == 3).all()


@pytest.mark.parametrize("norm", ["GN", ""])
def test_tower_is_convolution_norm_relu(norm: str) -> None:
    torch.manual_seed(0)
    tower, x = conv_tower(4, 32, 2, norm), torch.randn(1, 4, 5, 6)
    expected = x
    for layer in tower:
        expected = nn.functional.conv2d(expected, layer.weight, layer.bias, padding=1)
        if norm:
            expected = nn.functional.group_norm(expected, 32, eps=1e-5)
        expected = expected.clamp(min=0)
        assert (layer.bias is None) == bool(norm)
    torch.testing.assert_close(tower(x), expected)


def test_tower_without_convolutions_passes_its_input() -> None:
    x = torch.randn(1, 4, 5, 6)
    assert conv_tower(4, 32, 0, "GN")(x).equal(x)
