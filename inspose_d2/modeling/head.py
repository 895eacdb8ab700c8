"""Predictions at every location: person or not, KP-Net parameters (sec. 3.1), a box (Table 4)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, get_norm
from torch import Tensor, nn

from .candidates import Candidates
from .predictions import PersonPredictions

MAX_LOG_DISTANCE = 7.0  # e^7 strides are beyond any image: a wild prediction stays finite


def conv_tower(in_channels: int, channels: int, num_convs: int, norm: str) -> nn.Sequential:
    """Stack 3x3 convolutions, each with norm and ReLU.

    Args:
        in_channels: channels of the input.
        channels: channels of each convolution.
        num_convs: how many; 0 passes the input through.
        norm: name for ``detectron2.layers.get_norm``; "" for none.

    Returns:
        The tower.
    """
    return nn.Sequential(
        *(
            Conv2d(
                in_channels if i == 0 else channels,
                channels,
                kernel_size=3,
                padding=1,
                bias=not norm,
                norm=get_norm(norm, channels),
                activation=F.relu_,
            )
            for i in range(num_convs)
        )
    )


def init_as_retinanet(module: nn.Module) -> None:
    """Draw convolution weights from N(0, 0.01) and zero the biases (sec. 4, Lin et al. 2017b)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def prior_bias(probability: float) -> float:
    """Logit of a probability: the bias that makes an untrained output predict it."""
    return -math.log((1 - probability) / probability)


class InsPoseHead(nn.Module):
    """Classification head and parameter head, their weights shared over the levels (fig. 3).

    Only a few hundred of some 20,000 locations ever need their KP-Net parameters or their box. So
    ``forward`` stops at the features that :meth:`at` reads at chosen locations.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        num_convs: int,
        conv_dim: int,
        norm: str,
        num_params: int,
        prior_prob: float,
        with_boxes: bool,
        num_regressed: int = 0,
        num_visibility: int = 0,
    ) -> None:
        """Build both towers.

        Args:
            in_channels: channels of every level.
            num_convs: depth of each tower.
            conv_dim: width of each tower.
            norm: norm of the towers.
            num_params: P, parameters of a KP-Net.
            prior_prob: person probability of an untrained location.
            with_boxes: whether boxes are predicted from the parameter tower (end of sec. 3.4).
            num_regressed: keypoints that are regressed from the parameter tower, an auxiliary
                task of training (the authors' later code); 0 regresses none.
            num_visibility: keypoints whose visibility is predicted from the parameter tower (ours);
                0 predicts none.
        """
        super().__init__()
        self.cls_subnet = conv_tower(in_channels, conv_dim, num_convs, norm)
        self.cls_score = nn.Conv2d(conv_dim, 1, 3, padding=1)
        self.params_subnet = conv_tower(in_channels, conv_dim, num_convs, norm)
        self.params_pred = nn.Conv2d(conv_dim, num_params, 3, padding=1)
        self.box_pred = nn.Conv2d(conv_dim, 4, 3, padding=1) if with_boxes else None
        self.regression_pred = (
            nn.Conv2d(conv_dim, 2 * num_regressed, 3, padding=1) if num_regressed else None
        )
        self.visibility_pred = (
            nn.Conv2d(conv_dim, num_visibility, 3, padding=1) if num_visibility else None
        )
        init_as_retinanet(self)
        nn.init.constant_(self.cls_score.bias, prior_bias(prior_prob))  # type: ignore[arg-type]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read all but ``in_channels`` and ``num_params``."""
        node = cfg.MODEL.INSPOSE
        return {
            "num_convs": node.NUM_CONVS,
            "conv_dim": node.CONV_DIM,
            "norm": node.NORM,
            "prior_prob": node.PRIOR_PROB,
            "with_boxes": node.BOX_HEAD.ENABLED,
            "num_regressed": node.NUM_KEYPOINTS if node.REGRESSION.ENABLED else 0,
            "num_visibility": node.NUM_KEYPOINTS if node.VISIBILITY.ENABLED else 0,
        }

    def forward(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Predict persons and prepare the parameters.

        Args:
            features: (B, C, H_l, W_l) per level.

        Returns:
            (B, L) person logits, L over all levels, row by row, and per level the
            (B, conv_dim, H_l, W_l) input of :meth:`at`.
        """
        logits = [self.cls_score(self.cls_subnet(x)).flatten(1) for x in features]
        return torch.cat(logits, dim=1), [self.params_subnet(x) for x in features]

    def at(self, params_features: list[Tensor], candidates: Candidates) -> PersonPredictions:
        """Predict what is only asked for at N locations.

        Args:
            params_features: from :meth:`forward`.
            candidates: the locations, counted as in the logits.

        Returns:
            The predictions; regressed keypoints and visibility in training alone.
        """
        patches = gather_patches(params_features, candidates.image, candidates.index)
        regressed = None
        if self.regression_pred is not None and self.training:
            regressed = convolve_patches(self.regression_pred, patches).unflatten(1, (-1, 2))
        return PersonPredictions(
            candidates,
            params=convolve_patches(self.params_pred, patches),
            boxes=self.predict_boxes(patches, candidates),
            regressed=regressed,
            visibility=self.predict_visibility(patches) if self.training else None,
        )

    def predict_visibility(self, patches: Tensor) -> Tensor | None:
        """Map (N, 9 * conv_dim) patches to the visibility of the keypoints.

        Returns:
            (N, K) logits of the probability that a keypoint is visible; None without the output.
        """
        if self.visibility_pred is None:
            return None
        return convolve_patches(self.visibility_pred, patches)

    def predict_boxes(self, patches: Tensor, candidates: Candidates) -> Tensor | None:
        """Predict the box of the person at each location.

        The outputs are logarithms of the distances, in strides, from the location to the left,
        upper, right and lower side of the box (ours; FCOS learns a scale per level besides).

        Args:
            patches: (N, 9 * conv_dim) from :func:`gather_patches`.
            candidates: the N locations.

        Returns:
            (N, 4) boxes x0, y0, x1, y1 in image pixels, float32; None without the box head.
        """
        if self.box_pred is None:
            return None
        log_distances = convolve_patches(self.box_pred, patches).float()
        distances = log_distances.clamp(max=MAX_LOG_DISTANCE).exp() * candidates.strides[:, None]
        low, high = distances.split(2, dim=1)
        return torch.cat([candidates.points - low, candidates.points + high], dim=1)


def gather_patches(features: list[Tensor], image: Tensor, index: Tensor) -> Tensor:
    """Gather what a 3x3 convolution sees at N cells of some maps.

    Args:
        features: (B, C, H_l, W_l) per level.
        image: (N,) number of the image.
        index: (N,) number of the cell, over all levels, row by row.

    Returns:
        (N, 9 * C) patches, row by row, channels last.
    """
    rows = torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in features], dim=1)
    neighbours, inside = _neighbours([x.shape[2:] for x in features], rows.device)
    patches = rows[image[:, None], neighbours[index]]  # (N, 9, C)
    return patches.mul_(inside[index][..., None]).flatten(1)


def convolve_patches(conv: nn.Conv2d, patches: Tensor) -> Tensor:
    """Apply a 3x3 convolution to (N, 9 * C) patches, row by row, channels last: (N, out)."""
    return F.linear(patches, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def _neighbours(sizes: list[torch.Size], device: torch.device) -> tuple[Tensor, Tensor]:
    """Find the 3x3 neighbourhood of each location in the row of all levels.

    Args:
        sizes: (H_l, W_l) of each level.
        device: where to put the result.

    Returns:
        (L, 9) indices, row by row, and (L, 9) bool: whether the neighbour is in the level. The
        index of one that is not is that of a location of the level.
    """
    indices, inside, start = [], [], 0
    step = torch.arange(-1, 2, device=device)
    for height, width in sizes:
        row = (torch.arange(height, device=device)[:, None] + step)[:, None, :, None]
        column = (torch.arange(width, device=device)[:, None] + step)[None, :, None, :]
        index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1) + start
        in_level = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        indices.append(index.reshape(-1, 9))
        inside.append(in_level.reshape(-1, 9))
        start += height * width
    return torch.cat(indices), torch.cat(inside)
