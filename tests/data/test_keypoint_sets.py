"""Keypoint sets of any K: names, flip pairs, skeleton, sigmas; refused before training if wrong."""

import json
import logging
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import (
    COCO_PERSON_KEYPOINT_FLIP_MAP,
    COCO_PERSON_KEYPOINT_NAMES,
)
from detectron2.engine import default_argument_parser
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from inspose_d2 import ConfigError, InsPosePredictor, cli, get_cfg, register_coco_keypoints
from inspose_d2.data.builtin import CROWDPOSE_NAMES, CROWDPOSE_SIGMAS
from inspose_d2.data.check import check_config
from inspose_d2.data.coco_file import check_annotations
from inspose_d2.data.crowdpose import prepare
from inspose_d2.data.keypoint_names import (
    infer_flip_pairs,
    side_of,
    unmirrored_keypoints,
    wrong_flip_pairs,
)
from inspose_d2.data.keypoint_sets import register_datasets
from inspose_d2.data.select_keypoints import select_keypoints
from inspose_d2.data.synthetic import build_synthetic_people
from inspose_d2.engine import launch as train_net
from inspose_d2.engine.trainer import Trainer
from inspose_d2.modeling.oks import COCO_SIGMAS, DEFAULT_SIGMA
from inspose_d2.visualization.poses import LEFT, RIGHT, draw_poses

ROOT = Path(__file__).parents[2]
FIVE = ["nose", "left_wrist", "right_wrist", "left_ankle", "right_ankle"]
NAME = "five_points"


@pytest.fixture(autouse=True)
def catalogs() -> Iterator[None]:
    """Forget what a test registers."""
    before = set(DatasetCatalog), set(MetadataCatalog)
    yield
    for catalog, names in zip((DatasetCatalog, MetadataCatalog), before, strict=True):
        for name in set(catalog) - names:
            catalog.remove(name)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a file of one image with one person at (10, 20), (20, 20), ...; returns its path."""

    def make(names: Any = FIVE, **category: Any) -> Path:
        points = [value for k in range(len(names)) for value in (10 * k + 10, 20, 2)]
        person = {"id": 1, "image_id": 1, "category_id": 3, "iscrowd": 0, "area": 900}
        person |= {"bbox": [5, 5, 60, 30], "keypoints": points, "num_keypoints": len(names)}
        coco = {
            "images": [{"id": 1, "file_name": "1.png", "height": 48, "width": 96}],
            "annotations": [person],
            "categories": [{"id": 3, "name": "person", "keypoints": names, **category}],
        }
        cv2.imwrite(str(tmp_path / "1.png"), np.zeros((48, 96, 3), np.uint8))
        path = tmp_path / "five.json"
        path.write_text(json.dumps(coco))
        return path

    return make


@pytest.fixture
def five_cfg(tiny_cfg: Callable[..., CfgNode]) -> Callable[..., CfgNode]:
    """Make the tiny config for the set ``NAME``."""

    def make(**named: Any) -> CfgNode:
        names = {"DATASETS.TRAIN": (NAME,), "DATASETS.TEST": (NAME,)}
        return tiny_cfg(**{"MODEL.INSPOSE.NUM_KEYPOINTS": 5, **names, **named})

    return make


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("left_eye", ("left", "eye")),
        ("right_big_toe", ("right", "big toe")),
        ("Left Shoulder", ("left", "shoulder")),
        ("shoulder-right", ("right", "shoulder")),
        ("upper_left_lip", ("left", "upper lip")),
        ("leftEye", ("left", "eye")),
        ("lefteye", ("left", "eye")),
        ("LEFT_EYE", ("left", "eye")),
        ("l_eye", ("left", "eye")),
        ("LShoulder", ("left", "shoulder")),
        ("eye_R", ("right", "eye")),
        ("eye.l", ("left", "eye")),
        ("nose", ("", "nose")),
        ("l", ("", "l")),
        ("cleft_chin", ("", "cleft chin")),
        ("bright_spot", ("", "bright spot")),
        ("a_l_b", ("", "a l b")),
    ],
)
def test_side_of_a_name(name: str, expected: tuple[str, str]) -> None:
    assert side_of(name) == expected


def test_inferred_pairs_of_coco_are_detectron2s() -> None:
    inferred = infer_flip_pairs(COCO_PERSON_KEYPOINT_NAMES)
    assert set(inferred) == set(COCO_PERSON_KEYPOINT_FLIP_MAP)
    assert list(unmirrored_keypoints(COCO_PERSON_KEYPOINT_NAMES, inferred)) == []


def test_metadata_carries_all_that_depends_on_the_keypoints(write: Callable[..., Path]) -> None:
    path = write(skeleton=[[1, 2], [2, 3]])
    register_coco_keypoints(NAME, path, path.parent)
    metadata = MetadataCatalog.get(NAME)
    assert metadata.keypoint_names == FIVE
    pairs = [("left_wrist", "right_wrist"), ("left_ankle", "right_ankle")]
    assert metadata.keypoint_flip_map == pairs
    rules = [rule[:2] for rule in metadata.keypoint_connection_rules]
    assert rules == [("nose", "left_wrist"), ("left_wrist", "right_wrist")]  # COCO counts from 1
    assert metadata.keypoint_oks_sigmas == pytest.approx([0.026, 0.062, 0.062, 0.089, 0.089])
    assert metadata.thing_classes == ["person"]
    (image,) = DatasetCatalog.get(NAME)  # sets the same metadata again
    assert image["annotations"][0]["category_id"] == 0
    assert image["file_name"] == str(path.parent / "1.png")


def test_sigmas_of_other_names_are_the_documented_default_with_a_warning(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = write(["nose", "left_toe", "right_toe"])
    register_coco_keypoints(NAME, path, path.parent)
    expected = [0.026, DEFAULT_SIGMA, DEFAULT_SIGMA]
    assert MetadataCatalog.get(NAME).keypoint_oks_sigmas == pytest.approx(expected)
    assert pytest.approx(np.mean(list(COCO_SIGMAS.values())), abs=5e-4) == DEFAULT_SIGMA
    assert f"['left_toe', 'right_toe'] get {DEFAULT_SIGMA}" in caplog.text
    caplog.clear()
    register_coco_keypoints(NAME, path, path.parent, sigmas=[0.1, 0.2, 0.3])  # again: replaced
    assert MetadataCatalog.get(NAME).keypoint_oks_sigmas == [0.1, 0.2, 0.3]
    assert caplog.text == ""


@pytest.mark.parametrize("sigmas", [[0.1] * 4, [0.1] * 4 + [0.0], [0.1] * 4 + [math.nan]])
def test_wrong_sigmas_are_refused(write: Callable[..., Path], sigmas: list[float]) -> None:
    path = write()
    with pytest.raises(ValueError, match="must be 5 numbers above 0, one for each of"):
        register_coco_keypoints(NAME, path, path.parent, sigmas=sigmas)
    assert NAME not in DatasetCatalog


@pytest.mark.parametrize("skeleton", [[[0, 1]], [[5, 6]], [[16, 14]], [1, 2], [[1]], "12"])
def test_skeleton_that_does_not_fit_is_left_out_with_a_warning(
    write: Callable[..., Path], skeleton: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(skeleton=skeleton)
    register_coco_keypoints(NAME, path, path.parent)
    assert MetadataCatalog.get(NAME).keypoint_connection_rules == []
    assert "pairs of numbers from 1 to 5" in caplog.text


@pytest.mark.parametrize(
    ("categories", "told"),
    [
        ([], "must be one, for InsPose knows one class; got []"),
        ("person", "must be one"),
        ([{"id": 1, "name": "person"}], "must be a list of different names"),
        ([{"id": 1, "name": "person", "keypoints": ["a", "a"]}], "different names"),
        ([{"id": 1, "name": "person", "keypoints": [1, 2]}], "different names"),
        ([{"id": "1", "name": "person", "keypoints": FIVE}], "a whole number as its id"),
    ],
)
def test_wrong_categories_are_refused(
    write: Callable[..., Path], categories: Any, told: str
) -> None:
    path = write()
    path.write_text(json.dumps({**json.loads(path.read_text()), "categories": categories}))
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        register_coco_keypoints(NAME, path, path.parent)
    assert str(path) in str(error.value)


def test_name_of_other_files_is_refused(write: Callable[..., Path]) -> None:
    path = write()
    with pytest.raises(ValueError, match="'crowdpose_train' is taken by other files"):
        register_coco_keypoints("crowdpose_train", path, path.parent)


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ([("nose", "nose")], "no pairs of two different keypoints"),
        (["ab"], "no pairs of two different keypoints"),
        ([("left_wrist",)], "no pairs of two different keypoints"),
        ([("left_wrist", "right_writs")], "['right_writs'] are no keypoint_names"),
        ([("left_wrist", "right_wrist"), ("left_wrist", "nose")], "['left_wrist'] are in several"),
    ],
)
def test_pairs_that_are_no_involution_are_refused_at_registration(
    write: Callable[..., Path], pairs: Any, told: str
) -> None:
    path = write()
    with pytest.raises(ValueError, match=re.escape(told)):
        register_coco_keypoints(NAME, path, path.parent, flip_pairs=pairs)


def test_pairs_said_in_both_directions_are_right() -> None:
    pairs = [("left_wrist", "right_wrist"), ("right_wrist", "left_wrist")]
    assert list(wrong_flip_pairs(FIVE, pairs)) == []


ANKLES, WRISTS = ("left_ankle", "right_ankle"), ("left_wrist", "right_wrist")


@pytest.mark.parametrize(
    ("names", "pairs", "told"),
    [
        (FIVE, [], "'left_wrist' is in no flip pair: pair it with 'right_wrist'"),
        (FIVE, [ANKLES], "'right_wrist' is in no flip pair: pair it with 'left_wrist'"),
        (
            FIVE,
            [("left_wrist", "right_ankle"), ("left_ankle", "right_wrist")],
            "'left_wrist' is paired with 'right_ankle' instead of 'right_wrist'",
        ),
        (["nose", "left_ear"], None, "'left_ear' is in no flip pair: it has no counterpart"),
        (
            ["left_ear", "left_eye"],
            [("left_ear", "left_eye")],
            "'left_ear' is paired with 'left_eye', which is left too",
        ),
    ],
)
def test_wrong_flip_map_is_caught_before_training(
    write: Callable[..., Path],
    five_cfg: Callable[..., CfgNode],
    caplog: pytest.LogCaptureFixture,
    names: list[str],
    pairs: Any,
    told: str,
) -> None:
    path = write(names)
    register_coco_keypoints(NAME, path, path.parent, flip_pairs=pairs)
    assert told in caplog.text
    number = {"MODEL.INSPOSE.NUM_KEYPOINTS": len(names)}
    with pytest.raises(ConfigError, match=re.escape(told)):
        check_config(five_cfg(**number))
    with pytest.raises(ConfigError, match=re.escape(told)):
        Trainer(five_cfg(**number))
    check_config(five_cfg(**number, **{"INPUT.RANDOM_FLIP": "none"}))  # nothing is flipped
    check_config(five_cfg(**number), training=False)
    with pytest.raises(ConfigError, match=re.escape(told)):  # flipped views in evaluation
        check_config(five_cfg(**number, **{"TEST.AUG.ENABLED": True}), training=False)


def test_keypoints_without_sides_are_warned_of_unless_told_so(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = write(["tip", "base"])
    register_coco_keypoints(NAME, path, path.parent, sigmas=[0.1, 0.1])
    assert "no keypoint is called left or right" in caplog.text
    caplog.clear()
    register_coco_keypoints(NAME, path, path.parent, sigmas=[0.1, 0.1], flip_pairs=[])
    assert caplog.text == ""


def test_sets_with_other_orders_of_keypoints_are_refused(
    write: Callable[..., Path], five_cfg: Callable[..., CfgNode]
) -> None:
    path = write()
    register_coco_keypoints(NAME, path, path.parent)
    path = path.rename(path.with_name("val.json"))
    coco = json.loads(path.read_text())
    coco["categories"][0]["keypoints"] = [*FIVE[1:], FIVE[0]]
    path.write_text(json.dumps(coco))
    register_coco_keypoints("other_order", path, path.parent)
    with pytest.raises(ConfigError, match="must have the same keypoint_names in the same order"):
        check_config(five_cfg(**{"DATASETS.TEST": ("other_order",)}))


def test_register_key_registers_what_the_run_uses(
    write: Callable[..., Path],
    five_cfg: Callable[..., CfgNode],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(path.parent))
    cfg = five_cfg()
    cfg.DATASETS.TRAIN = ("not there",)
    cfg.DATASETS.REGISTER = [["not there", "no.json", ""], [NAME, "five.json", str(path.parent)]]
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1] * 5
    register_datasets(cfg, training=False)
    metadata = MetadataCatalog.get(NAME)
    assert metadata.json_file == str(path)
    assert metadata.keypoint_oks_sigmas == [0.1] * 5
    register_datasets(cfg, training=False)  # once more: nothing to do
    with pytest.raises(ConfigError, match=r"'not there': .*no\.json.* below \$DETECTRON2_DATASETS"):
        register_datasets(cfg)
    path.write_text("{")
    DatasetCatalog.remove(NAME)
    with pytest.raises(ConfigError, match=rf"DATASETS\.REGISTER '{NAME}': .*is no JSON"):
        register_datasets(cfg, training=False)


def test_evaluation_does_not_need_the_training_set(
    write: Callable[..., Path], five_cfg: Callable[..., CfgNode]
) -> None:
    path = write()
    cfg = five_cfg(**{"DATASETS.TRAIN": ("not there",)})
    cfg.DATASETS.REGISTER = [[NAME, str(path), str(path.parent)]]
    register_datasets(cfg, training=False)
    check_config(cfg, training=False)
    cfg.freeze()
    (batch,) = Trainer.build_test_loader(cfg, NAME)
    assert batch[0]["image"].shape[0] == 3


def test_flip_pairs_may_stand_in_the_config(
    write: Callable[..., Path], five_cfg: Callable[..., CfgNode], caplog: pytest.LogCaptureFixture
) -> None:
    names = ["head", "fin_A", "fin_B", "gill_A", "gill_B"]
    path = write(keypoints=names)
    cfg = five_cfg()
    entry = [NAME, str(path), str(path.parent)]
    for pairs in ([["fin_A", "fin_B"]], [["gill_A", "gill_B"], ["fin_A", "fin_B"]], []):
        cfg.DATASETS.REGISTER = [[*entry, pairs]]
        register_datasets(cfg)
        assert MetadataCatalog.get(NAME).keypoint_flip_map == [*map(tuple, pairs)]
    assert "flip_pairs" not in caplog.text
    cfg.DATASETS.REGISTER = [[*entry, [["fin_A", "tail"]]]]
    with pytest.raises(ConfigError, match=r"\['tail'\] are no keypoint_names"):
        register_datasets(cfg)


@pytest.mark.parametrize(
    "entry",
    [
        *("name", ["name", "a.json"], ["name", "a.json", 3], 7),
        *(["name", "a.json", "images", x] for x in (3, "pairs", ["ab"], [["a"]], [["a", 1]])),
        ["name", "a.json", "images", [], []],
    ],
)
def test_register_key_of_another_form_is_refused(
    five_cfg: Callable[..., CfgNode], entry: Any
) -> None:
    cfg = five_cfg()
    cfg.DATASETS.REGISTER = [entry]
    with pytest.raises(ConfigError, match=r"must be a list of \[name, json file, folder of images"):
        register_datasets(cfg)


def test_predictor_and_drawing_know_the_keypoints(
    write: Callable[..., Path], five_cfg: Callable[..., CfgNode], caplog: pytest.LogCaptureFixture
) -> None:
    path = write(skeleton=[[2, 4], [3, 5]])
    cfg = five_cfg(**{"MODEL.INSPOSE.SCORE_THRESH_TEST": 0.0})
    cfg.DATASETS.REGISTER = [[NAME, str(path), str(path.parent)]]
    predictor = InsPosePredictor(cfg, device="cpu")
    picture = np.full((48, 96, 3), 128, np.uint8)
    poses = predictor(picture)["instances"]
    assert poses.pred_keypoints.shape[1:] == (5, 3)
    assert predictor.metadata.keypoint_names == FIVE
    one = Instances((48, 96), pred_boxes=Boxes(torch.tensor([[10.0, 10, 80, 40]])))
    xy = torch.tensor([[48.0, 8], [20, 15], [76, 15], [20, 40], [76, 40]])
    one.pred_keypoints = torch.cat([xy, torch.ones(5, 1)], dim=1)[None]
    drawn = draw_poses(picture, one, metadata=predictor.metadata)
    # Half way between wrist and ankle runs a thin line, whose edges are smooth.
    left, right = drawn[28, 20].astype(float), drawn[28, 76].astype(float)
    assert left / left.max() == pytest.approx(np.array(LEFT) / max(LEFT), abs=0.05)
    assert right / right.max() == pytest.approx(np.array(RIGHT) / max(RIGHT), abs=0.05)

    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)
    cfg.DATASETS.REGISTER = [[NAME, "elsewhere.json", ""]]
    caplog.clear()
    poses = InsPosePredictor(cfg, device="cpu")(picture)["instances"]  # finds poses all the same
    assert poses.pred_keypoints.shape[1:] == (5, 3)
    assert "drawn without names and limbs" in caplog.text
    draw_poses(picture, poses, metadata=MetadataCatalog.get(NAME))


CROWD = {
    "images": [{"id": 100001, "file_name": "100001.jpg", "height": 400, "width": 600}],
    "annotations": [
        {
            **{"id": 1, "image_id": 100001, "category_id": 1, "iscrowd": 0},
            **{"bbox": [10, 20, 100, 200], "num_keypoints": 14},
            "keypoints": [x for k in range(14) for x in (20 + k, 30 + 10 * k, 2)],
        }
    ],
    "categories": [{"id": 1, "name": "person", "keypoints": ["?"] * 14, "skeleton": [[16, 14]]}],
}


def test_prepared_crowdpose_has_what_evaluation_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "crowdpose_test.json").write_text(json.dumps(CROWD))
    assert cli.main(["convert", "crowdpose", "--input", str(tmp_path / "json")]) == 0
    assert "1 images, 1 persons" in capsys.readouterr().out
    path = tmp_path / "annotations" / "crowdpose_test.json"
    check_annotations(str(path), 14, evaluation=True, class_names=["person"])
    coco = json.loads(path.read_text())
    assert coco["annotations"][0]["area"] == pytest.approx(0.53 * 100 * 200)
    assert coco["categories"][0]["keypoints"] == list(CROWDPOSE_NAMES)

    register_coco_keypoints("again", path, tmp_path)  # the file says all but the authors' sigmas
    built_in, own = MetadataCatalog.get("crowdpose_test"), MetadataCatalog.get("again")
    for key in ("keypoint_names", "keypoint_flip_map", "keypoint_connection_rules"):
        assert own.get(key) == built_in.get(key), key
    assert own.keypoint_oks_sigmas[:12] == pytest.approx(CROWDPOSE_SIGMAS[:12])


def test_crowdpose_files_of_another_kind_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    person = {**CROWD["annotations"][0], "keypoints": [0] * 51}
    with pytest.raises(ValueError, match="annotation 1 has 17 keypoints, CrowdPose has 14"):
        prepare({**CROWD, "annotations": [person]})
    assert cli.main(["convert", "crowdpose", "--input", str(tmp_path)]) == 2
    assert f"{tmp_path} has no crowdpose_" in capsys.readouterr().err


def test_crowdpose_config_passes_and_says_its_keypoints() -> None:
    cfg = get_cfg("InsPose_R50_CrowdPose", ["MODEL.DEVICE", "cpu"])
    check_config(cfg)
    metadata = MetadataCatalog.get("crowdpose_trainval")
    assert len(metadata.keypoint_flip_map) == 6
    assert len(metadata.keypoint_oks_sigmas) == cfg.MODEL.INSPOSE.NUM_KEYPOINTS == 14


def test_selected_keypoints_keep_their_places_and_connections(write: Callable[..., Path]) -> None:
    coco = json.loads(write(skeleton=[[1, 2], [2, 4], [3, 5]]).read_text())
    chosen = select_keypoints(coco, ["right_ankle", "nose", "right_wrist"])
    assert chosen["annotations"][0]["keypoints"] == [50, 20, 2, 10, 20, 2, 30, 20, 2]
    assert chosen["annotations"][0]["num_keypoints"] == 3
    assert chosen["categories"][0]["skeleton"] == [[3, 1]]  # right wrist to right ankle
    assert select_keypoints(coco, FIVE) == coco
    for names in (["elbow"], ["nose", "nose"]):
        with pytest.raises(ValueError, match="--keypoints must be different ones of"):
            select_keypoints(coco, names)


FIVE_KEYS = {
    "MODEL.INSPOSE.NUM_KEYPOINTS": 5,
    "MODEL.INSPOSE.SCORE_THRESH_TEST": 0.0,
    "DATASETS.TRAIN": "('five_train',)",
    "DATASETS.TEST": "('five_val',)",
    "INPUT.MIN_SIZE_TRAIN": "(96,)",
    "INPUT.MIN_SIZE_TEST": 96,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 3,
    "TEST.EVAL_PERIOD": 0,
    "SEED": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["config key", "own script, two workers"])
def test_five_keypoints_are_trained_and_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    full = build_synthetic_people(tmp_path, "val", 8, 160, num_workers=1)
    five = tmp_path / "five.json"
    flags = ["--input", str(full), "--output", str(five), "--keypoints", *FIVE]
    assert cli.main(["convert", "select-keypoints", *flags]) == 0
    images = str(full.parents[1] / "val")
    output = tmp_path / "output"
    keys = {**FIVE_KEYS, "OUTPUT_DIR": str(output)}
    final = ["MODEL.WEIGHTS", str(output / "model_final.pth")]
    words = ["--config-file", "quick/synthetic_people_tiny"]
    pairs = [str(x) for item in keys.items() for x in item]
    if way == "config key":
        sets = [["five_train", str(five), images], ["five_val", str(five), images]]
        pairs += ["DATASETS.REGISTER", str(sets)]
        parse = default_argument_parser().parse_args
        train_net.main(parse([*words, *pairs]))
        for name in ("five_train", "five_val"):  # as in another process
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        figures = train_net.main(parse([*words, "--eval-only", *pairs, *final]))["keypoints"]
        truth = COCO(str(five))
        found = truth.loadRes(str(output / "inference" / "coco_instances_results.json"))
        expected = COCOeval(truth, found, "keypoints")
        expected.params.kpt_oks_sigmas = np.array([COCO_SIGMAS[name] for name in FIVE])
        for step in ("evaluate", "accumulate", "summarize"):
            getattr(expected, step)()
        assert figures["AP"] == pytest.approx(100 * expected.stats[0], abs=1e-6)
        views = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(96,)"]
        train_net.main(parse([*words, "--eval-only", *pairs, *final, *views]))
    else:
        script = tmp_path / "my_train.py"
        script.write_text(
            "from detectron2.engine import default_argument_parser\n"
            "from inspose_d2 import register_coco_keypoints\n"
            "from train_net import launch_workers\n"
            f"for name in ('five_train', 'five_val'):\n"
            f"    register_coco_keypoints(name, {str(five)!r}, {images!r})\n"
            "if __name__ == '__main__':\n"
            "    launch_workers(default_argument_parser().parse_args())\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        command = [sys.executable, "-W", "ignore", str(script), *words]
        for number, more in enumerate((pairs, ["--eval-only", *pairs, *final])):
            # Workers meet in a file: a free port may be taken before they do.
            workers = ["--num-gpus", "2", "--dist-url", f"file://{tmp_path / f'meeting_{number}'}"]
            result = subprocess.run(
                [*command, *workers, *more], cwd=ROOT, capture_output=True, text=True, timeout=600
            )
            assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        assert "copypaste: Task: keypoints" in result.stdout + result.stderr
    records = json.loads((output / "inference" / "coco_instances_results.json").read_text())
    assert {len(record["keypoints"]) for record in records} == {15}
    logging.getLogger("detectron2").handlers.clear()  # default_setup's
