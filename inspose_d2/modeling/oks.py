"""Object keypoint similarity, COCO's measure of a pose, and the sigmas that it takes."""

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from pycocotools.cocoeval import Params
from torch import Tensor

COCO_SIGMAS: dict[str, float] = dict(
    zip(
        COCO_PERSON_KEYPOINT_NAMES,
        Params(iouType="keypoints").kpt_oks_sigmas.tolist(),
        strict=True,
    )
)
DEFAULT_SIGMA = round(sum(COCO_SIGMAS.values()) / len(COCO_SIGMAS), 3)  # 0.067


def object_keypoint_similarity(
    keypoints: Tensor, targets: Tensor, areas: Tensor, sigmas: Tensor
) -> Tensor:
    """Compare poses with annotated ones, pair by pair, as COCO's evaluation does.

    Args:
        keypoints: (N, K, 2 or more) x, y first, in pixels.
        targets: (N, K, 3) x, y, v; keypoints with v > 0 count.
        areas: (N,) of the annotated persons, square pixels.
        sigmas: (K,) COCO's constants of the keypoints.

    Returns:
        (N,) in [0, 1], the mean over the labelled keypoints; 0 where none is.
    """
    square = (keypoints[..., :2] - targets[..., :2]).square().sum(dim=2)
    variance = (2 * sigmas).square() * 2 * areas.clamp(min=torch.finfo(areas.dtype).eps)[:, None]
    labelled = targets[..., 2] > 0
    similarity = torch.exp(-square / variance).where(labelled, 0)
    return similarity.sum(dim=1) / labelled.sum(dim=1).clamp(min=1)


def oks_sigmas(cfg: CfgNode) -> list[float]:
    """Choose the sigmas of OKS for the keypoints of a config.

    Args:
        cfg: reads ``TEST.KEYPOINT_OKS_SIGMAS``, ``DATASETS`` and ``MODEL.INSPOSE.NUM_KEYPOINTS``.

    Returns:
        K values: the config's; else those of the first of its data sets that has K of them; else
        COCO's where K is 17, ``DEFAULT_SIGMA`` for each where it is not.
    """
    k = cfg.MODEL.INSPOSE.NUM_KEYPOINTS
    names = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
    known = (
        MetadataCatalog.get(x).get("keypoint_oks_sigmas") for x in names if x in DatasetCatalog
    )
    candidates = (cfg.TEST.KEYPOINT_OKS_SIGMAS, *known, COCO_SIGMAS.values(), [DEFAULT_SIGMA] * k)
    return next(list(x) for x in candidates if x is not None and len(x) == k)
