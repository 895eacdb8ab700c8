"""The whole model: losses, gradients, poses, batches."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, Keypoints, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from inspose_d2 import InsPose
from inspose_d2.data.synthetic import make_image
from inspose_d2.modeling.oks import object_keypoint_similarity
from inspose_d2.modeling.postprocess import boxes_of_poses

RECIPE = {"MODEL.INSPOSE.CLS_LOSS": "varifocal", "MODEL.INSPOSE.REGRESSION.ENABLED": True}
LOSSES = {"loss_cls", "loss_keypoint", "loss_disk_offset", "loss_heatmap"}
Make = Callable[..., Any]


def image_of(size: tuple[int, int], seed: int = 0) -> Tensor:
    """Random picture (3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *size), generator=generator).float()


def people(n: int, size: tuple[int, int], k: int = 17, seed: int = 0) -> Tensor:
    """Random keypoints (n, K, 3) inside an image; each person has one labelled at least."""
    generator = torch.Generator().manual_seed(seed)
    xy = torch.rand(n, k, 2, generator=generator) * torch.tensor([size[1], size[0]])
    v = torch.randint(0, 3, (n, k, 1), generator=generator).float()
    v[:, 0] = 2
    return torch.cat([xy, v], dim=2)


@pytest.fixture
def model(tiny_cfg: Make) -> InsPose:
    torch.manual_seed(0)
    return build_model(tiny_cfg())


@pytest.fixture
def batch(make_instances: Make) -> Make:
    """``batch(2, 0)``: two images, with two persons and none."""

    def make(*counts: int, k: int = 17) -> list[dict[str, Any]]:
        size = (96, 128)
        return [
            {
                "image": image_of(size, seed=i),
                "instances": make_instances(people(n, size, k, seed=i), size),
            }
            for i, n in enumerate(counts)
        ]

    return make


def train_step(model: nn.Module, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Losses of a batch, gradients in the parameters."""
    model.train()
    model.zero_grad()
    with EventStorage():
        losses = model(inputs)
    sum(losses.values()).backward()
    return losses


@pytest.mark.fault
@pytest.mark.parametrize("counts", [(2, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize(("recipe", "more"), [({}, set()), (RECIPE, {"loss_regression"})])
def test_gradient_reaches_every_parameter_when_images_have_persons_or_none(
    tiny_cfg: Make, batch: Make, counts: tuple[int, int], recipe: dict[str, Any], more: set[str]
) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_cfg(**recipe))
    losses = train_step(model, batch(*counts))
    assert losses.keys() == LOSSES | more
    assert all(loss.isfinite() for loss in losses.values())
    without_gradient = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert without_gradient == []


@pytest.mark.fault
def test_losses_of_keypoints_are_zero_when_no_person_is_in_the_batch(
    model: InsPose, batch: Make
) -> None:
    losses = train_step(model, batch(0, 0))
    assert losses["loss_keypoint"] == losses["loss_disk_offset"] == 0
    assert losses["loss_cls"] > 0
    assert losses["loss_heatmap"] > 0


@pytest.mark.fault
def test_half_empty_batch_has_all_losses(model: InsPose, batch: Make) -> None:
    assert all(loss > 0 for loss in train_step(model, batch(0, 2)).values())


@pytest.mark.parametrize("k", [1, 5])
def test_any_number_of_keypoints_trains_and_predicts(tiny_cfg: Make, batch: Make, k: int) -> None:
    model = build_model(tiny_cfg(**{"MODEL.INSPOSE.NUM_KEYPOINTS": k}))
    assert all(loss > 0 for loss in train_step(model, batch(2, 1, k=k)).values())
    poses = predict(model, [{"image": image_of((96, 128))}])[0]
    assert poses.pred_keypoints.shape[1:] == (k, 3)


@pytest.mark.fault
def test_crowded_image_single_keypoints_and_lines_train(
    model: InsPose, make_instances: Make
) -> None:
    size = (96, 128)
    crowd = people(500, size)
    line = people(1, size)
    line[..., 1:] = torch.tensor([48.0, 2.0])
    single = torch.zeros(1, 17, 3)
    single[0, 4] = torch.tensor([128.0, 96.0, 2.0])  # in the corner: x == W, y == H
    for keypoints in (crowd, single, line):
        inputs = [{"image": image_of(size), "instances": make_instances(keypoints, size)}]
        assert all(loss.isfinite() and loss > 0 for loss in train_step(model, inputs).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_float32_and_close_under_autocast(
    model: InsPose, batch: Make, dtype: torch.dtype
) -> None:
    full = train_step(model, batch(2, 1))
    with torch.autocast("cpu", dtype):
        half = train_step(model, batch(2, 1))
    for name, loss in half.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(full[name].item(), rel=0.1)


def test_branches_that_are_off_have_no_parameters_and_no_loss(tiny_cfg: Make, batch: Make) -> None:
    off = {"MODEL.INSPOSE.DISK_OFFSET.ENABLED": False, "MODEL.INSPOSE.HEATMAP.ENABLED": False}
    model = build_model(tiny_cfg(**off))
    assert not [n for n, _ in model.named_parameters() if "disk" in n or "heatmap" in n]
    assert train_step(model, batch(2)).keys() == {"loss_cls", "loss_keypoint"}
    keypoints = predict(model, [{"image": image_of((96, 128))}])[0].pred_keypoints
    # Without offsets every keypoint is the centre of a cell of 8 pixels.
    assert torch.equal(keypoints[..., :2] % 8, torch.full_like(keypoints[..., :2], 4))


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
def test_maps_and_offsets_have_the_asked_stride(tiny_cfg: Make, batch: Make, stride: int) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_cfg(**{"MODEL.INSPOSE.MAP_STRIDE": stride}))
    losses = train_step(model, batch(3, 0))
    cells = 96 * 128 / stride**2
    assert losses["loss_keypoint"].item() == pytest.approx(math.log(cells), abs=0.3)
    assert all(loss.isfinite() for loss in losses.values())
    # With offsets of 0 and the centre of cell (0, 0) as peak, keypoints are multiples of stride.
    nn.init.zeros_(model.disk_offset_branch.predictor.weight)
    size = (90, 123)  # no multiple of the stride
    poses = predict(model, [{"image": image_of(size)}])[0]
    xy = poses.pred_keypoints[..., :2]
    assert torch.equal(xy % stride, torch.zeros_like(xy))
    assert xy[..., 0].max() < 123
    assert xy[..., 1].max() < 90
    assert (xy % 8 != 0).any() == (stride < 8)


@pytest.mark.parametrize("stride", [0, -8, 3, 12, 64])
def test_stride_that_does_not_fit_is_refused(tiny_cfg: Make, stride: int) -> None:
    with pytest.raises(ValueError, match=r"MODEL\.INSPOSE\.MAP_STRIDE"):
        build_model(tiny_cfg(**{"MODEL.INSPOSE.MAP_STRIDE": stride}))


def test_box_head_learns_and_predicts_boxes(tiny_cfg: Make, batch: Make) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_cfg(**{"MODEL.INSPOSE.BOX_HEAD.ENABLED": True}))
    assert train_step(model, batch(0, 0))["loss_box"] == 0
    assert model.head.box_pred.weight.grad is not None
    assert train_step(model, batch(2, 0)).keys() == LOSSES | {"loss_box"}
    size = (90, 123)
    poses = predict(model, [{"image": image_of(size)}, {"image": image_of((96, 128))}])[0]
    boxes = poses.pred_boxes.tensor
    assert len(boxes) > 0
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= torch.tensor([123, 90])).all()
    assert not boxes.equal(boxes_of_poses(poses.pred_keypoints))
    # Without weights all boxes are squares of two strides around their locations.
    nn.init.zeros_(model.head.box_pred.weight)
    boxes = predict(model, [{"image": image_of((256, 256))}])[0].pred_boxes.tensor
    inner = ((boxes > 0) & (boxes < 256)).all(dim=1)
    sides = (boxes[:, 2:] - boxes[:, :2])[inner]
    assert inner.any()
    assert set(sides.unique().tolist()) <= {16, 32, 64, 128, 256}


@pytest.mark.parametrize(("shift", "oks"), [(0.0, 1.0), (1000.0, 0.0)])
def test_score_learns_the_oks_of_the_pose(
    tiny_cfg: Make, batch: Make, monkeypatch: pytest.MonkeyPatch, shift: float, oks: float
) -> None:
    model = build_model(tiny_cfg(**RECIPE))
    model.train()
    poses: list[Tensor] = []
    generate = model.target_generator

    def targets_of(*args: Any) -> Any:
        targets = generate(*args)
        poses[:] = targets.keypoints.split(targets.positives.counts)
        return targets

    def decoded(*_: Any, **__: Any) -> list[Tensor]:
        return [pose + pose.new_tensor([shift, shift, 0]) for pose in poses]

    monkeypatch.setattr(model, "target_generator", targets_of)
    monkeypatch.setattr("inspose_d2.modeling.criterion.keypoints_of", decoded)
    with EventStorage() as storage:
        losses = model(batch(2, 1))
        assert storage.latest()["mean_oks"][0] == pytest.approx(oks)
    # Quality 1 at the prior of 0.01 costs ln 100 for each person, quality 0 nothing.
    assert losses["loss_cls"].item() == pytest.approx(oks * math.log(100), abs=0.3)


def test_loss_weights_multiply_their_terms(tiny_cfg: Make, batch: Make) -> None:
    def losses(**weights: float) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return train_step(build_model(tiny_cfg(**weights)), batch(2))

    plain, weighted = losses(), losses(**{"MODEL.INSPOSE.LOSS_WEIGHT.KEYPOINT": 3.0})
    for name in LOSSES:
        factor = 3 if name == "loss_keypoint" else 1
        torch.testing.assert_close(weighted[name], factor * plain[name])


def predict(
    model: InsPose, inputs: list[dict[str, Any]], threshold: float = 0.0
) -> list[Instances]:
    """Poses of a batch, with a threshold that an untrained model passes."""
    model.eval()
    model.pose_inference.score_threshold = threshold
    with torch.no_grad():
        return [x["instances"] for x in model(inputs)]


def test_heatmap_branch_does_not_run_at_inference(model: InsPose, monkeypatch: Any) -> None:
    def refuse(_: Tensor) -> None:
        raise AssertionError("the heatmap branch is for training only")

    monkeypatch.setattr(model.heatmap_branch, "forward", refuse)
    assert len(predict(model, [{"image": image_of((96, 128))}])[0]) > 0


def test_poses_are_well_formed_and_inside_the_image(model: InsPose) -> None:
    size = (90, 123)  # no multiple of 8 or 32: there is padding to stay out of
    poses = predict(model, [{"image": image_of(size)}])[0]
    n = len(poses)
    assert poses.image_size == size
    assert 0 < n <= 100
    assert poses.pred_keypoints.shape == (n, 17, 3)
    assert poses.pred_boxes.tensor.shape == (n, 4)
    assert poses.pred_classes.eq(0).all()
    assert (poses.scores[:-1] >= poses.scores[1:]).all()
    x, y, score = poses.pred_keypoints.unbind(-1)
    assert x.min() >= 0
    assert x.max() <= 123
    assert y.min() >= 0
    assert y.max() <= 90
    assert score.min() > 0
    assert score.max() <= 1


def test_poses_are_scaled_to_the_asked_size(model: InsPose) -> None:
    image = image_of((96, 128))
    plain, doubled = (
        predict(model, [{"image": image, "height": 96 * f, "width": 128 * 2 * f}])[0]
        for f in (1, 2)
    )
    scale = torch.tensor([2.0, 2.0, 1.0])
    torch.testing.assert_close(doubled.pred_keypoints, plain.pred_keypoints * scale)


@pytest.mark.fault
def test_no_pose_gives_empty_fields(model: InsPose) -> None:
    poses = predict(model, [{"image": image_of((96, 128))}], threshold=1.0)[0]
    assert poses.pred_keypoints.shape == (0, 17, 3)
    assert poses.pred_boxes.tensor.shape == (0, 4)
    assert poses.scores.shape == poses.pred_classes.shape == (0,)


def test_batch_of_equal_sizes_equals_one_by_one(model: InsPose) -> None:
    inputs = [{"image": image_of((96, 128), seed=i)} for i in range(3)]
    together = predict(model, inputs)
    for one, all_of_them in zip((predict(model, [x])[0] for x in inputs), together, strict=True):
        torch.testing.assert_close(one.scores, all_of_them.scores, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            one.pred_keypoints, all_of_them.pred_keypoints, atol=1e-2, rtol=1e-3
        )


def test_mixed_sizes_train_and_predict(model: InsPose, make_instances: Make) -> None:
    sizes = [(64, 128), (96, 70), (33, 40)]
    inputs = [{"image": image_of(s), "instances": make_instances(people(1, s), s)} for s in sizes]
    assert all(loss.isfinite() for loss in train_step(model, inputs).values())
    assert [x.image_size for x in predict(model, inputs)] == sizes


@pytest.mark.parametrize("weight", [0.5, 0.75, 1.0])
def test_score_is_a_mean_of_person_and_keypoint_scores(model: InsPose, weight: float) -> None:
    inputs = [{"image": image_of((96, 128))}]
    inference = model.pose_inference
    inference.nms_threshold, inference.max_poses = 1.0, 500  # so that both runs keep the same
    inference.keypoint_score_weight = 0.0
    plain = predict(model, inputs)[0]
    inference.keypoint_score_weight = weight
    weighted = predict(model, inputs)[0]
    # The logarithms have an ordinary weighted mean.
    keypoint_scores = plain.pred_keypoints[..., 2].mean(dim=1)
    expected = torch.lerp(plain.scores.log(), keypoint_scores.log(), weight).exp()
    torch.testing.assert_close(weighted.scores, expected.sort(descending=True).values)


def test_convolutions_are_channels_last_on_the_cpu(model: InsPose) -> None:
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    features = model.predict(torch.zeros(1, 3, 96, 128)).params_features
    assert features[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_predict_is_one_graph_for_images_of_several_sizes(model: InsPose, training: bool) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model.train(training)
    torch._dynamo.reset()
    compiled = torch.compile(model.predict, backend=backend, fullgraph=True, dynamic=True)
    for seed, size in enumerate([(416, 608), (448, 608), (480, 640)]):
        images = image_of(size, seed)[None] / 255
        with torch.no_grad():
            expected, got = (vars(predict(images)) for predict in (model.predict, compiled))
        torch.testing.assert_close(got, expected)
    assert len(graphs) == 1


@pytest.mark.slow
def test_six_persons_are_learned_by_heart_and_nms_loses_none(tiny_cfg: Make) -> None:
    # Persons of 22 x 49 to 60 x 91 pixels, some of whom touch.
    picture, people = make_image(7, "val", 2, 192)
    keypoints = torch.tensor([x["keypoints"] for x in people]).view(6, 17, 3)
    keypoints = keypoints + torch.tensor([0.5, 0.5, 0])
    areas, boxes = (torch.tensor([float(x["area"]) for x in people]), [x["bbox"] for x in people])
    instances = Instances(
        (192, 192),
        gt_boxes=Boxes([[x, y, x + w, y + h] for x, y, w, h in boxes]),
        gt_classes=torch.zeros(6, dtype=torch.int64),
        gt_keypoints=Keypoints(keypoints),
    )
    image = torch.from_numpy(picture).permute(2, 0, 1).float()
    inputs = [{"image": image, "instances": instances}]
    torch.manual_seed(0)
    model = build_model(tiny_cfg(**{"TEST.DETECTIONS_PER_IMAGE": 1000}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for _ in range(200):
        train_step(model, inputs)
        optimizer.step()
        schedule.step()

    def similarities(nms_type: str, threshold: float) -> Tensor:
        """OKS of each person with each pose, (6, N)."""
        inference = model.pose_inference
        inference.nms_type, inference.nms_threshold = nms_type, threshold
        poses = predict(model, inputs, threshold=0.3)[0].pred_keypoints
        of_all = [(poses, keypoints[i].expand(len(poses), -1, -1)) for i in range(6)]
        sigmas = model.pose_inference.oks_sigmas
        return torch.stack(
            [
                object_keypoint_similarity(*pair, area.expand(len(poses)), sigmas)
                for pair, area in zip(of_all, areas, strict=True)
            ]
        )

    before = similarities("boxes", 1.0)
    assert before.shape[1] > 20
    assert before.amax(dim=1).min() > 0.75
    for nms in (("boxes", 0.6), ("poses", 0.5)):
        after = similarities(*nms)
        assert after.shape == (6, 6)
        best = after.max(dim=1)
        assert best.values.min() > 0.75
        assert best.indices.unique().numel() == 6


@pytest.mark.slow
@pytest.mark.parametrize("stride", [4, 16])
def test_one_image_is_learned_by_heart(tiny_cfg: Make, make_instances: Make, stride: int) -> None:
    # Two persons side by side: after some steps every keypoint is where it was put, whatever the
    # resolution of the maps, and every box too.
    torch.manual_seed(0)
    cfg: CfgNode = tiny_cfg(
        **{
            "MODEL.RESNETS.NORM": "BN",
            "MODEL.INSPOSE.MAP_STRIDE": stride,
            "MODEL.INSPOSE.BOX_HEAD.ENABLED": True,
        }
    )
    model, size = build_model(cfg), (96, 128)
    keypoints = people(2, (80, 56)) + torch.tensor([[[4.0, 8, 0]], [[66.0, 8, 0]]])
    keypoints[..., 2] = 2
    boxes = torch.tensor([[2.0, 5.0, 62.0, 90.0], [63.0, 3.0, 126.0, 94.0]])
    inputs = [{"image": image_of(size), "instances": make_instances(keypoints, size, boxes)}]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        train_step(model, inputs)
        optimizer.step()
    poses = predict(model, inputs, threshold=0.3)[0]
    assert len(poses) == 2
    order = poses.pred_keypoints[:, 0, 0].argsort()
    true_order = keypoints[:, 0, 0].argsort()
    xy, true_xy = poses.pred_keypoints[order][..., :2], keypoints[true_order][..., :2]
    error = (xy - true_xy).norm(dim=-1)
    # A cell between the persons has one offset, to the nearest keypoint: a keypoint of one person
    # may be drawn to the other's. Which of the 34, if any, depends on rounding, so on the machine.
    assert error.flatten().sort().values[-3] < max(stride, 4)
    assert error.median() < max(stride, 8) / 8
    ious = pairwise_iou(poses.pred_boxes[order], Boxes(boxes[true_order])).diagonal()
    assert ious.min() > 0.85


@pytest.mark.fault
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([], "the batch is empty"),
        ([{}], "input 0 of the batch must be a dict with a tensor 'image', got NoneType"),
        ([torch.zeros(3, 8, 8)], "must be a dict with a tensor 'image', got Tensor"),
        ([{"image": np.zeros((3, 8, 8))}], "got ndarray"),
        ([{"image": torch.zeros(8, 8)}], r"must be \(3, H, W\).*got \(8, 8\)"),
        ([{"image": torch.zeros(4, 8, 8)}], r"MODEL\.PIXEL_MEAN; got \(4, 8, 8\)"),
        ([{"image": torch.zeros(1, 8, 8)}], r"got \(1, 8, 8\)"),
        ([{"image": torch.zeros(3, 0, 8)}], r"not empty.*got \(3, 0, 8\)"),
        ([{"image": image_of((8, 8))}, {"image": torch.zeros(8, 8, 3)}], "'image' of input 1"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(model: InsPose, batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.eval()(batch)
