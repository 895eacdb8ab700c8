"""What the model makes of outputs that are planted in its heads: losses and poses by hand."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from inspose_d2 import InsPose
from inspose_d2.modeling.geometry import Locations

Make = Callable[..., Any]
STRIDES = (8, 16, 32, 64, 128)
LN2 = math.log(2)


def points_of(size: tuple[int, int]) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Centres (L, 2) x, y and strides (L,) of all locations; rows and columns of each level."""
    sizes = [(math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in STRIDES]
    cells = [
        (s * column + s / 2, s * row + s / 2, s)
        for s, (rows, columns) in zip(STRIDES, sizes, strict=True)
        for row, column in itertools.product(range(rows), range(columns))
    ]
    return torch.tensor(cells)[:, :2], torch.tensor(cells)[:, 2], sizes


def plant(model: InsPose, logits: Tensor, params: Tensor, features: Tensor) -> None:
    """Let the heads say this of B images whose sides are multiples of 128.

    Args:
        model: its last layer of the parameters becomes the identity.
        logits: (B, L) of persons.
        params: (B, L, P) of KP-Nets.
        features: (B, 8, H, W) shared input of the KP-Nets.
    """
    weight = model.head.params_pred.weight
    nn.init.zeros_(weight)
    weight.data[:, : len(weight), 1, 1] = torch.eye(len(weight))
    size = features.shape[2] * 8, features.shape[3] * 8
    levels = params.split([h * w for h, w in points_of(size)[2]], dim=1)
    channels = weight.shape[1] - params.shape[2]
    maps = [
        nn.functional.pad(x.mT.unflatten(2, hw), (0, 0, 0, 0, 0, channels))
        for x, hw in zip(levels, points_of(size)[2], strict=True)
    ]
    model.head.forward = lambda _: (logits, maps)  # type: ignore[method-assign]
    model.keypoint_branch.forward = lambda _: features  # type: ignore[method-assign]


# KP-Nets of two layers for two keypoints have 106 parameters, which fit into the head.
TWO_KEYPOINTS = {"NUM_KEYPOINTS": 2, "KP_NET.NUM_LAYERS": 2, "CONV_DIM": 128}
PAPER = {"DECODING_TEST": "peaks", "NMS_TYPE_TEST": "boxes", "CLS_LOSS": "focal"}


@pytest.fixture
def cfg_of(tiny_cfg: Make) -> Make:
    """Make the config of a small model of the paper from keys of MODEL.INSPOSE."""
    return lambda **own: tiny_cfg(**{f"MODEL.INSPOSE.{x}": y for x, y in (PAPER | own).items()})


@pytest.fixture
def model(cfg_of: Make) -> InsPose:
    """Two keypoints at the centres of their cells."""
    off = {"DISK_OFFSET.ENABLED": False, "HEATMAP.ENABLED": False}
    return build_model(cfg_of(**TWO_KEYPOINTS, **off))


def net_towards(pose: Tensor, point: Tensor, stride: Tensor, sharpness: float = 50) -> Tensor:
    """Parameters (106,) of a KP-Net whose maps fall off from two keypoints (2, 2).

    The map of a keypoint is -sharpness * (|x| + |y|), x and y to the cell in units of 8 strides:
    four hidden units are the positive and the negative parts of x and y.
    """
    first, bias = torch.zeros(8, 10), torch.zeros(8)
    for unit, (k, axis, sign) in enumerate(itertools.product((0, 1), (0, 1), (1, -1))):
        first[unit, 8 + axis] = sign
        bias[unit] = -sign * (pose[k, axis] - point[axis]) / (8 * stride)
    second = -sharpness * torch.eye(2).repeat_interleave(4, dim=1)
    return torch.cat([first.flatten(), bias, second.flatten(), torch.zeros(2)])


def maps_towards(pose: Tensor, stride: float, size: tuple[int, int], sharpness: float) -> Tensor:
    """Maps (2, H * W) of :func:`net_towards`, by their definition."""
    centres = points_of(size)[0][: size[0] * size[1] // 64]
    return -sharpness * (pose[:, None] - centres).abs().sum(dim=2).double() / (8 * stride)


# A child in front of an adult, both around (160, 125): boxes of 40 x 50 and 140 x 130 pixels.
SMALL = torch.tensor([[140.0, 100], [180, 150]])
LARGE = torch.tensor([[90.0, 60], [230, 190]])
SIZE = (256, 384)


def nets_of_levels(poses: dict[int, Tensor]) -> Tensor:
    """Parameters (1, L, P): all locations of a stride have nets towards the same pose."""
    points, strides, _ = points_of(SIZE)
    nets = [
        net_towards(poses.get(int(stride), SMALL), point, stride)
        for point, stride in zip(points, strides, strict=True)
    ]
    return torch.stack(nets)[None]


def test_overlapping_persons_on_two_levels_are_learned_and_decoded_each_as_itself(
    model: InsPose, make_instances: Make
) -> None:
    points, strides, _ = points_of(SIZE)
    features = torch.zeros(1, 8, SIZE[0] // 8, SIZE[1] // 8)
    keypoints = torch.cat([torch.stack([LARGE, SMALL]), torch.full((2, 2, 1), 2.0)], dim=2)
    inputs = [{"image": torch.zeros(3, *SIZE), "instances": make_instances(keypoints, SIZE)}]

    # Within 1.5 strides of the middle are 2 x 3 locations of P3, whose sides of the small box are
    # nearer than 64 pixels, and 2 x 3 of P4, whose farthest side of the large one is not.
    def loss(of_p3: Tensor, of_p4: Tensor) -> float:
        plant(model, torch.zeros(1, len(points)), nets_of_levels({8: of_p3, 16: of_p4}), features)
        with EventStorage() as storage:
            losses = model.train()(inputs)
            assert storage.latest()["num_positives"][0] == 12
        return losses["loss_keypoint"].item()

    def expected(at_8: Tensor, at_16: Tensor) -> float:
        total = 0.0
        for truth, said, stride in ((SMALL, at_8, 8), (LARGE, at_16, 16)):
            log_probs = maps_towards(said, stride, SIZE, 50).log_softmax(dim=1)
            cells = (truth // 8).long() @ torch.tensor([1, SIZE[1] // 8])
            total -= log_probs[[0, 1], cells].sum().item() * 6
        return total / 24

    assert loss(SMALL, LARGE) == pytest.approx(expected(SMALL, LARGE), rel=1e-4)
    assert loss(LARGE, SMALL) == pytest.approx(expected(LARGE, SMALL), rel=1e-4)
    assert expected(LARGE, SMALL) > 5 * expected(SMALL, LARGE)

    logits = torch.full((1, len(points)), -9.0)
    for stride, at, logit in ((8, (156, 124), 2.0), (16, (152, 120), 3.0)):
        logits[0, (strides == stride) & (points == torch.tensor(at)).all(dim=1)] = logit
    plant(model, logits, nets_of_levels({8: SMALL, 16: LARGE}), features)
    model.pose_inference.keypoint_score_weight = 0
    with torch.no_grad():
        poses = model.eval()(inputs)[0]["instances"]
    found = torch.stack([LARGE, SMALL]) // 8 * 8 + 4  # centres of the cells: there are no offsets
    assert poses.pred_keypoints[..., :2].equal(found)


# Person probability, shift of the pose in x, sharpness of the maps.
PLANTED = {
    "A": (0.9, 0, 40),
    "double of A": (0.8, 0, 36),
    "blurred": (0.7, 96, 5),
    "D": (0.6, 200, 44),
    "E": (0.3, 296, 30),
    "weak": (0.04, 152, 28),
}
PLAIN = {"score_threshold": 0.05, "topk_candidates": 10, "nms_threshold": 0.6, "max_poses": 10}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ["A", "D", "E", "blurred"]),
        ({"score_threshold": 0.5}, ["A", "D", "blurred"]),  # of persons, not of poses
        ({"topk_candidates": 4}, ["A", "D", "blurred"]),  # with the double, by persons
        ({"nms_threshold": 1.0}, ["A", "double of A", "D", "E", "blurred"]),
        ({"max_poses": 2}, ["A", "D"]),  # without the double, by scores of poses
        ({"keypoint_score_weight": 0.0}, ["A", "blurred", "D", "E"]),
        (
            {"keypoint_score_weight": 1.0, "score_threshold": 0.01},
            ["D", "A", "E", "weak", "blurred"],
        ),
    ],
)
def test_threshold_top_k_kp_nets_score_nms_and_limit_in_this_order(
    model: InsPose, settings: dict[str, float], names: list[str]
) -> None:
    settings = {**PLAIN, "keypoint_score_weight": 0.5, **settings}
    weight = settings["keypoint_score_weight"]
    points, strides, _ = points_of(SIZE)
    logits, params = torch.full((1, len(points)), -9.0), torch.zeros(1, len(points), 106)
    expected = {}
    for index, (name, (score, shift, sharpness)) in enumerate(PLANTED.items(), start=100):
        pose = torch.tensor([[20.0 + shift, 28], [60 + shift, 92]])  # centres of cells
        logits[0, index] = math.log(score / (1 - score))
        params[0, index] = net_towards(pose, points[index], strides[index], sharpness)
        peaks = maps_towards(pose, 8, SIZE, sharpness).softmax(dim=1).amax(dim=1)
        expected[name] = pose, score ** (1 - weight) * peaks.mean().item() ** weight
    plant(model, logits, params, torch.zeros(1, 8, SIZE[0] // 8, SIZE[1] // 8))
    for name, value in settings.items():
        assert hasattr(model.pose_inference, name)
        setattr(model.pose_inference, name, value)
    with torch.no_grad():
        poses = model.eval()([{"image": torch.zeros(3, *SIZE)}])[0]["instances"]
    assert poses.scores.tolist() == pytest.approx([expected[name][1] for name in names], rel=1e-4)
    found = torch.stack([expected[name][0] for name in names])
    assert poses.pred_keypoints[..., :2].equal(found)


def test_keypoint_loss_and_cells_are_those_of_the_authors(
    golden: Any, cfg_of: Make, make_instances: Make
) -> None:
    numbers, persons = golden("loss_from_outputs"), golden("gt")
    outputs = golden.recipe("recipe").head_outputs(3)
    rows = [
        torch.cat([torch.from_numpy(x).flatten(2) for x in outputs[name]], dim=2).mT
        for name in ("cls_scores", "controllers")
    ]
    model = build_model(cfg_of(CONV_DIM=320)).train()
    plant(model, rows[0][..., 0], rows[1], torch.from_numpy(outputs["shared_feat"]))
    instances = []
    for i in range(3):
        own = [persons[name][persons["image"] == i] for name in ("keypoints", "boxes")]
        instances.append(make_instances(own[0], (256, 320), own[1]))
    inputs = [{"image": torch.zeros(3, 256, 320), "instances": x} for x in instances]
    with EventStorage():
        loss = model(inputs)["loss_keypoint"].item()
    expected = dict(zip(numbers["names"], numbers["values_double_f64"].tolist(), strict=True))
    assert loss == pytest.approx(expected["loss_keypoint"], rel=1e-5)

    locations = Locations.of([torch.zeros(3, 1, *hw) for hw in points_of((256, 320))[2]], STRIDES)
    targets = model.target_generator(instances, locations, (32, 40))
    for i in range(2):
        own = targets.positives.image == i
        cells = targets.cells[own][targets.labelled[own]]
        assert cells.equal(numbers[f"ce_target_image{i}"])


# Persons by two keypoints. The first has 3 x 3 locations of P3 strictly within 12 pixels of the
# middle of its box, the others one each in their boxes.
NINE = [[36.0, 36, 2], [84, 84, 2]]
ONE, ANOTHER = [[92.0, 20, 2], [108, 36, 2]], [[20.0, 92, 2], [36, 108, 2]]


def losses_of_nothing_said(cfg: CfgNode, images: list[Instances]) -> dict[str, float]:
    """Losses of images of 128 x 128 pixels where all outputs are 0."""
    model, b, num = build_model(cfg).train(), len(images), len(points_of((128, 128))[0])
    plant(model, torch.zeros(b, num), torch.zeros(b, num, 106), torch.zeros(b, 8, 16, 16))
    model.disk_offset_branch.forward = lambda _: torch.zeros(b, 4, 16, 16)
    model.heatmap_branch.forward = lambda _: torch.zeros(b, 2, 16, 16)
    inputs = [{"image": torch.zeros(3, 128, 128), "instances": x} for x in images]
    with EventStorage():
        return {name: loss.item() for name, loss in model(inputs).items()}


def expected_losses(sums: list[int], averages: list[float], num_images: int) -> dict[str, float]:
    """Losses by hand of probabilities of 1/2, uniform maps and offsets of (1/2, 1/2).

    Args:
        sums: positive locations and labelled keypoints of this worker.
        averages: positive locations, pairs of one and a keypoint, offsets and labelled keypoints
            of all workers, which this worker's sums are divided by.
        num_images: of this worker.
    """
    (positives, labelled), cells, locations = sums, 16 * 16, 341
    loss = 0.25 * (0.25 * positives + 0.75 * (locations * num_images - positives)) * LN2
    return {
        "loss_cls": loss / averages[0],
        "loss_keypoint": 2 * positives * math.log(cells) / averages[1],
        "loss_disk_offset": labelled * (0.5 + 0.5) / averages[2],
        "loss_heatmap": 2 * cells * num_images * 0.25 * LN2 / averages[3],
    }


@pytest.fixture
def counted(cfg_of: Make) -> CfgNode:
    """Config where a keypoint has one cell of its map of offsets and of its heatmap."""
    return cfg_of(**TWO_KEYPOINTS, **{"DISK_OFFSET.RADIUS": 0.1, "HEATMAP.MIN_OVERLAP": 0.99})


def test_losses_are_divided_by_what_they_count(counted: CfgNode, make_instances: Make) -> None:
    instances = [make_instances(x, (128, 128)) for x in ([NINE], [ONE, ANOTHER])]
    losses = losses_of_nothing_said(counted, instances)
    expected = expected_losses([11, 6], [11, 22, 12, 6], num_images=2)
    assert losses == pytest.approx(expected, rel=1e-5)
    nobody = make_instances(torch.zeros(0, 2, 3), (128, 128))
    losses = losses_of_nothing_said(counted, [nobody])
    assert losses == pytest.approx(expected_losses([0, 0], [1, 1, 1, 1], num_images=1), rel=1e-5)


def save_losses(cfg: CfgNode, instances: list[Instances], folder: str) -> None:
    """Save the losses of a worker, which sees one image."""
    rank = comm.get_rank()
    torch.save(losses_of_nothing_said(cfg, [instances[rank]]), f"{folder}/{rank}.pth")


@pytest.mark.slow
def test_two_workers_divide_by_the_average_of_their_counts(
    counted: CfgNode, make_instances: Make, tmp_path: Path
) -> None:
    instances = [make_instances(x, (128, 128)) for x in ([NINE], [ONE, ANOTHER])]
    meet = f"file://{tmp_path / 'rendezvous'}"
    launch(save_losses, 2, dist_url=meet, args=(counted, instances, str(tmp_path)))
    for rank, sums in enumerate([[9, 2], [2, 4]]):
        losses = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        expected = expected_losses(sums, [5.5, 11, 6, 3], num_images=1)
        assert losses == pytest.approx(expected, rel=1e-5)
