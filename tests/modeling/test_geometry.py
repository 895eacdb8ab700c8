import pytest
import torch

from inspose_d2.modeling.geometry import (
    Locations,
    compute_locations,
    coordinate_scale,
    enclosing_boxes,
    map_size,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [
        # Cell (i, j) -> (i*s + s//2, j*s + s//2): rows one after the other, x first.
        ((2, 3), 8, [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]),
        ((3, 2), 16, [[8, 8], [24, 8], [8, 24], [24, 24], [8, 40], [24, 40]]),
        ((1, 2), 5, [[2, 2], [7, 2]]),  # an odd stride rounds its half down
        ((1, 1), 128, [[64, 64]]),
    ],
)
def test_locations_by_hand(size: tuple[int, int], stride: int, expected: list[list[float]]) -> None:
    locations = compute_locations(size, stride, CPU)
    assert locations.dtype == torch.float32
    assert locations.tolist() == expected


def test_locations_of_levels_are_one_row_finest_first() -> None:
    features = [torch.zeros(2, 5, 2, 3), torch.zeros(2, 5, 1, 2)]
    locations = Locations.of(features, [8, 16])
    # The two hand-made cases above, without a second row at stride 16.
    points = [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8], [24, 8]]
    assert locations.points.tolist() == points
    assert locations.strides.tolist() == [8] * 6 + [16] * 2
    assert locations.strides.dtype == torch.float32
    assert locations.levels.tolist() == [0] * 6 + [1] * 2
    assert locations.levels.dtype == torch.int64
    assert locations.sizes == [(2, 3), (1, 2)]
    fine, coarse = locations.grids()
    assert fine.tolist() == [points[:3], points[3:6]]
    assert coarse.tolist() == [points[6:]]


def test_locations_of_levels_when_strides_are_too_few() -> None:
    with pytest.raises(ValueError, match="zip"):
        Locations.of([torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 1)], [8])


def test_coordinate_scale_is_eight_strides() -> None:
    # golden/README.md: coord_normalize = 64 * 2^level.
    strides = torch.tensor([8.0, 16.0, 32.0, 64.0, 128.0])
    assert coordinate_scale(strides).tolist() == [64, 128, 256, 512, 1024]


@pytest.mark.parametrize(
    ("image_size", "expected"),
    [((16, 24), (2, 3)), ((17, 24), (3, 3)), ((16, 23), (2, 3)), ((1, 8), (1, 1))],
)
def test_map_size_rounds_up(image_size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert map_size(image_size, 8) == expected


def test_enclosing_boxes_take_labelled_keypoints_only() -> None:
    keypoints = torch.tensor(
        [
            [[10.0, 50.0, 2], [30.0, 20.0, 1], [0.0, 0.0, 0]],
            [[-5.0, 7.0, 2], [900.0, 900.0, 0], [-900.0, -900.0, 0]],  # one labelled: no size
            [[1.0, 2.0, 2], [3.0, 4.0, 2], [2.0, 9.0, 2]],
        ]
    )
    boxes = enclosing_boxes(keypoints, keypoints[..., 2] > 0)
    assert boxes.tolist() == [[10, 20, 30, 50], [-5, 7, -5, 7], [1, 2, 3, 9]]


def test_enclosing_boxes_are_zeros_when_nothing_is_labelled() -> None:
    keypoints = torch.tensor([[[10.0, 50.0], [30.0, 20.0]], [[5.0, 6.0], [7.0, 8.0]]])
    labelled = torch.tensor([[False, False], [True, True]])
    assert enclosing_boxes(keypoints, labelled).tolist() == [[0, 0, 0, 0], [5, 6, 7, 8]]


def test_enclosing_boxes_without_persons() -> None:
    boxes = enclosing_boxes(torch.zeros(0, 17, 3), torch.zeros(0, 17, dtype=torch.bool))
    assert boxes.shape == (0, 4)
