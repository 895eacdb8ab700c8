"""What the benchmarks run: InsPose and Keypoint R-CNN with random weights, images, persons."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, Keypoints
from torch import Tensor, nn

from benchmarks.analyze import build, count, force_persons, keep_finite, load
from inspose_d2 import InsPose, InsPoseOfficial

INSPOSE, BACKBONE = "InsPose", "InsPose, backbone + FPN alone"
PEER, PEER_CHANNELS_LAST = "Keypoint R-CNN", "Keypoint R-CNN, channels-last"
MODELS = (INSPOSE, PEER, PEER_CHANNELS_LAST)  # the peer is to be compared at its best
HEIGHTS, WIDTH = (60, 400), 0.4  # of persons: pixels, part of the height
SEED = 0
Inputs = list[dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """What all measurements of a run have in common.

    Attributes:
        config_file: of InsPose.
        peer: config of Keypoint R-CNN.
        size: (H, W) of the images, pixels.
        batch: images in a call.
        device: of torch.
        amp: name of the dtype of autocast; None for float32.
        channels_last: whether InsPose is in this memory layout on a GPU too.
        compile: whether ``torch.compile`` runs what has fixed shapes.
    """

    config_file: str
    peer: str
    size: tuple[int, int]
    batch: int
    device: str
    amp: str | None
    channels_last: bool
    compile: bool

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return torch.device(self.device).type == "cuda"

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision as asked for."""
        dtype = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.amp]
        kind = torch.device(self.device).type
        return torch.autocast(kind, dtype=dtype, enabled=dtype is not None)


def configs(setting: Setting) -> tuple[CfgNode, CfgNode]:
    """Configs of InsPose and of the peer; learning rate 0, so that weights stay what they are."""
    cfgs = load(setting.config_file, setting.device), load(setting.peer, setting.device)
    for cfg in cfgs:
        cfg.SOLVER.BASE_LR = 0.0
    return cfgs


def build_inspose(setting: Setting) -> InsPose:
    """Build InsPose as it runs: the layout is that of the device, or channels-last if asked for."""
    torch.manual_seed(SEED)
    model = build(configs(setting)[0], num_persons=1)
    if setting.channels_last:
        model.to(memory_format=torch.channels_last)
    if setting.compile:
        model.predict = torch.compile(model.predict)
    return model


def build_peer(setting: Setting, channels_last: bool) -> nn.Module:
    """Build Keypoint R-CNN as Detectron2 does.

    Args:
        setting: of the run.
        channels_last: whether its convolutions have this memory layout; not those of the regions,
            whose loss cannot.

    Returns:
        The model, in evaluation.
    """
    torch.manual_seed(SEED)
    model = build_model(configs(setting)[1]).eval()
    keep_finite(model)
    if channels_last:
        for part in (model.backbone, model.proposal_generator):
            part.to(memory_format=torch.channels_last)
    if setting.compile:  # the numbers of regions change
        for part in (model.backbone, model.proposal_generator.rpn_head):
            part.compile()
    return model


def build_one(setting: Setting, name: str) -> nn.Module:
    """Build InsPose, or the peer in one of its layouts, by name."""
    if name == INSPOSE:
        return build_inspose(setting)
    return build_peer(setting, channels_last=name == PEER_CHANNELS_LAST)


def person_boxes(num_persons: int, size: tuple[int, int]) -> Tensor:
    """Draw boxes of persons; those of fewer persons are the first of those of more.

    Args:
        num_persons: N.
        size: (H, W) of the image, in which they lie.

    Returns:
        (N, 4) x0, y0, x1, y1, of heights between ``HEIGHTS``, ``WIDTH`` of it wide.
    """
    image_height, image_width = size
    generator = torch.Generator().manual_seed(SEED)
    part, x, y = torch.rand(num_persons, 3, generator=generator).unbind(dim=1)
    low, high = (min(h, image_height, image_width / WIDTH) for h in HEIGHTS)
    height = low + (high - low) * part
    width = WIDTH * height
    x0, y0 = x * (image_width - width), y * (image_height - height)
    return torch.stack([x0, y0, x0 + width, y0 + height], dim=1)


def find_persons(model: nn.Module, num_persons: int) -> None:
    """Make a model find so many persons in any image, at the cost that they have.

    InsPose takes that many locations for persons. The peer finds its proposals and runs its box
    head and NMS on them as ever; then its detections are replaced by :func:`person_boxes`, which
    its keypoint head gets: the cost of its keypoints depends on the sizes of the boxes, and
    random weights give none of a person's.
    """
    if isinstance(model, InsPose | InsPoseOfficial):
        force_persons(model, num_persons)
        return
    heads = model.roi_heads

    def with_persons(features: dict[str, Tensor], found: list[Instances]) -> list[Instances]:
        given = [persons_like(x) for x in found]
        return type(heads).forward_with_given_boxes(heads, features, given)

    def persons_like(found: Instances) -> Instances:
        boxes = person_boxes(num_persons, found.image_size).to(found.pred_boxes.device)
        return Instances(
            found.image_size,
            pred_boxes=Boxes(boxes),
            scores=boxes.new_ones(num_persons),
            pred_classes=torch.zeros_like(boxes[:, 0], dtype=torch.int64),
        )

    heads.forward_with_given_boxes = with_persons


def images(setting: Setting) -> Inputs:
    """Make the images, of noise, for a model in evaluation."""
    generator = torch.Generator().manual_seed(SEED)
    pictures = torch.rand(setting.batch, 3, *setting.size, generator=generator) * 255
    return [{"image": picture.to(setting.device)} for picture in pictures]


def images_with_persons(setting: Setting, num_persons: int) -> Inputs:
    """Make the images for training: boxes of persons with 17 keypoints anywhere inside."""
    boxes = person_boxes(num_persons, setting.size)
    generator = torch.Generator().manual_seed(SEED)
    at = torch.rand(num_persons, 17, 2, generator=generator)
    xy = boxes[:, None, :2] + at * (boxes[:, 2:] - boxes[:, :2])[:, None]
    keypoints = torch.cat([xy, torch.full_like(xy[..., :1], 2)], dim=-1)  # (N, 17, 3)
    persons = Instances(
        setting.size,
        gt_boxes=Boxes(boxes),
        gt_classes=torch.zeros(num_persons, dtype=torch.int64),
        gt_keypoints=Keypoints(keypoints),
    )
    return [{**image, "instances": persons} for image in images(setting)]


def in_evaluation(setting: Setting, function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Make a function that calls another without gradients, in the precision of the setting."""

    def run(*_: Any) -> Any:
        with torch.inference_mode(), setting.autocast():
            return function(*args)

    return run


def inference(setting: Setting, model: nn.Module, num_persons: int) -> Callable[..., Any]:
    """Make the function that finds so many persons in each image."""
    inputs = images(setting)

    def find() -> list[dict[str, Instances]]:
        find_persons(model, num_persons)
        return model(inputs)

    return in_evaluation(setting, find)


def multiply_adds(setting: Setting, model: nn.Module, num_persons: int) -> dict[str, float]:
    """Count 1e9 multiply-adds of finding so many persons, by module; "" is the whole model.

    Args:
        setting: of the run.
        model: not compiled.
        num_persons: in each image.

    Returns:
        As :func:`analyze.count`.
    """
    find_persons(model, num_persons)
    if isinstance(model, InsPose):
        model.kp_net.backend = "torch"  # what is inside a kernel cannot be counted
    _, macs = count(model, images(setting))
    return {name: value / 1e9 for name, value in macs.items()}
