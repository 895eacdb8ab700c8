"""Pictures of each evaluation on the way of training, for TensorBoard."""

import functools
import itertools
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.evaluator import inference_context
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from ..data.dataset_mapper import InsPoseDatasetMapper
from ..data.images import read_image
from ..visualization.poses import draw_poses

NUM_PICTURES = 4
HEIGHT = 320  # pixels of a picture


class EvalPictures:
    """The first annotated images of a test set: ground truth on the left, poses on the right."""

    def __init__(self, cfg: CfgNode) -> None:
        """Keep what is needed; the images are chosen at the first evaluation.

        Args:
            cfg: reads the first of ``DATASETS.TEST`` and what the mapper reads. A set without
                annotated keypoints has no pictures.
        """
        self.cfg, self.name = cfg, cfg.DATASETS.TEST[0]
        self.mapper = InsPoseDatasetMapper(cfg, is_train=False)

    @functools.cached_property
    def records(self) -> list[dict[str, Any]]:
        """The images that are shown, as the catalog has them."""
        annotated = (x for x in DatasetCatalog.get(self.name) if len(_keypoints(x)))
        return list(itertools.islice(annotated, NUM_PICTURES))

    def put(self, model: nn.Module) -> None:
        """Put the pictures into the current ``EventStorage``.

        Args:
            model: in any mode, which it keeps; of one worker, not wrapped.
        """
        for number, record in enumerate(self.records):
            with inference_context(model), torch.no_grad():
                (output,) = model([self.mapper(record)])
            poses = output["instances"].to("cpu")
            if len(poses):  # of an untrained model there are as many as may be
                poses = poses[poses.scores >= 0.5 * poses.scores.max()]
            picture = self._draw(record, poses)[:, :, ::-1].transpose(2, 0, 1)
            get_event_storage().put_image(f"{self.name}/{number}", picture.copy())

    def _draw(self, record: dict[str, Any], poses: Instances) -> np.ndarray:
        """Draw both sides, (HEIGHT, W, 3) BGR."""
        image = read_image(record["file_name"], "BGR", self.cfg.INPUT.MAX_PIXELS)
        scale = HEIGHT / image.shape[0]
        image = cv2.resize(image, (max(1, round(image.shape[1] * scale)), HEIGHT))
        sides = []
        for keypoints in (torch.from_numpy(_keypoints(record)), poses.pred_keypoints):
            shown = Instances(
                image.shape[:2], pred_keypoints=keypoints * keypoints.new_tensor([scale, scale, 1])
            )
            sides.append(draw_poses(image, shown, metadata=MetadataCatalog.get(self.name)))
        return np.hstack(sides)


def _keypoints(record: dict[str, Any]) -> np.ndarray:
    """Keypoints (N, K, 3) of a record's persons: x, y in pixels, 1 where it is labelled, else 0."""
    people = [x["keypoints"] for x in record.get("annotations", ()) if any(x.get("keypoints", ()))]
    keypoints = np.array([np.reshape(x, (-1, 3)) for x in people], dtype=np.float64)
    if len(keypoints):
        keypoints[..., 2] = keypoints[..., 2] > 0
        keypoints = keypoints[keypoints[..., 2].any(axis=1)]
    return keypoints
