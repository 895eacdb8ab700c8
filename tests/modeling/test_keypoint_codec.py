import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from inspose_d2.modeling.geometry import enclosing_boxes, map_size
from inspose_d2.modeling.keypoint_codec import (
    decode_keypoints,
    encode_cells,
    encode_disk_offsets,
    encode_heatmaps,
    gaussian_radius,
)

STRIDE = 8
SIZE = HEIGHT, WIDTH = 5, 7  # cells
IMAGE = (HEIGHT * STRIDE, WIDTH * STRIDE)  # pixels


def keypoint(x: float, y: float, v: int = 2) -> Tensor:
    """One person with one keypoint, (1, 1, 3)."""
    return torch.tensor([[[x, y, v]]], dtype=torch.float32)


def coordinate(limit: int) -> st.SearchStrategy[float]:
    """Quarters of a pixel up to 2 cells beyond [0, limit], the borders often: exact in float32."""
    beyond = 2 * STRIDE
    inside = st.integers(-4 * beyond, 4 * (limit + beyond)).map(lambda n: n / 4)
    return inside | st.sampled_from([0.0, float(limit)])


def persons(num_keypoints: int, max_size: int = 4) -> st.SearchStrategy[Tensor]:
    """(N, K, 3) keypoints in and near the image; each may be unlabelled, as may whole persons."""
    one = st.tuples(coordinate(IMAGE[1]), coordinate(IMAGE[0]), st.sampled_from([0, 1, 2]))
    rows = st.lists(
        st.lists(one, min_size=num_keypoints, max_size=num_keypoints), max_size=max_size
    )
    return rows.map(lambda r: torch.tensor(r, dtype=torch.float32).view(-1, num_keypoints, 3))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("x", "y", "row", "column"),
    [
        (0, 0, 0, 0),
        (7.99, 7.99, 0, 0),
        (8, 7.99, 0, 1),  # a cell begins at its left side
        (20.5, 33, 4, 2),
        (55.99, 39.99, 4, 6),
        (56, 12, 1, 6),  # x == W: the last cell of its row, not the first of the next
        (12, 40, 4, 1),  # y == H
        (56, 40, 4, 6),
    ],
)
def test_encode_cells_by_hand(x: float, y: float, row: int, column: int) -> None:
    cells = encode_cells(keypoint(x, y), STRIDE, SIZE)
    assert cells.tolist() == [[row * 7 + column]]
    assert cells.dtype == torch.int64


@pytest.mark.fault
@given(
    x=st.floats(-10, IMAGE[1] + 10, width=32),
    y=st.floats(-10, IMAGE[0] + 10, width=32),
)
def test_encode_cells_never_leaves_the_map(x: float, y: float) -> None:
    cell = encode_cells(keypoint(x, y), STRIDE, SIZE).item()
    assert cell % WIDTH == min(max(math.floor(x / 8), 0), WIDTH - 1)
    assert cell // WIDTH == min(max(math.floor(y / 8), 0), HEIGHT - 1)


def test_encode_cells_without_persons() -> None:
    assert encode_cells(torch.zeros(0, 17, 3), STRIDE, SIZE).shape == (0, 17)


def decode(cells: Tensor, offsets: Tensor | None, image_size: tuple[int, int] = IMAGE) -> Tensor:
    scores = torch.linspace(0.1, 0.9, cells.numel()).view(cells.shape)
    return decode_keypoints(
        cells, scores, offsets, stride=STRIDE, map_width=WIDTH, image_size=image_size
    )


def test_decode_takes_centre_of_cell_without_offsets() -> None:
    # Row 1, column 3: ((3 + 0.5) * 8, (1 + 0.5) * 8); row 4, column 0.
    keypoints = decode(torch.tensor([[10, 28]]), None)
    assert keypoints[0, :, :2].tolist() == [[28, 12], [4, 36]]
    assert keypoints[0, :, 2].tolist() == pytest.approx([0.1, 0.9])


def test_decode_adds_offset_of_its_own_cell_and_keypoint() -> None:
    offsets = torch.full((4, HEIGHT, WIDTH), 100.0)
    offsets[0:2, 1, 3] = torch.tensor([0.25, 1.5])  # keypoint 0: x, y
    offsets[2:4, 4, 0] = torch.tensor([2.0, -0.5])  # keypoint 1
    keypoints = decode(torch.tensor([[10, 28]]), offsets)
    # ((3 + 0.25) * 8, (1 + 1.5) * 8) and ((0 + 2) * 8, (4 - 0.5) * 8): eq. 3.
    assert keypoints[0, :, :2].tolist() == [[26, 20], [16, 28]]


def test_decode_stays_in_the_image() -> None:
    # Offsets lead to (-80, 80 + 80), then to (56 + ...): the image is 37 x 53 (H x W).
    offsets = torch.zeros(4, HEIGHT, WIDTH)
    offsets[0], offsets[1], offsets[2], offsets[3] = -10, 10, 10, -10
    keypoints = decode(torch.tensor([[0, 34]]), offsets, (37, 53))
    assert keypoints[0, :, :2].tolist() == [[0, 37], [53, 0]]
    # The centre of the last cell, (52, 36), is inside; that of a map cut at 33 x 49 is not.
    assert decode(torch.tensor([[34]]), None, (33, 49))[0, 0, :2].tolist() == [49, 33]


@given(
    image_size=st.tuples(st.integers(1, IMAGE[0]), st.integers(1, IMAGE[1])),
    cells=st.lists(st.integers(0, HEIGHT * WIDTH - 1), min_size=2, max_size=2),
    offset=st.floats(-1e6, 1e6, width=32),
    with_offsets=st.booleans(),
)
def test_decode_never_leaves_the_image_without_its_padding(
    image_size: tuple[int, int], cells: list[int], offset: float, with_offsets: bool
) -> None:
    # Maps of the padded image: any cell may be the peak.
    offsets = torch.full((4, HEIGHT, WIDTH), offset) if with_offsets else None
    x, y, score = decode(torch.tensor([cells]), offsets, image_size).unbind(-1)
    assert ((x >= 0) & (x <= image_size[1])).all()
    assert ((y >= 0) & (y <= image_size[0])).all()
    assert score[0].tolist() == pytest.approx([0.1, 0.9])


@pytest.mark.parametrize("with_offsets", [True, False])
def test_decode_without_persons(with_offsets: bool) -> None:
    offsets = torch.zeros(34, HEIGHT, WIDTH) if with_offsets else None
    assert decode(torch.zeros(0, 17, dtype=torch.int64), offsets).shape == (0, 17, 3)


def round_trip(keypoints: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Encode, take the one-hot maps' peaks, decode with the written offsets."""
    size = map_size(image_size, STRIDE)
    cells = encode_cells(keypoints, STRIDE, size)
    peaks = torch.nn.functional.one_hot(cells, size[0] * size[1]).argmax(dim=-1)
    offsets, _ = encode_disk_offsets(keypoints, STRIDE, size, 3.0)
    return decode_keypoints(
        peaks,
        torch.ones(peaks.shape),
        offsets,
        stride=STRIDE,
        map_width=size[1],
        image_size=image_size,
    )


@given(
    height=st.integers(1, 800),
    width=st.integers(1, 1333),
    unit=st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 2), min_size=1, max_size=17),
)
def test_round_trip_of_one_person(height: int, width: int, unit: list[tuple[float, float]]) -> None:
    xy = torch.tensor(unit) * torch.tensor([float(width), float(height)])
    keypoints = torch.cat([xy, torch.ones(len(xy), 1)], dim=1)[None]
    decoded = round_trip(keypoints, (height, width))
    assert (decoded[..., :2] - keypoints[..., :2]).abs().max() < 1e-3


@given(
    left=st.tuples(st.floats(0, 100, width=32), st.floats(0, 64, width=32)),
    right=st.tuples(st.floats(200, 300, width=32), st.floats(0, 64, width=32)),
)
def test_round_trip_of_two_persons_apart(
    left: tuple[float, float], right: tuple[float, float]
) -> None:
    keypoints = torch.cat([keypoint(*left), keypoint(*right)])
    decoded = round_trip(keypoints, (64, 300))
    assert (decoded[..., :2] - keypoints[..., :2]).abs().max() < 1e-3


def disks_by_loops(keypoints: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Every cell asks every person; float64."""
    num_keypoints = keypoints.shape[1]
    offsets = torch.zeros(2 * num_keypoints, HEIGHT, WIDTH)
    mask = torch.zeros(num_keypoints, HEIGHT, WIDTH, dtype=torch.bool)
    for k in range(num_keypoints):
        for row in range(HEIGHT):
            for column in range(WIDTH):
                nearest = math.inf
                for x, y, v in keypoints[:, k].tolist():
                    distance = math.hypot(x / 8 - column - 0.5, y / 8 - row - 0.5)
                    if v > 0 and distance <= radius and distance < nearest:
                        nearest = distance
                        mask[k, row, column] = True
                        offsets[2 * k, row, column] = x / 8 - column
                        offsets[2 * k + 1, row, column] = y / 8 - row
    return offsets, mask


def test_disk_includes_cells_exactly_at_its_radius() -> None:
    # At the centre of cell (2, 3), radius 1: the four neighbours' centres are 1 away.
    _, mask = encode_disk_offsets(keypoint(28, 20), STRIDE, SIZE, 1.0)
    assert mask[0].nonzero().tolist() == [[1, 3], [2, 2], [2, 3], [2, 4], [3, 3]]


def test_lower_index_wins_where_disks_are_equally_near() -> None:
    # Map x = 1.5 and 3.5 in row 2: column 2, centre 2.5, is 1 away from both.
    keypoints = torch.cat([keypoint(12, 20), keypoint(28, 20)])
    for order, offset in (([0, 1], -0.5), ([1, 0], 1.5)):
        offsets, _ = encode_disk_offsets(keypoints[order], STRIDE, SIZE, 1.0)
        assert offsets[0, 2, 2] == offset


@given(
    keypoints=persons(num_keypoints=2),
    radius=st.sampled_from([0.25, 0.5, 0.75, 1.0, 1.5, 1.75, 2.5, 3.0, 20.0]),
)
def test_disks_equal_loops(keypoints: Tensor, radius: float) -> None:
    offsets, mask = encode_disk_offsets(keypoints, STRIDE, SIZE, radius)
    expected_offsets, expected_mask = disks_by_loops(keypoints, radius)
    assert mask.equal(expected_mask)
    torch.testing.assert_close(offsets, expected_offsets, atol=1e-6, rtol=0)


def test_disks_without_persons() -> None:
    offsets, mask = encode_disk_offsets(torch.zeros(0, 17, 3), STRIDE, SIZE, 3.0)
    assert offsets.equal(torch.zeros(34, HEIGHT, WIDTH))
    assert mask.equal(torch.zeros(17, HEIGHT, WIDTH, dtype=torch.bool))


def radius_by_hand(width: float, height: float, overlap: float) -> float:
    """The smallest of CornerNet's three cases, as golden/README.md writes them down."""
    total, area = height + width, width * height
    r1 = (total + math.sqrt(total**2 - 4 * area * (1 - overlap) / (1 + overlap))) / 2
    r2 = (2 * total + math.sqrt(4 * total**2 - 16 * (1 - overlap) * area)) / 2
    b = -2 * overlap * total
    r3 = (b + math.sqrt(b**2 + 16 * overlap * (1 - overlap) * area)) / 2
    return min(r1, r2, r3)


def heatmaps_by_loops(keypoints: Tensor, radii: list[float]) -> Tensor:
    """Every person paints every cell of its square, the larger value stays; float64."""
    heatmaps = torch.zeros(keypoints.shape[1], HEIGHT, WIDTH)
    for person, radius in zip(keypoints.tolist(), radii, strict=True):
        r = math.floor(radius)
        for k, (x, y, v) in enumerate(person):
            column = max(min(int(x // 8), WIDTH - 1), 0)
            row = max(min(int(y // 8), HEIGHT - 1), 0)
            for i in range(max(row - r, 0), min(row + r, HEIGHT - 1) + 1):
                for j in range(max(column - r, 0), min(column + r, WIDTH - 1) + 1):
                    square = (i - row) ** 2 + (j - column) ** 2
                    value = math.exp(-square / (2 * ((2 * r + 1) / 6) ** 2))
                    if v > 0:
                        heatmaps[k, i, j] = max(heatmaps[k, i, j].item(), value)
    return heatmaps


@pytest.mark.parametrize(("name", "overlap"), [("overlap07", 0.7), ("overlap09", 0.9)])
def test_gaussian_radius_equals_authors(
    golden: Callable[[str], dict[str, Tensor]], name: str, overlap: float
) -> None:
    expected = golden("radius")
    height_width = expected["height_width"]
    for size in (height_width, height_width.flip(1)):
        radius = gaussian_radius(size, overlap)
        torch.testing.assert_close(radius, expected[name], rtol=1e-4, atol=1e-4)


@given(
    width=st.integers(1, 4000).map(lambda n: n / 16),
    height=st.integers(1, 4000).map(lambda n: n / 16),
    overlap=st.integers(1, 19).map(lambda n: n / 20),
)
def test_gaussian_radius_is_smallest_of_three_cases(
    width: float, height: float, overlap: float
) -> None:
    radius = gaussian_radius(torch.tensor([[width, height]]), overlap)
    assert radius.item() == pytest.approx(
        radius_by_hand(width, height, overlap), rel=1e-3, abs=1e-3
    )


def test_heatmap_by_hand() -> None:
    # A box of 10 x 10 cells, overlap 0.7: (-28 + sqrt(784 + 336)) / 2 = 2.73, so radius 2 and
    # sigma 5/6. Keypoint in cell row 2, column 5: the square is cut behind column 6.
    boxes = torch.tensor([[0.0, 0.0, 80.0, 80.0]])
    heatmap = encode_heatmaps(keypoint(44, 20), boxes, STRIDE, SIZE, 0.7)[0]
    near, far = math.exp(-1 / (2 * 25 / 36)), math.exp(-4 / (2 * 25 / 36))
    assert heatmap[2].tolist() == pytest.approx([0, 0, 0, far, near, 1, near])
    assert heatmap[:, 5].tolist() == pytest.approx([far, near, 1, near, far])
    assert heatmap[4, 3].item() == pytest.approx(far**2)  # the corner: a square, not a disk
    assert heatmap[:, :3].count_nonzero() == 0


def test_radius_of_a_gaussian_is_bounded() -> None:
    # Radius 2 as above, but 1 is the most, or 1.9: sigma 3 / 6.
    boxes = torch.tensor([[0.0, 0.0, 80.0, 80.0]])
    for bound in (1.0, 1.9):
        heatmap = encode_heatmaps(keypoint(44, 20), boxes, STRIDE, SIZE, 0.7, bound)[0]
        near = math.exp(-2)
        assert heatmap[2].tolist() == pytest.approx([0, 0, 0, 0, near, 1, near])
    wide = encode_heatmaps(keypoint(44, 20), boxes, STRIDE, SIZE, 0.7, 2.0)
    assert wide.equal(encode_heatmaps(keypoint(44, 20), boxes, STRIDE, SIZE, 0.7))


@given(
    keypoints=persons(num_keypoints=2),
    sizes=st.lists(st.tuples(st.integers(0, 160), st.integers(0, 160)), min_size=4, max_size=4),
)
def test_heatmaps_equal_loops(keypoints: Tensor, sizes: list[tuple[int, int]]) -> None:
    sizes = sizes[: len(keypoints)]
    radii = [radius_by_hand(w / 8, h / 8, 0.7) for w, h in sizes]
    assume(all(abs(r - round(r)) > 1e-3 for r, (w, h) in zip(radii, sizes, strict=True) if w * h))
    corner = torch.full((len(sizes), 2), 5.0)
    boxes = torch.cat([corner, corner + torch.tensor(sizes).view(-1, 2)], dim=1)
    heatmaps = encode_heatmaps(keypoints, boxes, STRIDE, SIZE, 0.7)
    expected = heatmaps_by_loops(keypoints, [max(r, 0.0) for r in radii])
    torch.testing.assert_close(heatmaps, expected, atol=1e-6, rtol=0)


@given(keypoints=persons(num_keypoints=2))
def test_heatmap_is_exactly_one_in_cells_of_labelled_keypoints_only(keypoints: Tensor) -> None:
    labelled = keypoints[..., 2] > 0
    boxes = enclosing_boxes(keypoints, labelled)
    heatmaps = encode_heatmaps(keypoints, boxes, STRIDE, SIZE, 0.7).flatten(1)
    ones = torch.zeros_like(heatmaps, dtype=torch.bool)
    for person, k in labelled.nonzero().tolist():
        ones[k, encode_cells(keypoints, STRIDE, SIZE)[person, k]] = True
    assert (heatmaps == 1).equal(ones)
    assert (heatmaps >= 0).all()


def test_heatmap_is_one_cell_when_pseudo_box_is_degenerate() -> None:
    boxes = torch.tensor([[20.0, 20.0, 20.0, 20.0], [0.0, 36.0, 50.0, 36.0]])
    keypoints = torch.cat([keypoint(20, 20), keypoint(50, 36)])
    heatmap = encode_heatmaps(keypoints, boxes, STRIDE, SIZE, 0.7)[0]
    assert heatmap.nonzero().tolist() == [[2, 2], [4, 6]]


@pytest.mark.parametrize("num_persons", [0, 2])
def test_heatmaps_are_empty_when_nothing_is_labelled(num_persons: int) -> None:
    keypoints, boxes = torch.zeros(num_persons, 17, 3), torch.zeros(num_persons, 4)
    heatmaps = encode_heatmaps(keypoints, boxes, STRIDE, SIZE, 0.7)
    assert heatmaps.equal(torch.zeros(17, HEIGHT, WIDTH))


def test_five_hundred_persons_are_encoded() -> None:
    size = (16, 20)
    generator = torch.Generator().manual_seed(0)
    keypoints = torch.rand(500, 17, 3, generator=generator) * torch.tensor([160.0, 128.0, 1.0])
    keypoints[..., 2] += 1
    boxes = enclosing_boxes(keypoints, keypoints[..., 2] > 0)
    cells = encode_cells(keypoints, STRIDE, size)
    offsets, mask = encode_disk_offsets(keypoints, STRIDE, size, 3.0)
    heatmaps = encode_heatmaps(keypoints, boxes, STRIDE, size, 0.7).flatten(1)
    own = torch.arange(17).expand(500, 17), cells
    assert offsets.isfinite().all()
    assert mask.flatten(1)[own].all()
    assert (heatmaps[own] == 1).all()


def test_mirrored_maps_and_offsets_decode_to_the_mirrored_pose() -> None:
    height, width, stride = 4, 6, 8
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(0, height * width, (3, 2), generator=generator)
    offsets = torch.rand(4, height, width, generator=generator)  # x0, y0, x1, y1
    mirrored_offsets = offsets.flip(2)
    mirrored_offsets[0::2] = 1 - mirrored_offsets[0::2]
    mirrored_cells = cells // width * width + (width - 1 - cells % width)
    size = (height * stride, width * stride)
    scores = torch.rand(3, 2, generator=generator)
    pose, mirrored = (
        decode_keypoints(c, scores, o, stride=stride, map_width=width, image_size=size)
        for c, o in ((cells, offsets), (mirrored_cells, mirrored_offsets))
    )
    torch.testing.assert_close(mirrored[..., 0], size[1] - pose[..., 0])
    torch.testing.assert_close(mirrored[..., 1:], pose[..., 1:])
