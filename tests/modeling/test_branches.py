import pytest
import torch
from torch import Tensor, nn

from inspose_d2.modeling.branches import DiskOffsetBranch, HeatmapBranch, KeypointFeatureBranch

BRANCHES = [KeypointFeatureBranch, DiskOffsetBranch, HeatmapBranch]


def make(
    branch: type[nn.Module], out_channels: int = 5, num_convs: int = 1, scale: float = 1
) -> nn.Module:
    torch.manual_seed(0)
    return branch(
        in_channels=16,
        num_convs=num_convs,
        conv_dim=32,
        norm="GN",
        out_channels=out_channels,
        scale=scale,
    )


def make_feature() -> Tensor:
    return torch.randn(2, 16, 5, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(("out_channels", "num_convs"), [(8, 1), (34, 2)])
def test_branch_keeps_stride_and_has_its_channels(
    branch: type[nn.Module], out_channels: int, num_convs: int
) -> None:
    module = make(branch, out_channels, num_convs)
    assert module(make_feature()).shape == (2, out_channels, 5, 7)
    assert len(module.tower) == num_convs
    names = {
        f"tower.{i}.{x}" for i in range(num_convs) for x in ("weight", "norm.weight", "norm.bias")
    }
    assert set(module.state_dict()) == names | {"predictor.weight", "predictor.bias"}


@pytest.mark.parametrize("branch", BRANCHES)
def test_half_the_resolution_is_the_mean_of_four_cells(branch: type[nn.Module]) -> None:
    feature = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    full, half = make(branch)(feature), make(branch, scale=0.5)(feature)
    torch.testing.assert_close(half, full.unflatten(3, (3, 2)).unflatten(2, (2, 2)).mean((3, 5)))


@pytest.mark.parametrize("scale", [2, 4])
def test_higher_resolution_interpolates_between_the_centres_of_cells(scale: int) -> None:
    # An output that is x + 10 y at the centres of its cells, in cells of the feature, is still
    # that at the centres of the finer cells, except within half a coarse cell of the border.
    module = make(KeypointFeatureBranch, out_channels=1, scale=scale)
    module.tower = module.predictor = nn.Identity()
    x, y = torch.arange(7) + 0.5, torch.arange(5) + 0.5
    fine_x, fine_y = ((torch.arange(n * scale) + 0.5) / scale for n in (7, 5))
    output = module((x + 10 * y[:, None])[None, None])
    inner = slice(scale // 2, -(scale // 2))
    expected = (fine_x + 10 * fine_y[:, None])[inner, inner]
    torch.testing.assert_close(output[0, 0, inner, inner], expected)


@pytest.mark.parametrize("branch", BRANCHES)
def test_output_is_linear_in_the_last_convolution(branch: type[nn.Module]) -> None:
    # Nothing behind the predictor: no ReLU would let both signs pass, no norm the size.
    module, feature = make(branch), make_feature()
    nn.init.zeros_(module.predictor.bias)
    output = module(feature)
    assert (output < 0).any()
    assert (output > 0).any()
    module.predictor.weight.data *= -100
    torch.testing.assert_close(module(feature), -100 * output)


@pytest.mark.parametrize(
    ("branch", "bias"),
    # log((1 - 0.1) / 0.1) = 2.197225: heatmaps begin at 0.1, CornerNet's prior.
    [(KeypointFeatureBranch, 0.0), (DiskOffsetBranch, 0.0), (HeatmapBranch, -2.197225)],
)
def test_untrained_output_is_its_bias(branch: type[nn.Module], bias: float) -> None:
    module = make(branch)
    assert module.predictor.bias.tolist() == pytest.approx([bias] * 5, abs=1e-6)
    # Weights of 0.01 over 9 * 32 inputs of about 1 move the output by some 0.1.
    assert (module(make_feature()) - bias).abs().max() < 0.6
    assert module(make_feature()).mean().item() == pytest.approx(bias, abs=0.1)


@pytest.mark.parametrize("branch", BRANCHES)
def test_weights_begin_small_and_gradient_reaches_them(branch: type[nn.Module]) -> None:
    module = make(branch)
    # 32 * 16 * 9 and 5 * 32 * 9 weights: their std is known to 2 %.
    assert module.tower[0].weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert module.predictor.weight.std().item() == pytest.approx(0.01, rel=0.1)
    module(make_feature()).square().sum().backward()
    assert all((p.grad != 0).any() for p in module.parameters())
