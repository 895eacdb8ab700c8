import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from inspose_d2.data.dataset_mapper import InsPoseDatasetMapper
from inspose_d2.data.images import ImageError
from inspose_d2.modeling import target_generator

HEIGHT, WIDTH = 48, 96
# COCO's order: nose, then left and right of eyes, ears, shoulders and so on.
FLIP = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]


@pytest.fixture
def cfg(tiny_cfg: Callable[..., CfgNode]) -> CfgNode:
    # A shorter side of 48 leaves the images of this file as they are.
    return tiny_cfg(
        **{
            "DATASETS.TRAIN": ("keypoints_coco_2017_val",),
            "INPUT.MIN_SIZE_TRAIN": (HEIGHT, HEIGHT),
            "INPUT.MAX_SIZE_TRAIN": 1000,
            "INPUT.RANDOM_FLIP": "none",
        }
    )


@pytest.fixture
def image_file(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    return str(path)


def make_dict(image_file: str, *annotations: dict[str, Any]) -> dict[str, Any]:
    return {
        "file_name": image_file,
        "image_id": 1,
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": list(annotations),
    }


def make_person(**others: Any) -> dict[str, Any]:
    person = {
        "bbox": [10.0, 5.0, 40.0, 30.0],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "keypoints": pose().flatten().tolist(),
    }
    return {**person, **others}


def pose() -> Tensor:
    """Keypoint k at (10 + 2k, 6 + k), all visible."""
    k = torch.arange(17.0)
    return torch.stack([10 + 2 * k, 6 + k, torch.full((17,), 2.0)], dim=1)


CROWD = {
    "bbox": [50.0, 10.0, 30.0, 20.0],
    "bbox_mode": BoxMode.XYWH_ABS,
    "category_id": 0,
    "iscrowd": 1,
    "keypoints": [0] * 51,
    "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]},
}


def keypoints_of(mapped: dict[str, Any]) -> Tensor:
    return mapped["instances"].gt_keypoints.tensor


def test_person_keeps_its_keypoints_and_box(cfg: CfgNode, image_file: str) -> None:
    mapped = InsPoseDatasetMapper(cfg)(make_dict(image_file, make_person()))
    assert mapped["image"].shape == (3, HEIGHT, WIDTH)
    assert keypoints_of(mapped).equal(pose()[None])
    assert mapped["instances"].gt_boxes.tensor.tolist() == [[10, 5, 50, 35]]
    assert mapped["instances"].gt_classes.tolist() == [0]


@pytest.mark.fault
def test_crowd_becomes_person_without_labelled_keypoints(cfg: CfgNode, image_file: str) -> None:
    mapped = InsPoseDatasetMapper(cfg)(make_dict(image_file, make_person(), CROWD))
    assert keypoints_of(mapped).equal(torch.stack([pose(), torch.zeros(17, 3)]))
    assert mapped["instances"].gt_boxes.tensor[1].tolist() == [50, 10, 80, 30]
    assert mapped["instances"].gt_classes.tolist() == [0, target_generator.CROWD]


@pytest.mark.fault
def test_person_without_box_gets_the_one_around_the_labelled_keypoints(
    cfg: CfgNode, image_file: str
) -> None:
    keypoints = pose()
    keypoints[5:] = 0
    several, one, nothing = (make_person(keypoints=keypoints.flatten().tolist()) for _ in range(3))
    one["keypoints"] = pose().flatten().tolist()[:3] + [0.0] * 48
    nothing["keypoints"] = [0.0] * 51
    for person in (several, one, nothing):
        del person["bbox"]
    mapped = InsPoseDatasetMapper(cfg)(make_dict(image_file, several, one, nothing))
    # Keypoints 0 to 4 lie from (10, 6) to (18, 10); one keypoint alone gets a pixel.
    assert mapped["instances"].gt_boxes.tensor.tolist() == [[10, 6, 18, 10], [10, 6, 11, 7]]


@pytest.mark.fault
def test_labelled_keypoints_of_a_crowd_are_forgotten(cfg: CfgNode, image_file: str) -> None:
    mapped = InsPoseDatasetMapper(cfg)(make_dict(image_file, make_person(iscrowd=1)))
    assert keypoints_of(mapped).equal(torch.zeros(1, 17, 3))


def test_image_without_annotations_has_empty_keypoints(cfg: CfgNode, image_file: str) -> None:
    instances = InsPoseDatasetMapper(cfg)(make_dict(image_file))["instances"]
    assert instances.gt_keypoints.tensor.shape == (0, 17, 3)
    assert instances.gt_keypoints.tensor.dtype == torch.float32
    assert instances.gt_boxes.tensor.shape == (0, 4)


def test_image_whose_persons_have_no_area_has_empty_keypoints(
    cfg: CfgNode, image_file: str
) -> None:
    person = make_person(bbox=[10.0, 5.0, 0.0, 0.0])
    mapped = InsPoseDatasetMapper(cfg)(make_dict(image_file, person))
    assert keypoints_of(mapped).shape == (0, 17, 3)


@pytest.mark.fault
def test_keypoint_outside_the_image_becomes_unlabelled(cfg: CfgNode, image_file: str) -> None:
    keypoints = pose()
    keypoints[3, 0] = WIDTH + 1
    keypoints[4, 1] = -1
    keypoints[5, 0] = WIDTH  # on the border is inside
    person = make_person(keypoints=keypoints.flatten().tolist())
    mapped = InsPoseDatasetMapper(cfg)(make_dict(image_file, person))
    keypoints[3:5] = 0
    assert keypoints_of(mapped).equal(keypoints[None])


@pytest.mark.fault
@pytest.mark.parametrize("order", ["lacking first", "lacking last", "all lacking"])
def test_person_that_lacks_keypoints_has_none_labelled_in_any_order(
    cfg: CfgNode, image_file: str, order: str
) -> None:
    lacking = make_person()
    del lacking["keypoints"]
    persons, labelled = {
        "lacking first": ([lacking, make_person()], [False, True]),
        "lacking last": ([make_person(), lacking], [True, False]),
        "all lacking": ([lacking, copy.deepcopy(lacking)], [False, False]),
    }[order]
    mapped = InsPoseDatasetMapper(cfg)(make_dict(image_file, *persons))
    expected = [pose() if is_labelled else torch.zeros(17, 3) for is_labelled in labelled]
    assert keypoints_of(mapped).equal(torch.stack(expected))
    assert mapped["instances"].gt_classes.tolist() == [0, 0]


SIZES = [(48, 96), (33, 41), (97, 49), (64, 1)]  # (H, W)


@pytest.fixture(scope="module")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], str]:
    folder = tmp_path_factory.mktemp("images")
    for height, width in SIZES:
        Image.new("RGB", (width, height)).save(folder / f"{height}x{width}.png")
    return {size: str(folder / f"{size[0]}x{size[1]}.png") for size in SIZES}


@given(
    size=st.sampled_from(SIZES),
    new_size=st.tuples(st.integers(2, 300), st.integers(2, 300)),
    flip=st.booleans(),
    unit=st.lists(
        st.tuples(*[st.sampled_from([0.0, 1.0]) | st.floats(0, 1)] * 2), min_size=17, max_size=17
    ),
)
def test_keypoints_come_back_from_resizing_and_flipping_and_none_is_lost(
    image_files: dict[tuple[int, int], str],
    size: tuple[int, int],
    new_size: tuple[int, int],
    flip: bool,
    unit: list[tuple[float, float]],
) -> None:
    mapper = InsPoseDatasetMapper(
        is_train=True,
        augmentations=[T.Resize(new_size), T.RandomFlip(prob=float(flip))],
        image_format="BGR",
        use_keypoint=True,
        keypoint_hflip_indices=np.array(FLIP),
        max_pixels=10_000,
    )
    (height, width), (new_height, new_width) = size, new_size
    xy = np.array(unit) * [width, height]
    keypoints = np.insert(xy, 2, 2, axis=1).flatten().tolist()
    person = make_person(keypoints=keypoints, bbox=[0, 0, width, height])
    record = make_dict(image_files[size], person) | {"height": height, "width": width}
    (keypoints,) = keypoints_of(mapper(record)).double()
    assert (keypoints[:, 2] == 2).all()
    if flip:
        keypoints = keypoints[FLIP]
        keypoints[:, 0] = new_width - keypoints[:, 0]
    back = keypoints[:, :2] * torch.tensor([width / new_width, height / new_height])
    assert (back - torch.from_numpy(xy)).abs().max() < 1e-3


@pytest.mark.fault
def test_keypoint_on_the_border_is_not_lost_to_a_rounding_error(
    cfg: CfgNode, image_file: str
) -> None:
    mapper = InsPoseDatasetMapper(cfg)
    Image.new("RGB", (49, HEIGHT)).save(image_file)
    assert 49 * (63 / 49) > 63
    mapper.augmentations = T.AugmentationList([T.Resize((HEIGHT, 63))])
    keypoints = pose()
    keypoints[16] = torch.tensor([49.0, HEIGHT, 2])
    record = make_dict(image_file, make_person(keypoints=keypoints.flatten().tolist()))
    mapped = mapper({**record, "width": 49})
    assert keypoints_of(mapped)[0, 16].tolist() == [63, HEIGHT, 2]


def test_flip_mirrors_and_swaps_left_and_right(cfg: CfgNode, image_file: str) -> None:
    mapper = InsPoseDatasetMapper(cfg)
    plain = mapper(make_dict(image_file, make_person(), CROWD))
    mapper.augmentations = T.AugmentationList([T.RandomFlip(prob=1.0)])
    mapped = mapper(make_dict(image_file, make_person(), CROWD))
    expected = pose()[FLIP]
    expected[:, 0] = WIDTH - expected[:, 0]
    assert keypoints_of(mapped).equal(torch.stack([expected, torch.zeros(17, 3)]))
    assert mapped["image"].equal(plain["image"].flip(2))
    assert mapped["instances"].gt_boxes.tensor[0].tolist() == [WIDTH - 50, 5, WIDTH - 10, 35]


def test_data_set_dict_is_left_as_it_was(cfg: CfgNode, image_file: str) -> None:
    # Detectron2 hands the same dict out in every epoch.
    dataset_dict = make_dict(image_file, make_person(), CROWD)
    before = copy.deepcopy(dataset_dict)
    InsPoseDatasetMapper(cfg)(dataset_dict)
    assert dataset_dict == before


def test_evaluation_needs_no_annotations(cfg: CfgNode, image_file: str) -> None:
    mapped = InsPoseDatasetMapper(cfg, is_train=False)(make_dict(image_file, make_person()))
    assert "annotations" not in mapped
    assert "instances" not in mapped


def test_peer_of_the_mapper_reads_the_same(cfg: CfgNode, image_file: str) -> None:
    for is_train in (True, False):
        expected = DatasetMapper(cfg, is_train=is_train)(make_dict(image_file, make_person()))
        mapped = InsPoseDatasetMapper(cfg, is_train=is_train)(make_dict(image_file, make_person()))
        assert mapped.keys() == expected.keys()
        assert mapped["image"].equal(expected["image"])
        assert mapped["image"].dtype == torch.uint8


@pytest.mark.fault
@pytest.mark.parametrize("is_train", [True, False])
def test_image_that_cannot_be_read_is_named_with_its_id(
    cfg: CfgNode, tmp_path: Path, is_train: bool
) -> None:
    mapper = InsPoseDatasetMapper(cfg, is_train)
    path = tmp_path / "image.jpg"
    for content in (None, b"", b"no image"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ImageError, match=rf"image id 1, {path}: "):
            mapper(make_dict(str(path)))
    cfg.INPUT.MAX_PIXELS = HEIGHT * WIDTH - 1
    Image.new("RGB", (WIDTH, HEIGHT)).save(path)
    mapper(make_dict(str(path)))
    with pytest.raises(ImageError, match=r"image id 1, .* INPUT\.MAX_PIXELS 4607"):
        InsPoseDatasetMapper(cfg, is_train)(make_dict(str(path)))


@pytest.mark.fault
def test_exif_rotated_image_has_the_keypoints_of_the_upright_one(
    cfg: CfgNode, image_file: str, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[274] = 8
    turned = str(tmp_path / "turned.png")
    with Image.open(image_file) as image:
        image.transpose(Image.Transpose.ROTATE_270).save(turned, exif=exif)
    mapper = InsPoseDatasetMapper(cfg)
    expected = mapper(make_dict(image_file, make_person()))
    mapped = mapper(make_dict(turned, make_person()))
    assert mapped["image"].equal(expected["image"])
    assert keypoints_of(mapped).equal(keypoints_of(expected))
    # A json that has the size of the stored image: where its keypoints are, nobody knows.
    stored = {**make_dict(turned, make_person()), "height": WIDTH, "width": HEIGHT}
    message = r"image id 1, .*turned\.png: the image is 96 x 48 .* say 48 x 96; .*EXIF orientation"
    with pytest.raises(SizeMismatchError, match=message):
        mapper(stored)


@pytest.mark.fault
def test_image_of_another_size_than_the_annotations_say_is_named(
    cfg: CfgNode, image_file: str
) -> None:
    wrong = {**make_dict(image_file, make_person()), "width": WIDTH + 1}
    message = r"image\.png: the image is 96 x 48 .* the annotations say 97 x 48; put the annotated"
    with pytest.raises(SizeMismatchError, match=message):
        InsPoseDatasetMapper(cfg)(wrong)
    unsaid = make_dict(image_file)
    del unsaid["height"], unsaid["width"]
    mapped = InsPoseDatasetMapper(cfg)(unsaid)
    assert (mapped["height"], mapped["width"]) == (HEIGHT, WIDTH)


@pytest.mark.fault
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_thin_image_is_trained_on(
    tiny_cfg: Callable[..., CfgNode], tmp_path: Path, size: tuple[int, int]
) -> None:
    height, width = size
    path = str(tmp_path / "thin.png")
    Image.new("RGB", (width, height)).save(path)
    cfg = tiny_cfg(**{"DATASETS.TRAIN": ("keypoints_coco_2017_val",)})
    keypoints = [0.5 * width, 0.5 * height, 2.0] * 17
    person = make_person(bbox=[0.0, 0.0, width, height], keypoints=keypoints)
    inputs = {**make_dict(path, person), "height": height, "width": width}
    mapper = InsPoseDatasetMapper(cfg)
    mapper.augmentations = T.AugmentationList([*mapper.augmentations.augs, T.RandomFlip(prob=1.0)])
    mapped = mapper(inputs)
    assert min(mapped["image"].shape) >= 1
    assert len(mapped["instances"]) == 1
    model = build_model(cfg)
    with EventStorage():
        losses = model([mapped])
    assert all(loss.isfinite() for loss in losses.values())
    for view in (cfg.INPUT.MIN_SIZE_TEST, 0):
        cfg.INPUT.MIN_SIZE_TEST = view
        mapped = InsPoseDatasetMapper(cfg, is_train=False)(make_dict(path) | inputs)
        assert mapped["image"].shape[1:] == size if view == 0 else min(mapped["image"].shape) >= 1
