"""Pictures of evaluations for TensorBoard."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from inspose_d2.engine.pictures import HEIGHT, NUM_PICTURES, EvalPictures

NAME = "pictures_of_a_test"


class Finder(nn.Module):
    """Finds one person whose keypoints lie on a diagonal, in pixels of the original image."""

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        assert not self.training
        (image,) = inputs
        size = image["height"], image["width"]
        line = torch.linspace(0.1, 0.9, 17)[:, None] * torch.tensor([size[1], size[0]])
        keypoints = torch.cat([line, torch.ones(17, 1)], dim=1)[None]
        return [{"instances": Instances(size, pred_keypoints=keypoints, scores=torch.ones(1))}]


@pytest.fixture
def people(tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    cv2.imwrite(str(tmp_path / "black.png"), np.zeros((60, 80, 3), np.uint8))
    labelled: list[dict[str, Any]] = [{"keypoints": [40.0, 30.0, 2.0] * 17}]
    records = [
        {"file_name": str(tmp_path / "black.png"), "image_id": number, "height": 60, "width": 80}
        | {"annotations": labelled if number else [{"keypoints": [0.0] * 51}]}
        for number in range(NUM_PICTURES + 3)
    ]
    DatasetCatalog.register(NAME, lambda: records)
    like = MetadataCatalog.get("synthetic_people_val")
    MetadataCatalog.get(NAME).set(keypoint_names=like.keypoint_names, keypoint_connection_rules=[])
    yield records
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def pictures_of(cfg: CfgNode, model: nn.Module) -> dict[str, Tensor]:
    with EventStorage() as storage:
        EvalPictures(cfg).put(model)
        return {name: torch.as_tensor(picture) for name, picture, _ in storage._vis_data}


@pytest.mark.usefixtures("people")
def test_ground_truth_stands_beside_what_is_found(tiny_cfg: Callable[..., CfgNode]) -> None:
    model = Finder().train()
    pictures = pictures_of(tiny_cfg(**{"DATASETS.TEST": (NAME,)}), model)
    assert model.training
    assert list(pictures) == [f"{NAME}/{i}" for i in range(NUM_PICTURES)]
    width = round(HEIGHT * 80 / 60)
    for picture in pictures.values():
        assert picture.shape == (3, HEIGHT, 2 * width)
        drawn = picture.amax(dim=0) > 60
        truth, found = drawn[:, :width], drawn[:, -width:]
        rows, columns = truth.nonzero(as_tuple=True)
        assert rows.float().mean() == pytest.approx(HEIGHT / 2, abs=3)
        assert rows.max() - rows.min() < HEIGHT / 4  # all keypoints at one place
        assert columns.float().mean() == pytest.approx(width / 2, abs=3)
        rows, _ = found.nonzero(as_tuple=True)
        assert rows.min() < 0.15 * HEIGHT
        assert rows.max() > 0.85 * HEIGHT


def test_without_annotations_there_are_none(
    tiny_cfg: Callable[..., CfgNode], people: list[dict[str, Any]]
) -> None:
    for record in people:
        del record["annotations"]
    assert pictures_of(tiny_cfg(**{"DATASETS.TEST": (NAME,)}), Finder()) == {}
