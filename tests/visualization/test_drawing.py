from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer

import inspose_d2  # noqa: F401  (registers the synthetic people)
from inspose_d2.visualization.poses import (
    ACROSS,
    LEFT,
    MIDDLE,
    RIGHT,
    draw_keypoint_maps,
    draw_poses,
)

COCO = MetadataCatalog.get("keypoints_coco_2017_val")
NOSE, LEFT_SHOULDER, RIGHT_SHOULDER, LEFT_ELBOW, LEFT_HIP = 0, 5, 6, 7, 11


def poses_of(*persons: dict[int, tuple[float, float, float]], k: int = 17) -> Instances:
    """Persons with some keypoints (x, y, score) by number; the others have score 0 at (0, 0)."""
    keypoints = torch.zeros(len(persons), k, 3)
    for person, points in enumerate(persons):
        for number, point in points.items():
            keypoints[person, number] = torch.tensor(point)
    return Instances(
        (200, 200),
        pred_keypoints=keypoints,
        pred_boxes=Boxes(torch.tensor([[40.0, 60.0, 160.0, 180.0]] * len(persons))),
        scores=torch.linspace(0.9, 0.5, len(persons)),
        pred_classes=torch.zeros(len(persons), dtype=torch.int64),
    )


def ground(value: int = 0) -> np.ndarray:
    return np.full((200, 200, 3), value, np.uint8)


TORSO = {
    NOSE: (100.5, 30.5, 1.0),
    LEFT_SHOULDER: (150.5, 60.5, 1.0),
    RIGHT_SHOULDER: (50.5, 60.5, 1.0),
    LEFT_ELBOW: (150.5, 120.5, 1.0),
}


def color_at(image: np.ndarray, x: int, y: int) -> tuple[int, ...]:
    return tuple(image[y, x].tolist())


@pytest.mark.parametrize("value", [0, 255])
def test_colours_are_those_of_figure_2_on_dark_and_on_light_ground(value: int) -> None:
    image = draw_poses(ground(value), poses_of(TORSO), metadata=COCO)
    assert color_at(image, 100, 30) == MIDDLE == (255, 0, 255)  # magenta, the nose
    assert color_at(image, 150, 60) == color_at(image, 150, 90) == LEFT  # joint and upper arm
    assert color_at(image, 50, 60) == RIGHT
    assert color_at(image, 100, 60) == ACROSS  # from shoulder to shoulder
    assert LEFT[0] > LEFT[2]  # BGR: blue
    assert RIGHT[2] > RIGHT[0]  # orange
    # A limb has an edge that is darker than itself and the light ground.
    edge = image[85:95, 140:161].sum(axis=2).min()
    assert edge < sum(LEFT) / 2
    assert color_at(image, 199, 199) == (value,) * 3


def test_image_and_instances_stay_as_they_are() -> None:
    image, poses = ground(), poses_of(TORSO)
    before = poses.pred_keypoints.clone()
    drawn = draw_poses(image, poses, metadata=COCO, boxes=True, scores=True)
    assert not image.any()
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert torch.equal(poses.pred_keypoints, before)
    read_only = np.broadcast_to(np.uint8(0), (200, 200, 3))
    assert np.array_equal(
        draw_poses(read_only, poses, metadata=COCO, boxes=True, scores=True), drawn
    )


def test_opacity_is_the_root_of_the_score_of_a_limb_the_lower_one() -> None:
    person = TORSO | {NOSE: (100.5, 30.5, 0.25), LEFT_ELBOW: (150.5, 120.5, 0.25)}
    image = draw_poses(ground(), poses_of(person), metadata=COCO)
    assert image[30, 100] == pytest.approx(np.array(MIDDLE) / 2, abs=1)
    assert image[90, 150] == pytest.approx(np.array(LEFT) / 2, abs=1)
    assert color_at(image, 150, 60) == LEFT


def test_keypoints_below_the_threshold_are_not_drawn_nor_their_limbs() -> None:
    person = TORSO | {LEFT_ELBOW: (150.5, 120.5, 0.1)}
    image = draw_poses(ground(), poses_of(person), metadata=COCO, keypoint_threshold=0.2)
    assert not image[80:].any()
    assert not image[:10, :10].any()  # score 0 at (0, 0)
    assert draw_poses(ground(), poses_of(person), metadata=COCO)[80:].any()


def test_trunk_joins_shoulders_and_hips_that_the_rules_leave_apart() -> None:
    person = {LEFT_SHOULDER: (100.5, 50.5, 1.0), LEFT_HIP: (100.5, 150.5, 1.0)}
    image = draw_poses(ground(), poses_of(person), metadata=COCO)
    assert color_at(image, 100, 100) == LEFT


def test_limbs_have_the_colour_of_the_track_and_joints_that_of_the_side() -> None:
    def drawn(number: int) -> np.ndarray:
        poses = poses_of(TORSO)
        poses.pred_track_ids = torch.tensor([number])
        return draw_poses(ground(), poses, metadata=COCO, scores=True)

    arms = [color_at(drawn(x), 150, 90) for x in range(1, 9)]
    assert len({*arms}) == 8
    assert arms[2] == color_at(drawn(3), 100, 60)  # from shoulder to shoulder too
    assert color_at(drawn(3), 150, 60) == LEFT
    # Its number stands below, before the score.
    plain = draw_poses(ground(), poses_of(TORSO), metadata=COCO, scores=True)
    assert np.flatnonzero(drawn(3)[180:].any(axis=(0, 2))).size > (
        np.flatnonzero(plain[180:].any(axis=(0, 2))).size
    )


def test_centre_of_a_joint_is_the_keypoint() -> None:
    for x, y in ((60.0, 70.0), (60.25, 70.75), (60.5, 70.5)):
        image = draw_poses(ground(), poses_of({NOSE: (x, y, 1.0)}), metadata=COCO)
        weight = image[..., 0].astype(float)
        ys, xs = np.mgrid[:200, :200] + 0.5  # centres of the pixels
        centre = (weight * xs).sum() / weight.sum(), (weight * ys).sum() / weight.sum()
        assert centre == pytest.approx((x, y), abs=0.15)


def test_limbs_are_thicker_for_a_larger_person() -> None:
    def thickness(size: float) -> int:
        person = {LEFT_SHOULDER: (500.5, 10.5, 1.0), LEFT_ELBOW: (500.5, 10.5 + size, 1.0)}
        image = draw_poses(np.zeros((1000, 1000, 3), np.uint8), poses_of(person), metadata=COCO)
        return int((image[10 + round(size / 2), :, 0] > 100).sum())

    assert thickness(60) <= 2
    assert thickness(900) == pytest.approx(900 / 60, abs=2)


def test_first_pose_is_on_top() -> None:
    there = (100.5, 100.5, 1.0)
    image = draw_poses(
        ground(), poses_of({LEFT_SHOULDER: there}, {RIGHT_SHOULDER: there}), metadata=COCO
    )
    assert color_at(image, 100, 100) == LEFT


def test_points_outside_or_not_finite_do_no_harm() -> None:
    beyond = TORSO | {LEFT_ELBOW: (150.5, 1e30, 1.0)}
    image = draw_poses(ground(), poses_of(beyond), metadata=COCO)
    assert color_at(image, 150, 190) == LEFT  # the limb leaves the image
    bad = TORSO | {LEFT_ELBOW: (150.5, float("nan"), 1.0)}
    image = draw_poses(ground(), poses_of(bad), metadata=COCO)
    assert color_at(image, 150, 60) == LEFT
    assert not image[80:].any()
    nowhere = {NOSE: (-900.0, -900.0, 1.0)}
    assert not draw_poses(ground(), poses_of(nowhere), metadata=COCO).any()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 3)])
def test_images_of_any_size_are_drawn_on(size: tuple[int, int]) -> None:
    image = np.zeros((*size, 3), np.uint8)
    drawn = draw_poses(image, poses_of(TORSO), metadata=COCO, boxes=True, scores=True)
    assert drawn.shape == image.shape


def test_no_pose_gives_the_image() -> None:
    drawn = draw_poses(ground(7), poses_of()[:0], metadata=COCO, boxes=True, scores=True)
    assert np.array_equal(drawn, ground(7))


def test_boxes_and_scores_are_drawn_when_asked_for() -> None:
    poses = poses_of({NOSE: (100.5, 100.5, 1.0)})
    plain = draw_poses(ground(100), poses, metadata=COCO)
    boxed = draw_poses(ground(100), poses, metadata=COCO, boxes=True)
    scored = draw_poses(ground(100), poses, metadata=COCO, scores=True)
    assert (boxed != plain).any(axis=2)[60:180, 40].all()
    assert not (boxed != plain).any(axis=2)[70:170, 50:150].any()  # nothing inside
    changed = (scored != plain).any(axis=2)
    assert changed[181:191, 92:108].mean() > 0.95  # the plate below the box, in its middle
    assert not changed[:180].any()  # no head is hidden


def test_any_number_of_keypoints_with_and_without_names() -> None:
    hand = Metadata(
        name="hand",
        keypoint_names=["wrist", "Left_thumb", "tip_right"],
        keypoint_connection_rules=[("wrist", "Left_thumb", (0, 0, 0))],
    )
    person = {0: (50.5, 50.5, 1.0), 1: (150.5, 50.5, 1.0), 2: (100.5, 150.5, 1.0)}
    image = draw_poses(ground(), poses_of(person, k=3), metadata=hand)
    seen = [color_at(image, *xy) for xy in ((50, 50), (150, 50), (100, 150), (100, 50))]
    assert seen == [MIDDLE, LEFT, RIGHT, LEFT]
    image = draw_poses(ground(), poses_of(person, k=3), metadata=Metadata(name="unnamed"))
    assert len({color_at(image, *xy) for xy in ((50, 50), (150, 50), (100, 150))}) == 3
    assert not image[50, 70:130].any()  # no names, no limbs


@pytest.mark.parametrize(
    ("image", "k", "message"),
    [
        (ground()[..., 0], 17, r"image: expected \(H, W, 3\) uint8, got \(200, 200\) uint8"),
        (ground().astype(np.float32), 17, "float32"),
        (ground(), 5, "5 keypoints, but the data set 'keypoints_coco_2017_val' names 17"),
    ],
)
def test_wrong_form_is_named(image: Any, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_poses(image, poses_of({0: (1, 1, 1)}, k=k), metadata=COCO)


@pytest.mark.parametrize("name", ["keypoints_coco_2017_val", "synthetic_people_val"])
def test_visualizer_of_detectron2_draws_our_instances(name: str) -> None:
    visualizer = Visualizer(ground(), MetadataCatalog.get(name))
    image = visualizer.draw_instance_predictions(poses_of(TORSO)).get_image()
    assert all(image[int(y) - 2 : int(y) + 3, int(x)].any() for x, y, _ in TORSO.values())


def peaked(cells: list[tuple[int, int]], size: tuple[int, int]) -> np.ndarray:
    """Maps (K, h, w) with all mass in one cell (column, row) each."""
    maps = np.zeros((len(cells), *size))
    for k, (column, row) in enumerate(cells):
        maps[k, row, column] = 1
    return maps


def hue(bgr: np.ndarray) -> int:
    return int(cv2.cvtColor(np.uint8([[bgr]]), cv2.COLOR_BGR2HSV)[0, 0, 0])


def test_maps_light_up_where_their_cells_are_each_in_its_own_hue() -> None:
    cells = [(k % 6 * 2, k // 6 * 3) for k in range(17)]
    cell = (16.0, 20.0)
    maps = peaked(cells, (10, 12))
    picture = draw_keypoint_maps(ground(100), maps, cell=cell, metadata=COCO)
    assert picture.shape == (200, 200, 3)
    hues = []
    for column, row in cells:
        x, y = int((column + 0.5) * cell[0]), int((row + 0.5) * cell[1])
        assert picture[y, x].max() > 140
        hues.append(hue(picture[y, x]))
    assert len(set(hues)) == 17
    assert picture[190, 190].tolist() == [60] * 3  # elsewhere the darkened picture
    # The middle of the light is the centre of the cell.
    one = draw_keypoint_maps(ground(), maps[8:9], cell=cell, metadata=Metadata(name="one"))
    weight = one.astype(float).sum(axis=2)
    ys, xs = np.mgrid[:200, :200] + 0.5
    centre = (weight * xs).sum() / weight.sum(), (weight * ys).sum() / weight.sum()
    expected = (cells[8][0] + 0.5) * 16, (cells[8][1] + 0.5) * 20
    assert centre == pytest.approx(expected, abs=0.2)


def test_panels_show_each_map_alone_in_the_part_around_the_person() -> None:
    maps = peaked([(12, 12)] * 17, (25, 25))
    picture = draw_keypoint_maps(
        ground(), maps, cell=(8, 8), metadata=COCO, panels_of=(80, 80, 120, 120)
    )
    columns, width = 6, 150
    assert picture.shape == (900 + 3 * width, 900, 3)  # enlarged, then three rows of panels
    panels = [
        picture[900 + row * width :][:width, column * width :][:, :width]
        for row in range(3)
        for column in range(columns)
    ]
    # The cell (12, 12), 96 to 104 px, lies in the middle of the part, 71 to 129 px.
    assert all(panel[60:90, 60:90].max() > 140 for panel in panels[:17])
    assert not panels[17].any()
    assert len({hue(panel[75, 75]) for panel in panels[:17]}) == 17


@pytest.mark.parametrize("box", [(-50, -50, -10, -10), (190, 190, 900, 900), (5, 5, 5, 5)])
def test_panels_of_boxes_at_the_border_or_without_area(box: tuple[int, ...]) -> None:
    maps = peaked([(0, 0)] * 17, (25, 25))
    picture = draw_keypoint_maps(ground(), maps, cell=(8, 8), metadata=COCO, panels_of=box)
    assert picture.shape[1] == 900


def test_maps_of_another_form_are_refused() -> None:
    with pytest.raises(ValueError, match=r"maps: expected \(K, h, w\), got \(25, 25\)"):
        draw_keypoint_maps(ground(), np.zeros((25, 25)), cell=(8, 8), metadata=COCO)
    with pytest.raises(ValueError, match="names 17"):
        draw_keypoint_maps(ground(), np.zeros((3, 5, 5)), cell=(8, 8), metadata=COCO)


def test_limbs_between_names_without_sides_have_their_own_colours() -> None:
    names = ["head", "middle", "tail"]
    rules = [("head", "middle", (0, 0, 0)), ("middle", "tail", (0, 0, 0))]
    fish = Metadata(name="fish", keypoint_names=names, keypoint_connection_rules=rules)
    person = {0: (20.5, 20.5, 1.0), 1: (100.5, 20.5, 1.0), 2: (180.5, 20.5, 1.0)}
    image = draw_poses(ground(), poses_of(person, k=3), metadata=fish)
    seen = {color_at(image, x, 20) for x in (60, 140)}
    assert len(seen) == 2
    assert MIDDLE not in seen


def test_a_score_is_written_where_it_covers_no_head() -> None:
    # The second head is just below the box of the first.
    both = poses_of({NOSE: (100.5, 50.5, 1.0)}, {NOSE: (100.5, 112.5, 1.0)})
    boxes = torch.tensor([[60.0, 30, 140, 105], [60.0, 110, 140, 190]])
    both.pred_boxes, both.scores = Boxes(boxes), torch.tensor([0.9, 0.8])
    plain = draw_poses(ground(), both, metadata=COCO)
    written = draw_poses(ground(), both, metadata=COCO, scores=True)
    head = np.s_[107:118, 95:106]
    assert (written != plain).any()
    assert np.array_equal(written[head], plain[head])


def test_the_person_is_seen_through_the_light() -> None:
    stripes = ground()
    stripes[:, ::8] = stripes[:, 1::8] = stripes[:, 2::8] = stripes[:, 3::8] = 200
    maps = np.full((17, 25, 25), 1.0)
    picture = draw_keypoint_maps(stripes, maps, cell=(8, 8), metadata=COCO)
    assert abs(int(picture[100, 97].sum()) - int(picture[100, 102].sum())) > 60
