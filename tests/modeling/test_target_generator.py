import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from inspose_d2.modeling.geometry import Locations
from inspose_d2.modeling.target_generator import (
    CROWD,
    LEFT_OUT,
    NO_PERSON,
    PERSON,
    TargetGenerator,
    Targets,
)

IMAGE = HEIGHT, WIDTH = (128, 256)  # a multiple of the largest stride: mirrors onto itself
STRIDES = [8, 16, 32, 64, 128]
LEVELS = [(HEIGHT // s, WIDTH // s) for s in STRIDES]
MAP = LEVELS[0]

# Three keypoints per person; 1 and 2 are left and right. Pseudo-boxes: (40, 24) to (100, 90),
# centre (70, 57), and (180, 30) to (200, 110), centre (190, 70).
FIRST = [[70.0, 24.0, 2.0], [40.0, 90.0, 2.0], [100.0, 60.0, 1.0]]
SECOND = [[190.0, 30.0, 2.0], [180.0, 110.0, 2.0], [200.0, 70.0, 2.0]]
NOTHING = [[0.0, 0.0, 0.0]] * 3

Maker = Callable[..., Instances]


def generator(**others: Any) -> TargetGenerator:
    arguments: dict[str, Any] = {
        "num_keypoints": 3,
        "map_stride": 8,
        "heatmap_stride": 8,
        "assign_by_boxes": False,
        "center_sampling_radius": 1.5,
        "sizes_of_interest": [64, 128, 256, 512],
        "ignore_unlabeled": True,
        "disk_radius": 24.0,
        "heatmap_min_overlap": 0.7,
        "heatmap_max_radius": math.inf,
    }
    return TargetGenerator(**{**arguments, **others})


def make_locations() -> Locations:
    return Locations.of([torch.empty(1, 0, *size) for size in LEVELS], STRIDES)


def targets_of(*instances: Instances, **others: Any) -> Targets:
    map_size = tuple(n * 8 // others.get("map_stride", 8) for n in MAP)
    return generator(**others)(list(instances), make_locations(), map_size)


def labels_at(targets: Targets, points: list[tuple[float, float]], image: int = 0) -> list[int]:
    """Labels of p3's locations at these points."""
    locations = make_locations()
    on_p3 = locations.levels == 0
    wanted = torch.tensor(points)[:, None] == locations.points[on_p3]
    index = wanted.all(dim=-1).long().argmax(dim=1)
    assert wanted.all(dim=-1).any(dim=1).all()
    return targets.labels[image][on_p3][index].tolist()


def test_targets_of_two_persons_by_hand(make_instances: Maker) -> None:
    targets = targets_of(make_instances([FIRST, SECOND], IMAGE))
    positives = targets.positives
    assert (targets.labels == PERSON).sum() == len(positives.image)
    assert (targets.labels == LEFT_OUT).sum() == 0
    # On p3 person 0 has the locations within 12 of (70, 57) and person 1 within 12, in x within
    # its box's 10, of (190, 70); all these reach less than 64.
    first = [(x, y) for y in (52, 60, 68) for x in (60, 68, 76)]
    second = [(x, y) for y in (60, 68, 76) for x in (188, 196)]
    on_p3 = positives.strides == 8
    expected = sorted(first + second, key=lambda point: (point[1], point[0]))
    assert [tuple(point) for point in positives.points[on_p3].tolist()] == expected
    # Cells: row * 32 + column of floor(x / 8), floor(y / 8), in the order of the positives.
    cells = {
        True: [3 * 32 + 8, 11 * 32 + 5, 7 * 32 + 12],
        False: [3 * 32 + 23, 13 * 32 + 22, 8 * 32 + 25],
    }
    assert targets.cells.tolist() == [cells[x < 128] for x, _ in positives.points.tolist()]
    assert targets.labelled.all()
    assert targets.num_labelled == 6


def test_unlabelled_keypoints_are_not_targets(make_instances: Maker) -> None:
    person = [FIRST[0], [250.0, 120.0, 0.0], FIRST[2]]
    targets = targets_of(make_instances([person], IMAGE))
    assert targets.labelled.unique(dim=0).tolist() == [[True, False, True]]
    assert targets.num_labelled == 2
    assert targets.disk_mask[0].flatten(1).any(dim=1).tolist() == [True, False, True]
    assert targets.heatmaps[0].flatten(1).amax(dim=1).tolist() == [1, 0, 1]
    # The pseudo-box does not reach (250, 120): its centre is (85, 42).
    on_p3 = targets.positives.strides == 8
    assert ((targets.positives.points[on_p3] - torch.tensor([85, 42])).abs() < 12).all()


def test_disks_and_gaussians_of_persons_share_a_map(make_instances: Maker) -> None:
    # Keypoint 0 of both in row 3, at map x = 8.75 and 10.75. Centre of column 9 (9.5) is nearer to
    # the first, of column 10 to the second.
    near = [[86.0, 24.0, 2.0], SECOND[1], SECOND[2]]
    targets = targets_of(make_instances([FIRST, near], IMAGE))
    assert targets.disk_offsets[0, 0, 3, 8:12].tolist() == [0.75, -0.25, 0.75, -0.25]
    assert targets.heatmaps[0, 0, 3, [8, 10]].tolist() == [1, 1]


def test_gaussians_are_as_wide_as_their_pseudo_boxes_say(make_instances: Maker) -> None:
    # 60 x 66 pixels are 7.5 x 8.25 cells: (-22.05 + sqrt(486.2 + 207.9)) / 2 = 2.15, radius 2.
    # 20 x 80 are 2.5 x 10: (-17.5 + sqrt(306.25 + 84)) / 2 = 1.13, radius 1, sigma 3 / 6.
    heatmap = targets_of(make_instances([FIRST, SECOND], IMAGE)).heatmaps[0, 2]
    first, second = heatmap[7, 8:13].tolist(), heatmap[8, 22:26].tolist()
    assert first == pytest.approx([0, 0, math.exp(-2 * 1.44), math.exp(-0.5 * 1.44), 1])
    assert second == pytest.approx([0, 0, math.exp(-2), 1])


@pytest.mark.parametrize(
    ("stride", "cell", "offset"),
    # Keypoint 1 of the first person, (40, 90): x / s - column and y / s - row.
    [
        (16, (2, 5), (0.5, 0.625)),
        (8, (5, 11), (0.0, 0.25)),
        (4, (10, 22), (0.0, 0.5)),
        (2, (20, 45), (0.0, 0.0)),
    ],
)
def test_cells_and_offsets_follow_the_stride_of_the_maps(
    make_instances: Maker, stride: int, cell: tuple[int, int], offset: tuple[float, float]
) -> None:
    instances = make_instances([FIRST], IMAGE)
    targets = targets_of(instances, map_stride=stride)
    column, row = cell
    width = WIDTH // stride
    assert targets.cells[:, 1].unique().tolist() == [row * width + column]
    assert targets.disk_offsets.shape == (1, 6, HEIGHT // stride, width)
    assert tuple(targets.disk_offsets[0, 2:4, row, column].tolist()) == offset
    # Whom a location answers for and the heatmaps have nothing to do with it.
    usual = targets_of(instances)
    assert targets.labels.equal(usual.labels)
    assert targets.heatmaps.equal(usual.heatmaps)


def test_assignment_by_annotated_boxes(make_instances: Maker) -> None:
    # Boxes that have nothing to do with the pseudo-boxes: centres (40, 40), (120, 60), (216, 64).
    # The second has no labelled keypoint, but with boxes it is a person like any other; the third
    # is a crowd.
    boxes = torch.tensor([[10.0, 10, 70, 70], [90, 40, 150, 80], [186, 34, 246, 94]])
    instances = make_instances([FIRST, NOTHING, NOTHING], IMAGE, boxes)
    instances.gt_classes[2] = CROWD
    targets = targets_of(instances, assign_by_boxes=True)
    on_p3 = targets.positives.strides == 8
    points = targets.positives.points[on_p3]
    near_first = (points - torch.tensor([40, 40])).abs().amax(dim=1) < 12
    near_second = (points - torch.tensor([120, 60])).abs().amax(dim=1) < 12
    assert (near_first ^ near_second).all()
    # Columns 36, 44 and rows 36, 44; columns 116, 124 and rows 52, 60, 68.
    assert (near_first.sum(), near_second.sum()) == (4, 6)
    assert targets.boxes[on_p3].equal(torch.where(near_first[:, None], boxes[0], boxes[1]))
    # Only the first has keypoints to learn.
    assert targets.labelled[on_p3].equal(near_first[:, None].expand(-1, 3))
    assert targets.num_labelled == 3
    assert labels_at(targets, [(212, 60), (116, 44), (4, 4)]) == [LEFT_OUT, NO_PERSON, NO_PERSON]
    # The width of Gaussians is that of the pseudo-box still, and who has no keypoints is left out.
    assert targets.heatmaps.equal(targets_of(instances).heatmaps)
    assert (targets.heatmaps[0, :, 7, 14] == LEFT_OUT).all()  # (116, 60), in the second box


def test_boxes_are_the_pseudo_boxes_when_persons_are_assigned_by_them(
    make_instances: Maker,
) -> None:
    targets = targets_of(make_instances([FIRST], IMAGE, torch.tensor([[0.0, 0, 128, 128]])))
    assert targets.boxes.unique(dim=0).tolist() == [[40, 24, 100, 90]]


@pytest.mark.parametrize("has_keypoints", [True, False])
def test_image_without_persons(make_instances: Maker, has_keypoints: bool) -> None:
    empty = make_instances(torch.zeros(0, 3, 3), IMAGE)
    if not has_keypoints:
        empty.remove("gt_keypoints")
        empty.remove("gt_boxes")
    targets = targets_of(empty)
    assert (targets.labels == NO_PERSON).all()
    assert targets.labels.shape == (1, len(make_locations().points))
    assert targets.cells.shape == targets.labelled.shape == (0, 3)
    assert targets.positives.points.shape == (0, 2)
    assert targets.disk_offsets.equal(torch.zeros(1, 6, *MAP))
    assert targets.heatmaps.equal(torch.zeros(1, 3, *MAP))
    assert not targets.disk_mask.any()
    assert targets.num_labelled == 0


@pytest.mark.fault
@pytest.mark.parametrize(("ignore", "label"), [(True, LEFT_OUT), (False, NO_PERSON)])
def test_box_of_person_without_labelled_keypoints(
    make_instances: Maker, ignore: bool, label: int
) -> None:
    # The unlabelled person's box, sides at 52, 76 and 20, 100, lies over the first person.
    boxes = torch.tensor([[40.0, 24.0, 100.0, 90.0], [52.0, 20.0, 76.0, 100.0]])
    instances = make_instances([FIRST, NOTHING], IMAGE, boxes)
    targets = targets_of(instances, ignore_unlabeled=ignore)
    inside, outside = [(60, 28), (68, 28), (60, 92)], [(52, 28), (76, 28), (60, 20), (60, 108)]
    assert labels_at(targets, inside) == [label] * 3
    assert labels_at(targets, outside) == [NO_PERSON] * 4  # sides are outside
    assert labels_at(targets, [(60, 52), (68, 60), (76, 68)]) == [PERSON] * 3
    # Everything else is as if the unlabelled person were not there.
    alone = targets_of(instances[:1])
    assert (targets.labels == PERSON).equal(alone.labels == PERSON)
    assert targets.cells.equal(alone.cells)
    assert targets.disk_offsets.equal(alone.disk_offsets)
    assert targets.num_labelled == alone.num_labelled
    # Of the heatmaps too the box is left out, x 60 and 68, y 28 to 92, but for the cell of the
    # first person's keypoint 0, in row 3, column 8.
    expected = alone.heatmaps.clone()
    if ignore:
        expected[..., 3:12, 7:9] = LEFT_OUT
        expected[0, 0, 3, 8] = 1
    assert targets.heatmaps.equal(expected)
    assert (targets.heatmaps == 1).sum() == 3


@pytest.mark.fault
def test_only_persons_without_labelled_keypoints(make_instances: Maker) -> None:
    boxes = torch.tensor([[0.0, 0.0, 128.0, 128.0]])
    targets = targets_of(make_instances([NOTHING], IMAGE, boxes))
    locations = make_locations()
    left_out = ((locations.points > 0) & (locations.points < 128)).all(dim=1)
    assert (targets.labels[0] == LEFT_OUT).equal(left_out)
    assert targets.cells.shape == (0, 3)
    assert (targets.heatmaps == LEFT_OUT).all(dim=1)[0].flatten().equal(left_out[: 16 * 32])
    assert targets.heatmaps.max() == 0


@pytest.mark.fault
@pytest.mark.parametrize("by_boxes", [True, False])
@pytest.mark.parametrize(("ignore", "label"), [(True, LEFT_OUT), (False, NO_PERSON)])
def test_crowd_is_never_positive(
    make_instances: Maker, by_boxes: bool, ignore: bool, label: int
) -> None:
    boxes = torch.tensor([[0.0, 0.0, 128.0, 128.0], [180.0, 30.0, 200.0, 110.0]])
    instances = make_instances([NOTHING, SECOND], IMAGE, boxes)
    instances.gt_classes[0] = CROWD
    targets = targets_of(instances, assign_by_boxes=by_boxes, ignore_unlabeled=ignore)
    points = make_locations().points
    in_crowd = ((points > 0) & (points < 128)).all(dim=1)
    assert (targets.labels[0][in_crowd] == label).all()
    assert (targets.labels == PERSON).any()  # of the other
    assert targets.labelled.all()


def test_unlabelled_person_before_labelled_one(make_instances: Maker) -> None:
    # Indices of persons with a pose are not those among all persons.
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [180.0, 30.0, 200.0, 110.0]])
    targets = targets_of(make_instances([NOTHING, SECOND], IMAGE, boxes))
    assert targets.cells.equal(targets_of(make_instances([SECOND], IMAGE)).cells)
    assert len(targets.cells) > 0


@pytest.mark.fault
def test_person_with_one_keypoint_has_one_location(make_instances: Maker) -> None:
    targets = targets_of(make_instances([[FIRST[0], *NOTHING[:2]]], IMAGE))
    assert targets.positives.points.tolist() == [[68, 20]]  # 68 is nearest to 70, 20 (28 too) to 24
    assert targets.heatmaps[0, 0].nonzero().tolist() == [[3, 8]]


def test_wrong_number_of_keypoints_names_the_key(make_instances: Maker) -> None:
    instances = make_instances([FIRST], IMAGE)
    with pytest.raises(
        ValueError, match=r"MODEL\.INSPOSE\.NUM_KEYPOINTS is 17, but .* 3 keypoints per person"
    ):
        targets_of(instances, num_keypoints=17)


def test_missing_keypoints_name_the_key(make_instances: Maker) -> None:
    instances = make_instances([FIRST], IMAGE)
    instances.remove("gt_keypoints")
    with pytest.raises(ValueError, match=r"MODEL\.KEYPOINT_ON: True"):
        targets_of(instances)


def test_batch_equals_image_by_image(make_instances: Maker) -> None:
    boxes = torch.tensor([[180.0, 30.0, 200.0, 110.0], [10.0, 10.0, 90.0, 90.0]])
    images = [
        make_instances([FIRST, SECOND], IMAGE),
        Instances(IMAGE, gt_boxes=Boxes(torch.zeros(0, 4))),
        make_instances([SECOND, NOTHING], (100, 240), boxes),
    ]
    batch, single = targets_of(*images), [targets_of(x) for x in images]
    for name in ("labels", "cells", "labelled", "boxes", "disk_offsets", "disk_mask", "heatmaps"):
        parts = [getattr(x, name) for x in single]
        assert getattr(batch, name).equal(torch.cat(parts)), name
    for name in ("index", "points", "strides"):
        parts = [getattr(x.positives, name) for x in single]
        assert getattr(batch.positives, name).equal(torch.cat(parts)), name
    counts = [len(x.cells) for x in single]
    assert batch.positives.image.bincount(minlength=3).tolist() == counts
    assert batch.num_labelled == 9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_targets_of_a_crowd_on_cuda_equal_those_of_the_cpu(make_instances: Maker) -> None:
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(200, 1, 2, generator=random) * torch.tensor([WIDTH, HEIGHT])
    extent = 200 * torch.rand(200, 1, 2, generator=random) ** 3
    xy = corner + extent * torch.rand(200, 3, 2, generator=random)
    visible = torch.randint(0, 3, (200, 3, 1), generator=random)
    instances = make_instances(torch.cat([xy, visible], dim=2), IMAGE)
    features = [torch.empty(1, 0, *size, device="cuda") for size in LEVELS]
    expected = targets_of(instances)
    found = generator()([instances.to("cuda")], Locations.of(features, STRIDES), MAP)
    for name in ("labels", "cells", "labelled", "boxes", "disk_offsets", "disk_mask"):
        assert getattr(found, name).cpu().equal(getattr(expected, name)), name
    torch.testing.assert_close(found.heatmaps.cpu(), expected.heatmaps)


def mirror(per_location: Tensor) -> Tensor:
    """Mirror (L, ...) level by level."""
    levels = per_location.split([h * w for h, w in LEVELS])
    return torch.cat(
        [x.unflatten(0, size).flip(1).flatten(0, 1) for x, size in zip(levels, LEVELS, strict=True)]
    )


def cells_of_locations(targets: Targets) -> Tensor:
    """(L, K) target cells of an image, -1 where there is no person."""
    cells = torch.full((targets.labels.shape[1], 3), -1)
    cells[targets.positives.index] = targets.cells
    return cells


@pytest.mark.parametrize("seed", range(4))
def test_targets_of_mirrored_image_are_mirrored_targets(seed: int, make_instances: Maker) -> None:
    random = torch.Generator().manual_seed(seed)
    # Odd eighths of a pixel: exact in float32 and never on the side of a cell, which would
    # change hands in the mirror.
    eighths = torch.rand(4, 3, 2, generator=random) * torch.tensor([4.0 * WIDTH, 4.0 * HEIGHT])
    visible = torch.randint(0, 3, (4, 3, 1), generator=random)
    keypoints = torch.cat([(2 * eighths.floor() + 1) / 8, visible], dim=2)
    keypoints[3, :, 2] = 0
    boxes = torch.tensor([10.0, 10.0, 90.0, 60.0]).repeat(4, 1)
    flipped = keypoints[:, [0, 2, 1]] * torch.tensor([-1.0, 1, 1]) + torch.tensor([WIDTH, 0.0, 0])
    flipped_boxes = torch.tensor([WIDTH - 90.0, 10.0, WIDTH - 10.0, 60.0]).repeat(4, 1)

    targets = targets_of(make_instances(keypoints, IMAGE, boxes))
    of_flipped = targets_of(make_instances(flipped, IMAGE, flipped_boxes))

    assert (targets.labels == PERSON).any()
    assert (targets.labels == LEFT_OUT).any()
    assert of_flipped.labels[0].equal(mirror(targets.labels[0]))
    cells = cells_of_locations(targets)
    columns, is_person = MAP[1] - 1 - cells % MAP[1], cells >= 0
    mirrored_cells = torch.where(is_person, cells // MAP[1] * MAP[1] + columns, -1)[:, [0, 2, 1]]
    assert cells_of_locations(of_flipped).equal(mirror(mirrored_cells))
    assert of_flipped.disk_mask.equal(targets.disk_mask[:, [0, 2, 1]].flip(3))
    assert of_flipped.heatmaps.equal(targets.heatmaps[:, [0, 2, 1]].flip(3))
    # x offsets count from the other side of the cell: 1 - offset; y offsets stay.
    offsets = targets.disk_offsets.unflatten(1, (3, 2))[:, [0, 2, 1]].flip(4)
    offsets[:, :, 0] = 1 - offsets[:, :, 0]
    offsets = torch.where(of_flipped.disk_mask[:, :, None], offsets, 0).flatten(1, 2)
    torch.testing.assert_close(of_flipped.disk_offsets, offsets)
    assert of_flipped.num_labelled == targets.num_labelled
