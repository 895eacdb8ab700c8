"""What the architectures here share around their networks: images in, poses out."""

from typing import Any

import torch
from detectron2.layers import move_device_like
from detectron2.modeling import Backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn


class ImageModel(nn.Module):
    """A model that takes Detectron2's batches of images."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, backbone: Backbone, pixel_mean: list[float], pixel_std: list[float]) -> None:
        """Keep what images are prepared by.

        Args:
            backbone: says what the sides of a padded image are multiples of.
            pixel_mean: per channel, in the order of ``INPUT.FORMAT``.
            pixel_std: per channel.
        """
        super().__init__()
        self.backbone = backbone
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @property
    def device(self) -> torch.device:
        """Device of the model, which images are moved to."""
        return self.pixel_mean.device

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalize the images and pad them to one size.

        Raises:
            ValueError: there is no image, or one that is empty or has other channels.
        """
        _check_images(batched_inputs, num_channels=len(self.pixel_mean))
        images = [move_device_like(x["image"], self.pixel_mean) for x in batched_inputs]
        images = [self.normalize(x) for x in images]
        return ImageList.from_tensors(
            images,
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )

    @staticmethod
    def postprocess(poses: Instances, height: int, width: int) -> Instances:
        """Scale poses from pixels of the network input to those of the asked size."""
        return detector_postprocess(poses, height, width)

    def results_of(
        self,
        poses: list[Instances],
        batched_inputs: list[dict[str, Any]],
        image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Instances]]:
        """Scale the poses of a batch to the sizes that its inputs ask for.

        Args:
            poses: per image, in pixels of the network input, with pred_locations, which go.
            batched_inputs: with "height" and "width" where another size than the input's is asked.
            image_sizes: (H, W) of each image without padding, pixels.

        Returns:
            Per image {"instances": poses}.
        """
        results = []
        for pose, inputs, (height, width) in zip(poses, batched_inputs, image_sizes, strict=True):
            asked = inputs.get("height", height), inputs.get("width", width)
            scaled = self.postprocess(pose, *asked)
            scaled.remove("pred_locations")
            results.append({"instances": scaled})
        return results

    def normalize(self, image: Tensor) -> Tensor:
        """Bring the colours (C, H, W), 0 to 255, to the range that the backbone knows."""
        return (image - self.pixel_mean) / self.pixel_std


def _check_images(batched_inputs: list[dict[str, Any]], num_channels: int) -> None:
    """Refuse what is no batch of images, by types and shapes alone: values would cost a wait."""
    if len(batched_inputs) == 0:
        raise ValueError("the batch is empty: expected a list of dicts with an 'image' each")
    for number, inputs in enumerate(batched_inputs):
        image = inputs.get("image") if isinstance(inputs, dict) else inputs
        if not isinstance(image, Tensor) or not isinstance(inputs, dict):
            raise ValueError(
                f"input {number} of the batch must be a dict with a tensor 'image', "
                f"got {type(image).__name__}"
            )
        if image.dim() != 3 or image.shape[0] != num_channels or image.numel() == 0:
            raise ValueError(
                f"'image' of input {number} of the batch must be ({num_channels}, H, W), not "
                f"empty, one channel per value of MODEL.PIXEL_MEAN; got {tuple(image.shape)}"
            )
