"""The pages of training data and of results, on three made-up images.

Image 1 has persons, image 2 has nobody, image 3 a crowd and a person without labelled keypoints.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from pycocotools.coco import COCO

from inspose_d2 import cli, get_cfg
from inspose_d2.cli import browse
from inspose_d2.engine.trainer import Trainer
from inspose_d2.modeling.geometry import Locations

SIZE = (240, 320)  # H, W
NAME = "browse_test"
# With this sigma and a person of 100 x 100 pixels, d pixels off are e^(-d^2 / 200).
SIGMA = 0.05
CROWD = [160, 20, 140, 80]
# 17 points in a person's box of 100 x 100, as parts of it.
SHAPE = np.array([[(i % 5) / 4, (i // 5) / 3] for i in range(17)])


def person(id: int, image_id: int, x: float, y: float, *, visible: int = 2) -> dict[str, Any]:
    """An annotated person of 100 x 100 pixels, its first corner at (x, y)."""
    return {
        "id": id,
        "image_id": image_id,
        "category_id": 1,
        "bbox": [x, y, 100, 100],
        "area": 10000,
        "iscrowd": 0,
        "num_keypoints": 17 if visible else 0,
        "keypoints": [v for px, py in SHAPE * 100 + (x, y) for v in (px, py, visible)],
    }


def guess(image_id: int, x: float, y: float, score: float) -> dict[str, Any]:
    """A prediction of a person with its first corner at (x, y)."""
    return {
        "image_id": image_id,
        "category_id": 1,
        "score": score,
        "bbox": [x, y, 100, 100],
        "keypoints": [v for px, py in SHAPE * 100 + (x, y) for v in (px, py, 0.9)],
    }


@pytest.fixture
def cfg(tmp_path: Path) -> Iterator[CfgNode]:
    """The small config with a data set of three images, for training and evaluation."""
    rng = np.random.default_rng(0)
    for i in (1, 2, 3):
        image = rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)
        assert cv2.imwrite(str(tmp_path / f"photo & {i}.png"), image)
    crowd = person(4, 3, *CROWD[:2], visible=0)
    crowd |= {"bbox": CROWD, "area": CROWD[2] * CROWD[3], "iscrowd": 1}
    annotated = {
        "images": [
            {"id": i, "file_name": f"photo & {i}.png", "height": SIZE[0], "width": SIZE[1]}
            for i in (1, 2, 3)
        ],
        "categories": [
            {"id": 1, "name": "person", "keypoints": [str(i) for i in range(17)], "skeleton": []}
        ],
        "annotations": [
            person(1, 1, 10, 10),
            person(2, 1, 110, 130),
            person(3, 1, 215, 20),
            crowd,
            person(5, 3, 20, 130, visible=0),
        ],
    }
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(annotated))
    coco = MetadataCatalog.get("keypoints_coco_2017_val")
    register_coco_instances(
        NAME,
        {
            "keypoint_names": coco.keypoint_names,
            "keypoint_flip_map": coco.keypoint_flip_map,
            "keypoint_connection_rules": coco.keypoint_connection_rules,
        },
        str(file),
        str(tmp_path),
    )
    sigmas = str([SIGMA] * 17)
    data = f"('{NAME}',)"
    opts = ["DATASETS.TRAIN", data, "DATASETS.TEST", data, "TEST.KEYPOINT_OKS_SIGMAS", sigmas]
    opts += ["DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False", "MODEL.DEVICE", "cpu"]
    opts += ["MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", "0"]
    yield get_cfg("quick/synthetic_people", opts)
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture
def results_page(cfg: CfgNode, tmp_path: Path) -> Callable[..., str]:
    """Write predictions and the page; returns its HTML."""

    def write(predictions: list[Any], num: int = 30) -> str:
        results = tmp_path / "results.json"
        results.write_text(json.dumps(predictions))
        return browse.browse_results(cfg, results, num, tmp_path / "page").read_text()

    return write


def check_is_self_contained(page: Path) -> None:
    """All pictures are there, and nothing else is asked of disk or net but the sources' links."""
    text = page.read_text()
    assert "<script" not in text
    assert "http" not in text
    pictures = re.findall(r'src="([^"]+)"', text)
    assert pictures
    for link in pictures:
        assert cv2.imread(str(page.parent / link)) is not None
    for link in re.findall(r'href="#([^"]+)"', text):
        assert f'id="{link}"' in text
    assert "photo & " not in text  # "&amp;" in text, "%26" in links


def test_worst_person_comes_first_and_a_perfect_prediction_last(
    results_page: Callable[..., str], tmp_path: Path
) -> None:
    # 2 is hit exactly, 1 by 10 pixels: e^-0.5; nothing is near 3, but a free guess: e^-2.
    predictions = [guess(1, 110, 130, 0.7), guess(1, 20, 10, 0.9), guess(1, 235, 20, 0.5)]
    text = results_page([*predictions, guess(2, 100, 100, 0.8)])
    titles = re.findall(r'<h3>(?:OKS ([\d.]+), )?<span class="\w+">([\w ]+)</span>', text)
    assert titles == [
        (f"{math.exp(-2):.3f}", "missed"),
        (f"{math.exp(-0.5):.3f}", "found"),
        ("1.000", "found"),
        ("", "false positive"),  # 0.8, on the image without persons
        ("", "false positive"),  # 0.5, that took nobody
    ]
    assert re.findall(r"annotation id (\d)</h3>", text) == ["3", "1", "2"]
    rows = re.findall(r"<td>(\d)</td></tr>", text)
    assert rows == ["3", "1", "2"]
    assert "4 predictions in 3 images; 3 persons with keypoints, 1 missed; 2 false" in text
    check_is_self_contained(tmp_path / "page" / "index.html")


def test_page_lists_all_persons_though_few_are_shown(
    results_page: Callable[..., str], tmp_path: Path
) -> None:
    text = results_page([guess(1, 10, 10, 0.9)], num=1)
    assert text.count("<section") == 1
    assert len(re.findall(r"<td>(?:\d)</td></tr>", text)) == 3
    assert "The worst 1 of 3 persons" in text
    check_is_self_contained(tmp_path / "page" / "index.html")


def test_sigmas_of_the_data_set_are_those_of_its_metadata(
    cfg: CfgNode, results_page: Callable[..., str]
) -> None:
    cfg.TEST.KEYPOINT_OKS_SIGMAS = []
    MetadataCatalog.get(NAME).keypoint_oks_sigmas = [2 * SIGMA] * 17
    text = results_page([guess(1, 20, 10, 0.9)])
    assert f"OKS {math.exp(-100 / 800):.3f}" in text


def test_without_predictions_all_are_missed(results_page: Callable[..., str]) -> None:
    text = results_page([])
    assert text.count('OKS 0.000, <span class="missed">missed') == 3
    assert "0 false positives" in text


def test_panels_in_which_nothing_would_be_drawn_are_left_out(
    results_page: Callable[..., str],
) -> None:
    """Person 1 has a prediction; for 2 and 3 a far one is left; false ones have no ground truth."""
    text = results_page([guess(1, 10, 10, 0.9), guess(1, 500, 500, 0.8), guess(2, 50, 50, 0.7)])
    captions = {
        (re.findall(r"annotation id (\d)|score ([\d.]+)", section)[0]): [
            caption.split(",")[0] for caption in re.findall(r"<figcaption>(.*?)<", section)
        ]
        for section in text.split("<section")[1:]
    }
    assert captions == {
        ("1", ""): ["ground truth", "prediction", "whole image"],
        ("2", ""): ["ground truth", "whole image"],
        ("3", ""): ["ground truth", "whole image"],
        ("", "0.80"): ["whole image"],
        ("", "0.70"): ["prediction", "whole image"],
    }


def test_small_pictures_are_enlarged(results_page: Callable[..., str], tmp_path: Path) -> None:
    results_page([guess(1, 10, 10, 0.9)])
    for file in (tmp_path / "page" / "pictures").iterdir():
        assert cv2.imread(str(file)).shape[0] == browse.ROW_HEIGHT


@pytest.mark.usefixtures("cfg")
def test_crowds_are_no_persons_and_who_is_found_in_one_is_no_false_positive(
    tmp_path: Path,
) -> None:
    coco = COCO(tmp_path / "annotations.json")
    on_crowd, elsewhere = guess(3, 190, 0, 0.9), guess(3, -900, 900, 0.8)
    persons, false_positives = browse.match(coco, [on_crowd, elsewhere], [SIGMA] * 17)
    assert {x.image_id for x in persons} == {1}
    assert [x.prediction["score"] for x in false_positives] == [0.8]


@pytest.mark.usefixtures("cfg")
def test_each_person_has_one_prediction_and_each_prediction_one_person(
    tmp_path: Path,
) -> None:
    """As COCO's: the better score chooses first, though the other fits better."""
    coco = COCO(tmp_path / "annotations.json")
    persons, false_positives = browse.match(
        coco, [guess(1, 11, 10, 0.6), guess(1, 16, 10, 0.9)], [SIGMA] * 17
    )
    first = next(x for x in persons if x.person["id"] == 1)
    assert first.oks == pytest.approx(math.exp(-36 / 200))
    assert [x.prediction["score"] for x in false_positives] == [0.6]


@pytest.mark.usefixtures("cfg")
def test_missed_person_has_the_best_prediction_that_took_nobody(tmp_path: Path) -> None:
    """The one that took the neighbour would fit better; a crowd comes first in the file."""
    file = tmp_path / "annotations.json"
    annotated = json.loads(file.read_text())
    annotated["annotations"] += [person(0, 3, 180, 700), person(7, 3, 185, 700)]  # far from it
    file.write_text(json.dumps(annotated))
    persons, false_positives = browse.match(
        COCO(file), [guess(3, 180, 700, 0.9), guess(3, 210, 700, 0.5)], [SIGMA] * 17
    )
    worst, best = (x for x in persons if x.image_id == 3)
    assert (worst.person["id"], worst.is_found) == (7, False)
    assert worst.oks == pytest.approx(math.exp(-(25**2) / 200))
    assert (best.person["id"], best.is_found, best.oks) == (0, True, 1)
    assert [x.prediction["score"] for x in false_positives] == [0.5]


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([guess(9, 0, 0, 0.5)], "image_id 9 is no image of the data set"),
        ([guess(1, 0, 0, 0.5) | {"keypoints": [0.0] * 15}], "not a list of 51 numbers"),
        ([{"image_id": 1}], "no category_id, keypoints, score"),
        ({}, "expected a list"),
    ],
)
def test_results_of_something_else_are_refused(
    results_page: Callable[..., str], predictions: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        results_page(predictions)


def test_data_page_shows_persons_nobody_and_a_crowd(cfg: CfgNode, tmp_path: Path) -> None:
    page = browse.browse_data(cfg, 10, tmp_path / "page")
    text = page.read_text()
    assert text.count("<section") == 3  # each image once, though 10 were asked for
    assert text.count("<figure") == 4 * 3
    said = {
        int(image): tuple(map(int, numbers))
        for image, *numbers in re.findall(
            r"image id (\d), .*?annotations: (\d+), labelled keypoints: (\d+); .*?left out: (\d+)",
            text,
        )
    }
    assert said[1][:2] == (3, 51)
    assert said[2] == (0, 0, 0)
    assert said[3][:2] == (2, 0)
    assert said[3][2] > 100
    check_is_self_contained(page)


def inputs_of(cfg: CfgNode, image_id: int) -> dict[str, Any]:
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 1
    loader = iter(Trainer.build_train_loader(cfg))
    return next(x for (x,) in loader if x["image_id"] == image_id)


def test_targets_are_at_the_locations_of_the_network(cfg: CfgNode) -> None:
    model = build_model(cfg)
    inputs = inputs_of(cfg, 1)
    targets, locations = browse.targets_of(model, inputs)
    with torch.no_grad():
        predictions = model.predict(model.preprocess_image([inputs]).tensor)
    assert locations.sizes == Locations.of(predictions.params_features, model.strides).sizes
    assert targets.disk_offsets.shape == predictions.disk_offsets.shape
    assert targets.heatmaps.shape == predictions.heatmap_logits.shape


def test_what_is_left_out_is_red_and_nothing_else(cfg: CfgNode) -> None:
    model = build_model(cfg)
    inputs = inputs_of(cfg, 3)
    targets, locations = browse.targets_of(model, inputs)
    height, width = inputs["image"].shape[1:]
    canvas = browse.draw_locations(np.zeros((height, width, 3), np.uint8), targets, locations, 1)
    red = canvas[..., 2] > canvas[..., 0] + 20
    for x0, y0, x1, y1 in inputs["instances"].gt_boxes.tensor.round().int().tolist():
        assert red[y0 + 8 : y1 - 8, x0 + 8 : x1 - 8].all()
        red[max(y0 - 8, 0) : y1 + 8, max(x0 - 8, 0) : x1 + 8] = False
    assert not red.any()


def test_lines_of_the_disks_end_at_the_keypoints(cfg: CfgNode) -> None:
    model = build_model(cfg)
    inputs = inputs_of(cfg, 1)
    targets, _ = browse.targets_of(model, inputs)
    height, width = inputs["image"].shape[1:]
    drawn = browse.draw_disks(np.zeros((height, width, 3), np.uint8), targets, 8, 1)
    points = inputs["instances"].gt_keypoints.tensor[..., :2].flatten(0, 1).numpy()
    for x, y in points[(points > 1).all(axis=1)].astype(int):
        assert drawn[min(y, height - 1), min(x, width - 1)].max() > 100
    far = np.ones((height, width), bool)
    for x, y in points.astype(int):
        far[max(y - 24, 0) : y + 24, max(x - 24, 0) : x + 24] = False
    assert not drawn[far].any()


@pytest.mark.usefixtures("cfg")
def test_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    peer = ["data", "--config-file", "quick/keypoint_rcnn", "--output", "x"]
    assert cli.main(["browse", *peer]) == cli.USAGE
    assert "MODEL.META_ARCHITECTURE is 'GeneralizedRCNN'" in capsys.readouterr().err
    missing = ["results", "--config-file", "quick/synthetic_people", "--output", "x"]
    opts = ["DATASETS.TEST", f"('{NAME}',)"]
    assert cli.main(["browse", *missing, *opts]) == cli.USAGE
    assert "coco_instances_results.json" in capsys.readouterr().err
    assert not Path("x").exists()
    Path("r.json").write_text("[]")
    assert cli.main(["browse", *missing, "--input", "r.json", *opts]) == 0
    assert "see x/index.html" in capsys.readouterr().out


def test_targets_of_the_authors_model_are_drawn(cfg: CfgNode, tmp_path: Path) -> None:
    official = ["MODEL.META_ARCHITECTURE", "InsPoseOfficial", "INPUT.RESIZE", "opencv"]
    cfg.merge_from_list([*official, "MODEL.INSPOSE.KEYPOINT_SCORE_WEIGHT_TEST", 0.0])
    model = build_model(cfg)
    (inputs,) = next(iter(Trainer.build_train_loader(cfg.clone())))[:1]
    targets, _ = browse.targets_of(model, inputs)
    at = model.preprocess_image([inputs]).tensor.shape[-2:]
    assert targets.heatmaps.shape == (1, 17, at[0] // 4, at[1] // 4)
    text = browse.browse_data(cfg, 3, tmp_path / "page").read_text()
    assert text.count("heatmaps</figcaption>") == text.count("disk offsets</figcaption>") == 3
    of_image_1 = text.split("photo%20%26%201.png")[1].split("</section>")[0]
    assert "positive locations: p3 0, p4 0, p5 0" not in of_image_1
    check_is_self_contained(tmp_path / "page" / "index.html")
