"""COCO's figures of poses, with a definite answer to bad, missing and repeated predictions."""

import contextlib
import io
import os
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import (
    COCOeval_opt,
    _evaluate_predictions_on_coco,
)
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from pycocotools.coco import COCO
from tabulate import tabulate
from torch import Tensor

from ..data.annotations import count_people
from ..data.coco_file import in_memory
from ..modeling.oks import COCO_SIGMAS
from .results import RESULTS, ResultsFile, to_coco
from .visibility import evaluate_visibility

try:
    import faster_coco_eval  # the extra "eval": the same figures sooner
except ImportError:
    faster_coco_eval = None

# What Detectron2 reports of each task.
METRICS = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),
}
# COCO's code looks at no more predictions of an image and category, best first.
MAX_DETECTIONS = {"bbox": 100, "keypoints": 20}
# Keypoint AP on the images with so many persons, from and to; Detectron2 leaves names with a "-"
# out of its summary line.
AP_BY_PEOPLE = {
    "AP-1-person": (1, 1),
    "AP-2-to-3-persons": (2, 3),
    "AP-4-to-6-persons": (4, 6),
    "AP-7-or-more-persons": (7, float("inf")),
}


class InsPoseEvaluator(COCOEvaluator):
    """Evaluates the keypoints, and the boxes if asked, of any model.

    Unlike ``COCOEvaluator`` it refuses predictions that are not finite (COCO's code takes them for
    perfect), reports AP 0 where nothing was predicted and NaN where there is nothing to find,
    counts a repeated image once, leaves what it is given unchanged, and keeps tensors rather than
    Python numbers of each image until the end. It also reports keypoint AP by the number of persons
    in the image and, where poses have ``pred_visibility``, how well it tells hidden keypoints from
    visible ones; it takes sigmas from the metadata, and reads annotations as
    :func:`~inspose_d2.data.coco_file.plain` makes them. faster-coco-eval computes the figures where
    it is installed.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] = ("keypoints",),
        *,
        output_dir: str | None = None,
        kpt_oks_sigmas: Sequence[float] = (),
    ) -> None:
        """Read the annotations.

        Args:
            dataset_name: a registered data set.
            tasks: of "keypoints", "bbox".
            output_dir: folder for ``coco_instances_results.json``; None writes none.
            kpt_oks_sigmas: of each keypoint, ``TEST.KEYPOINT_OKS_SIGMAS``; empty takes
                ``keypoint_oks_sigmas`` of the data set's metadata, or COCO's where it has none.

        Raises:
            ValueError: another task.
        """
        if not tasks or not METRICS.keys() >= set(tasks):
            raise ValueError(f"tasks must be some of {list(METRICS)}, got {tasks}")
        sigmas = kpt_oks_sigmas or MetadataCatalog.get(dataset_name).get("keypoint_oks_sigmas", ())
        with in_memory({}, evaluation=True):
            super().__init__(
                dataset_name, tasks=tasks, output_dir=output_dir, kpt_oks_sigmas=sigmas
            )

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Instances]]) -> None:
        """Take the predictions of a batch; they are copied.

        Args:
            inputs: per image "image_id" and, for messages, "file_name".
            outputs: per image {"instances": ``Instances`` with pred_boxes, scores, pred_classes
                and, for the task "keypoints", pred_keypoints (N, K, 3), in pixels, and, if it is
                there, pred_visibility (N, K)}.

        Raises:
            ValueError: a box, score or keypoint is not finite.
        """
        for image, output in zip(inputs, outputs, strict=True):
            poses = self._copy(output["instances"])
            for name, value in poses.get_fields().items():
                bad = ~_tensor(value)[:, None].flatten(1).isfinite()  # (N, values of each)
                if bad.any():
                    raise ValueError(
                        f"{name} of image {image.get('file_name')} (id {image['image_id']}) is "
                        f"not finite in {int(bad.any(dim=1).sum())} of {len(poses)} predictions: "
                        "COCO's evaluation would take these for perfect"
                    )
            self._predictions.append((image["image_id"], poses))

    def evaluate(self, img_ids: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """Compute the figures, and write the predictions in COCO's form, strict JSON.

        An image that was seen several times, by one worker or by several, counts once: as it was
        seen last by the worker of the highest rank.

        Args:
            img_ids: images to evaluate, None for the whole data set.

        Returns:
            Per task its ``METRICS`` in percent, of keypoints ``AP_BY_PEOPLE`` too: 0 where nothing
            was predicted, NaN where there is nothing to find. As "visibility", where it was
            predicted, the figures of :func:`.evaluate_visibility`. Empty without annotations
            (test-dev) and on all workers but the first.
        """
        comm.synchronize()
        gathered = list(chain(*comm.gather(self._predictions, dst=0)))
        if not comm.is_main_process():
            return {}
        predictions = dict(gathered)
        if len(predictions) < len(gathered):
            self._logger.warning(
                "%d images were seen more than once; each counts once, as it was seen last",
                len(gathered) - len(predictions),
            )
        if self._output_dir:
            self._write(predictions)
        if not self._do_evaluation:
            self._logger.info("Annotations are not available for evaluation.")
            return {}
        results = {}
        for task in sorted(self._tasks):
            records = self._best_records(task, predictions)
            results[task] = self._metrics(task, records, img_ids)
            if task == "keypoints":
                results[task] |= self._ap_by_people(records, img_ids)
            if task == "keypoints" and records and "visibility" in records[0]:
                wanted = [x for x in records if img_ids is None or x["image_id"] in img_ids]
                sigmas = list(self._kpt_oks_sigmas or COCO_SIGMAS.values())
                results["visibility"] = evaluate_visibility(self._coco_api, wanted, sigmas)
        return results

    def _copy(self, instances: Instances) -> Instances:
        """Copy what the tasks need to the CPU, apart from any larger storage behind it."""
        fields = {
            "pred_boxes": Boxes(instances.pred_boxes.tensor.to("cpu", copy=True)),
            "scores": instances.scores.to("cpu", copy=True),
            "pred_classes": instances.pred_classes.to("cpu", copy=True),
        }
        # A model that finds nobody may leave the keypoints out.
        if "keypoints" in self._tasks and (len(instances) or instances.has("pred_keypoints")):
            fields["pred_keypoints"] = instances.pred_keypoints.to("cpu", copy=True)
            if instances.has("pred_visibility"):
                fields["pred_visibility"] = instances.pred_visibility.to("cpu", copy=True)
        return Instances(instances.image_size, **fields)

    def _records(self, image_id: int, poses: Instances) -> list[dict[str, Any]]:
        """Predictions of an image in COCO's result format."""
        records = to_coco(poses, image_id)
        contiguous = getattr(self._metadata, "thing_dataset_id_to_contiguous_id", None)
        if contiguous is not None:
            dataset_ids = {number: dataset_id for dataset_id, number in contiguous.items()}
            for record in records:
                if record["category_id"] not in dataset_ids:
                    raise ValueError(
                        f"image {image_id} has a prediction of class "
                        f"{record['category_id']}, the data set has {sorted(dataset_ids)}"
                    )
                record["category_id"] = dataset_ids[record["category_id"]]
        return records

    def _best_records(self, task: str, predictions: dict[int, Instances]) -> list[dict[str, Any]]:
        """Records of the predictions that COCO's code looks at, which takes 4 KiB for each."""
        best = []
        for image_id, poses in predictions.items():
            count: Counter[int] = Counter()  # by category
            for record in sorted(self._records(image_id, poses), key=lambda x: -x["score"]):
                count[record["category_id"]] += 1
                if count[record["category_id"]] <= MAX_DETECTIONS[task]:
                    best.append(record)
        return best

    def _write(self, predictions: dict[int, Instances]) -> None:
        """Write all records image by image: as one text they take 1 MiB of each."""
        path = os.path.join(self._output_dir, RESULTS)
        self._logger.info("Saving results to %s", path)
        with ResultsFile(path) as file:
            for image_id, poses in predictions.items():
                file.add(self._records(image_id, poses))

    def _metrics(
        self, task: str, records: list[dict[str, Any]], img_ids: Sequence[int] | None
    ) -> dict[str, float]:
        """``METRICS`` of a task; COCO's code can do without neither annotations nor predictions."""
        if not self._has_truth(task, img_ids):
            self._logger.warning(
                "%s has nothing to find for the task %s: all its figures are NaN",
                self._metadata.name,
                task,
            )
            return dict.fromkeys(METRICS[task], float("nan"))
        if not records:
            self._logger.warning("Nothing was predicted: all figures of the task %s are 0", task)
            return dict.fromkeys(METRICS[task], 0.0)
        evaluation = _evaluate_predictions_on_coco(
            self._coco_api,
            records,
            task,
            kpt_oks_sigmas=self._kpt_oks_sigmas,
            cocoeval_fn=make_coco_eval,
            img_ids=img_ids,
        )
        names = self._metadata.get("thing_classes")
        return self._derive_coco_results(evaluation, task, class_names=names)

    def _ap_by_people(
        self, records: list[dict[str, Any]], img_ids: Sequence[int] | None
    ) -> dict[str, float]:
        """``AP_BY_PEOPLE``; together they cost less than one more evaluation."""
        counts = count_people(self._coco_api.anns.values())
        wanted = counts.keys() if img_ids is None else counts.keys() & set(img_ids)
        figures, rows = {}, []
        for name, (low, high) in AP_BY_PEOPLE.items():
            images = [image_id for image_id in wanted if low <= counts[image_id] <= high]
            figures[name] = (
                keypoint_ap(self._coco_api, records, images, self._kpt_oks_sigmas)
                if images
                else float("nan")
            )
            rows.append((name, len(images), sum(counts[x] for x in images), figures[name]))
        table = tabulate(
            rows,
            headers=("metric", "images", "persons", "AP"),
            tablefmt="pipe",
            floatfmt=".3f",
        )
        self._logger.info("Keypoint AP by the number of persons in the image:\n%s", table)
        return figures

    def _has_truth(self, task: str, img_ids: Sequence[int] | None) -> bool:
        """Whether COCO wants anybody of the images to be found: a person, with keypoints."""
        return any(
            not x.get("iscrowd", 0)
            and (task == "bbox" or x.get("num_keypoints", 0) > 0)
            and (img_ids is None or x["image_id"] in img_ids)
            for x in self._coco_api.anns.values()
        )


def keypoint_ap(
    truth: COCO,
    records: list[dict[str, Any]],
    image_ids: Sequence[int],
    sigmas: Sequence[float] = (),
) -> float:
    """Keypoint AP, in percent, of some images, each with a person to find.

    Args:
        truth: the annotations.
        records: predictions in COCO's result format, of these and of other images.
        image_ids: of the images.
        sigmas: of OKS; empty takes COCO's.
    """
    wanted = set(image_ids)
    found = [record for record in records if record["image_id"] in wanted]
    if not found:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = make_coco_eval(truth, truth.loadRes(found), "keypoints")
        params = evaluation.params
        params.imgIds = sorted(wanted)
        params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]  # all
        if sigmas:
            params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]
    return 100 * float(precision[precision > -1].mean())


def make_coco_eval(truth: COCO, detections: COCO, task: str) -> Any:
    """Make a ``COCOeval``, the fastest there is: faster-coco-eval's, Detectron2's, pycocotools'.

    faster-coco-eval's ``init_as_pycocotools()``, which would replace pycocotools for the whole
    program, breaks ``detectron2.evaluation``.

    Args:
        truth: the annotations.
        detections: ``truth.loadRes(records)``.
        task: "keypoints" or "bbox".
    """
    if faster_coco_eval is None:
        return COCOeval_opt(truth, detections, task)
    faster = (faster_coco_eval.COCO(coco.dataset) for coco in (truth, detections))
    return faster_coco_eval.COCOeval_faster(*faster, task, print_function=print)


def _tensor(field: Tensor | Boxes) -> Tensor:
    return field.tensor if isinstance(field, Boxes) else field
