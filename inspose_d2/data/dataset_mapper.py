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
    without persons.
    """

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        if not self.use_keypoint:
            raise ValueError("InsPose learns from keypoints: set MODEL.KEYPOINT_ON: True")
        num_keypoints = len(self.keypoint_hflip_indices)
        for annotation in dataset_dict["annotations"]:
            is_crowd = annotation.get("iscrowd", 0)
            if is_crowd:
                annotation.update(iscrowd=0, category_id=CROWD)
            if is_crowd or "keypoints" not in annotation:
                annotation["keypoints"] = [0.0] * (3 * num_keypoints)
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        instances = dataset_dict["instances"]
        if not instances.has("gt_keypoints"):
            instances.gt_keypoints = Keypoints(torch.as_tensor(np.zeros((0, num_keypoints, 3))))
