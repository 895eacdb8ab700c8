"""The authors' whole model from an image file to keypoints, against numbers of their code."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, Keypoints
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import Tensor

from inspose_d2 import InsPoseOfficial, InsPosePredictor, get_cfg
from inspose_d2.checkpoint.opera import _convert
from inspose_d2.data.images import ResizeShortestEdge, read_image
from inspose_d2.evaluation import InsPoseEvaluator
from inspose_d2.export import export_onnx, graph_of
from inspose_d2.modeling.geometry import Locations, enclosing_boxes
from inspose_d2.modeling.keypoint_maps import keypoint_maps_of
from inspose_d2.modeling.official.decode import HALF_PIXEL, rescale

CONFIG = "InsPose_R50_Official"
IMAGES = ["synthetic0", "synthetic1", "coco139", "coco11813"]
SMALL = [f"{image}_small" for image in IMAGES]
OTHERS = ["synthetic1_small_few", "coco139_small_none", "synthetic0_full", "coco11813_full"]
STRIDES = [8, 16, 32, 64, 128]
CASES = [*SMALL, *OTHERS]


def whole(*cases: str) -> Any:
    return pytest.mark.parametrize("case", cases)


@pytest.fixture
def picture(golden_full: Any, request: pytest.FixtureRequest) -> Callable[[str], np.ndarray]:
    """Image of a case as the authors' code reads it, BGR (H, W, 3)."""

    def make(case: str) -> np.ndarray:
        kind = case.split("_")[0]
        recipe = golden_full.recipe("recipe_full")
        if kind.startswith("synthetic"):
            return recipe.image(*{"synthetic0": (0, 427, 640), "synthetic1": (1, 160, 500)}[kind])
        root = request.getfixturevalue("coco_root")
        name = f"{int(kind.removeprefix('coco')):012d}.jpg"
        return read_image(root / "coco" / "val2017" / name, "BGR", 10**8)

    return make


@pytest.fixture(scope="module")
def predictor(golden_full: Any) -> InsPosePredictor:
    """The model with the weights that the numbers were made with."""
    numbers, recipe = golden_full("state_dict"), golden_full.recipe("recipe_full")
    shapes = {
        str(name): tuple(shape[:ndim])
        for name, shape, ndim in zip(
            numbers["names"], numbers["shapes"].tolist(), numbers["ndim"].tolist(), strict=True
        )
    }
    theirs = {k: torch.from_numpy(np.asarray(v)) for k, v in recipe.state_dict(shapes).items()}
    for name, total in zip(numbers["names"], numbers["sum_f64"].tolist(), strict=True):
        assert theirs[str(name)].double().sum().item() == pytest.approx(total)
    predictor = InsPosePredictor(get_cfg(CONFIG, ["MODEL.WEIGHTS", ""]), device="cpu")
    weights, _ = _convert({"state_dict": theirs}, predictor.model.state_dict(), Path("made up"))
    predictor.model.load_state_dict(weights)
    return predictor


def set_case(predictor: InsPosePredictor, numbers: dict[str, Any]) -> None:
    """Let the predictor resize as the authors' code did, with the bias of the case."""
    long, short = numbers["img_scale"].tolist()
    predictor.resize = ResizeShortestEdge([short, short], long, library="opencv")
    predictor.model.head.cls_score.bias.data.fill_(numbers["class_bias"].item())


def sample(x: Tensor) -> Tensor:
    return x.flatten()[:: max(1, x.numel() // 512)][:512]


@pytest.mark.coco
@whole(*CASES)
def test_bytes_of_resized_images(
    golden_full: Any, picture: Callable[[str], np.ndarray], case: str
) -> None:
    numbers, image = golden_full(case), picture(case)
    assert image.shape == tuple(numbers["image_shape"])
    assert hashlib.sha256(image.tobytes()).hexdigest() == numbers["image_sha256"]
    long, short = numbers["img_scale"].tolist()
    transform = ResizeShortestEdge([short, short], long, library="opencv").get_transform(image)
    resized = transform.apply_image(image)
    assert resized.shape == tuple(numbers["img_shape"])
    assert hashlib.sha256(resized.tobytes()).hexdigest() == numbers["resized_sha256"]
    scale = np.float32([resized.shape[1] / image.shape[1], resized.shape[0] / image.shape[0]] * 2)
    assert np.array_equal(scale, numbers["scale_factor"])


@pytest.mark.coco
@whole(*SMALL)
def test_normalized_and_padded_input(
    golden_full: Any,
    picture: Callable[[str], np.ndarray],
    tiny_official: InsPoseOfficial,
    case: str,
) -> None:
    numbers, image = golden_full(case), picture(case)
    long, short = numbers["img_scale"].tolist()
    resize = ResizeShortestEdge([short, short], long, library="opencv")
    pixels = resize.get_transform(image).apply_image(image)[:, :, ::-1].transpose(2, 0, 1).copy()
    got = tiny_official.preprocess_image([{"image": torch.from_numpy(pixels)}]).tensor[0]
    assert (*got.shape[1:], 3) == tuple(numbers["pad_shape"])
    assert_close(got[:, ::16, ::16], numbers["input_sample"], 1e-6)
    sums = got.double().sum(dim=(1, 2)), got.double().abs().sum(dim=(1, 2))
    torch.testing.assert_close(sums[0], numbers["input_sum_f64"], rtol=1e-7, atol=1e-3)
    torch.testing.assert_close(sums[1], numbers["input_abs_sum_f64"], rtol=1e-7, atol=0)


def assert_close(got: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


@pytest.mark.slow
@pytest.mark.coco
@whole(*CASES)
@torch.no_grad()
def test_whole_model_from_image_to_keypoints(
    golden_full: Any,
    picture: Callable[[str], np.ndarray],
    predictor: InsPosePredictor,
    case: str,
) -> None:
    numbers, image = golden_full(case), picture(case)
    set_case(predictor, numbers)
    model, maps = predictor.model, {}
    body = model.backbone.bottom_up
    watch = body.register_forward_hook(lambda *call: maps.update(call[2]))
    try:
        images = model.preprocess_image([predictor.prepare(image)])
        predictions = model.predict(images.tensor)
    finally:
        watch.remove()
    pyramid = {f"p{i + 3}": x for i, x in enumerate(predictions.pyramid)}
    for theirs, ours in [
        ("c3", "res3"),
        ("c4", "res4"),
        ("c5", "res5"),
        *((name, name) for name in pyramid),
    ]:
        got = (maps | pyramid)[ours]
        assert got.shape == tuple(numbers[f"{theirs}_shape"])
        assert_close(sample(got), numbers[f"{theirs}_sample"], 1e-4 * got.abs().max().item())
        total = got.double().abs().sum().item()
        assert total == pytest.approx(numbers[f"{theirs}_abs_sum_f64"].item(), rel=1e-6)

    locations = Locations.of(predictions.pyramid, STRIDES)
    logits = torch.cat([numbers[f"cls_score{i}"].flatten() for i in range(5)])
    assert_close(predictions.person_logits[0], logits, 1e-4)
    for level, pose in enumerate(predictions.poses):
        assert_close(sample(pose), numbers[f"offset_pred{level}_sample"], 1e-4)

    sizes = images.image_sizes
    poses = model.inference(predictions, locations, sizes)[0]
    starts = np.cumsum([0, *(height * width for height, width in locations.sizes)])[:-1]
    cell = torch.from_numpy(starts)[numbers["level"]] + numbers["cell"]
    assert poses.pred_locations.sort().values.equal(cell.sort().values)
    rank = poses.pred_locations.argsort()[cell.argsort().argsort()]  # of each of their poses
    poses = rescale(poses, *image.shape[:2])[rank]
    assert_close(poses.scores, numbers["scores"], 1e-5)
    assert_close(poses.pred_boxes.tensor, numbers["boxes"], 1e-3)
    got, expected = (x[..., :2] for x in (poses.pred_keypoints, numbers["keypoints"]))
    # Where two peaks are nearly as high rounding decides: more of it at the full size.
    clear = numbers["map_peak_gap"] > (4e-4 if case.endswith("full") else 2e-4)
    assert clear.float().mean() > 0.99 or not len(clear)
    assert_close(got[clear] - HALF_PIXEL, expected[clear], 1e-3)


@pytest.mark.slow
@pytest.mark.coco
def test_poses_whose_box_has_no_area_are_kept(
    golden_full: Any, picture: Callable[[str], np.ndarray], predictor: InsPosePredictor
) -> None:
    flat = 0
    for case in SMALL[:2]:
        numbers = golden_full(case)
        set_case(predictor, numbers)
        poses = predictor(picture(case))["instances"]
        assert len(poses) == len(numbers["boxes"])
        flat += int((poses.pred_boxes.area() == 0).sum())
        theirs = numbers["boxes"]
        expected = int(((theirs[:, 2:] - theirs[:, :2]).prod(dim=1) == 0).sum())
        assert int((poses.pred_boxes.area() == 0).sum()) == expected
    assert flat > 0


@pytest.mark.slow
def test_written_results_are_the_authors_keypoints(
    golden_full: Any,
    picture: Callable[[str], np.ndarray],
    predictor: InsPosePredictor,
    tmp_path: Path,
) -> None:
    """Detectron2 takes half a pixel off keypoints when it writes them."""
    numbers, image = golden_full("synthetic1_small_few"), picture("synthetic1_small_few")
    set_case(predictor, numbers)
    (tmp_path / "gt.json").write_text(json.dumps(ground_truth(*image.shape[:2])))
    DatasetCatalog.register("one_image", list)
    MetadataCatalog.get("one_image").set(json_file=str(tmp_path / "gt.json"), thing_classes=["p"])
    try:
        evaluator = InsPoseEvaluator("one_image", tasks=("keypoints",), output_dir=str(tmp_path))
        evaluator.reset()
        evaluator.process([{"image_id": 1}], [predictor(image)])
        evaluator.evaluate()
    finally:
        DatasetCatalog.remove("one_image")
        MetadataCatalog.remove("one_image")
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    written.sort(key=lambda x: -x["score"])
    got = torch.tensor([x["keypoints"] for x in written]).view(-1, 17, 3)
    assert len(got) == len(numbers["scores"]) == 8
    assert_close(got[..., :2], numbers["keypoints"][..., :2], 1e-3)


def ground_truth(height: int, width: int) -> dict[str, Any]:
    person = {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "bbox": [1, 1, 9, 9],
        "area": 81,
        "iscrowd": 0,
        "num_keypoints": 17,
        "keypoints": [5, 5, 2] * 17,
    }
    keypoints = [str(i) for i in range(17)]
    return {
        "images": [{"id": 1, "height": height, "width": width, "file_name": "1.jpg"}],
        "annotations": [person],
        "categories": [{"id": 1, "name": "person", "keypoints": keypoints, "skeleton": []}],
    }


@pytest.fixture
def tiny_official_cfg(tiny_cfg: Callable[..., CfgNode]) -> CfgNode:
    """Config of a model that is as small as it can be."""
    return tiny_cfg(
        **{
            "MODEL.META_ARCHITECTURE": "InsPoseOfficial",
            "MODEL.INSPOSE.NUM_KEYPOINTS": 17,
            "MODEL.INSPOSE.MAP_STRIDE": 8,
            "MODEL.INSPOSE.KEYPOINT_SCORE_WEIGHT_TEST": 0.0,
            "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
            "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
            "INPUT.FORMAT": "RGB",
            "INPUT.RESIZE": "opencv",
        }
    )


@pytest.fixture
def tiny_official(tiny_official_cfg: CfgNode) -> InsPoseOfficial:
    """A random model that finds many poses."""
    seed_all_rng(0)
    model = build_model(tiny_official_cfg).eval()
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.3)
    torch.nn.init.normal_(model.head.params_pred.weight, std=0.05)
    torch.nn.init.normal_(model.head.pose_pred.weight, std=0.05)
    return model


def noise(size: tuple[int, int], seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, *size), np.uint8))


@torch.no_grad()
def test_batch_of_equal_sizes_is_one_by_one(tiny_official: InsPoseOfficial) -> None:
    inputs = [
        {"image": noise((96, 128), seed), "height": height, "width": 200}
        for seed, height in [(0, 150), (1, 75)]
    ]
    together = [x["instances"] for x in tiny_official(inputs)]
    for got, own in zip(together, inputs, strict=True):
        expected = tiny_official([own])[0]["instances"]
        assert len(expected) > 3
        assert got.image_size == (own["height"], 200)
        assert_close(got.scores, expected.scores, 1e-5)
        assert_close(got.pred_keypoints, expected.pred_keypoints, 1e-3)
        assert_close(got.pred_boxes.tensor, expected.pred_boxes.tensor, 1e-3)


@torch.no_grad()
def test_image_without_a_pose_beside_one_with_poses(tiny_official: InsPoseOfficial) -> None:
    black = torch.zeros(3, 96, 128, dtype=torch.uint8)
    scores = [
        tiny_official([{"image": x}])[0]["instances"].scores.max()
        for x in (noise((96, 128), 0), black)
    ]
    tiny_official.score_threshold = (scores[0] + scores[1]).item() / 2
    order = [noise((96, 128), 0), black] if scores[0] > scores[1] else [black, noise((96, 128), 0)]
    poses, nothing = (x["instances"] for x in tiny_official([{"image": x} for x in order]))
    assert len(poses) > 0
    assert nothing.pred_keypoints.shape == (0, 17, 3)
    assert nothing.pred_boxes.tensor.shape == (0, 4)


def test_keypoint_maps_are_those_that_scores_come_from(tiny_official: InsPoseOfficial) -> None:
    inputs = {"image": noise((90, 75), 0), "height": 180, "width": 225}
    with torch.no_grad():
        ordinary = tiny_official([inputs])[0]["instances"]
    maps = keypoint_maps_of(tiny_official, inputs, [1, 0])
    assert maps.probs.shape == (2, 17, 12, 12)  # of the padded image
    assert maps.poses.pred_keypoints.equal(ordinary.pred_keypoints[[1, 0]])
    assert maps.poses.get_fields().keys() == ordinary.get_fields().keys()
    assert_close(maps.probs.amax(dim=(2, 3)), ordinary.pred_keypoints[[1, 0]][..., 2], 1e-5)


def annotated(keypoints: Tensor) -> Instances:
    """Persons of an image of 96 x 128 with keypoints (n, 17, 3)."""
    boxes = enclosing_boxes(keypoints, keypoints[..., 2] > 0)
    return Instances(
        (96, 128),
        gt_boxes=Boxes(boxes),
        gt_classes=torch.zeros(len(boxes), dtype=torch.int64),
        gt_keypoints=Keypoints(keypoints),
    )


@pytest.mark.parametrize("num_persons", [0, 2])
def test_losses_are_finite_and_reach_every_parameter(
    tiny_official: InsPoseOfficial, num_persons: int
) -> None:
    xy = torch.rand(num_persons, 17, 2, generator=torch.Generator().manual_seed(0)) * 90
    persons = annotated(torch.cat([xy, torch.full((num_persons, 17, 1), 2.0)], dim=2))
    inputs = [{"image": noise((96, 128), seed), "instances": persons} for seed in (0, 1)]
    with EventStorage():
        losses = tiny_official.train()(inputs)
    assert len(losses) == 7
    assert all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    named = tiny_official.named_parameters()
    assert [name for name, p in named if p.requires_grad and p.grad is None] == []


def test_half_pixel_of_the_loader_is_taken_off_in_training(
    tiny_official: InsPoseOfficial, monkeypatch: pytest.MonkeyPatch
) -> None:
    keypoints = torch.full((1, 17, 3), 2.0)
    keypoints[0, :, :2] = torch.linspace(10, 80, 34).view(17, 2)
    inputs = {"image": noise((96, 128), 0), "instances": annotated(keypoints)}
    inputs |= {"height": 48, "width": 32}  # resized by 2 in y, by 4 in x
    seen = []
    make = tiny_official.criterion.targets
    monkeypatch.setattr(
        tiny_official.criterion,
        "targets",
        lambda persons, *a: (seen.append(persons), make(persons, *a))[1],
    )
    with EventStorage():
        tiny_official.train()([inputs])
    expected = keypoints[..., :2] - torch.tensor([2.0, 1.0])
    assert_close(seen[0][0].keypoints[..., :2], expected, 1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.INSPOSE.NUM_KEYPOINTS", 14),
        ("MODEL.INSPOSE.MAP_STRIDE", 4),
        ("MODEL.INSPOSE.BOX_HEAD.ENABLED", True),
        ("MODEL.INSPOSE.VISIBILITY.ENABLED", True),
        ("MODEL.INSPOSE.KEYPOINT_SCORE_WEIGHT_TEST", 0.75),
    ],
)
def test_what_this_model_cannot_is_refused_by_key(
    tiny_official_cfg: CfgNode, key: str, value: Any
) -> None:
    tiny_official_cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=rf"{key} must be .* InsPoseOfficial; got {value}"):
        build_model(tiny_official_cfg)


def poses_of(model: InsPoseOfficial, image: Tensor, **asked: int) -> list[Tensor]:
    """What the model finds, in the order of the graph and pixels of the asked size."""
    poses = model([{"image": image, **asked}])[0]["instances"]
    return [poses.pred_boxes.tensor, poses.scores, poses.pred_keypoints]


def assert_same_poses(got: Any, expected: list[Tensor]) -> None:
    for own, theirs, atol in zip(got, expected, (0.1, 1e-4, 0.1), strict=True):
        assert_close(torch.as_tensor(own), theirs, atol)


@torch.no_grad()
def test_exported_graph_gives_the_poses_of_the_model(tiny_official: InsPoseOfficial) -> None:
    tiny_official.max_poses = 20
    graph = graph_of(tiny_official)
    for size in ((96, 128), (97, 210), (31, 33)):
        image = noise(size, 0)
        expected = poses_of(tiny_official, image)
        assert len(expected[0]) > 5
        assert_same_poses(graph(image), expected)


def poses_of_picture(model: InsPoseOfficial, cfg: CfgNode, picture: Tensor) -> list[Tensor]:
    """What the model finds in a picture (H, W, 3) in BGR; resized as in the graph."""
    height, width, _ = picture.shape
    graph = graph_of(model, cfg)
    pixels = picture.permute(2, 0, 1).flip(0).float()
    image = graph.resized(pixels[None], graph.size_of(height, width))[0]
    assert image.shape != pixels.shape
    return poses_of(model, image, height=height, width=width)


@torch.no_grad()
def test_graph_of_pictures_gives_the_poses_at_their_size(
    tiny_official: InsPoseOfficial, tiny_official_cfg: CfgNode
) -> None:
    tiny_official.max_poses = 20
    for size in ((50, 70), (150, 210)):
        picture = noise(size, 0).permute(1, 2, 0)
        expected = poses_of_picture(tiny_official, tiny_official_cfg, picture)
        assert len(expected[0]) > 5
        assert_same_poses(graph_of(tiny_official, tiny_official_cfg)(picture), expected)


@torch.no_grad()
def test_exported_graph_finds_one_pose_and_none(tiny_official: InsPoseOfficial) -> None:
    image = noise((96, 128), 0)
    tiny_official.head.cls_score.weight.mul_(0.1)  # or the best scores are all 1
    images = tiny_official.preprocess_image([{"image": image}]).tensor
    scores = tiny_official.predict(images).person_logits[0].sigmoid().topk(2).values
    tiny_official.max_poses = 5
    for count, threshold in ((0, 1.0), (1, (scores[0] + scores[1]).item() / 2)):
        tiny_official.score_threshold = threshold
        got = graph_of(tiny_official)(image)
        assert [len(x) for x in got] == [count] * 3
        assert_same_poses(got, poses_of(tiny_official, image))


@pytest.mark.slow
@torch.no_grad()
def test_program_and_onnx_file_find_the_poses_of_pytorch(
    tiny_official: InsPoseOfficial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    programs, trace = [], torch.export.export

    def export(*arguments: Any, **named: Any) -> Any:
        programs.append(trace(*arguments, **named))
        return programs[-1]

    monkeypatch.setattr(torch.export, "export", export)  # it takes long: ONNX and we use the same
    tiny_official.max_poses, tiny_official.score_threshold = 20, 0.0
    tiny_official.head.cls_score.weight.mul_(0.1)  # or the best scores are all 1
    export_onnx(tiny_official, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    program = programs[0].module()
    for size in ((232, 328), (160, 410)):
        image = noise(size, 0)
        expected = poses_of(tiny_official, image)
        assert_same_poses(program(image), expected)
        assert_same_poses(session.run(None, {"image": image.numpy()}), expected)
