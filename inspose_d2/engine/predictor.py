"""Poses from files, arrays and Pillow images, one or many at a time."""

import logging
import os
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from PIL import Image

from ..config import ConfigError, get_cfg
from ..data.images import ImageError, ResizeShortestEdge, read_image, to_array, to_tensor
from ..data.keypoint_sets import register_datasets
from ..model_zoo import config_of, find_weights, load_model
from ..modeling.backbone import keep_folded

logger = logging.getLogger(__name__)

Picture = str | os.PathLike[str] | np.ndarray | Image.Image


class InsPosePredictor:
    """Detectron2's ``DefaultPredictor`` that also takes files, Pillow images and lists.

    It refuses what is no image by name. One predictor may be called
    from several threads at once.

        predictor = InsPosePredictor("InsPose_R50_3x", weights="model_final.pth")
        poses = predictor("image.jpg")["instances"]
    """

    def __init__(
        self,
        cfg: CfgNode | str | os.PathLike[str] | None = None,
        *,
        weights: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        max_poses: int | None = None,
    ) -> None:
        """Build the model and load its weights.

        Args:
            cfg: the whole config; not changed. Or a YAML file, or a name in :func:`list_configs`.
                The others, where given, go before its keys. None takes the config that comes
                with the weights.
            weights: checkpoint file, a name in :func:`list_checkpoints`, a folder in the form of
                the Hugging Face hub, or a repository there, ``organisation/name``;
                ``MODEL.WEIGHTS``.
            device: ``MODEL.DEVICE``.
            score_threshold: ``MODEL.INSPOSE.SCORE_THRESH_TEST``, in [0, 1]; poses whose score is
                below are left out, whatever their person probability is. Where it is not given
                soft-NMS (:class:`InsPoseOfficial`) may leave lower scores, as its authors have it.
            nms_threshold: ``MODEL.INSPOSE.NMS_THRESH_TEST``, in [0, 1].
            max_poses: ``TEST.DETECTIONS_PER_IMAGE``, at least 1.

        Raises:
            ValueError: an argument is out of its range, or no config is known.
            CheckpointError: the weights cannot be read, or are of another model.
            OSError: the weights cannot be downloaded.
        """
        cfg = cfg.clone() if isinstance(cfg, CfgNode) else get_cfg(cfg or _config_of(weights))
        assert isinstance(cfg, CfgNode)
        cfg.defrost()
        if device is not None:
            cfg.MODEL.DEVICE = str(device)
        if weights is not None:
            cfg.MODEL.WEIGHTS = str(find_weights(weights))
        if score_threshold is not None:
            cfg.MODEL.INSPOSE.SCORE_THRESH_TEST = _fraction("score_threshold", score_threshold)
        node = cfg.MODEL.INSPOSE
        # Otherwise scores are person probabilities, which the model has compared already.
        is_mixed = node.KEYPOINT_SCORE_WEIGHT_TEST > 0
        self.least_score = (
            node.SCORE_THRESH_TEST if is_mixed or score_threshold is not None else 0.0
        )
        if nms_threshold is not None:
            cfg.MODEL.INSPOSE.NMS_THRESH_TEST = _fraction("nms_threshold", nms_threshold)
        if max_poses is not None:
            cfg.TEST.DETECTIONS_PER_IMAGE = _count("max_poses", max_poses)
        self.cfg = cfg
        try:
            register_datasets(cfg, training=False)
        except ConfigError as error:  # the files may be where it was trained
            logger.warning("%s: poses are found, but drawn without names and limbs", error)
        if cfg.DATASETS.TEST:
            self.metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
        self.model = load_model(cfg)
        keep_folded(self.model)
        size = cfg.INPUT.MIN_SIZE_TEST
        self.resize = ResizeShortestEdge(
            [size, size], cfg.INPUT.MAX_SIZE_TEST, library=cfg.INPUT.RESIZE
        )

    def __call__(
        self, x: Picture | list[Picture] | tuple[Picture, ...], batch_size: int = 8
    ) -> Any:
        """Find the poses of one image, or of each of a list.

        Args:
            x: an image or a list of them. An image is the path of a file, a BGR array (H, W, 3) of
                uint8 as ``cv2.imread`` gives it, or a Pillow image. What is no array is turned
                upright by its EXIF orientation, and poses are those of the upright image.
            batch_size: most images of a list that go through the model at once. Only images that
                are resized to one size do: padding would change the results.

        Returns:
            Per image {"instances": ``Instances`` with pred_keypoints (N, K, 3), pred_boxes, scores
            and pred_classes, best first}; a list of these, in the order of x, for a list. The
            keypoints are x, y in pixels of the image and their probability, in [0, 1].

        Raises:
            ImageError: a file or a Pillow image cannot be read.
            TypeError: x is no image, or its values are not uint8; says what to do.
            ValueError: an array has another shape, the list is empty, the batch size is below 1.
        """
        _count("batch_size", batch_size)
        if not isinstance(x, (list, tuple)):
            return self._run([self.prepare(x)])[0]
        if not x:
            raise ValueError("the list of images is empty; give it an image at least")
        results: dict[int, dict[str, Instances]] = {}
        waiting: dict[tuple[int, ...], dict[int, dict[str, Any]]] = defaultdict(dict)
        for number, picture in enumerate(x):
            inputs = self.prepare(picture, f"image {number} of the list")
            shape = tuple(inputs["image"].shape)
            waiting[shape][number] = inputs
            if len(waiting[shape]) == batch_size:
                batch = waiting.pop(shape)
                results.update(zip(batch, self._run(list(batch.values())), strict=True))
        for batch in waiting.values():
            results.update(zip(batch, self._run(list(batch.values())), strict=True))
        return [results[number] for number in range(len(x))]

    @torch.no_grad()
    def _run(self, batch: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        found = self.model(batch)
        return [
            {"instances": poses[poses.scores >= self.least_score]}
            for poses in (x["instances"] for x in found)
        ]

    def prepare(self, picture: Any, name: str = "image") -> dict[str, Any]:
        """Turn an image into the model's input; `name` is what messages call it."""
        order, max_pixels = self.cfg.INPUT.FORMAT, self.cfg.INPUT.MAX_PIXELS
        if isinstance(picture, (str, os.PathLike)):
            pixels = read_image(picture, order, max_pixels)
        elif isinstance(picture, Image.Image):
            try:
                pixels = to_array(picture, order, max_pixels)
            except ImageError as error:
                raise ImageError(f"{name}, a Pillow image: {error}") from error.__cause__
        else:
            _check_array(picture, name)
            pixels = picture if order == "BGR" else picture[:, :, ::-1]
        resized = self.resize.get_transform(pixels).apply_image(pixels)
        return {"image": to_tensor(resized), "height": pixels.shape[0], "width": pixels.shape[1]}


def _config_of(weights: str | os.PathLike[str] | None) -> str:
    """Give the config that comes with the weights."""
    config = None if weights is None else config_of(weights)
    if config is None:
        raise ValueError("give the config: these weights do not say which one they are of")
    return config


def _check_array(array: Any, name: str) -> None:
    """Refuse what is not (H, W, 3) uint8, and say how to make it so."""
    if not isinstance(array, np.ndarray):
        kind = type(array).__name__
        got = f"{kind} {tuple(array.shape)}, {array.dtype}" if hasattr(array, "dtype") else kind
        cure = "give a path, a Pillow image, an array (H, W, 3) of uint8 in BGR, or a list of these"
        if array is None:
            cure = "cv2.imread returns None for a file it cannot read: give its path instead"
        elif isinstance(array, torch.Tensor):
            cure = "for a tensor (3, H, W) in BGR, give image.permute(1, 2, 0).byte().cpu().numpy()"
        elif isinstance(array, (bytes, bytearray, memoryview)):
            cure = "give PIL.Image.open(io.BytesIO(data)) for the content of a file"
        elif isinstance(array, (list, tuple)):
            cure = "give one list of images, not a list in a list"
        elif hasattr(array, "__next__"):
            cure = "give list(images)"
        raise TypeError(f"{name} is no image: got {got}; {cure}")
    got = f"got shape {array.shape}, {array.dtype}"
    if array.dtype != np.uint8:
        cures = {
            np.dtype(np.uint16): "scale with (image / 257).round().astype('uint8')",
            np.dtype(bool): "scale with image.astype('uint8') * 255",
        }
        cure = cures.get(array.dtype, "scale it to 0..255, without NaN, and give .astype('uint8')")
        raise TypeError(f"{name} must be an array (H, W, 3) of uint8, {got}; {cure}")
    if array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ValueError(
            f"{name} must be an array (H, W, 3) of uint8 in BGR, {got}; {_cure_of_shape(array)}"
        )


def _cure_of_shape(array: np.ndarray) -> str:
    if array.size == 0:
        return "it has no pixels: was a region cut out beside the image?"
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1):
        return "for a grey image, give cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)"
    if array.ndim == 4:
        return "for several images, give list(images)"
    if array.ndim == 3 and array.shape[2] == 4:
        return "drop alpha with image[:, :, :3]"
    if array.ndim == 3 and array.shape[0] == 3:
        return "for (3, H, W), give image.transpose(1, 2, 0)"
    return "give one image of three channels"


def _fraction(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
    return float(value)


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r}")
    return int(value)
