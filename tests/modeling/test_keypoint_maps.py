from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from inspose_d2 import InsPose
from inspose_d2.modeling.keypoint_maps import keypoint_maps_of


@pytest.fixture
def model(tiny_cfg: Callable[..., CfgNode]) -> InsPose:
    torch.manual_seed(0)
    cfg = tiny_cfg(["TEST.DETECTIONS_PER_IMAGE", 7])
    cfg.MODEL.INSPOSE.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.INSPOSE.NMS_THRESH_TEST = 1.0  # all stay
    model = build_model(cfg).eval()
    for parameter in model.head.parameters():  # initial weights make flat maps
        torch.nn.init.normal_(parameter, std=0.3)
    return model


# 90 x 75 is padded, and its maps (12 x 10 cells at stride 8) reach beyond it.
IMAGE = torch.rand(3, 90, 75, generator=torch.Generator().manual_seed(0)) * 255
INPUTS: dict[str, Any] = {"image": IMAGE, "height": 180, "width": 225}


def test_maps_are_those_that_the_poses_were_read_from(model: InsPose) -> None:
    with torch.no_grad():
        ordinary = model([INPUTS])[0]["instances"]
    assert len(ordinary) == 7
    chosen = [2, 0, 3]
    result = keypoint_maps_of(model, INPUTS, chosen)
    assert result.probs.shape == (3, 17, 12, 10)
    assert result.probs.sum(dim=(2, 3)).allclose(torch.ones(3, 17))
    # The same poses; the score of a keypoint is the probability at the peak.
    assert torch.equal(result.poses.pred_keypoints, ordinary.pred_keypoints[chosen])
    assert torch.equal(result.poses.scores, ordinary.scores[chosen])
    assert result.poses.get_fields().keys() == ordinary.get_fields().keys()
    peaks = result.probs.amax(dim=(2, 3))
    assert peaks.allclose(ordinary.pred_keypoints[chosen][..., 2], atol=1e-5)


@pytest.mark.parametrize(("stride", "size"), [(16, (6, 5)), (4, (23, 19))])
def test_maps_of_another_stride_are_those_that_the_poses_were_read_from(
    model: InsPose, stride: int, size: tuple[int, int]
) -> None:
    model.kp_net.map_stride = stride
    model.disk_offset_branch = None
    result = keypoint_maps_of(model, INPUTS, [1])
    assert result.probs.shape == (1, 17, *size)
    assert result.cell == (stride * 225 / 75, stride * 180 / 90)
    assert result.probs.sum(dim=(2, 3)).allclose(torch.ones(1, 17))
    peaks = result.probs.amax(dim=(2, 3))
    assert peaks.allclose(result.poses.pred_keypoints[..., 2], atol=1e-5)


def test_cells_are_in_pixels_of_the_asked_size(model: InsPose) -> None:
    model.disk_offset_branch = None  # keypoints are then the centres of cells
    result = keypoint_maps_of(model, INPUTS, [0, 1])
    assert result.cell == (8 * 225 / 75, 8 * 180 / 90)
    cells = result.probs.flatten(2).argmax(dim=2)
    centres = torch.stack([cells % 10 + 0.5, cells // 10 + 0.5], dim=2)
    expected = centres * torch.tensor(result.cell)
    inside = (expected < torch.tensor([225.0, 180.0])).all(dim=2)
    assert inside.any()
    found = result.poses.pred_keypoints[..., :2]
    assert found[inside].allclose(expected[inside], atol=1e-3)


def test_no_pose_chosen_gives_no_maps(model: InsPose) -> None:
    result = keypoint_maps_of(model, INPUTS, [])
    assert result.probs.shape == (0, 17, 12, 10)
    assert len(result.poses) == 0


def test_poses_that_are_not_there_are_refused(model: InsPose) -> None:
    with pytest.raises(ValueError, match=r"there are 7 poses in the image, asked for \[7\]"):
        keypoint_maps_of(model, INPUTS, [7])
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        keypoint_maps_of(model.train(), INPUTS, [0])
