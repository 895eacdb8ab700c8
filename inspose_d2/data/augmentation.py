"""What training does to an image before the network sees it: turn, size, crop, flip, colours."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import transforms as T

from .images import ResizeScale, ResizeShortestEdge


def training_augmentations(
    cfg: CfgNode, defaults: Sequence[T.Augmentation]
) -> list[T.Augmentation]:
    """Add what ``INPUT`` switches on to the paper's resize and flip (ours).

    With ``INPUT.SCALE_JITTER`` an image is scaled to fit, times a random factor, into a square of
    ``INPUT.CROP_SIZE`` and cropped or padded to it, instead of the resize of
    ``INPUT.MIN_SIZE_TRAIN`` (large scale jitter, Ghiasi et al. 2021, with Detectron2's transforms).
    Keypoints that are cut away count as not labelled; a person who has none left becomes one
    without labels, whose rest the classification loss leaves out.

    Args:
        cfg: reads ``INPUT``.
        defaults: Detectron2's augmentations of this config.

    Returns:
        Augmentations in their order.
    """
    node, augmentations = cfg.INPUT, list(defaults)
    if node.SCALE_JITTER:
        side = node.CROP_SIZE
        sizing = [ResizeScale(*node.SCALE_JITTER, side, side), T.FixedSizeCrop((side, side))]
        place = [type(x) for x in augmentations].index(ResizeShortestEdge)
        augmentations[place : place + 1] = sizing
    if node.ROTATION:
        turn = T.RandomRotation([-node.ROTATION, node.ROTATION], expand=False)
        augmentations.insert(0, turn)
    if node.COLOR_JITTER:
        factors = 1 - node.COLOR_JITTER, 1 + node.COLOR_JITTER
        kinds = (T.RandomBrightness, T.RandomContrast, T.RandomSaturation)
        augmentations += [kind(*factors) for kind in kinds]
    return augmentations
