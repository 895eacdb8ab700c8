"""Evaluation of poses that are bad, missing, repeated; the figures are worked by hand."""

import copy
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.evaluation import inference_on_dataset
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from inspose_d2.evaluation import METRICS, InsPoseEvaluator

NAME = "tiny_people"
# Three keypoints with sigma 0.1 and a person of area 50 * 50. If all three are d pixels off,
# OKS = exp(-d^2 / (2 * 2500 * (2 * 0.1)^2)) = exp(-d^2 / 200).
SIGMAS = (0.1, 0.1, 0.1)
TRUTH = [[20, 20], [70, 20], [45, 70]]
PERSON = {
    "category_id": 7,
    "bbox": [20, 20, 50, 50],
    "area": 2500,
    "iscrowd": 0,
    "keypoints": [value for x, y in TRUTH for value in (x, y, 2)],
    "num_keypoints": 3,
}
Make = Callable[..., InsPoseEvaluator]


@pytest.fixture
def evaluator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make an evaluator of two images, 1 and 2, each with ``PERSON`` unless told otherwise."""
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)  # for caplog

    def make(
        annotations: list[dict[str, Any]] | None = None, tasks: tuple[str, ...] = ("keypoints",)
    ) -> InsPoseEvaluator:
        if annotations is None:
            annotations = [{**PERSON, "image_id": 1}, {**PERSON, "image_id": 2}]
        data = {
            "images": [
                {"id": i, "file_name": f"{i}.jpg", "height": 100, "width": 200} for i in (1, 2)
            ],
            "annotations": [{**person, "id": i} for i, person in enumerate(annotations, start=1)],
            "categories": [{"id": 7, "name": "person"}],
        }
        json_file = tmp_path / "people.json"
        json_file.write_text(json.dumps(data))
        metadata = Metadata(name=NAME, json_file=str(json_file), thing_classes=["person"])
        metadata.thing_dataset_id_to_contiguous_id = {7: 0}
        monkeypatch.setitem(MetadataCatalog.data, NAME, metadata)
        made = InsPoseEvaluator(
            NAME, tasks, output_dir=str(tmp_path / "out"), kpt_oks_sigmas=SIGMAS
        )
        made.reset()
        return made

    return make


def image(image_id: int) -> dict[str, Any]:
    return {"image_id": image_id, "file_name": f"{image_id}.jpg", "height": 100, "width": 200}


def found(*poses: tuple[float, float]) -> dict[str, Instances]:
    """What a model says: poses of (score, pixels that all keypoints lie to the right)."""
    xy = torch.tensor(TRUTH).float() + 0.5  # as Detectron2 loads them
    keypoints = torch.cat([xy, torch.ones(3, 1)], dim=1).repeat(len(poses), 1, 1)
    scores, shifts = torch.tensor(poses).reshape(-1, 2).T
    keypoints[..., 0] += shifts[:, None]
    corners = [keypoints[..., :2].amin(dim=1), keypoints[..., :2].amax(dim=1)]
    boxes = torch.cat(corners, dim=1) - 0.5  # boxes it loads as they are
    instances = Instances(
        (100, 200),
        pred_boxes=Boxes(boxes),
        scores=scores.clone(),
        pred_classes=torch.zeros(len(poses), dtype=torch.int64),
        pred_keypoints=keypoints,
    )
    return {"instances": instances}


def fields_of(output: dict[str, Instances]) -> dict[str, Tensor]:
    fields = output["instances"].get_fields()
    return {key: getattr(value, "tensor", value) for key, value in fields.items()}


def written(tmp_path: Path) -> list[dict[str, Any]]:
    """The result file, read as strict JSON."""
    text = (tmp_path / "out" / "coco_instances_results.json").read_text()
    return json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))


def test_figures_are_those_of_coco_with_own_sigmas(evaluator: Make, tmp_path: Path) -> None:
    # exp(-10^2 / 200) = 0.607 is above 0.5, 0.55 and 0.6 of the ten thresholds.
    made = evaluator(tasks=("bbox", "keypoints"))
    made.process([image(1), image(2)], [found((0.9, 10)), found((0.8, 10))])
    results = made.evaluate()
    assert results["keypoints"] == pytest.approx(
        {"AP": 30, "AP50": 100, "AP75": 0, "APm": 30, "APl": math.nan}, nan_ok=True
    )
    # Boxes: IoU 40 / 60 = 0.67 is above four thresholds.
    assert results["bbox"]["AP"] == pytest.approx(40)
    assert results["bbox"].keys() == set(METRICS["bbox"])
    first, second = written(tmp_path)
    assert (first["image_id"], first["category_id"]) == (1, 7)
    assert first["keypoints"] == [30, 20, 1, 80, 20, 1, 55, 70, 1]  # without the half pixel
    assert second["score"] == pytest.approx(0.8)


@pytest.mark.fault
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["pred_keypoints", "pred_boxes", "scores"])
def test_prediction_that_is_not_finite_is_refused_by_the_name_of_its_image(
    evaluator: Make, name: str, value: float
) -> None:
    output = found((0.9, 0), (0.8, 100))
    fields_of(output)[name].view(2, -1)[1, 0] = value
    message = rf"{name} of image 2\.jpg \(id 2\) is not finite in 1 of 2 predictions"
    with pytest.raises(ValueError, match=message):
        evaluator().process([image(1), image(2)], [found((0.9, 0)), output])


@pytest.mark.fault
def test_pose_with_one_nan_does_not_score(evaluator: Make) -> None:
    # 100 pixels off: OKS exp(-50). COCO's code lifts this from AP 0 to 100 by one NaN.
    made = evaluator()
    outputs = [found((0.9, 100)), found((0.9, 100))]
    made.process([image(1), image(2)], outputs)
    assert made.evaluate()["keypoints"]["AP"] == 0
    made.reset()
    for output in outputs:
        output["instances"].pred_keypoints[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        made.process([image(1), image(2)], outputs)


@pytest.mark.fault
@pytest.mark.parametrize("outputs", [[], [found(), found()]], ids=["no image", "no pose"])
def test_nothing_predicted_is_zero(
    evaluator: Make,
    outputs: list[dict[str, Instances]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = evaluator(tasks=("bbox", "keypoints"))
    made.process([image(1), image(2)][: len(outputs)], outputs)
    assert made.evaluate() == {task: dict.fromkeys(names, 0.0) for task, names in METRICS.items()}
    assert "Nothing was predicted" in caplog.text
    assert written(tmp_path) == []


@pytest.mark.fault
@pytest.mark.parametrize("outputs", [[found()], [found((0.9, 0))]], ids=["no pose", "a pose"])
@pytest.mark.parametrize(
    "annotations",
    [
        [],
        [{**PERSON, "image_id": 1, "iscrowd": 1}],
        [{**PERSON, "image_id": 1, "keypoints": [0] * 9, "num_keypoints": 0}],
        [{k: PERSON[k] for k in ("category_id", "bbox", "area", "iscrowd")} | {"image_id": 1}],
    ],
    ids=["no person", "crowd", "unlabelled", "boxes only"],
)
def test_nothing_to_find_is_nan_and_a_warning(
    evaluator: Make,
    annotations: list[dict[str, Any]],
    outputs: list[dict[str, Instances]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = evaluator(annotations)
    made.process([image(1)], outputs)
    figures = made.evaluate()["keypoints"]
    assert figures.keys() == set(METRICS["keypoints"])
    assert all(math.isnan(value) for value in figures.values())
    assert f"{NAME} has nothing to find for the task keypoints" in caplog.text
    assert len(written(tmp_path)) == len(outputs[0]["instances"])


def test_evaluation_of_some_images_leaves_out_the_others(evaluator: Make) -> None:
    made = evaluator([{**PERSON, "image_id": 1}])
    made.process([image(1)], [found((0.9, 0))])
    assert made.evaluate(img_ids=[1])["keypoints"]["AP"] == pytest.approx(100)
    assert math.isnan(made.evaluate(img_ids=[2])["keypoints"]["AP"])


@pytest.mark.fault
def test_inputs_and_outputs_stay_unchanged_and_evaluating_again_gives_the_same(
    evaluator: Make, tmp_path: Path
) -> None:
    inputs, outputs = [image(1), image(2)], [found((0.9, 10), (0.8, 100)), found((0.7, 10))]
    inputs_before, outputs_before = copy.deepcopy(inputs), copy.deepcopy(outputs)
    made = evaluator()
    made.process(inputs, outputs)
    first, poses = made.evaluate(), written(tmp_path)
    assert made.evaluate()["keypoints"]["AP"] == first["keypoints"]["AP"]
    assert written(tmp_path) == poses
    assert inputs == inputs_before
    for output, before in zip(outputs, outputs_before, strict=True):
        assert output["instances"].get_fields().keys() == before["instances"].get_fields().keys()
        for name, value in fields_of(output).items():
            assert value.equal(fields_of(before)[name]), name

    for output in outputs:  # the caller's to reuse
        output["instances"].pred_keypoints.fill_(0)
    made.evaluate()
    assert written(tmp_path) == poses


@pytest.mark.fault
def test_numbers_that_json_does_not_have_are_never_written(evaluator: Make, tmp_path: Path) -> None:
    output = found((0.9, 0))
    output["instances"].pred_boxes.tensor[0] = torch.tensor([-3e38, 0, 3e38, 9])  # wide: infinite
    made = evaluator()
    made.process([image(1)], [output])
    with pytest.raises(ValueError, match="not JSON compliant"):
        made.evaluate()
    assert not (tmp_path / "out" / "coco_instances_results.json").exists()


# Image 1 is right with score 0.5, image 2 wrong with 0.9. Counted once, precision is 1/2 up to
# recall 1/2, at 51 of 101 recalls: AP 51 / 101 / 2. Counted twice it would be 51 / 101 / 3.
ONCE = 100 * 51 / 101 / 2


@pytest.mark.fault
def test_repeated_image_counts_once_as_seen_last(
    evaluator: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = evaluator()
    made.process([image(2), image(1)], [found((0.9, 0)), found((0.5, 0))])
    made.process([image(2)], [found((0.9, 100))])
    assert made.evaluate()["keypoints"]["AP"] == pytest.approx(ONCE)
    assert len(written(tmp_path)) == 2
    assert "1 images were seen more than once" in caplog.text


@pytest.mark.fault
def test_image_that_two_workers_saw_counts_once(
    evaluator: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[Any] = []

    def gather(data: Any, **_: Any) -> list[Any]:
        gathered.append(copy.deepcopy(data))
        return gathered

    monkeypatch.setattr(comm, "gather", gather)
    one, two = evaluator(), evaluator()
    one.process([image(1), image(2)], [found((0.5, 0)), found((0.9, 100))])
    one.evaluate()
    two.process([image(2)], [found((0.9, 100))])
    assert two.evaluate()["keypoints"]["AP"] == pytest.approx(ONCE)  # with the poses of both
    assert len(written(tmp_path)) == 2


@pytest.mark.fault
@pytest.mark.parametrize("poses", ["none", "not finite"])
def test_model_without_poses_is_evaluated(
    evaluator: Make,
    tiny_cfg: Callable[..., Any],
    poses: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    threshold = 1.0 if poses == "none" else 0.0
    overrides = ["MODEL.INSPOSE.NUM_KEYPOINTS", 3, "MODEL.INSPOSE.SCORE_THRESH_TEST", threshold]
    model = build_model(tiny_cfg([*overrides, "MODEL.INSPOSE.BOX_HEAD.ENABLED", True])).eval()
    last = [layer for layer in model.disk_offset_branch.modules() if isinstance(layer, nn.Conv2d)]
    if poses == "not finite":
        nn.init.constant_(last[-1].bias, math.nan)
    batch = [{**image(1), "image": torch.zeros(3, 64, 128)}]
    with torch.no_grad():
        fields = fields_of(model(batch)[0])
    shapes = {name: tuple(value.shape) for name, value in fields.items()}
    assert shapes == {
        "pred_boxes": (0, 4),
        "scores": (0,),
        "pred_classes": (0,),
        "pred_keypoints": (0, 3, 3),
    }
    results = inference_on_dataset(model, [batch], evaluator(tasks=("bbox", "keypoints")))
    assert results == {task: dict.fromkeys(names, 0.0) for task, names in METRICS.items()}
    assert ("poses of an image: not finite" in caplog.text) == (poses == "not finite")


@pytest.mark.fault
def test_poses_that_coco_does_not_look_at_are_written_but_take_no_memory(
    evaluator: Make, tmp_path: Path
) -> None:
    # 20 of an image count. The right one is the best of image 1, though the last in its list, and
    # the 21st of image 2: of equal scores the first counts.
    wrong = [(0.5, 100)] * 19
    outputs = [found((0.4, 100), *wrong, (0.6, 0)), found((0.4, 100), *wrong, (0.5, 100), (0.5, 0))]
    made = evaluator()
    made.process([image(1), image(2)], [outputs[0], outputs[1]])
    assert made.evaluate()["keypoints"]["AP"] == pytest.approx(figure_of_coco(made, outputs))
    assert len(written(tmp_path)) == 43
    predictions = dict(made._predictions)
    assert len(made._best_records("keypoints", predictions)) == 40
    assert len(made._best_records("bbox", predictions)) == 43


def figure_of_coco(made: InsPoseEvaluator, outputs: list[dict[str, Instances]]) -> float:
    """AP in percent of all poses by COCO's own code."""
    ids = enumerate(outputs, start=1)
    records = [
        {**record, "category_id": 7}
        for i, output in ids
        for record in instances_to_coco_json(copy.deepcopy(output["instances"]), i)
    ]
    evaluation = COCOeval(made._coco_api, made._coco_api.loadRes(records), "keypoints")
    evaluation.params.kpt_oks_sigmas = np.array(SIGMAS)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert 0 < evaluation.stats[0] < 1
    return float(100 * evaluation.stats[0])


@pytest.mark.parametrize("tasks", [(), ("segm",), ("keypoints", "mask")])
def test_other_tasks_are_refused(evaluator: Make, tasks: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"tasks must be some of \['bbox', 'keypoints'\]"):
        evaluator(tasks=tasks)


def test_class_that_the_data_set_lacks_is_refused(evaluator: Make) -> None:
    output = found((0.9, 0))
    output["instances"].pred_classes += 1
    made = evaluator()
    made.process([image(1)], [output])
    with pytest.raises(ValueError, match=r"image 1 has a prediction of class 1, .* has \[0\]"):
        made.evaluate()
