import pytest
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from inspose_d2.export import similarities, unsuppressed
from inspose_d2.modeling.inference import Poses
from inspose_d2.modeling.oks import object_keypoint_similarity
from inspose_d2.modeling.postprocess import best_poses, body_areas, boxes_of_poses, nms_of_poses

IMAGE = (100, 200)


NMS_TYPES = pytest.mark.parametrize("nms_type", ["boxes", "poses"])


def select(
    keypoints: Tensor,
    scores: Tensor,
    nms_threshold: float = 0.6,
    max_poses: int = 100,
    nms_type: str = "boxes",
    boxes: Tensor | None = None,
) -> Instances:
    boxes = boxes_of_poses(keypoints) if boxes is None else boxes
    keep = best_poses(
        keypoints,
        boxes,
        scores,
        nms_threshold=nms_threshold,
        max_poses=max_poses,
        sigmas=None if nms_type == "boxes" else torch.full(keypoints.shape[1:2], 0.1),
    )
    others = torch.zeros(len(scores), 1), torch.zeros(len(scores), 2), torch.ones(len(scores))
    numbers = torch.arange(len(scores))
    return Poses(keypoints, boxes, scores, *others, numbers).take(keep).to_instances(IMAGE)


def pose(*xy: tuple[float, float]) -> Tensor:
    """One pose (1, K, 3), keypoint scores 0.5."""
    return torch.tensor([[[x, y, 0.5] for x, y in xy]])


POSES = {
    "box": pose((10, 20), (40, 80), (30, 50)),
    "line": pose((10, 20), (40, 20), (30, 20)),
    "point": pose((10, 20), (10, 20), (10, 20)),
    "corner": pose((200, 100), (200, 100), (200, 100)),
}


@st.composite
def scored_poses(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Up to 8 poses of 3 keypoints, on few places so that many overlap, with distinct scores."""
    point = st.tuples(
        st.integers(0, 4).map(lambda n: 50 * n), st.integers(0, 4).map(lambda n: 25 * n)
    )
    rows = draw(st.lists(st.lists(point, min_size=3, max_size=3), min_size=1, max_size=8))
    scores = draw(st.lists(st.integers(1, 99), min_size=len(rows), max_size=len(rows), unique=True))
    return torch.cat([pose(*row) for row in rows]), torch.tensor(scores) / 100


@pytest.mark.fault
@NMS_TYPES
@pytest.mark.parametrize("name", POSES)
def test_identical_poses_become_one(name: str, nms_type: str) -> None:
    scores = torch.tensor([0.2, 0.5, 0.9, 0.5, 0.3])
    poses = select(POSES[name].repeat(5, 1, 1), scores, nms_type=nms_type)
    assert poses.scores.tolist() == [scores.max()]
    assert poses.pred_keypoints.equal(POSES[name])


@pytest.mark.parametrize(("threshold", "count"), [(0.59, 1), (0.61, 2)])
def test_overlap_is_that_of_boxes_grown_by_half_a_pixel(threshold: float, count: int) -> None:
    # Boxes 0..10 and 2.5..12.5 in x, both 0..10 in y: IoU 75 / 125 = 0.6; ungrown 58.5 / 103.5.
    keypoints = torch.cat([pose((0.5, 0.5), (9.5, 9.5)), pose((3, 0.5), (12, 9.5))])
    poses = select(keypoints, torch.tensor([0.8, 0.7]), nms_threshold=threshold)
    assert len(poses) == count
    assert poses.pred_boxes.tensor[0].tolist() == [0, 0, 10, 10]


def test_boxes_of_a_box_head_decide_instead_of_keypoints() -> None:
    keypoints = torch.cat([POSES["box"], POSES["box"], POSES["corner"]])
    boxes = torch.tensor([[0.0, 0, 50, 50], [50, 50, 99, 99], [0, 0, 50, 49]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    poses = select(keypoints, scores, boxes=boxes)
    assert poses.scores.equal(scores[:2])  # equal poses in different boxes stay, not the reverse
    assert poses.pred_boxes.tensor.equal(boxes[:2])


@NMS_TYPES
def test_poses_apart_all_stay_best_first(nms_type: str) -> None:
    keypoints = torch.cat([POSES["corner"], POSES["box"], pose((100, 5), (120, 9), (110, 7))])
    poses = select(keypoints, torch.tensor([0.4, 0.9, 0.6]), nms_type=nms_type)
    torch.testing.assert_close(poses.scores, torch.tensor([0.9, 0.6, 0.4]))
    assert poses.pred_keypoints.equal(keypoints[[1, 2, 0]])
    assert poses.pred_classes.tolist() == [0, 0, 0]
    assert poses.image_size == IMAGE


@NMS_TYPES
def test_max_poses_keeps_the_best(nms_type: str) -> None:
    keypoints = torch.cat([POSES["corner"], POSES["box"], pose((100, 5), (120, 9), (110, 7))])
    poses = select(keypoints, torch.tensor([0.4, 0.9, 0.6]), max_poses=2, nms_type=nms_type)
    assert poses.pred_keypoints.equal(keypoints[[1, 2]])


@pytest.mark.fault
@NMS_TYPES
def test_no_poses_give_empty_fields(nms_type: str) -> None:
    poses = select(torch.zeros(0, 17, 3), torch.zeros(0), nms_type=nms_type)
    assert len(poses) == 0
    assert poses.pred_boxes.tensor.shape == (0, 4)
    assert poses.scores.shape == (0,)
    assert poses.pred_classes.shape == (0,)
    assert poses.pred_classes.dtype == torch.int64
    assert poses.pred_keypoints.shape == (0, 17, 3)
    assert len(detector_postprocess(poses, 50, 50)) == 0


@pytest.mark.parametrize("name", POSES)
def test_detector_postprocess_scales_and_keeps_poses(name: str) -> None:
    poses = detector_postprocess(select(POSES[name], torch.tensor([0.9])), 200, 600)
    assert len(poses) == 1  # also those whose keypoints enclose no area
    # 100 x 200 to 200 x 600: y times 2, x times 3; keypoint scores stay.
    assert poses.pred_keypoints.equal(POSES[name] * torch.tensor([3.0, 2.0, 1.0]))


@NMS_TYPES
@given(poses=scored_poses())
def test_selection_is_sorted_and_selecting_again_changes_nothing(
    nms_type: str, poses: tuple[Tensor, Tensor]
) -> None:
    once = select(*poses, nms_type=nms_type)
    assert once.scores.tolist() == sorted(once.scores.tolist(), reverse=True)
    assert once.scores[0] == poses[1].max()
    twice = select(once.pred_keypoints, once.scores, nms_type=nms_type)
    assert twice.pred_keypoints.equal(once.pred_keypoints)
    assert twice.scores.equal(once.scores)


@NMS_TYPES
@given(poses=scored_poses())
def test_copies_of_all_poses_change_nothing(nms_type: str, poses: tuple[Tensor, Tensor]) -> None:
    keypoints, scores = poses
    once = select(keypoints, scores, nms_type=nms_type)
    doubled = select(keypoints.repeat(2, 1, 1), scores.repeat(2), nms_type=nms_type)
    assert doubled.pred_keypoints.equal(once.pred_keypoints)
    assert doubled.scores.equal(once.scores)


def random_people(num_people: int, num_poses: int) -> tuple[Tensor, Tensor, Tensor]:
    """Poses (N, 17, 3) found near people of 30 by 80 pixels, their scores, and sigmas."""
    random = torch.Generator().manual_seed(0)
    people = torch.randn(num_people, 17, 2, generator=random) * torch.tensor([15.0, 40.0])
    people += torch.rand(num_people, 1, 2, generator=random) * 300
    found = people[torch.arange(num_poses) % num_people]
    found = found + torch.randn(found.shape, generator=random) * 3
    keypoints = torch.cat([found, torch.ones(num_poses, 17, 1)], dim=2)
    return keypoints, torch.rand(num_poses, generator=random), torch.linspace(0.025, 0.1, 17)


@pytest.mark.parametrize("max_poses", [7, 100])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 1.0])
def test_nms_of_poses_is_that_of_the_definition(threshold: float, max_poses: int) -> None:
    keypoints, scores, sigmas = random_people(20, 60)
    areas = body_areas(keypoints)
    expected: list[int] = []
    for number in scores.argsort(descending=True):
        pair_areas = torch.minimum(areas[number], areas[expected])
        this = keypoints[number].expand(len(expected), -1, -1)
        oks = object_keypoint_similarity(this, keypoints[expected], pair_areas, sigmas)
        if not (oks > threshold).any() and len(expected) < max_poses:
            expected.append(int(number))
    assert nms_of_poses(keypoints, scores, sigmas, threshold, max_poses).tolist() == expected


@pytest.mark.parametrize("num_keypoints", [3, 17])
@pytest.mark.parametrize("threshold", [0.1, 0.5])
@pytest.mark.parametrize("room", [1.0, 4.0])
def test_nms_of_500_poses_is_that_of_the_graph(
    num_keypoints: int, threshold: float, room: float
) -> None:
    keypoints, scores, sigmas = random_people(100, 500)
    keypoints[..., :2] += (room - 1) * keypoints[:100, :1, :2].repeat(5, 1, 1)
    keypoints, sigmas = keypoints[:, :num_keypoints], sigmas[:num_keypoints]
    kept = nms_of_poses(keypoints, scores, sigmas, threshold, 100)
    order = scores.argsort(descending=True)
    similar = similarities(keypoints[order], sigmas) > threshold
    stays = unsuppressed(similar, torch.ones(500, dtype=torch.bool))
    assert kept.equal(order[stays][:100])
    assert len(kept) > 20


def test_keypoints_on_a_neighbour_join_boxes_and_not_poses() -> None:
    # Two persons 60 pixels apart; two keypoints of each lie on the other.
    people, _, sigmas = random_people(1, 1)
    keypoints = people.repeat(2, 1, 1)
    keypoints[1, :, 0] += 60
    keypoints[0, :2], keypoints[1, 15:] = keypoints[1, :2].clone(), keypoints[0, 15:].clone()
    scores = torch.tensor([0.9, 0.8])
    assert len(nms_of_poses(keypoints, scores, sigmas, 0.5, 100)) == 2
    torch.testing.assert_close(
        body_areas(keypoints), body_areas(people).repeat(2), rtol=0.5, atol=0
    )


@pytest.mark.fault
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_poses_that_are_not_finite_are_dropped_and_counted_in_one_warning(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    # Five copies apart by their boxes; three are bad, each in another field.
    keypoints = POSES["box"].repeat(5, 1, 1)
    boxes = torch.tensor([[20.0 * i, 0, 20 * i + 10, 10] for i in range(5)])
    scores = torch.tensor([0.5, 0.9, 0.8, 0.7, 0.6])
    keypoints[1, 2, 1], boxes[2, 3], scores[3] = value, value, value
    poses = select(keypoints, scores, boxes=boxes)
    torch.testing.assert_close(poses.scores, torch.tensor([0.6, 0.5]))
    assert poses.pred_boxes.tensor.equal(boxes[[4, 0]])
    assert poses.pred_keypoints.equal(keypoints[[4, 0]])
    assert [record.getMessage() for record in caplog.records] == [
        "dropped 3 of 5 poses of an image: not finite"
    ]
