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
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from inspose_d2.config import get_cfg
from inspose_d2.engine import trainer
from inspose_d2.evaluation.coco import AP_BY_PEOPLE, METRICS, InsPoseEvaluator, make_coco_eval

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
# Figures where nothing was predicted of images with one person each.
NO_POSES = {task: dict.fromkeys(names, 0.0) for task, names in METRICS.items()}
NO_POSES["keypoints"] |= dict.fromkeys(AP_BY_PEOPLE, math.nan) | {"AP-1-person": 0.0}
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


def assert_equal(results: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the figures of each task; NaN equals NaN."""
    assert results.keys() == expected.keys()
    for task, figures in results.items():
        assert figures == pytest.approx(expected[task], abs=1e-9, nan_ok=True)


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
        {"AP": 30, "AP50": 100, "AP75": 0, "APm": 30, "APl": math.nan}
        | dict.fromkeys(AP_BY_PEOPLE, math.nan)
        | {"AP-1-person": 30},
        nan_ok=True,
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
    assert_equal(made.evaluate(), NO_POSES)
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
    assert figures.keys() == {*METRICS["keypoints"], *AP_BY_PEOPLE}
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
    assert_equal(results, NO_POSES)
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


def test_sigmas_of_the_metadata_are_taken_where_none_are_given(
    evaluator: Make, tmp_path: Path
) -> None:
    evaluator()  # writes and registers the data set
    MetadataCatalog.get(NAME).set(keypoint_oks_sigmas=(0.2, 0.2, 0.2))
    for own, ap in (((), 80), (SIGMAS, 30)):  # OKS exp(-10^2 / 800) = 0.88 and 0.61
        made = InsPoseEvaluator(NAME, output_dir=str(tmp_path), kpt_oks_sigmas=own)
        made.reset()
        made.process([image(1), image(2)], [found((0.9, 10)), found((0.8, 10))])
        assert made.evaluate()["keypoints"]["AP"] == pytest.approx(ap)


def test_ap_by_people_counts_the_images_of_each_group_alone(
    evaluator: Make, caplog: pytest.LogCaptureFixture
) -> None:
    # Image 1 has one person, image 2 three, a crowd and one without keypoints; there one is found.
    crowd = {**PERSON, "image_id": 2, "iscrowd": 1, "keypoints": [0] * 9, "num_keypoints": 0}
    others = [shifted_truth(x) for x in (40, 80)]
    made = evaluator([{**PERSON, "image_id": 1}, {**PERSON, "image_id": 2}, *others, crowd])
    made.process([image(1), image(2)], [found((0.9, 10)), found((0.8, 0))])
    with caplog.at_level(logging.INFO):
        figures = made.evaluate()["keypoints"]
    assert figures["AP-1-person"] == pytest.approx(30)  # OKS 0.607, three of ten thresholds
    assert figures["AP-2-to-3-persons"] == pytest.approx(100 * 34 / 101)  # recall 1/3
    assert math.isnan(figures["AP-4-to-6-persons"])
    assert "| AP-2-to-3-persons    |        1 |         3 |" in caplog.text
    only_second = made.evaluate(img_ids=[2])["keypoints"]
    assert math.isnan(only_second["AP-1-person"])
    assert only_second["AP-2-to-3-persons"] == figures["AP-2-to-3-persons"]


def shifted_truth(pixels: int) -> dict[str, Any]:
    """``PERSON`` in image 2, so many pixels to the right."""
    points = [value for x, y in TRUTH for value in (x + pixels, y, 2)]
    return {**PERSON, "image_id": 2, "bbox": [20 + pixels, 20, 50, 50], "keypoints": points}


def random_set(seed: int, num_images: int, num_keypoints: int, category: int) -> dict[str, Any]:
    """Persons of all sizes, hidden keypoints, crowds, persons without keypoints, empty images."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for image_id in rng.permutation(10 * num_images)[:num_images].tolist():
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "height": 400, "width": 600})
        for _ in range(rng.integers(0, 9)):
            corner, size = rng.uniform(0, 300, 2), rng.uniform(10, 250, 2)
            points = corner + rng.uniform(size=(num_keypoints, 2)) * size
            v = rng.integers(0, 3, num_keypoints) * (rng.uniform() > 0.1)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "iscrowd": int(rng.uniform() < 0.1),
                    "area": float(size.prod() * 0.6),
                    "bbox": [*corner.tolist(), *size.tolist()],
                    "keypoints": np.column_stack([points, v]).ravel().tolist(),
                    "num_keypoints": int((v > 0).sum()),
                }
            )
    categories = [{"id": category, "name": "person"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def random_poses(data: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Records near the truth, far from it, doubled, with equal scores, up to 30 in an image."""
    rng = np.random.default_rng(seed)
    records = []
    for person in data["annotations"]:
        for _ in range(rng.integers(0, 5)):
            noise = rng.choice([0.5, 5, 50])
            keypoints = np.array(person["keypoints"]).reshape(-1, 3)
            keypoints[:, :2] += rng.normal(size=(len(keypoints), 2)) * noise
            box = np.array(person["bbox"]) + rng.normal(size=4)
            records.append(
                {
                    "image_id": person["image_id"],
                    "category_id": person["category_id"],
                    "score": float(rng.choice([0.3, 0.6, rng.uniform()])),
                    "bbox": box.tolist(),
                    "keypoints": keypoints.ravel().tolist(),
                }
            )
    return records


def test_evaluator_of_detectron2_gives_the_same_figures_and_poses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random_set(5, 60, 17, category=7)
    (tmp_path / "people.json").write_text(json.dumps(data))
    metadata = Metadata(name=NAME, json_file=str(tmp_path / "people.json"))
    metadata.thing_dataset_id_to_contiguous_id = {7: 0}
    monkeypatch.setitem(MetadataCatalog.data, NAME, metadata)
    of_image: dict[int, list[dict[str, Any]]] = {x["id"]: [] for x in data["images"]}
    for record in random_poses(data, 6):
        of_image[record["image_id"]].append(record)
    assert max(map(len, of_image.values())) > 20  # COCO looks at no more
    results, poses = [], []
    for kind in (COCOEvaluator, InsPoseEvaluator):
        output = tmp_path / kind.__name__
        made = kind(NAME, tasks=("bbox", "keypoints"), output_dir=str(output))
        made.reset()
        for image_id, records in of_image.items():
            boxes = torch.tensor([x["bbox"] for x in records]).view(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            keypoints = torch.tensor([x["keypoints"] for x in records]).view(-1, 17, 3)
            fields = {
                "pred_boxes": Boxes(boxes),
                "pred_keypoints": keypoints + torch.tensor([0.5, 0.5, 0]),
                "scores": torch.tensor([x["score"] for x in records]),
                "pred_classes": torch.zeros(len(records), dtype=torch.int64),
            }
            made.process([image(image_id)], [{"instances": Instances((400, 600), **fields)}])
        results.append(made.evaluate())
        poses.append(json.loads((output / "coco_instances_results.json").read_text()))
    theirs, ours = results
    assert 20 < theirs["keypoints"]["AP"] < 80
    for task, figures in theirs.items():
        assert {x: ours[task][x] for x in METRICS[task]} == pytest.approx(
            {x: figures[x] for x in METRICS[task]}, abs=1e-9, nan_ok=True
        )
    assert poses[0] == poses[1]


@pytest.mark.parametrize("task", METRICS)
@pytest.mark.parametrize(
    "part", ["all", "some images", "one pose", "image without persons", "only crowds"]
)
@pytest.mark.parametrize(("num_keypoints", "category"), [(17, 1), (5, 7)])
def test_faster_coco_eval_gives_the_figures_of_pycocotools(
    task: str, part: str, num_keypoints: int, category: int
) -> None:
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval, the extra 'eval'")
    data = random_set(3, 40, num_keypoints, category)
    records = random_poses(data, 4)
    image_ids = sorted(x["id"] for x in data["images"])
    seen = {x["image_id"] for x in data["annotations"]}
    if part == "some images":
        image_ids = image_ids[::3]
    elif part == "one pose":
        records = records[:1]
    elif part == "image without persons":
        empty = next(x for x in image_ids if x not in seen)
        records.append({**records[0], "image_id": empty})
    elif part == "only crowds":
        for annotation in data["annotations"]:
            annotation["iscrowd"] = 1

    def stats(make: Callable[[COCO, COCO, str], Any]) -> list[float]:
        truth = COCO()
        truth.dataset = copy.deepcopy(data)
        truth.createIndex()
        made = make(truth, truth.loadRes(copy.deepcopy(records)), task)
        made.params.imgIds = image_ids
        if num_keypoints != 17:
            made.params.kpt_oks_sigmas = np.full(num_keypoints, 0.1)
        made.evaluate()
        made.accumulate()
        made.summarize()
        return made.stats.tolist()

    ours = stats(make_coco_eval)
    assert ours == pytest.approx(stats(COCOeval), abs=1e-12)
    assert (max(ours) > 0.05) == (part in ("all", "some images", "image without persons"))


def test_several_test_sets_do_not_overwrite_each_others_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer, "InsPoseEvaluator", lambda _, output_dir, **__: output_dir)
    cfg = get_cfg("people/InsPose_Lite0_people", ["OUTPUT_DIR", "out"])
    folders: list[Any] = [trainer.Trainer.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
    assert folders == ["out/inference/people_holdout", "out/inference/people_val"]
    cfg.DATASETS.TEST = ("people_val",)
    folders = [trainer.Trainer.build_evaluator(cfg, "people_val")]
    assert folders == ["out/inference"]
