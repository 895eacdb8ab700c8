"""InsPosePredictor: what it takes, what it refuses, and that its results are the model's."""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from PIL import Image

from inspose_d2 import InsPosePredictor
from inspose_d2.data.images import ImageError

FINDS_MUCH = ["MODEL.INSPOSE.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 20]


def picture(height: int = 60, width: int = 90, seed: int = 0) -> np.ndarray:
    """Random BGR picture (H, W, 3) of coarse blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return cv2.resize(blocks, (width, height), interpolation=cv2.INTER_NEAREST)


@pytest.fixture
def cfg(tiny_cfg: Callable[..., CfgNode]) -> CfgNode:
    return tiny_cfg(FINDS_MUCH)


@pytest.fixture
def predictor(cfg: CfgNode) -> InsPosePredictor:
    torch.manual_seed(0)
    return InsPosePredictor(cfg, device="cpu")


def assert_same(results: dict[str, Instances], expected: dict[str, Instances]) -> None:
    """Equal to the last bit, and not empty."""
    poses, others = results["instances"], expected["instances"]
    assert poses.image_size == others.image_size
    assert len(poses) == len(others) > 0
    assert poses.pred_keypoints.equal(others.pred_keypoints)
    assert poses.pred_boxes.tensor.equal(others.pred_boxes.tensor)
    assert poses.scores.equal(others.scores)
    assert poses.pred_classes.equal(others.pred_classes)


def assert_close(results: dict[str, Instances], expected: dict[str, Instances]) -> None:
    """Equal to rounding; near-equal scores may change places."""
    poses, others = results["instances"], expected["instances"]
    assert poses.image_size == others.image_size
    torch.testing.assert_close(poses.scores, others.scores, rtol=1e-4, atol=1e-6)
    distances = torch.cdist(*(x.pred_keypoints.flatten(1) for x in (poses, others)))
    assert distances.amin(dim=1).max() < 0.01  # pixels, of all keypoints together
    assert distances.argmin(dim=1).unique().numel() == len(others)


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_result_is_that_of_default_predictor(cfg: CfgNode, order: str, tmp_path: Path) -> None:
    cfg.INPUT.FORMAT = order
    torch.manual_seed(0)
    predictor = InsPosePredictor(cfg, device="cpu")
    DetectionCheckpointer(predictor.model, str(tmp_path)).save("model")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    expected = DefaultPredictor(cfg)(picture())
    assert_same(predictor(picture()), expected)
    cfg.MODEL.WEIGHTS = ""
    loaded = InsPosePredictor(cfg, weights=tmp_path / "model.pth", device="cpu")
    assert_same(loaded(picture()), expected)
    assert cfg.MODEL.WEIGHTS == ""


def test_file_array_and_pillow_image_are_the_same(
    predictor: InsPosePredictor, tmp_path: Path
) -> None:
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), picture())
    expected = predictor(picture())
    assert expected["instances"].image_size == (60, 90)
    for x in (path, str(path), Image.open(path), Image.fromarray(picture()[:, :, ::-1])):
        assert_same(predictor(x), expected)
    keypoints = expected["instances"].pred_keypoints
    assert keypoints.shape[1:] == (17, 3)
    assert 0 <= keypoints[..., 2].min() <= keypoints[..., 2].max() <= 1


@pytest.mark.fault
def test_exif_rotated_file_gives_the_keypoints_of_the_upright_image(
    predictor: InsPosePredictor, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[274] = 6
    upright = Image.fromarray(picture())
    upright.save(tmp_path / "upright.png")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "turned.png", exif=exif)
    expected = predictor(tmp_path / "upright.png")
    for x in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert_same(predictor(x), expected)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_list_is_in_order_whatever_the_sizes(
    predictor: InsPosePredictor, tmp_path: Path, batch_size: int
) -> None:
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), picture(seed=3))
    images = [picture(), picture(90, 60, 1), picture(seed=2), str(path), picture(120, 180, 4)]
    sizes: list[int] = []
    predictor.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    results = predictor(images, batch_size=batch_size)
    # Four are resized to one size, the upright one waits for others of its own.
    assert sorted(sizes) == {1: [1] * 5, 2: [1, 2, 2], 8: [1, 4]}[batch_size]
    assert [x["instances"].image_size for x in results] == [
        (60, 90), (90, 60), (60, 90), (60, 90), (120, 180)
    ]  # fmt: skip
    for image, result in zip(images, results, strict=True):
        assert_close(result, predictor(image))
    assert_close(predictor(tuple(images[:1]))[0], results[0])


@pytest.mark.fault
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_thin_image_gives_finite_poses(predictor: InsPosePredictor, size: tuple[int, int]) -> None:
    poses = predictor(np.full((*size, 3), 200, np.uint8))["instances"]
    assert poses.image_size == size
    assert poses.pred_keypoints.isfinite().all()
    assert poses.pred_keypoints.shape[1:] == (17, 3)
    predictor.model.pose_inference.score_threshold = 1.0
    assert len(predictor(np.full((*size, 3), 200, np.uint8))["instances"]) == 0


GOOD = picture()
BAD = {
    "None": (None, TypeError, "NoneType; cv2.imread returns None"),
    "number": (7, TypeError, "int; give a path"),
    "bytes": (b"\x89PNG", TypeError, r"bytes; give PIL\.Image\.open"),
    "dict": ({"image": GOOD}, TypeError, "dict; give a path"),
    "generator": ((x for x in [GOOD]), TypeError, r"generator; give list\(images\)"),
    "list in a list": ([[GOOD]], TypeError, "image 0 of the list .*list; give one list"),
    "None in a list": ([GOOD, None], TypeError, "image 1 of the list is no image: got NoneType"),
    "empty list": ([], ValueError, "list of images is empty"),
    "tensor": (torch.zeros(3, 4, 5), TypeError, r"Tensor \(3, 4, 5\), torch.float32; .*permute"),
    "grey": (GOOD[:, :, 0], ValueError, r"\(60, 90\), uint8; .*COLOR_GRAY2BGR"),
    "one channel": (GOOD[:, :, :1], ValueError, r"\(60, 90, 1\), uint8; .*COLOR_GRAY2BGR"),
    "RGBA": (np.zeros((4, 5, 4), np.uint8), ValueError, r"\(4, 5, 4\), uint8; drop alpha"),
    "channels first": (GOOD.transpose(2, 0, 1), ValueError, r"\(3, 60, 90\), .*transpose"),
    "batch": (GOOD[None], ValueError, r"\(1, 60, 90, 3\), uint8; .*list\(images\)"),
    "two channels": (GOOD[:, :, :2], ValueError, r"\(60, 90, 2\), uint8; give one image"),
    "row": (GOOD[0, :, 0], ValueError, r"\(90,\), uint8"),
    "no rows": (GOOD[:0], ValueError, r"\(0, 90, 3\), uint8; it has no pixels"),
    "uint16": (GOOD.astype(np.uint16), TypeError, r"\(60, 90, 3\), uint16; scale with .* / 257"),
    "float": (GOOD / 255, TypeError, r"\(60, 90, 3\), float64; scale it to 0\.\.255"),
    "NaN": (np.full((4, 5, 3), np.nan, np.float32), TypeError, "float32; .*without NaN"),
    "int64": (GOOD.astype(np.int64), TypeError, "int64; scale it"),
    "bool": (GOOD > 100, TypeError, r"bool; scale with image\.astype"),
    "objects": (np.array([None, GOOD], dtype=object), TypeError, "object"),
}


@pytest.mark.fault
def test_what_is_no_image_is_refused_with_shape_type_and_cure(predictor: InsPosePredictor) -> None:
    for x, error, message in BAD.values():
        with pytest.raises(error, match=message):
            predictor(x)


@pytest.mark.fault
def test_bad_file_and_bad_pillow_image_are_named(
    predictor: InsPosePredictor, tmp_path: Path
) -> None:
    with pytest.raises(ImageError, match=r"missing\.jpg.*No such file"):
        predictor([picture(), tmp_path / "missing.jpg"])
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "jpeg")
    with pytest.raises(ImageError, match=r"image 1 of the list, a Pillow image: damaged"):
        predictor([picture(), Image.open(io.BytesIO(file.getvalue()[:-200]))])
    with pytest.raises(ImageError, match="image, a Pillow image: mode 'F'"):
        predictor(Image.new("F", (4, 5)))
    with pytest.raises(ImageError, match="0 x 5: the image has no pixels"):
        predictor(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, None])
def test_batch_size_below_one_is_refused(predictor: InsPosePredictor, batch_size: Any) -> None:
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        predictor([picture()], batch_size=batch_size)


def test_device_is_that_of_the_config_or_refused(cfg: CfgNode) -> None:
    assert InsPosePredictor(cfg).model.device.type == "cpu"
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cuda"
        with pytest.raises(ValueError, match=r"MODEL\.DEVICE is 'cuda', but .*set it to 'cpu'"):
            InsPosePredictor(cfg)


def test_config_is_taken_by_its_name() -> None:
    predictor = InsPosePredictor("quick/synthetic_people_tiny", weights="synthetic_people_tiny")
    assert predictor.cfg.MODEL.INSPOSE.NUM_KEYPOINTS == 17


def test_threshold_is_one_of_the_score_that_is_returned(cfg: CfgNode) -> None:
    cfg.MODEL.INSPOSE.KEYPOINT_SCORE_WEIGHT_TEST = 0.75  # scores are lower than probabilities
    torch.manual_seed(0)
    low = InsPosePredictor(cfg, score_threshold=0.0)
    found = low(picture())["instances"].scores
    threshold = float(found.median())
    high = InsPosePredictor(cfg, score_threshold=threshold)
    high.model.load_state_dict(low.model.state_dict())
    torch.testing.assert_close(high(picture())["instances"].scores, found[found >= threshold])


def test_arguments_go_before_the_config(cfg: CfgNode) -> None:
    before = cfg.clone()
    cfg.freeze()
    predictor = InsPosePredictor(
        cfg, device="cpu", score_threshold=0.25, nms_threshold=0.5, max_poses=3
    )
    inference = predictor.model.pose_inference
    assert (inference.score_threshold, inference.nms_threshold) == (0.25, 0.5)
    assert inference.max_poses == 3
    assert not predictor.model.training
    assert cfg == before


@pytest.mark.parametrize(
    "argument",
    [{"score_threshold": 50}, {"nms_threshold": -0.1}, {"max_poses": 0}, {"max_poses": 2.5}],
)
def test_argument_out_of_range_is_named(cfg: CfgNode, argument: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(argument))} must be"):
        InsPosePredictor(cfg, device="cpu", **argument)


@pytest.mark.fault
@pytest.mark.parametrize("requests", [3, pytest.param(24, marks=pytest.mark.slow)])
def test_eight_threads_get_what_one_gets(predictor: InsPosePredictor, requests: int) -> None:
    sizes = [(60, 90), (90, 60), (128, 128)]
    images = [picture(*sizes[seed % 3], seed) for seed in range(requests)]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        serial = [predictor(image) for image in images]
        state = {name: id(value) for name, value in vars(predictor).items()}
        with ThreadPoolExecutor(8) as pool:
            runs = list(pool.map(lambda _: [predictor(x) for x in images], range(8)))
    finally:
        torch.set_num_threads(num_threads)
    assert {name: id(value) for name, value in vars(predictor).items()} == state
    for results in runs:
        for result, expected in zip(results, serial, strict=True):
            assert_same(result, expected)
