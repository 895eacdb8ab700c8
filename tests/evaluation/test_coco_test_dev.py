"""COCO test-dev as users meet it: evaluated without annotations, then packed for the server."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.engine import default_argument_parser

from inspose_d2 import cli
from inspose_d2.cli import submit as submit_module
from inspose_d2.data.builtin import TEST_DEV, register_coco_test_dev
from inspose_d2.engine import launch as train_net
from inspose_d2.engine.trainer import Trainer

PERSON = {"supercategory": "person", "id": 1, "name": "person"}
# COCO's own file lists 80 categories of ids up to 90.
MANY = [PERSON] + [{"id": 90 - i, "name": f"thing {i}"} for i in range(79)]


@pytest.fixture
def test_dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make a test-dev of two images, in COCO's form and registered; returns its json file."""

    def make(**more: Any) -> Path:
        image_root, json_file = tmp_path / "test2017", tmp_path / "image_info_test-dev2017.json"
        image_root.mkdir()
        random = np.random.default_rng(0)
        images = []
        for image_id, (height, width) in ((581, (60, 90)), (16, (90, 60))):
            name = f"{image_id:012d}.jpg"
            pixels = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
            cv2.imwrite(str(image_root / name), pixels)
            images += [{"id": image_id, "file_name": name, "height": height, "width": width}]
        json_file.write_text(json.dumps({"info": {}, "licenses": [], "images": images, **more}))

        name = "coco_2017_test-dev"
        files = Metadata(name=name, json_file=str(json_file), image_root=str(image_root))
        monkeypatch.setitem(MetadataCatalog.data, name, files)
        monkeypatch.delitem(MetadataCatalog.data, TEST_DEV)
        monkeypatch.delitem(DatasetCatalog.data, TEST_DEV)
        register_coco_test_dev()
        return json_file

    return make


@pytest.mark.parametrize("more", [{"categories": MANY}, {"categories": [PERSON]}, {}])
def test_evaluation_and_submission_need_no_annotations(
    test_dev: Callable[..., Path],
    tiny_cfg: Callable[..., CfgNode],
    tmp_path: Path,
    more: dict[str, Any],
) -> None:
    json_file = test_dev(**more)
    settings = ["DATASETS.TEST", (TEST_DEV,), "MODEL.INSPOSE.SCORE_THRESH_TEST", 0.0]
    cfg = tiny_cfg(settings)
    (tmp_path / "tiny.yaml").write_text(cfg.dump())
    args = default_argument_parser().parse_args(
        ["--config-file", str(tmp_path / "tiny.yaml"), "--eval-only"]
    )
    assert train_net.main(args) == {}  # no figures: only the server has the annotations

    results = Path(cfg.OUTPUT_DIR) / "inference" / "coco_instances_results.json"
    poses = json.loads(results.read_text())
    assert {pose["image_id"] for pose in poses} == {16, 581}
    assert {pose["category_id"] for pose in poses} == {1}
    flags = [str(results), "--image-info", str(json_file), "--name", "InsPose"]
    assert cli.main(["submit", "--input", *flags]) == 0
    assert (results.parent / "person_keypoints_test-dev2017_InsPose_results.zip").is_file()


def test_written_poses_are_half_a_pixel_left_and_above_the_predicted(
    test_dev: Callable[..., Path], tiny_cfg: Callable[..., CfgNode]
) -> None:
    test_dev()
    cfg = tiny_cfg(["DATASETS.TEST", (TEST_DEV,), "MODEL.INSPOSE.SCORE_THRESH_TEST", 0.0])
    model = Trainer.build_model(cfg).eval()
    batch = next(iter(Trainer.build_test_loader(cfg, TEST_DEV)))
    with torch.inference_mode():
        predicted = model(batch)[0]["instances"].pred_keypoints
    Trainer.test(cfg, model)

    results = Path(cfg.OUTPUT_DIR) / "inference" / "coco_instances_results.json"
    poses = [p for p in json.loads(results.read_text()) if p["image_id"] == batch[0]["image_id"]]
    ready = submit_module.for_server(poses)
    written = torch.tensor([pose["keypoints"] for pose in ready]).reshape(-1, 17, 3)
    expected = predicted[: submit_module.MAX_POSES, :, :2] - 0.5
    torch.testing.assert_close(written[..., :2], expected, rtol=0, atol=0.0051)


def test_files_lie_beside_those_of_val() -> None:
    val, test = MetadataCatalog.get("keypoints_coco_2017_val"), MetadataCatalog.get(TEST_DEV)
    folder = Path(val.json_file).parent
    assert Path(test.json_file) == folder / "image_info_test-dev2017.json"
    assert Path(test.image_root) == Path(val.image_root).parent / "test2017"
    for name in ("thing_classes", "keypoint_names", "keypoint_flip_map"):
        assert getattr(test, name) == getattr(val, name)
    assert test.keypoint_connection_rules == val.keypoint_connection_rules
    assert test.evaluator_type == "coco"


def test_registering_again_leaves_a_registration_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    register_coco_test_dev()
    monkeypatch.setitem(DatasetCatalog.data, TEST_DEV, list)  # a user's own
    register_coco_test_dev()
    assert DatasetCatalog.get(TEST_DEV) == []
