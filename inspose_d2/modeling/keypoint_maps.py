"""The keypoint maps of chosen poses, which ordinary inference never keeps (fig. 1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.structures import Instances
from torch import Tensor

from .candidates import Candidates
from .inspose import InsPose
from .official import InsPoseOfficial


@dataclass
class KeypointMaps:
    """What the KP-Nets of n poses of an image say of each cell.

    The cell in column i and row j covers [i * w, (i + 1) * w) x [j * h, (j + 1) * h) pixels of the
    image, (w, h) being ``cell``. The last column and row may reach beyond the image.
    """

    poses: Instances  # the n poses, in pixels of the asked size, as ordinary inference gives them
    probs: Tensor  # (n, K, H, W) float32, softmax probabilities: each map sums to 1
    cell: tuple[float, float]  # width and height of a cell in pixels of the asked size


@torch.no_grad()
def keypoint_maps_of(
    model: InsPose | InsPoseOfficial, inputs: dict[str, Any], chosen: Sequence[int]
) -> KeypointMaps:
    """Run the model on an image, then the KP-Nets of chosen poses once more, keeping their maps.

    A pose's keypoint score is its map's largest probability, and that cell the one that the disk
    offset is read at. (The authors' released model looks for that cell in an enlarged map.)

    Args:
        model: in evaluation mode, on any device.
        inputs: of one image, as :meth:`InsPose.forward` takes them.
        chosen: numbers of poses in the model's result for this image alone, from 0.

    Returns:
        The maps, in the order of ``chosen``.

    Raises:
        ValueError: the model is in training mode, or there is no such pose.
    """
    if model.training:
        raise ValueError("keypoint maps are those of inference: call model.eval() first")
    images = model.preprocess_image([inputs])
    size = images.image_sizes[0]
    predictions: Any = model.predict(images.tensor)
    locations = model.locations_of(predictions)
    poses = model.inference(predictions, locations, [size])[0]
    asked = inputs.get("height", size[0]), inputs.get("width", size[1])
    poses = model.postprocess(poses, *asked)
    if not all(0 <= number < len(poses) for number in chosen):
        raise ValueError(f"there are {len(poses)} poses in the image, asked for {list(chosen)}")
    poses = poses[torch.tensor(chosen, dtype=torch.int64, device=model.device)]

    index = poses.pred_locations
    poses.remove("pred_locations")
    points, strides = locations.points[index], locations.strides[index]
    candidates = Candidates(torch.zeros_like(index), index, points, strides, [len(index)])
    params, features, maps = model.kp_net_inputs(predictions, locations, candidates, size)
    net, stride = model.kp_net, model.kp_net.map_stride
    logits = net.logits(params, points, strides, net.shared_input(features))
    return KeypointMaps(
        poses,
        net.resample(logits, maps).softmax(dim=2).unflatten(2, maps),
        (stride * asked[1] / size[1], stride * asked[0] / size[0]),
    )
