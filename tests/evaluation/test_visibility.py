"""Hidden and visible keypoints: learned, predicted, averaged, written, drawn and evaluated."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from inspose_d2 import InsPose
from inspose_d2.engine.predictor import InsPosePredictor
from inspose_d2.engine.test_time_augmentation import flip_poses, merge_poses
from inspose_d2.evaluation import InsPoseEvaluator
from inspose_d2.evaluation.results import to_coco
from inspose_d2.evaluation.visibility import visibility_figures
from inspose_d2.modeling.losses import visibility_loss
from inspose_d2.visualization.poses import LEFT, WHITE, draw_poses

ENABLED = {"MODEL.INSPOSE.VISIBILITY.ENABLED": True}
FINDS_MUCH = {"MODEL.INSPOSE.SCORE_THRESH_TEST": 0.0, "MODEL.INSPOSE.NMS_THRESH_TEST": 0.99}
SIZE = (96, 128)
Make = Callable[..., Any]


def picture(seed: int = 0) -> Tensor:
    """Random colours (3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *SIZE), generator=generator).float()


def built(cfg: CfgNode) -> InsPose:
    """A model with random weights, the same for the same config."""
    torch.manual_seed(0)
    return build_model(cfg)


@torch.no_grad()
def poses_in(model: InsPose, *images: Tensor) -> list[Instances]:
    return [x["instances"] for x in model.eval()([{"image": image} for image in images])]


def test_loss_by_hand() -> None:
    # Logit ln 3 is p = 3/4: visible costs ln 4/3, hidden ln 4. The third is not labelled.
    logits = torch.tensor([[math.log(3), math.log(3), 50.0]])
    visible, labelled = torch.tensor([[True, False, False]]), torch.tensor([[True, True, False]])
    loss = visibility_loss(logits, visible, labelled)
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(4))


def losses_of(model: InsPose, *persons: Instances) -> dict[str, Tensor]:
    """Losses of images with these persons, gradients in the parameters."""
    model.train().zero_grad()
    inputs = [{"image": picture(i), "instances": x} for i, x in enumerate(persons)]
    with EventStorage():
        losses = model(inputs)
    sum(losses.values()).backward()
    return losses


def a_person(*v: int) -> Tensor:
    """Keypoints (1, 3, 3) of a person in the middle of the image, with these v."""
    return torch.tensor([[[60.0, 40, v[0]], [70, 60, v[1]], [50, 50, v[2]]]])


def test_model_learns_v_of_labelled_keypoints(tiny_cfg: Make, make_instances: Make) -> None:
    cfg = tiny_cfg(**ENABLED, **{"MODEL.INSPOSE.NUM_KEYPOINTS": 3, "MODEL.INSPOSE.NORM": ""})
    model = built(cfg)
    torch.nn.init.zeros_(model.head.visibility_pred.weight)
    bias = torch.tensor([math.log(3), math.log(3), 7.0])
    model.head.visibility_pred.bias.data.copy_(bias)
    loss = losses_of(model, make_instances(a_person(2, 1, 0), SIZE))["loss_visibility"]
    # As above, but the mean of the two labelled keypoints, however many locations learn them.
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    # d loss / d logit is p - 1 = -1/4 where visible and p = 3/4 where hidden, over two keypoints.
    expected = torch.tensor([-1 / 8, 3 / 8, 0])
    torch.testing.assert_close(model.head.visibility_pred.bias.grad, expected)


@pytest.mark.parametrize("count", [0, 1])
def test_gradient_reaches_the_output_with_and_without_persons(
    tiny_cfg: Make, make_instances: Make, count: int
) -> None:
    model = built(tiny_cfg(**ENABLED, **{"MODEL.INSPOSE.NUM_KEYPOINTS": 3}))
    people = make_instances(a_person(2, 1, 2)[:count], SIZE)
    assert (losses_of(model, people)["loss_visibility"] > 0) == bool(count)
    assert all(x.grad is not None for x in model.head.visibility_pred.parameters())


def test_weight_of_the_loss(tiny_cfg: Make, make_instances: Make) -> None:
    cfg = tiny_cfg(**ENABLED, **{"MODEL.INSPOSE.NUM_KEYPOINTS": 3})
    people = make_instances(a_person(2, 1, 2), SIZE)
    plain = losses_of(built(cfg), people)["loss_visibility"]
    cfg.MODEL.INSPOSE.LOSS_WEIGHT.VISIBILITY = 0.25
    weighted = losses_of(built(cfg), people)["loss_visibility"]
    assert weighted.item() == pytest.approx(plain.item() / 4)


@pytest.mark.parametrize("decoding", ["peaks", "expected_oks"])
def test_poses_keep_their_own_visibility_through_nms_and_in_a_batch(
    tiny_cfg: Make, decoding: str
) -> None:
    model = built(tiny_cfg(**ENABLED, **FINDS_MUCH, **{"MODEL.INSPOSE.DECODING_TEST": decoding}))
    torch.nn.init.normal_(model.head.visibility_pred.weight, std=0.5)
    images = [{"image": picture(seed)} for seed in (1, 2)]
    with torch.no_grad():
        predictions = model.eval().predict(model.preprocess_image(images).tensor)
        locations = model.locations_of(predictions)
        found = model.inference(predictions, locations, [SIZE, SIZE])
        # The full convolution, level by level: logits at all locations.
        maps = [model.head.visibility_pred(x).flatten(2) for x in predictions.params_features]
        everywhere = torch.cat(maps, dim=2).mT.sigmoid()  # (B, L, K)
    for poses, own in zip(found, everywhere, strict=True):
        assert len(poses) > 3
        torch.testing.assert_close(poses.pred_visibility, own[poses.pred_locations])
    assert everywhere.std() > 0.05


def test_without_the_key_nothing_changes(tiny_cfg: Make) -> None:
    plain, other = built(tiny_cfg(**FINDS_MUCH)), built(tiny_cfg(**FINDS_MUCH, **ENABLED))
    extra = {"head.visibility_pred.weight", "head.visibility_pred.bias"}
    assert other.state_dict().keys() - plain.state_dict().keys() == extra
    other.load_state_dict(plain.state_dict(), strict=False)
    (poses,), (same,) = poses_in(plain, picture()), poses_in(other, picture())
    assert not poses.has("pred_visibility")
    assert poses.pred_keypoints.equal(same.pred_keypoints)
    assert poses.scores.equal(same.scores)


def test_checkpoint_and_predictor_give_it_and_json_has_it(tiny_cfg: Make, tmp_path: Path) -> None:
    cfg = tiny_cfg(**ENABLED, **FINDS_MUCH)
    torch.save(built(cfg).state_dict(), tmp_path / "model.pth")
    predictor = InsPosePredictor(cfg, weights=tmp_path / "model.pth")
    image = picture().byte().permute(1, 2, 0).numpy()
    poses = predictor([image, image])[1]["instances"]
    assert len(poses) > 3
    assert poses.pred_visibility.shape == (len(poses), 17)
    assert ((poses.pred_visibility > 0) & (poses.pred_visibility < 1)).all()
    records = json.loads(json.dumps(to_coco(poses, 3, file_name="a.jpg")))
    for record, own in zip(records, poses.pred_visibility, strict=True):
        assert record["visibility"] == pytest.approx(own.tolist())
        assert len(record["keypoints"]) == 3 * 17
    poses.remove("pred_visibility")
    assert "visibility" not in to_coco(poses, 3, file_name="a.jpg")[0]


def poses_of(visibility: list[list[float]], score: float = 0.5, shift: float = 0.0) -> Instances:
    """Persons of three keypoints, far from each other, with this visibility (N, 3)."""
    xy = torch.tensor([[50.0, 30], [30, 70], [70, 70]])
    steps = 100 * torch.arange(len(visibility))[:, None, None]
    keypoints = torch.cat([xy + steps + shift, torch.ones(len(visibility), 3, 1)], dim=2)
    low, high = keypoints[..., :2].amin(dim=1), keypoints[..., :2].amax(dim=1)
    return Instances(
        (400, 400),
        pred_boxes=Boxes(torch.cat([low, high], dim=1)),
        scores=torch.full((len(visibility),), score),
        pred_classes=torch.zeros(len(visibility), dtype=torch.int64),
        pred_keypoints=keypoints,
        pred_visibility=torch.tensor(visibility),
    )


def test_flip_swaps_sides() -> None:
    flipped = flip_poses(poses_of([[0.1, 0.2, 0.3]]), [0, 2, 1])
    torch.testing.assert_close(flipped.pred_visibility, torch.tensor([[0.1, 0.3, 0.2]]))


def test_views_are_averaged_by_score() -> None:
    first, second = poses_of([[0.9, 0.0, 0.5]], 0.6), poses_of([[0.1, 1.0, 0.5]], 0.2)
    merged = merge_poses([first, second], 10)
    torch.testing.assert_close(merged.pred_visibility, torch.tensor([[0.7, 0.25, 0.5]]))
    # A view that misses a person has no say.
    both = merge_poses([poses_of([[0.9, 0.0, 0.5], [0.2, 0.3, 0.4]], 0.6), second], 10)
    torch.testing.assert_close(both.pred_visibility[1], torch.tensor([0.2, 0.3, 0.4]))
    alone = merge_poses([first], 10)
    assert alone.pred_visibility.equal(first.pred_visibility)


def test_hidden_keypoints_are_drawn_hollow() -> None:
    metadata = Metadata(keypoint_names=["left_eye", "nose", "right_eye"])
    image = np.zeros((400, 400, 3), np.uint8)
    poses = poses_of([[0.49, 0.5, 1.0]])
    poses.pred_keypoints[..., :2] *= 5
    drawn = draw_poses(image, poses, metadata=metadata)
    assert tuple(drawn[150, 250]) == WHITE
    assert np.abs(drawn[150, 253].astype(int) - LEFT).max() < 50  # the rim
    poses.pred_visibility[0, 0] = 0.5
    filled = draw_poses(image, poses, metadata=metadata)
    assert tuple(filled[150, 250]) == LEFT
    assert (drawn[250:] == filled[250:]).all()  # the others are as they were
    poses.remove("pred_visibility")
    assert (draw_poses(image, poses, metadata=metadata) == filled).all()


def test_figures_by_hand() -> None:
    # Three visible, two hidden. At 0.5 right are 0.9, 0.6, 0.2: 3 of 5. Of the six pairs of a
    # visible and a hidden one the visible wins (0.9, 0.7), (0.9, 0.2), (0.6, 0.2), (0.3, 0.2).
    visibility, v = np.array([0.9, 0.6, 0.3, 0.7, 0.2]), np.array([2, 2, 2, 1, 1])
    assert visibility_figures(visibility, v) == pytest.approx(
        {"accuracy": 60, "always-visible": 60, "AUC": 100 * 4 / 6}
    )
    # Who says the same of all is right as often as who says "visible", and orders no pair.
    constant = visibility_figures(np.full(5, 0.8), v)
    assert constant == pytest.approx({"accuracy": 60, "always-visible": 60, "AUC": 50})


def test_figures_that_cannot_be_said_are_nan() -> None:
    all_visible = visibility_figures(np.array([0.9, 0.4]), np.array([2, 2]))
    expected = {"accuracy": 50, "always-visible": 100, "AUC": math.nan}
    assert all_visible == pytest.approx(expected, nan_ok=True)
    assert all(math.isnan(x) for x in visibility_figures(np.zeros(0), np.zeros(0)).values())


NAME = "people_with_hidden_keypoints"
# Keypoints of `poses_of`, as COCO counts pixels.
PERSON = [[49.5, 29.5], [29.5, 69.5], [69.5, 69.5]]


@pytest.fixture
def evaluator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make an evaluator of image 1 with persons 100 pixels apart, each given by its v."""

    def make(*flags: tuple[int, int, int], **more: Any) -> InsPoseEvaluator:
        annotations = [
            {
                "id": i + 1,
                "image_id": 1,
                "category_id": 1,
                "iscrowd": 0,
                "bbox": [25 + 100 * i, 25 + 100 * i, 50, 50],
                "area": 2500,
                "num_keypoints": sum(x > 0 for x in v),
                "keypoints": [
                    value
                    for (x, y), own in zip(PERSON, v, strict=True)
                    for value in ((x + 100 * i, y + 100 * i, own) if own else (0, 0, 0))
                ],
            }
            | more
            for i, v in enumerate(flags)
        ]
        images = [{"id": i, "file_name": f"{i}.jpg", "height": 400, "width": 400} for i in (1, 2)]
        data = {"images": images, "annotations": annotations}
        data["categories"] = [{"id": 1, "name": "person"}]
        path = tmp_path / "people.json"
        path.write_text(json.dumps(data))
        metadata = Metadata(name=NAME, json_file=str(path), thing_classes=["person"])
        metadata.thing_dataset_id_to_contiguous_id = {1: 0}
        monkeypatch.setitem(MetadataCatalog.data, NAME, metadata)
        made = InsPoseEvaluator(NAME, output_dir=str(tmp_path), kpt_oks_sigmas=(0.1, 0.1, 0.1))
        made.reset()
        return made

    return make


def test_labelled_keypoints_of_found_persons_are_compared(evaluator: Make, tmp_path: Path) -> None:
    made = evaluator((2, 1, 0), (2, 2, 1), (1, 1, 1))
    # The first two are found, the third is not: OKS exp(-(50^2 + 50^2) / 200) is about 0. A second
    # pose of the first person, of a lower score, is left over.
    found = poses_of([[0.9, 0.2, 0.0], [0.8, 0.4, 0.3], [0.9, 0.9, 0.9]])
    found.pred_keypoints[2, :, :2] += 50
    found.scores = torch.tensor([0.9, 0.8, 0.7])
    double = poses_of([[0.1, 0.9, 0.9]], 0.6, shift=1.0)
    found = Instances.cat([found, double])
    made.process([{"image_id": 1}, {"image_id": 2}], [{"instances": found}, {"instances": double}])
    figures = made.evaluate()["visibility"]
    # Of (0.9, 2), (0.2, 1), (0.8, 2), (0.4, 2), (0.3, 1) all but 0.4 are right; 0.4 is above both
    # hidden ones.
    assert figures == pytest.approx({"accuracy": 80, "always-visible": 60, "AUC": 100})
    records = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert records[1]["visibility"] == pytest.approx([0.8, 0.4, 0.3])
    assert math.isnan(made.evaluate(img_ids=[2])["visibility"]["accuracy"])


def test_pose_takes_the_person_whose_oks_is_highest(evaluator: Make) -> None:
    made = evaluator((2, 2, 2), (1, 1, 1))
    found = poses_of([[0.1] * 3, [0.9] * 3])[torch.tensor([1, 0])]
    made.process([{"image_id": 1}], [{"instances": found}])
    figures = made.evaluate()["visibility"]
    assert figures == pytest.approx({"accuracy": 0, "always-visible": 50, "AUC": 0})


def test_crowds_are_not_compared(evaluator: Make) -> None:
    made = evaluator((2, 2, 1), iscrowd=1)
    made.process([{"image_id": 1}], [{"instances": poses_of([[0.9] * 3])}])
    assert math.isnan(made.evaluate()["visibility"]["accuracy"])


def test_visibility_that_is_not_finite_is_refused(evaluator: Make) -> None:
    made = evaluator((2, 2, 1))
    with pytest.raises(ValueError, match="pred_visibility of image None"):
        made.process([{"image_id": 1}], [{"instances": poses_of([[0.9, math.nan, 0.9]])}])
