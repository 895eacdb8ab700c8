"""From a data set dict to the input of InsPose."""

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.structures import Keypoints
from fvcore.transforms.transform import VFlipTransform

from ..modeling.target_generator import CROWD
from .annotations import box_of
from .augmentation import training_augmentations
from .images import ImageError, ResizeShortestEdge, read_image, to_tensor


class InsPoseDatasetMapper(DatasetMapper):
    """Detectron2's mapper, which here also keeps the persons that it would drop or trip over.

    A crowd region becomes a person without labelled keypoints and of the class ``CROWD``, whose box
    the classification loss leaves out; ``gt_keypoints`` is there for every image, (0, K, 3)
    without persons. A person without a box gets the one around the labelled keypoints; one with
    neither is dropped. Images are read by :func:`read_image` and keep a pixel in each side.
    """

    @configurable
    def __init__(self, is_train: bool, *, max_pixels: int, **others: Any) -> None:
        """Make the mapper for training or evaluation.

        Args:
            is_train: whether annotations are mapped too.
            max_pixels: see :func:`read_image`.
            others: of Detectron2's ``DatasetMapper``.
        """
        super().__init__(is_train, **others)
        self.max_pixels = max_pixels

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read ``INPUT`` and what Detectron2's mapper reads."""
        if not is_train:  # or it would ask for the flip pairs of DATASETS.TRAIN, and not use them
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.KEYPOINT_ON = False
        settings = super().from_config(cfg, is_train)
        augmentations = [_our_resize(x, cfg.INPUT.RESIZE) for x in settings["augmentations"]]
        if is_train:
            augmentations = training_augmentations(cfg, augmentations)
        return {**settings, "augmentations": augmentations, "max_pixels": cfg.INPUT.MAX_PIXELS}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one image.

        Args:
            dataset_dict: as in Detectron2's catalog; not changed.

        Returns:
            Input of :class:`InsPose`: "image", (3, H, W) uint8 in the order of ``INPUT.FORMAT``,
            in training "instances", and what else the dict has.

        Raises:
            ImageError: the image cannot be read; names path and image id.
            SizeMismatchError: it has another size than the annotations say.
        """
        dataset_dict = copy.deepcopy(dataset_dict)
        image = self._read(dataset_dict)
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        image = aug_input.image
        dataset_dict["image"] = to_tensor(image)
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, image.shape[:2])
        return dataset_dict

    def _read(self, dataset_dict: dict[str, Any]) -> np.ndarray:
        """Read the image of a dict, which gets its height and width where it has none."""
        path, image_id = dataset_dict["file_name"], dataset_dict.get("image_id")
        try:
            image = read_image(path, self.image_format, self.max_pixels)
        except ImageError as error:
            raise ImageError(f"image id {image_id}, {error}") from error.__cause__
        height, width = image.shape[:2]
        said = dataset_dict.setdefault("height", height), dataset_dict.setdefault("width", width)
        if said != (height, width):
            if said == (width, height):
                cause = (
                    "most likely the annotations were made without regard to its EXIF orientation: "
                    "save the image without it, or annotate the upright image"
                )
            else:
                cause = "put the annotated image in its place, or write its size into the json"
            raise SizeMismatchError(
                f"image id {image_id}, {path}: the image is {width} x {height} (width x height), "
                f"the annotations say {said[1]} x {said[0]}; {cause}"
            )
        return image

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        if not self.use_keypoint:
            raise ValueError("InsPose learns from keypoints: set MODEL.KEYPOINT_ON: True")
        num_keypoints = len(self.keypoint_hflip_indices)
        size = dataset_dict["width"], dataset_dict["height"]
        # Detectron2 exchanges left and right for horizontal flips alone.
        is_mirrored = sum(isinstance(x, VFlipTransform) for x in transforms.transforms) % 2
        for annotation in dataset_dict["annotations"]:
            is_crowd = annotation.get("iscrowd", 0)
            if is_crowd:
                annotation.update(iscrowd=0, category_id=CROWD)
            if is_crowd or "keypoints" not in annotation:
                annotation["keypoints"] = [0.0] * (3 * num_keypoints)
            if "bbox" not in annotation:
                annotation["bbox"] = box_of(annotation) or [0.0] * 4
            points = _off_the_border(annotation["keypoints"], size)
            annotation["keypoints"] = points[self.keypoint_hflip_indices] if is_mirrored else points
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        instances = dataset_dict["instances"]
        if not instances.has("gt_keypoints"):
            instances.gt_keypoints = Keypoints(torch.as_tensor(np.zeros((0, num_keypoints, 3))))


def _our_resize(augmentation: Any, library: str) -> Any:
    """Replace Detectron2's resizing by ours."""
    if type(augmentation) is not T.ResizeShortestEdge:
        return augmentation
    return ResizeShortestEdge(
        augmentation.short_edge_length,
        augmentation.max_size,
        augmentation.sample_style,
        augmentation.interp,
        library,
    )


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
