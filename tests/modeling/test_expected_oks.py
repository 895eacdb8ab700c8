"""Decoding by expected OKS against its definition, pose by pose and cell by cell."""

import time
from collections.abc import Callable

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from torch import Tensor

from inspose_d2.modeling.expected_oks import decode_by_expected_oks, places_of_cells
from inspose_d2.modeling.keypoint_codec import decode_keypoints
from inspose_d2.modeling.oks import object_keypoint_similarity

SIZE = HEIGHT, WIDTH = 12, 15
STRIDE = 4
SIGMAS = torch.tensor([0.03, 0.1])
IMAGE = HEIGHT * STRIDE, WIDTH * STRIDE


def decode(
    logits: Tensor, offsets: Tensor | None, area: float, image: tuple[int, int] = IMAGE
) -> Tensor:
    return decode_by_expected_oks(
        logits,
        places_of_cells(offsets, 2, SIZE, logits.device),
        torch.full(logits.shape[:1], area),
        SIGMAS,
        stride=STRIDE,
        image_size=image,
    )


def random_maps(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 2, HEIGHT * WIDTH, generator=generator) * 3
    return logits, torch.rand(4, HEIGHT + 2, WIDTH + 3, generator=generator)


def test_of_a_tiny_person_the_peaks_and_their_offsets_are_left() -> None:
    logits, offsets = random_maps(0)
    scores, cells = logits.softmax(dim=2).max(dim=2)
    expected = decode_keypoints(
        cells, scores, offsets, stride=STRIDE, map_width=WIDTH, image_size=IMAGE
    )
    torch.testing.assert_close(decode(logits, offsets, 1.0), expected)


@pytest.mark.parametrize("area", [100.0, 1000.0])
def test_score_is_the_highest_expected_oks_of_all_cells(area: float) -> None:
    logits, _ = random_maps(1)
    centres = torch.cartesian_prod(torch.arange(HEIGHT), torch.arange(WIDTH)).flip(1) + 0.5
    pixels = centres * STRIDE
    probs = logits.softmax(dim=2)
    for keypoint, sigma in enumerate(SIGMAS):
        # OKS of each cell (as the answer) with each other one (as the truth), by its definition.
        answers = pixels[:, None, None].expand(-1, len(pixels), -1, -1).flatten(0, 1)
        truths = torch.cat([pixels, torch.ones(len(pixels), 1)], dim=1)
        truths = truths[None, :, None].expand(len(pixels), -1, -1, -1).flatten(0, 1)
        oks = object_keypoint_similarity(
            answers, truths, torch.full((len(answers),), area), sigma[None]
        ).view(len(pixels), -1)
        expected = probs[:, keypoint] @ oks.T  # (3, cells)
        found = decode(logits, None, area)[:, keypoint]
        torch.testing.assert_close(found[:, 2], expected.amax(dim=1))
        # The point itself is a mean shift from the best cell: not further than the Gaussian.
        best = pixels[expected.argmax(dim=1)]
        assert (found[:, :2] - best).norm(dim=1).max() < 3 * 2 * sigma * area**0.5


def test_many_good_cells_outweigh_the_single_best_for_a_large_person_alone() -> None:
    logits = torch.full((1, 2, *SIZE), -20.0)
    logits[..., 2, 2] = 1.0
    logits[..., 8:11, 9:12] = 0.5  # nine cells, each with 0.61 of the peak's probability
    small, large = (decode(logits.flatten(2), None, area)[0, 1] for area in (1.0, 3600.0))
    torch.testing.assert_close(small[:2], torch.tensor([10.0, 10.0]))
    assert (large[:2] - torch.tensor([42.0, 38.0])).norm() < 0.1  # the middle of the nine
    assert large[2] > 0.7 > small[2]


def test_mirrored_maps_give_mirrored_points() -> None:
    logits, offsets = random_maps(2)
    offsets = offsets[:, :HEIGHT, :WIDTH]
    sign = torch.tensor([-1.0, 1.0, -1.0, 1.0])[:, None, None]
    shift = torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None, None]
    mirrored = logits.unflatten(2, SIZE).flip(3).flatten(2)
    found = decode(logits, offsets, 500.0)
    other = decode(mirrored, offsets.flip(2) * sign + shift, 500.0)
    torch.testing.assert_close(other[..., 0], IMAGE[1] - found[..., 0])
    torch.testing.assert_close(other[..., 1:], found[..., 1:])


def test_points_stay_inside_the_image_and_scores_below_one() -> None:
    logits = torch.full((1, 2, HEIGHT * WIDTH), -30.0)
    logits[..., -1] = 30.0
    found = decode(logits, torch.full((4, *SIZE), 9.0), 1e6, image=(45, 58))
    assert found[0].tolist() == [[58.0, 45.0, 1.0]] * 2


def test_autocast_changes_nothing() -> None:
    logits, offsets = random_maps(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decode(logits, offsets, 300.0)
    torch.testing.assert_close(found, decode(logits, offsets, 300.0), rtol=0, atol=0)


def test_model_refines_the_poses_that_nms_has_left(tiny_cfg: Callable[..., CfgNode]) -> None:
    images = torch.rand(2, 3, 96, 128) * 255
    results = {}
    for decoding in ("peaks", "expected_oks"):
        seed_all_rng(0)
        settings = {"DECODING_TEST": decoding, "KEYPOINT_SCORE_WEIGHT_TEST": 0.0}
        cfg = tiny_cfg(**{f"MODEL.INSPOSE.{key}": value for key, value in settings.items()})
        model = build_model(cfg).eval()
        torch.nn.init.normal_(model.head.cls_score.weight, std=0.1)
        inference = model.pose_inference
        inference.score_threshold, inference.nms_threshold = 0.0, 1.0
        with torch.no_grad():
            results[decoding] = model([{"image": image} for image in images])
            inference.keypoint_score_weight = 1.0
            mixed = model([{"image": image} for image in images])
    for before, after, by_keypoints in zip(
        results["peaks"], results["expected_oks"], mixed, strict=True
    ):
        a, b = before["instances"], after["instances"]
        assert len(a) > 1
        torch.testing.assert_close(b.scores, a.scores)  # the same poses, weight 0
        assert (b.pred_keypoints[..., 2] >= a.pred_keypoints[..., 2] - 1e-6).all()
        assert not b.has("pred_locations")
        c = by_keypoints["instances"]
        torch.testing.assert_close(c.scores, c.pred_keypoints[..., 2].mean(dim=1))
        assert c.scores.diff().max() <= 0  # best first


def test_sharp_maps_take_no_longer_than_flat_ones() -> None:
    size = 64, 64
    places = places_of_cells(None, 2, size, torch.device("cpu"))
    areas = torch.full((20,), 500.0)

    def seconds(logits: Tensor) -> float:
        """Time of the CPU; products of tiny numbers, below the normal ones, would be slow."""
        start = time.process_time()
        decode_by_expected_oks(logits, places, areas, SIGMAS, stride=STRIDE, image_size=(256, 256))
        return time.process_time() - start

    flat = torch.zeros(20, 2, 64 * 64)
    sharp = torch.randn(flat.shape, generator=torch.Generator().manual_seed(3)) * 10
    times = [(seconds(flat), seconds(sharp)) for _ in range(9)]
    quickest_flat, quickest_sharp = map(min, zip(*times, strict=True))
    assert quickest_sharp < 2.5 * quickest_flat
