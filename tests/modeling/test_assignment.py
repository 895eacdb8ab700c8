import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from inspose_d2.modeling.assignment import BACKGROUND, assign_locations, inside_any
from inspose_d2.modeling.geometry import Locations

STRIDES = [8, 16, 32, 64, 128]
SIZES_OF_INTEREST = [64, 128, 256, 512]
HEIGHT, WIDTH = 128, 160


def pyramid(height: int, width: int, strides: list[int] | None = None) -> Locations:
    strides = strides or STRIDES
    features = [torch.empty(1, 0, math.ceil(height / s), math.ceil(width / s)) for s in strides]
    return Locations.of(features, strides)


def assign(locations: Locations, boxes: list[list[float]] | Tensor, radius: float = 1.5) -> Tensor:
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return assign_locations(
        locations,
        boxes,
        radius=radius,
        sizes_of_interest=SIZES_OF_INTEREST[: len(locations.sizes) - 1],
    )


def positives(
    locations: Locations, boxes: list[list[float]], person: int = 0
) -> list[tuple[float, ...]]:
    """(stride, x, y) of the locations that a person has."""
    chosen = assign(locations, boxes) == person
    rows = torch.cat([locations.strides[:, None], locations.points], dim=1)[chosen]
    return [tuple(row) for row in rows.tolist()]


def assign_densely(locations: Locations, boxes: Tensor, radius: float) -> Tensor:
    """The same rule, every location against every person, in float32."""
    bounds = torch.tensor([-math.inf, *SIZES_OF_INTEREST[: len(locations.sizes) - 1], math.inf])
    x0, y0, x1, y1 = boxes.unbind(1)
    x, y = locations.points[:, :1], locations.points[:, 1:]  # (L, 1)
    dx, dy = (x - (x0 + x1) / 2).abs(), (y - (y0 + y1) / 2).abs()  # (L, N)
    reach = torch.maximum(dx + (x1 - x0) / 2, dy + (y1 - y0) / 2)
    low, high = bounds[locations.levels][:, None], bounds[locations.levels + 1][:, None]
    in_range = (reach >= low) & (reach <= high)
    side = radius * locations.strides[:, None]
    in_square = (dx < side) & (dy < side) & (dx < (x1 - x0) / 2) & (dy < (y1 - y0) / 2)
    fits = in_range & in_square
    distance = dx.square() + dy.square()
    for person in range(len(boxes)):
        if not fits[:, person].any():
            allowed = in_range[:, person] | ~in_range[:, person].any()
            nearest = distance[:, person].masked_fill(~allowed, math.inf).argmin()
            fits[nearest, person] = True
    area = torch.where(fits, (x1 - x0) * (y1 - y0), math.inf)
    area = torch.cat([area, torch.full_like(x, 1e30)], dim=1)  # the last is the background
    person = area.argmin(dim=1)
    return torch.where(person == len(boxes), BACKGROUND, person)


def random_boxes(count: int, size: tuple[int, int], seed: int) -> Tensor:
    """Boxes of all sizes in and around an image; some are lines, points or the same."""
    random = torch.Generator().manual_seed(seed)
    extent = torch.tensor([size[1], size[0]])
    centre = (2 * torch.rand(count, 2, generator=random) - 0.5) * extent
    side = 1500 * torch.rand(count, 2, generator=random) ** 4
    side *= torch.rand(count, 2, generator=random) < 0.8
    boxes = torch.cat([centre - side / 2, centre + side / 2], dim=1)
    original = torch.randint(0, max(count, 1), (count // 4,), generator=random)
    boxes[: count // 4] = boxes[original]
    return boxes


@st.composite
def in_image_boxes(draw: st.DrawFn) -> tuple[float, ...]:
    """Boxes on quarters of a pixel, so float32 is exact; some are points or lines."""
    x = sorted(draw(st.integers(0, 4 * WIDTH)) / 4 for _ in range(2))
    y = sorted(draw(st.integers(0, 4 * HEIGHT)) / 4 for _ in range(2))
    shape = draw(st.sampled_from(["box", "box", "line", "point"]))
    x1 = x[0] if shape == "point" else x[1]
    y1 = y[1] if shape == "box" else y[0]
    return x[0], y[0], x1, y1


def test_assignment_equals_authors_on_three_images(
    golden: Callable[[str], dict[str, Tensor]],
) -> None:
    expected, gt = golden("assign"), golden("gt")
    locations = pyramid(256, 320)
    for image in range(3):
        # gt.npz has annotated boxes where no keypoint is labelled (person 5).
        matched = assign(locations, gt["boxes"][gt["image"] == image])
        for level in range(5):
            own = expected[f"image{level}"] == image
            ours = matched[locations.levels == level]
            points = locations.points[locations.levels == level]
            assert points.equal(expected[f"points{level}"])
            is_person = expected[f"labels{level}"][own] == 0  # mmdet: 0 person, 1 background
            assert (ours != BACKGROUND).equal(is_person)
            assert ours[is_person].equal(expected[f"matched_gt{level}"][own][is_person].long())


def test_assignment_equals_authors_on_large_image(
    golden: Callable[[str], dict[str, Tensor]],
) -> None:
    expected = golden("assign_800x1216")
    locations = pyramid(800, 1216)
    assert locations.levels.equal(expected["level"].long())
    matched = assign(locations, expected["boxes"])
    is_person = expected["labels"] == 0
    assert (matched != BACKGROUND).equal(is_person)
    assert matched[is_person].equal(expected["matched_gt"][is_person].long())
    # golden/README.md: positives per level.
    assert locations.levels[is_person].bincount().tolist() == [75, 9, 18, 21, 9]


def test_level_ranges_include_both_ends() -> None:
    # Centre (70, 70), half sizes 62 and 10. On p3 x = 68 has reach 2 + 62 = 64, the last that p3
    # takes (76 has 68). On p4 x = 72 has reach 64 too, the first that p4 takes; 56 and 88, within
    # 1.5 * 16 of the centre, have 76 and 80. In y only 68, 76 and 72 are inside the box.
    locations = pyramid(160, 160, [8, 16])
    expected = [(8, 68, 68), (8, 68, 76), (16, 56, 72), (16, 72, 72), (16, 88, 72)]
    assert positives(locations, [[8, 60, 132, 80]]) == expected


def test_location_on_side_of_centre_square_is_outside() -> None:
    # Centre 16, half side 1.5 * 8 = 12: locations 4 and 28 lie on the square's sides.
    expected = [(8, 12, 12), (8, 20, 12), (8, 12, 20), (8, 20, 20)]
    assert positives(pyramid(64, 64, [8]), [[0, 0, 32, 32]]) == expected


def test_location_on_side_of_box_is_outside() -> None:
    # x from 12 to 28: of the locations 12, 20, 28 only 20 is strictly inside.
    assert positives(pyramid(64, 64, [8]), [[12, 0, 28, 32]]) == [(8, 20, 12), (8, 20, 20)]


def test_smallest_box_wins_where_persons_overlap() -> None:
    # Box 0 (area 1024) alone has (12|20, 12|20), see above. Box 1 (area 256), centre (18, 8), half
    # size 8, has x = 12, 20 and y = 4, 12: they share y = 12.
    boxes = [[0.0, 0.0, 32.0, 32.0], [10.0, 0.0, 26.0, 16.0]]
    locations = pyramid(64, 64, [8])
    assert positives(locations, boxes, 0) == [(8, 12, 20), (8, 20, 20)]
    assert positives(locations, boxes, 1) == [(8, 12, 4), (8, 20, 4), (8, 12, 12), (8, 20, 12)]


def test_lower_index_wins_where_areas_are_equal() -> None:
    # The two boxes above with the second grown to 32 x 32; y = 12 and 20 belong to both.
    boxes = [[0.0, 0.0, 32.0, 32.0], [0.0, 0.0, 32.0, 32.0]]
    locations = pyramid(64, 64, [8])
    assert len(positives(locations, boxes, 0)) == 4
    assert positives(locations, boxes, 1) == []


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        # One keypoint: (12, 20) is sqrt(2) away.
        ([13, 21, 13, 21], (8, 12, 20)),
        # A line, centre (13, 41): (12, 44) is nearer than (12, 36) and than p4's (8, 40).
        ([13, 21, 13, 61], (8, 12, 44)),
        # A line of 200 pixels is p4's, centre (110, 100): reach of (104, 104) is 106. p3's
        # (108, 100) is nearer, but p3 does not answer for such sizes.
        ([10, 100, 210, 100], (16, 104, 104)),
        # A box between the locations: four are equally near, the first gets it.
        ([5, 5, 11, 11], (8, 4, 4)),
    ],
)
def test_nearest_location_of_its_level_when_none_is_inside(
    box: list[float], expected: tuple[float, ...]
) -> None:
    assert positives(pyramid(256, 256), [box]) == [expected]


def test_nearest_location_of_all_when_no_level_fits() -> None:
    # Half size 126 around the centre of a 32 x 32 image: the reach is 126 on p5, whose range begins
    # at 128, at least 134 on p4, whose range ends at 128, and so on. p5's (16, 16) is the centre.
    assert positives(pyramid(32, 32), [[-110, -110, 142, 142]]) == [(32, 16, 16)]


def test_person_with_one_keypoint_takes_location_from_large_person() -> None:
    boxes = [[0.0, 0.0, 32.0, 32.0], [13.0, 13.0, 13.0, 13.0]]
    locations = pyramid(64, 64, [8])
    assert positives(locations, boxes, 0) == [(8, 20, 12), (8, 12, 20), (8, 20, 20)]
    assert positives(locations, boxes, 1) == [(8, 12, 12)]


def test_all_is_background_without_persons() -> None:
    locations = pyramid(64, 64)
    matched = assign(locations, [])
    assert matched.tolist() == [BACKGROUND] * len(locations.points)
    assert matched.dtype == torch.int64


@given(
    count=st.integers(0, 40),
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    num_levels=st.integers(1, 5),
    radius=st.sampled_from([0.5, 0.8, 1.5, 2.5]),
    seed=st.integers(0, 2**32),
)
def test_assignment_equals_every_location_against_every_person(
    count: int, height: int, width: int, num_levels: int, radius: float, seed: int
) -> None:
    locations = pyramid(height, width, STRIDES[:num_levels])
    boxes = random_boxes(count, (height, width), seed)
    matched = assign(locations, boxes, radius)
    assert matched.equal(assign_densely(locations, boxes, radius))


@pytest.mark.parametrize("seed", range(2))
def test_assignment_of_a_crowd_equals_every_location_against_every_person(seed: int) -> None:
    locations, boxes = pyramid(800, 1216), random_boxes(300, (800, 1216), seed)
    matched = assign(locations, boxes)
    assert len(matched.unique()) > 100
    assert matched.equal(assign_densely(locations, boxes, 1.5))


@pytest.mark.fault
@given(box=in_image_boxes(), height=st.integers(1, 9), width=st.integers(1, 9))
def test_single_person_always_has_a_location(
    box: tuple[float, ...], height: int, width: int
) -> None:
    # Images of 32 to 288 pixels, with the box scaled into them.
    scale = torch.tensor([32 * width / WIDTH, 32 * height / HEIGHT]).repeat(2)
    matched = assign(pyramid(32 * height, 32 * width), torch.tensor(box) * scale)
    assert (matched == 0).any()
    assert ((matched == 0) | (matched == BACKGROUND)).all()


@given(boxes=st.lists(in_image_boxes(), min_size=2, max_size=5), data=st.data())
def test_order_of_persons_does_not_matter(
    boxes: list[tuple[float, ...]], data: st.DataObject
) -> None:
    boxes = torch.tensor(boxes)
    assume(len(((boxes[:, 2:] - boxes[:, :2]).prod(dim=1)).unique()) == len(boxes))
    order = torch.tensor(data.draw(st.permutations(range(len(boxes)))))
    locations = pyramid(HEIGHT, WIDTH)
    matched, permuted = assign(locations, boxes), assign(locations, boxes[order])
    back = torch.where(permuted == BACKGROUND, BACKGROUND, order[permuted])
    assert matched.equal(back)


def test_inside_any_excludes_sides() -> None:
    locations = pyramid(16, 24, [8])  # x 4, 12, 20; y 4, 12
    boxes = torch.tensor([[4.0, 0.0, 13.0, 16.0], [19.0, 11.0, 21.0, 13.0]])
    # Box 0 has x = 12 (4 is on its side), box 1 only (20, 12).
    inside = inside_any(locations, boxes).view(2, 3)
    assert inside.tolist() == [[False, True, False], [False, True, True]]


@given(
    count=st.integers(0, 40),
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    seed=st.integers(0, 2**32),
)
def test_inside_any_equals_every_location_against_every_box(
    count: int, height: int, width: int, seed: int
) -> None:
    locations, boxes = pyramid(height, width), random_boxes(count, (height, width), seed)
    x, y = locations.points[:, :1], locations.points[:, 1:]
    x0, y0, x1, y1 = boxes.unbind(1)
    expected = ((x > x0) & (x < x1) & (y > y0) & (y < y1)).any(dim=1)
    assert inside_any(locations, boxes).equal(expected)
