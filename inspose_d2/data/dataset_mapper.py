"""From a data set dict to the input of InsPose."""

from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.structures import Keypoints

from ..target_generator import CROWD


class InsPoseDatasetMapper(DatasetMapper):
    """Detectron2's mapper, which here also keeps the persons that it would drop or trip over.

    A crowd region becomes a person without labelled keypoints and of the class ``CROWD``, whose box
    the classification loss leaves out; ``gt_keypoints`` is there for every image, (0, K, 3)
    without persons. A person without a box gets the one around the labelled keypoints; one with
    neither is dropped.
    """

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        if not self.use_keypoint:
            raise ValueError("InsPose learns from keypoints: set MODEL.KEYPOINT_ON: True")
        num_keypoints = len(self.keypoint_hflip_indices)
        size = dataset_dict["width"], dataset_dict["height"]
        for annotation in dataset_dict["annotations"]:
            is_crowd = annotation.get("iscrowd", 0)
            if is_crowd:
                annotation.update(iscrowd=0, category_id=CROWD)
            if is_crowd or "keypoints" not in annotation:
                annotation["keypoints"] = [0.0] * (3 * num_keypoints)
            if "bbox" not in annotation:
                annotation["bbox"] = _pseudo_box(annotation["keypoints"])
            annotation["keypoints"] = _off_the_border(annotation["keypoints"], size)
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        instances = dataset_dict["instances"]
        if not instances.has("gt_keypoints"):
            instances.gt_keypoints = Keypoints(torch.as_tensor(np.zeros((0, num_keypoints, 3))))


def _off_the_border(keypoints: list[float], size: tuple[int, int]) -> np.ndarray:
    """Move keypoints on the right and lower borders inwards by less than a rounding of float32.

    Resized from a width W to W', x == W becomes W * (W' / W). That may be above W' by a rounding
    error, and Detectron2 would drop the keypoint as outside.

    Args:
        keypoints: x, y in pixels and v of each.
        size: (W, H) of the image.

    Returns:
        (K, 3) the same; what is outside stays where it is.
    """
    points = np.reshape(np.asarray(keypoints, dtype=np.float64), (-1, 3)).copy()
    xy, border = points[:, :2], np.asarray(size)
    points[:, :2] = np.where(xy <= border, np.minimum(xy, border * (1 - 1e-12)), xy)
    return points


def _pseudo_box(keypoints: list[float]) -> list[float]:
    """Box [x, y, width, height] around the labelled keypoints; empty where there are none.

    It has a pixel at least, or Detectron2 would drop a person with one keypoint.
    """
    points = np.reshape(keypoints, (-1, 3))
    points = points[points[:, 2] > 0, :2]
    if len(points) == 0:
        return [0.0] * 4
    corner = points.min(axis=0)
    return [*corner, *(points.max(axis=0) - corner).clip(min=1)]
