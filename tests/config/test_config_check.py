"""Values that a run would trip over are refused before anything is built: key, value, cure."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model

from inspose_d2 import ConfigError, get_cfg, list_configs
from inspose_d2.config.check import (
    GROUP_NORM,
    MODEL_CHOICES,
    MODEL_RULES,
    TRAINING_CHOICES,
    TRAINING_RULES,
    check_model,
    doubt_about_sizes,
)
from inspose_d2.data.check import check_config
from inspose_d2.engine.trainer import Trainer

NAN, INF = float("nan"), float("inf")


def message(cfg: CfgNode, *, training: bool = True) -> str:
    with pytest.raises(ConfigError) as error:
        check_config(cfg, training=training)
    return str(error.value)


@pytest.fixture
def tiny_data() -> Iterator[Callable[..., None]]:
    """Register a data set without images, of given metadata, as ``tiny_data``."""

    def register(**metadata: Any) -> None:
        DatasetCatalog.register("tiny_data", list)
        MetadataCatalog.get("tiny_data").set(**metadata)

    yield register
    DatasetCatalog.remove("tiny_data")
    MetadataCatalog.remove("tiny_data")


@pytest.mark.parametrize("name", list_configs())
@pytest.mark.parametrize("training", [True, False])
def test_packaged_configs_pass(name: str, training: bool) -> None:
    check_config(get_cfg(name, ["MODEL.DEVICE", "cpu"]), training=training)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("key", "value", "must"),
    [
        ("SOLVER.BASE_LR", 0.0, "above 0"),
        ("SOLVER.BASE_LR", -0.1, "above 0"),
        ("SOLVER.BASE_LR", NAN, "above 0"),
        ("SOLVER.BASE_LR", INF, "above 0"),
        ("SOLVER.IMS_PER_BATCH", 0, "at least 1"),
        ("SOLVER.MAX_ITER", 0, "at least 1"),
        ("SOLVER.STEPS", (-3, 5), "above 0"),
        ("SOLVER.STEPS", (5, 3), "grow"),
        ("SOLVER.WEIGHT_DECAY", -1e-4, "0 or more"),
        ("SOLVER.MOMENTUM", 1.0, "[0, 1)"),
        ("SOLVER.WARMUP_FACTOR", 2.0, "[0, 1]"),
        ("SOLVER.CHECKPOINT_PERIOD", 0, "at least 1"),
        ("SOLVER.REFERENCE_WORLD_SIZE", -1, "0 or more"),
        ("SOLVER.OPTIMIZER", "ADAM", "'SGD', 'ADAMW'"),
        ("SOLVER.LR_SCHEDULER_NAME", "Cosine", "'WarmupCosineLR'"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.0, "above 0"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "l2", "'norm'"),
        ("DATALOADER.NUM_WORKERS", -1, "0 or more"),
        ("INPUT.MIN_SIZE_TRAIN", (0,), "at least 1 pixel"),
        ("INPUT.MIN_SIZE_TRAIN", (), "sizes to choose from"),
        ("INPUT.RANDOM_FLIP", "both", "'horizontal'"),
        ("TEST.EVAL_PERIOD", -1, "0 or more"),
        ("TEST.DETECTIONS_PER_IMAGE", 0, "at least 1"),
        ("MODEL.INSPOSE.KP_NET.CHANNELS", 0, "at least 1"),
        ("MODEL.INSPOSE.SCORE_THRESH_TEST", 1.1, "[0, 1]"),
        ("MODEL.INSPOSE.SCORE_THRESH_TEST", NAN, "[0, 1]"),
        ("MODEL.INSPOSE.NMS_THRESH_TEST", -0.1, "[0, 1]"),
        ("MODEL.INSPOSE.NMS_THRESH_TEST", "high", "[0, 1]"),
        ("MODEL.INSPOSE.PRIOR_PROB", 0.0, "(0, 1)"),
        ("MODEL.INSPOSE.HEATMAP.MIN_OVERLAP", 1.0, "(0, 1)"),
        ("MODEL.INSPOSE.HEATMAP.MAX_RADIUS", -1.0, "0 or more"),
        ("MODEL.INSPOSE.RESAMPLE", "maps", "one of 'predictions', 'features'"),
        ("MODEL.INSPOSE.LOSS_WEIGHT.KEYPOINT", -1.0, "0 or more"),
        ("MODEL.INSPOSE.CENTER_SAMPLING_RADIUS", 0.0, "above 0"),
        ("MODEL.INSPOSE.SIZES_OF_INTEREST", [64, 128], "4 values"),
        ("MODEL.INSPOSE.SIZES_OF_INTEREST", [64, 512, 256, 128], "growing"),
        ("MODEL.INSPOSE.CONV_DIM", 40, "multiple of 32"),
        ("MODEL.FPN.OUT_CHANNELS", 48, "multiple of 32"),
        ("MODEL.INSPOSE.KP_NET.BACKEND", "cuda", "'triton'"),
        ("MODEL.INSPOSE.NMS_TYPE_TEST", "oks", "'poses'"),
        ("MODEL.PIXEL_STD", [0.0, 1.0, 1.0], "above 0"),
        ("MODEL.PIXEL_MEAN", [1.0], "same length"),
        ("MODEL.DEVICE", "gpu", "'cuda' or 'cpu'"),
        ("INPUT.FORMAT", "L", "one of 'BGR', 'RGB'"),
        ("MODEL.META_ARCHITECTURE", "InPose", "Did you mean 'InsPose'?"),
        (
            "MODEL.BACKBONE.NAME",
            "build_inspose_resnet_fpn",
            "Did you mean 'build_inspose_resnet_fpn_backbone'?",
        ),
        ("VERSION", 1, "must be 2"),
    ],
)
def test_wrong_value_is_told_by_key_value_and_cure(
    tiny_cfg: Callable[..., CfgNode], key: str, value: Any, must: str
) -> None:
    cfg = tiny_cfg()
    *groups, name = key.split(".")
    node = cfg
    for group in groups:
        node = node[group]
    node[name] = value
    lines = message(cfg).splitlines()
    assert len(lines) == 1
    # A rule that two keys break together may name the other one first.
    assert key in lines[0]
    assert must in lines[0]
    assert f"{value}" in lines[0]


def test_every_rule_and_choice_names_declared_keys() -> None:
    rules = (rule.keys.split() for rule in (*MODEL_RULES, *TRAINING_RULES))
    widths = (x.split() for x in GROUP_NORM.values())
    keys = [x for group in (*rules, *widths) for x in group]
    for key in (*keys, *GROUP_NORM, *MODEL_CHOICES, *TRAINING_CHOICES):
        node = get_cfg()
        for name in key.split("."):
            node = node[name]


def test_all_problems_are_told_at_once(tiny_cfg: Callable[..., CfgNode]) -> None:
    cfg = tiny_cfg(["SOLVER.BASE_LR", -1.0, "MODEL.INSPOSE.NMS_THRESH_TEST", 2.0])
    told = message(cfg).splitlines()
    assert [line.split()[0] for line in told] == ["MODEL.INSPOSE.NMS_THRESH_TEST", "SOLVER.BASE_LR"]


def test_a_range_of_sizes_is_two_sizes(tiny_cfg: Callable[..., CfgNode]) -> None:
    cfg = tiny_cfg(["INPUT.MIN_SIZE_TRAIN", (64, 96), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"])
    check_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN = (64, 80, 96)
    assert "exactly two with INPUT.MIN_SIZE_TRAIN_SAMPLING 'range'" in message(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    check_config(cfg)


def test_evaluation_does_not_ask_for_what_training_needs(tiny_cfg: Callable[..., CfgNode]) -> None:
    cfg = tiny_cfg(["SOLVER.BASE_LR", -1.0, "DATASETS.TRAIN", "()"])
    check_config(cfg, training=False)
    assert "DATASETS.TRAIN must name a data set" in message(cfg)
    cfg.DATASETS.TEST = ()
    assert "DATASETS.TEST must name a data set" in message(cfg, training=False)


@pytest.mark.fault
def test_cuda_without_cuda_is_refused(
    tiny_cfg: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cfg = tiny_cfg(["MODEL.DEVICE", "cuda:1"])
    assert message(cfg) == (
        "MODEL.DEVICE is 'cuda:1', but PyTorch finds no CUDA device: set it to 'cpu'"
    )
    with pytest.raises(ConfigError, match=r"MODEL\.DEVICE"):
        build_model(cfg)


@pytest.mark.fault
@pytest.mark.parametrize("device", ["mps", "xpu:3"])
def test_device_that_is_not_there_is_refused(device: str, tiny_cfg: Callable[..., CfgNode]) -> None:
    cfg = tiny_cfg(["MODEL.DEVICE", device])
    assert f"MODEL.DEVICE is '{device}', which PyTorch cannot use: set it to 'cpu'" in message(cfg)


@pytest.mark.fault
@pytest.mark.parametrize("below", ["", "new/run"])
def test_output_folder_that_is_a_file_is_refused(
    below: str, tiny_cfg: Callable[..., CfgNode], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    cfg = tiny_cfg(["OUTPUT_DIR", str(file / below)])
    said = f"OUTPUT_DIR is '{file / below}', but {file} is no folder: choose another one"
    assert message(cfg) == said


@pytest.mark.fault
@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_unknown_data_set_suggests_the_nearest(
    tiny_cfg: Callable[..., CfgNode], split: str
) -> None:
    cfg = tiny_cfg([f"DATASETS.{split}", ("keypoint_coco_2017_val",)])
    told = message(cfg)
    assert told.startswith(f"DATASETS.{split} names 'keypoint_coco_2017_val'")
    assert "Did you mean 'keypoints_coco_2017_val'?" in told
    assert "keypoint_coco_2017_val" not in MetadataCatalog  # the check leaves no trace


@pytest.mark.fault
def test_keypoints_must_be_as_many_as_the_data_set_names(tiny_cfg: Callable[..., CfgNode]) -> None:
    cfg = tiny_cfg(["MODEL.INSPOSE.NUM_KEYPOINTS", 14])
    told = message(cfg)
    for split in ("TRAIN", "TEST"):
        assert f"NUM_KEYPOINTS is 14, but DATASETS.{split}" in told
    assert "set it to 17" in told
    assert "TEST.KEYPOINT_OKS_SIGMAS must be 14 values" in told


@pytest.mark.fault
@pytest.mark.parametrize(
    ("k", "sigmas", "right"), [(2, 2, True), (2, 0, False), (2, 17, False), (17, 3, False)]
)
def test_sigmas_must_be_as_many_as_keypoints(
    tiny_cfg: Callable[..., CfgNode],
    tiny_data: Callable[..., None],
    k: int,
    sigmas: int,
    right: bool,
) -> None:
    names = [str(x) for x in range(k)]
    tiny_data(keypoint_names=names, keypoint_flip_map=[])
    cfg = tiny_cfg(["MODEL.INSPOSE.NUM_KEYPOINTS", k, "TEST.KEYPOINT_OKS_SIGMAS", [0.1] * sigmas])
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("tiny_data",)
    if right:
        check_config(cfg)
    else:
        assert message(cfg).startswith(f"TEST.KEYPOINT_OKS_SIGMAS must be {k} values")
        cfg.DATASETS.TEST = ()
        check_config(cfg)  # nothing is evaluated


@pytest.mark.fault
@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({}, "does not say keypoint_names and keypoint_flip_map"),
        (
            {"keypoint_names": ["left", "right"]},
            "does not say keypoint_names and keypoint_flip_map",
        ),
        (
            {"keypoint_names": ["left", "right"], "keypoint_flip_map": [("left", "rihgt")]},
            "keypoint_flip_map: ['rihgt'] are no keypoint_names",
        ),
    ],
)
def test_names_and_flip_pairs_must_be_there_and_agree(
    tiny_cfg: Callable[..., CfgNode],
    tiny_data: Callable[..., None],
    metadata: dict[str, Any],
    told: str,
) -> None:
    tiny_data(**metadata)
    cfg = tiny_cfg(["MODEL.INSPOSE.NUM_KEYPOINTS", 2, "DATASETS.TEST", "()"])
    cfg.DATASETS.TRAIN = ("tiny_data",)
    assert "DATASETS.TRAIN 'tiny_data'" in message(cfg)
    assert told in message(cfg)


def test_model_alone_needs_no_data_set(tiny_cfg: Callable[..., CfgNode]) -> None:
    check_model(tiny_cfg(["DATASETS.TEST", ("of another machine",), "SOLVER.BASE_LR", -1.0]))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("key", "value", "build"),
    [
        ("MODEL.INSPOSE.NMS_THRESH_TEST", 2.0, build_model),
        ("SOLVER.BASE_LR", -1.0, Trainer),
        ("DATASETS.TRAIN", ("synthetic_peple_train",), Trainer),
    ],
)
def test_model_and_trainer_refuse_before_they_build(
    tiny_cfg: Callable[..., CfgNode],
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    value: Any,
    build: Callable[[CfgNode], Any],
) -> None:
    def too_late(*_: Any) -> None:
        raise AssertionError("built")

    monkeypatch.setattr("inspose_d2.modeling.inspose.build_backbone", too_late)
    with pytest.raises(ConfigError, match=re.escape(key)):
        build(tiny_cfg([key, value]))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--config-file is missing"),
        (["--config-file", "InsPose_R50_3"], "Did you mean 'InsPose_R50_3x'?"),
        (["--config-file", "InsPose_R50_3x", "SOLVER.BASE_RL", "1"], "'SOLVER.BASE_LR'"),
        (["--config-file", "InsPose_R50_3x", "SOLVER.BASE_LR"], "pairs KEY VALUE"),
        (["--config-file", "InsPose_R50_3x", "SOLVER.BASE_LR", "0"], "above 0; got 0"),
    ],
)
def test_train_net_ends_with_one_message_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    from inspose_d2.engine import launch as train_net

    args = default_argument_parser().parse_args(words)
    with pytest.raises(SystemExit) as error:
        train_net.setup(args)
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("train_net.py: ")
    assert told in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("train", "train_limit", "test", "test_limit", "outside"),
    [
        ((640, 800), 1333, 800, 1333, False),
        ((256,), 256, 256, 256, False),
        ((256,), 256, 272, 272, True),
        ((256,), 256, 192, 999, False),  # of a photograph of 4:3 the longer side is 256 in both
        ((256,), 999, 256, 272, True),
        ((192, 320), 320, 256, 256, False),
        ((192, 320), 320, 320, 480, True),
        ((256,), 256, 0, 1333, False),  # images keep their sizes, which nobody knows
    ],
)
def test_a_test_size_outside_the_training_sizes_is_doubted(
    train: tuple[int, ...], train_limit: int, test: int, test_limit: int, outside: bool
) -> None:
    sizes = [
        "INPUT.SCALE_JITTER",
        (),
        "INPUT.MIN_SIZE_TRAIN",
        train,
        "INPUT.MAX_SIZE_TRAIN",
        train_limit,
    ]
    sizes += ["INPUT.MIN_SIZE_TEST", test, "INPUT.MAX_SIZE_TEST", test_limit]
    doubt = doubt_about_sizes(get_cfg("quick/custom", sizes))
    assert bool(doubt) == outside
    if outside:
        assert f"INPUT.MIN_SIZE_TEST {test}" in doubt


@pytest.mark.parametrize(("size", "outside"), [(200, False), (288, False), (320, True)])
def test_the_sizes_of_scale_jitter_are_those_of_training(size: int, outside: bool) -> None:
    jitter = ["INPUT.SCALE_JITTER", (0.7, 1.2), "INPUT.CROP_SIZE", 256]
    test = ["INPUT.MIN_SIZE_TEST", size, "INPUT.MAX_SIZE_TEST", size]
    doubt = doubt_about_sizes(get_cfg("quick/custom", [*jitter, *test]))
    assert ("CROP_SIZE" in doubt) == outside


def test_without_an_evaluation_no_test_size_is_doubted() -> None:
    outside = ["INPUT.MIN_SIZE_TEST", 999, "INPUT.MAX_SIZE_TEST", 999]
    assert doubt_about_sizes(get_cfg("quick/custom", outside))
    assert not doubt_about_sizes(get_cfg("quick/custom", [*outside, "DATASETS.TEST", ()]))


# The models of synthetic people are tested at 320 pixels and trained at 256, for speed.
SYNTHETIC = ("quick/synthetic_people", "quick/synthetic_people_tiny", "quick/keypoint_rcnn")


@pytest.mark.parametrize("name", sorted(set(list_configs()) - set(SYNTHETIC)))
def test_sizes_of_the_project_are_not_doubted(name: str) -> None:
    assert not doubt_about_sizes(get_cfg(name))
