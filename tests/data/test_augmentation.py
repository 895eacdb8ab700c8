"""What INPUT switches on beside resize and flip: sizes, keypoints and persons follow the image."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import BoxMode
from detectron2.utils.env import seed_all_rng
from PIL import Image
from torch import Tensor

from inspose_d2.data.dataset_mapper import InsPoseDatasetMapper

HEIGHT, WIDTH = 120, 160
POINTS = [(20.5, 30.5), (139.5, 30.5), (20.5, 99.5), (139.5, 99.5)]  # red, one each per keypoint
OFF = {"INPUT.RANDOM_FLIP": "none", "INPUT.MIN_SIZE_TRAIN": (HEIGHT, HEIGHT)}


@pytest.fixture
def image(tmp_path: Path) -> dict[str, Any]:
    """A grey image with four red squares, annotated by four of the keypoints of a person."""
    pixels = np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8)
    for x, y in POINTS:
        column, row = int(x), int(y)
        pixels[row - 3 : row + 4, column - 3 : column + 4] = (250, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    keypoints = np.zeros((17, 3))
    keypoints[[0, 5, 6, 11], :2], keypoints[[0, 5, 6, 11], 2] = POINTS, 2
    person = {
        "bbox": [17.0, 27.0, 126.0, 76.0],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "keypoints": keypoints.flatten().tolist(),
    }
    size = {"height": HEIGHT, "width": WIDTH}
    path = str(tmp_path / "image.png")
    return {"file_name": path, "image_id": 1, "annotations": [person], **size}


def map_with(cfg: CfgNode, image: dict[str, Any], seed: int) -> tuple[Tensor, Any]:
    seed_all_rng(seed)
    mapped = InsPoseDatasetMapper(cfg, is_train=True)(image)
    return mapped["image"], mapped["instances"]


def red_at(pixels: Tensor, x: float, y: float) -> bool:
    blue, green, red = pixels[:, int(y), int(x)].int().tolist()
    return red > 2 * max(blue, green)


@pytest.mark.parametrize(
    "switches",
    [
        {"INPUT.SCALE_JITTER": (0.5, 2.0), "INPUT.CROP_SIZE": 128},
        {"INPUT.ROTATION": 40.0},
        {"INPUT.SCALE_JITTER": (0.7, 1.6), "INPUT.CROP_SIZE": 96, "INPUT.ROTATION": 20.0},
        {"INPUT.COLOR_JITTER": 0.3},
    ],
)
def test_labelled_keypoints_stay_on_what_they_mark(
    tiny_cfg: Callable[..., CfgNode], image: dict[str, Any], switches: dict[str, Any]
) -> None:
    cfg = tiny_cfg(**OFF, **{"INPUT.MAX_SIZE_TRAIN": 1000}, **switches)
    seen = 0
    for seed in range(30):
        pixels, instances = map_with(cfg, image, seed)
        if "INPUT.SCALE_JITTER" in switches:
            assert pixels.shape[1:] == (switches["INPUT.CROP_SIZE"],) * 2
        keypoints = instances.gt_keypoints.tensor.reshape(-1, 3)
        for x, y, v in keypoints.tolist():
            inside = 2 < x < pixels.shape[2] - 2 and 2 < y < pixels.shape[1] - 2
            if v and inside:
                seen += 1
                assert red_at(pixels, x, y), (seed, x, y)
    assert seen > 40


def test_every_red_square_inside_a_crop_is_labelled(
    tiny_cfg: Callable[..., CfgNode], image: dict[str, Any]
) -> None:
    cfg = tiny_cfg(**OFF, **{"INPUT.SCALE_JITTER": (1.0, 2.5), "INPUT.CROP_SIZE": 96})
    cut = 0
    for seed in range(30):
        pixels, instances = map_with(cfg, image, seed)
        channels = pixels.int()
        red = (channels[2] > 2 * channels[1]) & (channels[2] > 150)
        rows, columns = red.nonzero(as_tuple=True)
        labelled = instances.gt_keypoints.tensor.reshape(-1, 3)
        labelled = labelled[labelled[:, 2] > 0]
        cut += 4 - len(labelled)
        far = torch.cdist(
            torch.stack([columns, rows], dim=1).float() + 0.5, labelled[:, :2].float()
        )
        # Half a square, 3.5 pixels, times the largest factor, and its diagonal; a square whose
        # middle is cut away has no label, and touches the border.
        border = (columns < 10) | (rows < 10) | (columns > 85) | (rows > 85)
        near = far.amin(dim=1) < 13 if len(labelled) else torch.zeros(len(rows), dtype=torch.bool)
        assert (near | border).all(), seed
    assert cut > 10


def test_person_who_lost_all_keypoints_has_none_labelled_and_a_box_in_the_image(
    tiny_cfg: Callable[..., CfgNode], image: dict[str, Any]
) -> None:
    cfg = tiny_cfg(**OFF, **{"INPUT.SCALE_JITTER": (6.0, 6.0), "INPUT.CROP_SIZE": 64})
    without = 0
    for seed in range(20):
        _, instances = map_with(cfg, image, seed)
        boxes = instances.gt_boxes.tensor
        assert (boxes >= 0).all()
        assert (boxes <= 64).all()
        assert instances.gt_keypoints.tensor.shape[1:] == (17, 3)
        without += len(instances) and not (instances.gt_keypoints.tensor[..., 2] > 0).any()
    assert without > 5


def test_switches_are_off_at_test_time(
    tiny_cfg: Callable[..., CfgNode], image: dict[str, Any]
) -> None:
    switches = {"INPUT.ROTATION": 40.0, "INPUT.COLOR_JITTER": 0.5, "INPUT.SCALE_JITTER": (0.5, 2.0)}
    size = {"INPUT.MIN_SIZE_TEST": HEIGHT, "INPUT.MAX_SIZE_TEST": 1000}
    mapped = InsPoseDatasetMapper(tiny_cfg(**size, **switches), is_train=False)(image)
    plain = InsPoseDatasetMapper(tiny_cfg(**size), is_train=False)(image)
    assert torch.equal(mapped["image"], plain["image"])
