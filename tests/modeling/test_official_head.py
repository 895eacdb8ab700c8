"""Head and branches of the authors' model, against numbers of their code."""

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.ops import deform_conv2d

from inspose_d2.checkpoint.opera import prefixes
from inspose_d2.modeling.candidates import candidates_at
from inspose_d2.modeling.geometry import Locations
from inspose_d2.modeling.official.head import (
    STAR_GRADIENT,
    STAR_KEYPOINTS,
    DenseBranch,
    KeypointFeatures,
    OfficialHead,
    StarConv2d,
    star_points,
)
from tests.modeling.test_official_criterion import OURS, criterion, persons_of_images

STRIDES = [8, 16, 32, 64, 128]


class Parts(nn.Module):
    """What the authors call the head."""

    def __init__(self) -> None:
        super().__init__()
        widths = {"in_channels": 256, "norm": "GN"}
        self.head = OfficialHead(
            num_convs=4, conv_dim=256, num_params=313, num_keypoints=17, prior_prob=0.01, **widths
        )
        self.keypoint_branch = KeypointFeatures(num_convs=4, conv_dim=128, out_channels=8, **widths)
        self.dense_branch = DenseBranch(num_convs=2, conv_dim=512, num_keypoints=17, **widths)


@pytest.fixture(scope="module")
def parts(golden: Any) -> Parts:
    numbers, recipe, table = golden("forward_instance"), golden.recipe("recipe"), dict(prefixes())
    state = {}
    for i, (name, padded) in enumerate(
        zip(numbers["param_names"], numbers["param_shapes"].tolist(), strict=True)
    ):
        shape = tuple(n for n in padded if n)
        prefix, _, last = f"bbox_head.{name}".rpartition(".")
        value = torch.from_numpy(recipe.parameter(i, str(name), shape))
        assert value.double().sum() == pytest.approx(numbers["param_sum_f64"][i].item())
        state[f"{table[prefix]}.{last}"] = value
    parts = Parts()
    parts.load_state_dict(state)
    return parts.to(memory_format=torch.channels_last)


@torch.no_grad()
def test_forward_of_the_authors_features(golden: Any, parts: Parts) -> None:
    numbers = golden("forward_instance")
    features = [torch.from_numpy(x) for x in golden.recipe("recipe").features(1)]
    logits, poses = parts.head(features)
    locations = Locations.of(features, STRIDES)
    for level, pose in enumerate(poses):
        torch.testing.assert_close(pose, numbers[f"offset_pred{level}"], atol=1e-4, rtol=0)
    expected = torch.cat([numbers[f"cls_score{i}"].flatten(1) for i in range(5)], dim=1)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

    everywhere = candidates_at(locations, torch.ones_like(logits, dtype=torch.bool))
    params = parts.head.predict_params(features, poses, locations, everywhere)
    expected = torch.cat([numbers[f"controller{i}"].flatten(2) for i in range(5)], dim=2)[0].T
    torch.testing.assert_close(params, expected, atol=1e-4, rtol=0)
    shared = parts.keypoint_branch(features[0])
    torch.testing.assert_close(shared, numbers["shared_feat"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_dense_branch_of_the_authors_features(golden: Any, parts: Parts) -> None:
    numbers, branch = golden("forward_dense"), parts.dense_branch
    x = branch(torch.from_numpy(golden.recipe("recipe").features(1)[0]))
    for name, layer in (
        ("heatmap", branch.heatmap_pred),
        ("ae", branch.tag_pred),
        ("offset", branch.offset_pred),
    ):
        torch.testing.assert_close(layer(x), numbers[name], atol=1e-4, rtol=0)
    cells = torch.randint(64 * 80, (9, 17), generator=torch.Generator().manual_seed(0))
    offsets = branch.offsets_at(x, torch.zeros(9, dtype=torch.int64), cells)
    rows = numbers["offset"][0].unflatten(0, (17, 2)).flatten(2)
    expected = rows[torch.arange(17), :, cells]
    torch.testing.assert_close(offsets, expected, atol=1e-4, rtol=0)


def test_star_convolution_is_a_deformable_one_and_so_are_its_gradients() -> None:
    torch.manual_seed(0)
    star = StarConv2d(32, "GN")
    x = torch.randn(2, 32, 5, 7).to(memory_format=torch.channels_last).requires_grad_()
    points = (3 * torch.randn(2, 9, 2, 5, 7)).requires_grad_()
    steps = torch.tensor([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)])
    offsets = (points.flip(2) - steps[None, :, :, None, None]).flatten(1, 2)
    expected = deform_conv2d(x, offsets, star.weight, padding=1)
    got = star.sample(x, points)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    like = torch.randn_like(got)
    inputs = (x, points, star.weight)
    for own, theirs in zip(
        torch.autograd.grad(got, inputs, like),
        torch.autograd.grad(expected, inputs, like),
        strict=True,
    ):
        torch.testing.assert_close(own, theirs, atol=1e-4, rtol=1e-4)


def test_points_far_away_and_not_finite_do_not_crash() -> None:
    star = StarConv2d(32, "GN")
    points = torch.zeros(1, 9, 2, 3, 3)
    points[:, 0], points[:, 1, 0], points[:, 2, 1] = 1e30, torch.nan, -torch.inf
    x = torch.ones(1, 32, 3, 3)
    assert star.sample(x, points).shape == (1, 32, 3, 3)
    points = torch.full_like(points, 1e30)
    assert star.sample(x, points).count_nonzero() == 0


def test_points_of_a_star_are_nine_keypoints_and_get_a_tenth_of_the_gradient() -> None:
    pose = torch.arange(34.0).view(1, 34, 1, 1).requires_grad_()
    points = star_points(pose)
    expected = torch.tensor([[2.0 * k, 2 * k + 1] for k in STAR_KEYPOINTS])
    assert torch.equal(points[0, :, :, 0, 0], expected)
    points.sum().backward()
    assert pose.grad is not None
    nose, eye = pose.grad.view(17, 2)[:2]
    torch.testing.assert_close(nose, torch.full((2,), STAR_GRADIENT))
    assert eye.count_nonzero() == 0


def test_parameters_of_chosen_locations_are_those_of_all(golden: Any, parts: Parts) -> None:
    """Levels and images that no location is of are left out, which changes nothing."""
    features = [
        torch.from_numpy(x[:, :, :4, :6].copy()) for x in golden.recipe("recipe").features(2)
    ]
    locations = Locations.of(features, STRIDES)
    with torch.no_grad():
        _, poses = parts.head(features)
        chosen = torch.zeros(2, len(locations.points), dtype=torch.bool)
        chosen[0, 3] = chosen[1, -1] = chosen[1, 30] = True
        some = candidates_at(locations, chosen)
        everywhere = candidates_at(locations, torch.ones_like(chosen))
        params = parts.head.predict_params(features, poses, locations, some)
        expected = parts.head.predict_params(features, poses, locations, everywhere)
    torch.testing.assert_close(params, expected[chosen.flatten()], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_losses_of_the_authors_features_and_the_gradients_of_all_parameters(
    golden: Any, parts: Parts
) -> None:
    numbers, persons = golden("loss_from_features"), persons_of_images(golden("gt"))
    features = [torch.from_numpy(x) for x in golden.recipe("recipe").features(3)]
    locations, losses = Locations.of(features, STRIDES), criterion()
    targets = losses.targets(persons, locations, (32, 40))
    where = targets.positives
    logits, poses = parts.head(features)
    deltas = torch.cat([x.flatten(2) for x in poses], dim=2).mT
    dense = parts.dense_branch(features[0])
    got = losses.losses(
        targets,
        persons,
        person_logits=logits,
        params=parts.head.params_everywhere(features, poses, where),
        regressed=deltas[where.image, where.index].unflatten(1, (17, 2)),
        keypoint_features=parts.keypoint_branch(features[0]),
        heatmap_logits=parts.dense_branch.heatmap_pred(dense),
        tags=parts.dense_branch.tag_pred(dense),
        offsets=parts.dense_branch.offset_pred(dense),
    )
    for name, value in zip(numbers["names"], numbers["values_double_f64"].tolist(), strict=True):
        assert got[OURS[str(name)]].item() == pytest.approx(value, rel=1e-5), name
    sum(got.values()).backward()  # type: ignore[union-attr]
    table, ours = dict(prefixes()), dict(parts.named_parameters())
    norms = numbers["grad_norm_double_f64"].tolist()
    for name, norm, first in zip(
        numbers["param_names"], norms, numbers["grad_first8"], strict=True
    ):
        prefix, _, last = f"bbox_head.{name}".rpartition(".")
        grad = ours[f"{table[prefix]}.{last}"].grad
        assert grad is not None
        assert grad.double().norm().item() == pytest.approx(norm, rel=1e-3), name
        own = grad.flatten()[:8]
        torch.testing.assert_close(own, first[: len(own)], rtol=1e-2, atol=2e-3 * norm)
    parts.zero_grad()
