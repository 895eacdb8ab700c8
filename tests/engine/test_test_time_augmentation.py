"""Test-time augmentation: its properties, on merging alone and on a whole model."""

import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from inspose_d2.engine.test_time_augmentation import (
    FALLOFF,
    InsPoseWithTTA,
    flip_poses,
    keypoint_similarity,
    merge_poses,
)

IMAGE = (100, 200)
MIRROR = [0, 2, 1]  # nose, left eye, right eye
FINDS_MUCH = [
    *("MODEL.INSPOSE.SCORE_THRESH_TEST", 0.0),
    *("MODEL.INSPOSE.TOPK_CANDIDATES_TEST", 20),
    *("MODEL.INSPOSE.NMS_THRESH_TEST", 0.99),
]


def poses_of(keypoints: Any, scores: Any, boxes: Any = None) -> Instances:
    """Poses of an image: keypoints (N, 3, 3), boxes around them unless given."""
    keypoints = torch.as_tensor(keypoints, dtype=torch.float32).reshape(-1, 3, 3)
    xy = keypoints[..., :2]
    if boxes is None:
        boxes = torch.cat([xy.amin(dim=1) - 0.5, xy.amax(dim=1) + 0.5], dim=1)
    return Instances(
        IMAGE,
        pred_boxes=Boxes(torch.as_tensor(boxes, dtype=torch.float32)),
        scores=torch.as_tensor(scores, dtype=torch.float32),
        pred_classes=torch.zeros(len(keypoints), dtype=torch.int64),
        pred_keypoints=keypoints,
    )


def person(x: float, y: float = 50, score: float = 0.5) -> list[list[float]]:
    """Keypoints of a person of 40 x 40 pixels around (x, y)."""
    return [[x, y - 20, score], [x - 20, y + 20, score], [x + 20, y + 20, score]]


def assert_equal(one: Instances, other: Instances, tolerance: float = 0.0) -> None:
    assert one.image_size == other.image_size
    assert one.get_fields().keys() == other.get_fields().keys()
    assert one.pred_classes.equal(other.pred_classes)
    for get in (
        lambda x: x.pred_keypoints,
        lambda x: x.pred_boxes.tensor,
        lambda x: x.scores,
    ):
        torch.testing.assert_close(get(one), get(other), rtol=tolerance, atol=tolerance)


@st.composite
def view(draw: st.DrawFn) -> Instances:
    """Up to 4 poses, best first, on few places and with few scores: doubles and ties are common."""
    scores = sorted(draw(st.lists(st.sampled_from([0.2, 0.5, 0.9]), max_size=4)), reverse=True)
    rows = []
    for _ in scores:
        x, y = draw(st.integers(0, 8)), draw(st.integers(0, 2))
        rows.append(person(20 + 20 * x, 30 + 20 * y, draw(st.sampled_from([0.1, 0.6]))))
        if draw(st.booleans()):
            rows[-1][0][0] += 3
    return poses_of(rows, scores)


@given(view())
def test_one_view_stays_as_it_is(poses: Instances) -> None:
    assert_equal(merge_poses([poses], 100), poses)


@given(st.lists(view(), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_order_of_views_does_not_matter(views: list[Instances], random: Any) -> None:
    shuffled = list(views)
    random.shuffle(shuffled)
    assert_equal(merge_poses(shuffled, 100), merge_poses(views, 100))


@given(st.lists(view(), min_size=1, max_size=4))
def test_merged_poses_stay_in_the_image_and_no_view_gives_two_to_one(
    views: list[Instances],
) -> None:
    merged = merge_poses(views, 100)
    xy = merged.pred_keypoints[..., :2]
    assert ((xy >= 0) & (xy <= xy.new_tensor([200, 100]))).all()
    assert max(len(x) for x in views) <= len(merged) <= sum(len(x) for x in views)
    assert merged.scores.equal(merged.scores.sort(descending=True).values)


@given(view())
def test_empty_view_changes_nothing_but_scores(poses: Instances) -> None:
    merged = merge_poses([poses_of([], [], torch.zeros(0, 4)), poses], 100)
    poses.scores /= 2  # mean over both views
    assert_equal(merged, poses)


def test_views_without_poses_give_none() -> None:
    merged = merge_poses([poses_of([], [], torch.zeros(0, 4))] * 2, 100)
    assert len(merged) == 0
    assert merged.pred_keypoints.shape == (0, 3, 3)


@given(view())
def test_flipping_twice_changes_nothing(poses: Instances) -> None:
    assert_equal(flip_poses(flip_poses(poses, MIRROR), MIRROR), poses)


def test_flip_mirrors_places_and_swaps_sides() -> None:
    poses = poses_of([[[50, 10, 0.7], [40, 20, 0.8], [70, 30, 0.9]]], [0.5])
    flipped = flip_poses(poses, MIRROR)
    expected = [[150, 10, 0.7], [130, 30, 0.9], [160, 20, 0.8]]
    torch.testing.assert_close(flipped.pred_keypoints[0], torch.tensor(expected))
    assert flipped.pred_boxes.tensor.tolist() == [[129.5, 9.5, 160.5, 30.5]]
    assert poses.pred_boxes.tensor.tolist() == [[39.5, 9.5, 70.5, 30.5]]  # untouched


def test_similarity_is_that_of_oks() -> None:
    # 5 pixels in a box of 100 x 25: exp(-25 / (2 * 0.05^2 * 2500)) = exp(-2).
    similarity = keypoint_similarity(
        torch.tensor([[10.0, 10.0], [7.0, 7.0]]),
        torch.tensor([[13.0, 14.0], [7.0, 7.0]]),
        torch.tensor(2500.0),
    )
    assert FALLOFF == 0.05
    assert similarity.tolist() == pytest.approx([math.exp(-2), 1])


def test_average_is_by_pose_score_times_keypoint_score() -> None:
    # All 100 x 100 pixels, so 2 * falloff^2 * area = 50. Only the nose differs: x = 100 with weight
    # 0.8 * 0.5 = 0.4, x = 101 with weight 0.4 * 0.25 = 0.1. At 100 lies more support, so the
    # average is about 100 and counts the other pose with exp(-1 / 50).
    def keypoints(x: float, score: float) -> list[list[float]]:
        return [[x, 50, score], [50, 0, 0.5], [150, 100, 0.5]]

    boxes = torch.tensor([[50.0, 0, 150, 100]])
    first = poses_of([keypoints(100, 0.5)], [0.8], boxes)
    second = poses_of([keypoints(101, 0.25)], [0.4], boxes)
    merged = merge_poses([first, second], 100)
    assert len(merged) == 1
    far = 0.1 * math.exp(-1 / 50)
    x = (0.4 * 100 + far * 101) / (0.4 + far)
    near = [math.exp(-((x - 100) ** 2) / 50), math.exp(-((x - 101) ** 2) / 50)]
    nose = (0.8 * 0.5 * near[0] + 0.4 * 0.25 * near[1]) / 1.2
    score = (0.8 * (near[0] + 2) / 3 + 0.4 * (near[1] + 2) / 3) / 2
    torch.testing.assert_close(
        merged.pred_keypoints[0], torch.tensor([[x, 50, nose], [50, 0, 0.5], [150, 100, 0.5]])
    )
    assert merged.scores.tolist() == pytest.approx([score])


def test_boxes_are_averaged_by_score() -> None:
    first = poses_of([person(60)], [0.9], torch.tensor([[30.0, 20, 90, 80]]))
    second = poses_of([person(60)], [0.3], torch.tensor([[34.0, 28, 94, 84]]))
    merged = merge_poses([first, second], 100)
    torch.testing.assert_close(merged.pred_boxes.tensor, torch.tensor([[31.0, 22, 91, 81]]))


def test_keypoint_that_one_view_mistakes_stays_where_the_others_agree() -> None:
    wrong = person(60)
    wrong[0] = [20, 90, 0.5]
    views = [poses_of([person(60)], [0.5]), poses_of([wrong], [0.6]), poses_of([person(60)], [0.5])]
    merged = merge_poses(views, 100)
    assert len(merged) == 1
    torch.testing.assert_close(
        merged.pred_keypoints[0, :, :2], torch.tensor(person(60))[:, :2], rtol=0, atol=1e-3
    )
    # Two thirds of the votes for the nose: its score falls, those of the eyes do not.
    assert merged.pred_keypoints[0, :, 2].tolist() == pytest.approx([0.5 / 1.6, 0.5, 0.5])


def test_doubles_become_one_and_score_by_how_many_views_see_them() -> None:
    both = poses_of([person(60), person(140)], [0.9, 0.6])
    merged = merge_poses([both, both, poses_of([person(60)], [0.6])], 100)
    assert merged.pred_keypoints[:, 0, 0].tolist() == pytest.approx([60, 140])
    assert merged.scores.tolist() == pytest.approx([0.8, 0.4])


def test_near_persons_stay_two() -> None:
    # 2 pixels apart, a similarity of 0.6; each finds itself in the other view.
    views = [
        poses_of([person(60), person(62)], [0.9, 0.7]),
        poses_of([person(62), person(60)], [0.6, 0.5]),
    ]
    merged = merge_poses(views, 100)
    assert merged.pred_keypoints[:, 0, 0].tolist() == pytest.approx([60, 62])
    assert merged.scores.tolist() == pytest.approx([0.7, 0.65])


def test_best_poses_are_kept() -> None:
    poses = poses_of([person(40), person(90), person(140)], [0.9, 0.6, 0.3])
    assert_equal(merge_poses([poses, poses], 2), poses[:2], 1e-6)


class Beacons(nn.Module):
    """Finds one person by bright dots: the nose 255, pair i of keypoints 255 - i.

    Of a pair, the dot further to the right is the left keypoint, as in a face that looks at us.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        (inputs,) = batched_inputs
        image = inputs["image"]
        self.seen.append(image)
        places = [(image[0] == 255 - i).nonzero().flip(1).float() + 0.5 for i in range(9)]
        pairs = [place[place[:, 0].argsort(descending=True)] for place in places]
        xy = torch.cat(pairs)[None]
        poses = Instances(
            (inputs["height"], inputs["width"]),
            pred_boxes=Boxes(torch.cat([xy.amin(dim=1) - 0.5, xy.amax(dim=1) + 0.5], dim=1)),
            scores=torch.ones(1),
            pred_classes=torch.zeros(1, dtype=torch.int64),
            pred_keypoints=torch.cat([xy, torch.ones(1, 17, 1)], dim=2),
        )
        return [{"instances": poses}]


def with_tta(cfg: CfgNode, model: nn.Module, sizes: tuple[int, ...], flip: bool) -> InsPoseWithTTA:
    cfg = cfg.clone()
    cfg.merge_from_list(["TEST.AUG.MIN_SIZES", sizes, "TEST.AUG.FLIP", flip])
    return InsPoseWithTTA(cfg, model)


def test_flipped_view_comes_back_with_sides_swapped(tiny_cfg: Callable[..., CfgNode]) -> None:
    # Without the swap left and right would lie in each other's place; one pixel off, the average
    # of the views would be half a pixel off.
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    image[:, 5, 40] = 255
    for i in range(1, 9):
        image[:, 7 * i, 40 - 3 * i] = image[:, 7 * i, 40 + 5 * i] = 255 - i
    plain = Beacons()([{"image": image, "height": 64, "width": 96}])[0]["instances"]
    assert plain.pred_keypoints[0, 1:3, :2].tolist() == [[45.5, 7.5], [37.5, 7.5]]  # left, right
    tta = with_tta(tiny_cfg(), Beacons(), (64,), flip=True)
    merged = tta([{"image": image}])[0]["instances"]
    assert_equal(merged, plain, 1e-6)
    unchanged, flipped = tta.model.seen
    assert unchanged.equal(image)
    assert flipped.equal(image.flip(2))


@pytest.fixture
def model_and_cfg(tiny_cfg: Callable[..., CfgNode]) -> tuple[nn.Module, CfgNode]:
    """A whole model with random weights that finds something everywhere."""
    torch.manual_seed(0)
    cfg = tiny_cfg(FINDS_MUCH)
    return build_model(cfg).eval(), cfg


def picture(height: int = 72, width: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def test_model_with_one_view_equals_the_model(model_and_cfg: tuple[nn.Module, CfgNode]) -> None:
    model, cfg = model_and_cfg
    tta = with_tta(cfg, model, (72,), flip=False)
    for inputs in ({"image": picture()}, {"image": picture(), "height": 100, "width": 130}):
        plain = model([inputs])[0]["instances"]
        assert len(plain) > 3
        assert_equal(tta([inputs])[0]["instances"], plain)


@torch.no_grad()
def test_flipped_image_gives_flipped_poses(model_and_cfg: tuple[nn.Module, CfgNode]) -> None:
    model, cfg = model_and_cfg
    tta = with_tta(cfg, model, (72,), flip=True)
    one = tta([{"image": picture()}])[0]["instances"]
    other = tta([{"image": picture().flip(2)}])[0]["instances"]
    assert_equal(flip_poses(other, tta.flip_indices), one, 1e-4)


def test_predictor_of_detectron2(tiny_cfg: Callable[..., CfgNode]) -> None:
    # An app wraps the predictor's model and stops the predictor from resizing.
    cfg = tiny_cfg([*FINDS_MUCH, "TEST.AUG.MIN_SIZES", (96,), "TEST.AUG.MAX_SIZE", 128])
    cfg.TEST.AUG.FLIP = False
    image = cv2.resize(np.ascontiguousarray(picture().permute(1, 2, 0).numpy()), (170, 140))
    predictor = DefaultPredictor(cfg)
    plain = predictor(image)["instances"]
    model = predictor.model
    cfg.INPUT.MIN_SIZE_TEST = 0
    predictor = DefaultPredictor(cfg)
    predictor.model = InsPoseWithTTA(cfg, model)
    assert len(plain) > 3
    assert_equal(predictor(image)["instances"], plain)


def test_flip_map_that_is_missing_is_named(tiny_cfg: Callable[..., CfgNode]) -> None:
    name = "keypoints_without_sides"
    MetadataCatalog.get(name).keypoint_names = ["a"] * 17
    cfg = tiny_cfg(["DATASETS.TEST", (name,)])
    with pytest.raises(ValueError, match=rf"the data sets .*{name}.* keypoint_flip_map"):
        InsPoseWithTTA(cfg, nn.Identity())
    MetadataCatalog.remove(name)
    cfg.TEST.AUG.FLIP = False
    InsPoseWithTTA(cfg, nn.Identity())


def test_views_without_sizes_are_refused(tiny_cfg: Callable[..., CfgNode]) -> None:
    with pytest.raises(ValueError, match=r"TEST\.AUG\.MIN_SIZES"):
        InsPoseWithTTA(tiny_cfg(["TEST.AUG.MIN_SIZES", ()]), nn.Identity())


@pytest.mark.fault
@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_thin_image_has_views(
    model_and_cfg: tuple[nn.Module, CfgNode], size: tuple[int, int]
) -> None:
    model, cfg = model_and_cfg
    tta = with_tta(cfg, model, (64, 72), flip=True)
    poses = tta([{"image": torch.full((3, *size), 200.0)}])[0]["instances"]
    assert poses.image_size == size
    assert poses.pred_keypoints.isfinite().all()
