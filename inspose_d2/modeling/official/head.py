"""Heads and branches of the authors' released model, where they differ from the paper's."""

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from ..candidates import Candidates
from ..geometry import Locations
from ..head import (
    conv_tower,
    convolve_patches,
    gather_patches,
    init_as_retinanet,
    prior_bias,
)

# COCO keypoints whose regressed places a star convolution samples, in the order of its taps: nose,
# shoulders, wrists, hips, ankles.
STAR_KEYPOINTS = (0, 5, 6, 9, 10, 11, 12, 15, 16)
# Share of the gradient that the regressed places get from the star convolutions.
STAR_GRADIENT = 0.1
DENSE_SCALE = 2  # cells of the dense maps per cell of their feature, along each side


class StarConv2d(Conv2d):
    """3x3 convolution, with norm and ReLU, whose nine taps sample at keypoints of a pose.

    A deformable convolution without modulation: what lies outside the map counts as zero.
    """

    def __init__(self, channels: int, norm: str) -> None:
        """Build as many output as input channels."""
        super().__init__(
            channels,
            channels,
            kernel_size=3,
            padding=1,
            bias=False,
            norm=get_norm(norm, channels),
            activation=F.relu_,
        )
        nn.init.normal_(self.weight, std=0.1)

    def forward(self, x: Tensor, points: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: (B, C, H, W).
            points: (B, 9, 2, H, W) x, y of each tap, in cells from the cell of the output.

        Returns:
            (B, C, H, W).
        """
        x = self.sample(x, points.float())
        return self.activation(x if self.norm is None else self.norm(x))

    def sample(self, x: Tensor, points: Tensor) -> Tensor:
        """Convolve, before norm and ReLU; the gradient reaches the points too."""
        if x.is_cuda:
            steps = torch.arange(-1, 2, device=x.device)
            own = torch.cartesian_prod(steps, steps)[None, :, :, None, None]  # y, x of the taps
            offsets = (points.flip(2) - own).flatten(1, 2)
            return deform_conv2d(x, offsets.to(x.dtype), self.weight, padding=1)
        # torchvision's loops take 3 times as long on a CPU.
        cells, weights = _corners(points)  # (B, H, W, 9, 4)
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)  # (B * H * W, C)
        samples = F.embedding_bag(
            cells.flatten(0, 3), rows, mode="sum", per_sample_weights=weights.flatten(0, 3).to(rows)
        )
        kernel = self.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (9 * C, out)
        out = samples.reshape(-1, len(kernel)) @ kernel
        return out.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


def _corners(points: Tensor) -> tuple[Tensor, Tensor]:
    """Find the four cells around each sampling point and their bilinear weights.

    Args:
        points: (B, 9, 2, H, W), see :class:`StarConv2d`.

    Returns:
        (B, H, W, 9, 4) cells, counted over all images row by row, and weights, 0 for a corner
        outside the map.
    """
    batch, _, _, height, width = points.shape
    columns = torch.arange(width, device=points.device)
    rows = torch.arange(height, device=points.device)[:, None]
    x, y = points[:, :, 0] + columns, points[:, :, 1] + rows  # (B, 9, H, W)
    # Far away all corners are outside; as they are, huge numbers would overflow the integers.
    x, y = x.clamp(-2, width + 1), y.clamp(-2, height + 1)
    left, top = x.detach().floor(), y.detach().floor()
    cells, weights = [], []
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        cells.append((row * width + column).long().where(inside, 0))
        weights.append((1 - (y - row).abs()) * (1 - (x - column).abs()) * inside)
    image = torch.arange(batch, device=points.device).view(-1, 1, 1, 1, 1)
    cell = torch.stack(cells, -1) + image * (height * width)
    return (
        cell.permute(0, 2, 3, 1, 4).contiguous(),
        torch.stack(weights, -1).permute(0, 2, 3, 1, 4).contiguous(),
    )


class OfficialHead(nn.Module):
    """Person logits, regressed poses and KP-Net parameters, their weights shared over the levels.

    Classification and parameters see, beside their towers, a star convolution of these at the
    regressed poses. ``forward`` leaves out the parameters: they are needed at a few locations of
    the levels that poses are kept of.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_convs: int,
        conv_dim: int,
        norm: str,
        num_params: int,
        num_keypoints: int,
        prior_prob: float,
    ) -> None:
        """Build the three towers.

        Args:
            in_channels: channels of every level.
            num_convs: depth of each tower.
            conv_dim: width of the towers of classification and parameters; that of the poses is
                twice as wide.
            norm: norm of the towers.
            num_params: P, parameters of a KP-Net.
            num_keypoints: K.
            prior_prob: person probability of an untrained location.
        """
        super().__init__()
        self.cls_subnet = conv_tower(in_channels, conv_dim, num_convs, norm)
        self.params_subnet = conv_tower(in_channels, conv_dim, num_convs, norm)
        self.pose_subnet = conv_tower(in_channels, 2 * conv_dim, num_convs, norm)
        self.cls_score = nn.Conv2d(2 * conv_dim, 1, 3, padding=1)
        self.params_pred = nn.Conv2d(2 * conv_dim, num_params, 3, padding=1)
        self.pose_pred = nn.Conv2d(2 * conv_dim, 2 * num_keypoints, 3, padding=1)
        init_as_retinanet(self)
        nn.init.constant_(self.cls_score.bias, prior_bias(prior_prob))  # type: ignore[arg-type]
        self.cls_star = StarConv2d(conv_dim, norm)
        self.params_star = StarConv2d(conv_dim, norm)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Predict persons and regress poses.

        Args:
            features: (B, C, H_l, W_l) per level.

        Returns:
            (B, L) person logits, L over all levels, row by row, and per level the regressed poses
            (B, 2K, H_l, W_l): x0, y0, x1, ... from the location, in strides.
        """
        poses = [self.pose_pred(self.pose_subnet(x)) for x in features]
        logits = []
        for x, pose in zip(features, poses, strict=True):
            x = self.cls_subnet(x)
            x = torch.cat([x, self.cls_star(x, star_points(pose))], dim=1)
            logits.append(self.cls_score(x).flatten(1))
        return torch.cat(logits, dim=1), poses

    def params_features(self, feature: Tensor, pose: Tensor) -> Tensor:
        """Prepare the parameters of a level.

        Args:
            feature: (B, C, H, W).
            pose: (B, 2K, H, W) from :meth:`forward`.

        Returns:
            (B, 2 * conv_dim, H, W) input of the last convolution.
        """
        x = self.params_subnet(feature)
        return torch.cat([x, self.params_star(x, star_points(pose))], dim=1)

    def predict_params(
        self,
        features: list[Tensor],
        poses: list[Tensor],
        locations: Locations,
        candidates: Candidates,
    ) -> Tensor:
        """Predict the KP-Net parameters of N locations.

        A tower runs over a whole map, for its norm sees all of it; but not over those that none of
        the locations is of.

        Args:
            features: (B, C, H_l, W_l) per level.
            poses: per level, from :meth:`forward`.
            locations: of the levels.
            candidates: the N locations.

        Returns:
            (N, P) parameters.
        """
        level_of = locations.levels[candidates.index]
        params = features[0].new_empty(len(level_of), self.params_pred.out_channels)
        start = 0
        for level, (height, width) in enumerate(locations.sizes):
            own = (level_of == level).nonzero()[:, 0]
            if len(own):
                images, image = candidates.image[own].unique(return_inverse=True)
                x = self.params_features(features[level][images], poses[level][images])
                patches = gather_patches([x], image, candidates.index[own] - start)
                params[own] = convolve_patches(self.params_pred, patches)
            start += height * width
        return params

    def params_everywhere(
        self, features: list[Tensor], poses: list[Tensor], candidates: Candidates
    ) -> Tensor:
        """Predict as :meth:`predict_params`, but run the towers of all levels and images.

        So every parameter gets a gradient, and no size depends on the candidates.
        """
        levels = [self.params_features(x, pose) for x, pose in zip(features, poses, strict=True)]
        patches = gather_patches(levels, candidates.image, candidates.index)
        return convolve_patches(self.params_pred, patches)


def star_points(pose: Tensor) -> Tensor:
    """Take the sampling points of a star convolution out of regressed poses.

    Args:
        pose: (B, 2K, H, W) x0, y0, x1, ... in strides.

    Returns:
        (B, 9, 2, H, W); backwards, ``STAR_GRADIENT`` of the gradient goes through.
    """
    points = pose.unflatten(1, (-1, 2))[:, list(STAR_KEYPOINTS)]
    return torch.lerp(points.detach(), points, STAR_GRADIENT) if points.requires_grad else points


class KeypointFeatures(nn.Module):
    """The shared input of all KP-Nets; here its last layer has a norm and ReLU too."""

    def __init__(
        self, *, in_channels: int, num_convs: int, conv_dim: int, norm: str, out_channels: int
    ) -> None:
        """Build the layers.

        Args:
            in_channels: channels of P3.
            num_convs: hidden convolutions.
            conv_dim: their width.
            norm: their norm.
            out_channels: channels of the output, normed in two groups.
        """
        super().__init__()
        self.tower = conv_tower(in_channels, conv_dim, num_convs, norm)
        self.predictor = Conv2d(
            conv_dim,
            out_channels,
            kernel_size=3,
            padding=1,
            bias=False,
            norm=nn.GroupNorm(2, out_channels),
            activation=F.relu_,
        )
        init_as_retinanet(self)

    def forward(self, feature: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, out_channels, H, W), not negative."""
        return self.predictor(self.tower(feature))


class DenseBranch(nn.Module):
    """What every cell says of the keypoints near it, at twice the resolution of P3.

    Offsets are read at the peaks of the KP-Nets' maps. Heatmaps and tags serve training alone, but
    checkpoints have them.
    """

    def __init__(
        self, *, in_channels: int, num_convs: int, conv_dim: int, norm: str, num_keypoints: int
    ) -> None:
        """Build the layers.

        Args:
            in_channels: channels of P3.
            num_convs: convolutions before the resolution is doubled; one follows.
            conv_dim: their width.
            norm: their norm.
            num_keypoints: K.
        """
        super().__init__()
        self.low = conv_tower(in_channels, conv_dim, num_convs, norm)
        self.high = conv_tower(conv_dim, conv_dim, 1, norm)
        self.heatmap_pred = nn.Conv2d(conv_dim, num_keypoints, 3, padding=1)
        self.tag_pred = nn.Conv2d(conv_dim, num_keypoints, 3, padding=1)
        self.offset_pred = nn.Conv2d(conv_dim, 2 * num_keypoints, 3, padding=1)
        init_as_retinanet(self)
        nn.init.constant_(self.heatmap_pred.bias, prior_bias(0.1))  # type: ignore[arg-type]

    def forward(self, feature: Tensor) -> Tensor:
        """Map P3 (B, C, H, W) to the input (B, conv_dim, 2H, 2W) of the last layers."""
        x = self.low(feature)
        x = F.interpolate(x, scale_factor=DENSE_SCALE, mode="bilinear", align_corners=False)
        return self.high(x)

    def offsets_at(self, x: Tensor, image: Tensor, cells: Tensor) -> Tensor:
        """Predict the offset of each keypoint at one cell.

        Args:
            x: (B, conv_dim, 2H, 2W) from :meth:`forward`.
            image: (N,) number of the image.
            cells: (N, K) cell of each keypoint, row * 2W + column.

        Returns:
            (N, K, 2) x, y from the cell to the keypoint, in cells.
        """
        n, k = cells.shape
        patches = gather_patches([x], image.repeat_interleave(k), cells.flatten())
        weight = self.offset_pred.weight.permute(0, 2, 3, 1).flatten(1).unflatten(0, (k, 2))
        offsets = torch.einsum("nkc,kdc->nkd", patches.view(n, k, -1), weight)
        return offsets + self.offset_pred.bias.view(k, 2)  # type: ignore[union-attr]
