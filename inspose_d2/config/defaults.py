"""Every key that InsPose adds to Detectron2's config, explained where it is declared."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2 import config as detectron2_config
from detectron2.config import CfgNode as CN

from .files import find_config, list_configs, merge_file, merge_options

__all__ = ["add_inspose_config", "get_cfg", "list_configs"]


def get_cfg(name_or_file: str | os.PathLike[str] | None = None, opts: Sequence[Any] = ()) -> CN:
    """Make a config: Detectron2's defaults, the keys of InsPose, a file, then single changes.

    ``MODEL.DEVICE`` is "cuda" where there is such a device, else "cpu", unless file or changes set
    it.

    Args:
        name_or_file: a YAML file, or a name in :func:`list_configs` such as "InsPose_R50_3x".
        opts: KEY, VALUE, KEY, VALUE, ..., such as ``["SOLVER.BASE_LR", 0.005]``.

    Returns:
        The config, not frozen.

    Raises:
        ConfigError: names the file and the key, and the nearest valid key or the expected type.
    """
    cfg = detectron2_config.get_cfg()
    add_inspose_config(cfg)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if name_or_file is not None:
        merge_file(cfg, find_config(name_or_file))
    merge_options(cfg, opts)
    return cfg


def add_inspose_config(cfg: CN) -> None:
    """Add the keys of InsPose, with the paper's values, to a Detectron2 config.

    Args:
        cfg: a config from ``detectron2.config.get_cfg()``; changed in place.
    """
    # Network of build_inspose_timm_fpn_backbone: a name of timm.list_models() with features of
    # strides 8, 16 and 32. The batch norms of pretrained weights are frozen;
    # BACKBONE.FREEZE_AT is Detectron2's and not read.
    cfg.MODEL.TIMM = CN()
    cfg.MODEL.TIMM.NAME = ""
    # Begin with pretrained weights, which fix INPUT.FORMAT, PIXEL_MEAN and PIXEL_STD. They are
    # loaded when MODEL.WEIGHTS is "": a checkpoint of InsPose has the backbone in it.
    cfg.MODEL.TIMM.PRETRAINED = True
    # File of these weights as timm publishes them (model.safetensors, .bin or .pth); "" downloads.
    cfg.MODEL.TIMM.WEIGHTS = ""
    # Freeze all that the network's feature of this stride is made by, such as 4: stem and first
    # stages. 0 freezes nothing.
    cfg.MODEL.TIMM.FREEZE_STRIDE = 0

    # Images of more pixels are refused before they are decoded, for a file of some kilobytes may
    # fill the memory. The default is where Pillow begins to warn; at twice this it refuses too.
    cfg.INPUT.MAX_PIXELS = 89478485

    # Augmentations of training beside the paper's resize and flip, all off (ours; see
    # data/augmentation.py). SCALE_JITTER (lowest, highest): the image is scaled to fit into a
    # square of CROP_SIZE pixels, times a random factor of this range, then cropped or padded to
    # the square; MIN_SIZE_TRAIN and MAX_SIZE_TRAIN are not read then.
    cfg.INPUT.SCALE_JITTER = ()
    cfg.INPUT.CROP_SIZE = 640
    # Turn by a random angle of up to so many degrees to either side.
    cfg.INPUT.ROTATION = 0.0
    # Factors of brightness, contrast and saturation are drawn from 1 - x to 1 + x.
    cfg.INPUT.COLOR_JITTER = 0.0

    # What resizes images: "pillow", as Detectron2 does, or "opencv", as mmdetection does, which the
    # authors' weights were trained with. When an image grows they differ by a grey level at most.
    cfg.INPUT.RESIZE = "pillow"

    # Keypoint sets to register, each [name, json file in COCO's format, folder of images], for
    # DATASETS.TRAIN and TEST. Keypoints that change places in a mirror may stand behind, such as
    # [["fin_A", "fin_B"]], or [] for none; otherwise left and right in the names tell. Paths are
    # below $DETECTRON2_DATASETS, by default "datasets", unless they are absolute. See
    # register_coco_keypoints.
    cfg.DATASETS.REGISTER = []

    cfg.MODEL.INSPOSE = CN()

    # Pyramid levels that predict persons, finest first (sec. 3.1: P3 to P7).
    cfg.MODEL.INSPOSE.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # K, keypoints of a person; must equal the data set's (COCO: 17). Flip pairs and OKS sigmas are
    # the data set's too; TEST.KEYPOINT_OKS_SIGMAS, where it is not empty, goes before these.
    cfg.MODEL.INSPOSE.NUM_KEYPOINTS = 17

    # Towers of the classification and of the parameter head, each NUM_CONVS x
    # (3x3 conv, NORM, ReLU) with CONV_DIM channels, shared over levels (FCOS).
    cfg.MODEL.INSPOSE.NUM_CONVS = 4
    cfg.MODEL.INSPOSE.CONV_DIM = 256
    # Norm of all towers and branches: any name that detectron2.layers.get_norm knows
    # ("GN" has 32 groups: widths must be multiples of 32), or "" for none.
    cfg.MODEL.INSPOSE.NORM = "GN"
    # Person probability that an untrained location predicts (RetinaNet sec. 4.1).
    cfg.MODEL.INSPOSE.PRIOR_PROB = 0.01

    # KP-Net: 1x1 convolutions of this depth (1 to 4 in Table 2) and hidden width.
    cfg.MODEL.INSPOSE.KP_NET = CN()
    cfg.MODEL.INSPOSE.KP_NET.NUM_LAYERS = 3
    cfg.MODEL.INSPOSE.KP_NET.CHANNELS = 8
    # How the KP-Nets run: "torch" as matrix products, "grouped" as grouped convolutions (sec. 3.2;
    # slower), "triton" as fused kernels on a CUDA device; "auto" takes the kernels where they can
    # run well (Triton 3.3 or newer, layers of up to 8 channels) and agree with the definition on
    # the first persons, else "torch". The results are the same.
    cfg.MODEL.INSPOSE.KP_NET.BACKEND = "auto"

    # Image pixels per cell of keypoint maps and disk offsets: 16, 8, 4, 2 in Table 3. Heatmaps have
    # the stride of KEYPOINT_BRANCH.IN_FEATURE.
    cfg.MODEL.INSPOSE.MAP_STRIDE = 8
    # What is resampled bilinearly where MAP_STRIDE is not the stride of IN_FEATURE: "predictions",
    # keypoint maps and disk offsets (the paper), or "features", the shared input of the KP-Nets,
    # which then run at MAP_STRIDE, and disk offsets (ours; finer maps from nets that see more).
    cfg.MODEL.INSPOSE.RESAMPLE = "predictions"

    # Keypoint feature branch, the shared input of all KP-Nets (sec. 3.2). IN_FEATURE
    # is read by the disk offset and the heatmap branch too.
    cfg.MODEL.INSPOSE.KEYPOINT_BRANCH = CN()
    cfg.MODEL.INSPOSE.KEYPOINT_BRANCH.IN_FEATURE = "p3"
    cfg.MODEL.INSPOSE.KEYPOINT_BRANCH.NUM_CONVS = 4
    cfg.MODEL.INSPOSE.KEYPOINT_BRANCH.CONV_DIM = 128
    cfg.MODEL.INSPOSE.KEYPOINT_BRANCH.OUT_CHANNELS = 8

    # Disk offset branch (sec. 3.3): NUM_CONVS hidden convolutions and a last one to 2K.
    cfg.MODEL.INSPOSE.DISK_OFFSET = CN()
    cfg.MODEL.INSPOSE.DISK_OFFSET.ENABLED = True
    cfg.MODEL.INSPOSE.DISK_OFFSET.NUM_CONVS = 2
    cfg.MODEL.INSPOSE.DISK_OFFSET.CONV_DIM = 256
    # R of sec. 3.3 in cells of KEYPOINT_BRANCH.IN_FEATURE, of 8 pixels, whatever MAP_STRIDE is (not
    # given in the paper; ours): map cells whose centre is within R learn the offset to a keypoint.
    cfg.MODEL.INSPOSE.DISK_OFFSET.RADIUS = 3.0

    # Heatmap branch (sec. 3.4), training only: NUM_CONVS hidden and a last one to K.
    cfg.MODEL.INSPOSE.HEATMAP = CN()
    cfg.MODEL.INSPOSE.HEATMAP.ENABLED = True
    cfg.MODEL.INSPOSE.HEATMAP.NUM_CONVS = 2
    cfg.MODEL.INSPOSE.HEATMAP.CONV_DIM = 256
    # Radius of a Gaussian: how far the corners of the pseudo-box may move with this IoU left,
    # in (0, 1); see keypoint_codec.gaussian_radius (CornerNet).
    cfg.MODEL.INSPOSE.HEATMAP.MIN_OVERLAP = 0.7
    # Largest radius of a Gaussian, in cells of the heatmaps (8 pixels); 0 for no bound (CornerNet):
    # it then grows with the person. The authors' later code has 3 cells of 4 pixels.
    cfg.MODEL.INSPOSE.HEATMAP.MAX_RADIUS = 0.0

    # Box head (sec. 3.4, Table 4): predicts a box at each location; persons are then assigned by
    # their annotated boxes, not by pseudo-boxes; NMS and `pred_boxes` take the predicted ones.
    cfg.MODEL.INSPOSE.BOX_HEAD = CN()
    cfg.MODEL.INSPOSE.BOX_HEAD.ENABLED = False

    # Positive locations lie within this many strides of the pseudo-box centre (sec. 3.1, r).
    cfg.MODEL.INSPOSE.CENTER_SAMPLING_RADIUS = 1.5
    # Bounds between the levels, in pixels of the network input, for the largest distance from
    # a location to a side of its pseudo-box: [0, 64] on p3, ..., [512, inf) on p7 (FCOS).
    cfg.MODEL.INSPOSE.SIZES_OF_INTEREST = [64, 128, 256, 512]
    # Locations inside the annotated box of a crowd or of a person without labelled keypoints:
    # "ignore" leaves them out of the classification loss and of the heatmap loss, "background"
    # makes them negatives of both.
    cfg.MODEL.INSPOSE.UNLABELED_PERSONS = "ignore"

    # Auxiliary task of training: the parameter tower regresses the keypoints at positive locations
    # (the authors' later code).
    cfg.MODEL.INSPOSE.REGRESSION = CN()
    cfg.MODEL.INSPOSE.REGRESSION.ENABLED = False

    # Whether a keypoint is visible (ours): the parameter tower learns COCO's v of labelled
    # keypoints, 2 visible or 1 hidden, and poses have `pred_visibility`, see docs/visibility.md.
    cfg.MODEL.INSPOSE.VISIBILITY = CN()
    cfg.MODEL.INSPOSE.VISIBILITY.ENABLED = False

    # Classification loss: "focal" (the paper), a person is 1, or "varifocal" (the authors' later
    # code), a person is as good as the pose found there: its OKS. Then the score ranks poses.
    cfg.MODEL.INSPOSE.CLS_LOSS = "focal"
    # Focal loss (eq. 5; values of RetinaNet).
    cfg.MODEL.INSPOSE.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.INSPOSE.FOCAL_LOSS_GAMMA = 2.0
    # Weights of the terms of eq. 5; the paper sums them plainly.
    cfg.MODEL.INSPOSE.LOSS_WEIGHT = CN()
    cfg.MODEL.INSPOSE.LOSS_WEIGHT.CLS = 1.0
    cfg.MODEL.INSPOSE.LOSS_WEIGHT.KEYPOINT = 1.0
    cfg.MODEL.INSPOSE.LOSS_WEIGHT.DISK_OFFSET = 1.0
    cfg.MODEL.INSPOSE.LOSS_WEIGHT.HEATMAP = 1.0
    cfg.MODEL.INSPOSE.LOSS_WEIGHT.BOX = 1.0
    cfg.MODEL.INSPOSE.LOSS_WEIGHT.REGRESSION = 1.0
    cfg.MODEL.INSPOSE.LOSS_WEIGHT.VISIBILITY = 1.0

    # Inference (sec. 3.4): locations with a person probability above the threshold, of these
    # the best per image, then NMS; TEST.DETECTIONS_PER_IMAGE poses are kept. "boxes" (the paper):
    # at this IoU of the boxes around all keypoints, or of the predicted ones with the box head.
    # "poses" (ours): at this similarity of the poses, see postprocess.nms_of_poses. Keypoints that
    # are not labelled for a person often lie on a neighbour: the boxes then cover each other.
    cfg.MODEL.INSPOSE.SCORE_THRESH_TEST = 0.1
    cfg.MODEL.INSPOSE.TOPK_CANDIDATES_TEST = 500
    cfg.MODEL.INSPOSE.NMS_TYPE_TEST = "boxes"
    cfg.MODEL.INSPOSE.NMS_THRESH_TEST = 0.6
    # Where a keypoint is, by its map: at the "peaks" (the paper, eq. 2 and 3), with the probability
    # there for its score; or (ours), "expected_oks", where the expected OKS is highest, which then
    # is its score; see expected_oks.py.
    cfg.MODEL.INSPOSE.DECODING_TEST = "peaks"
    # Score of a pose: the geometric mean of its person probability and its mean keypoint score, the
    # latter with this weight, in [0, 1]. 0 is the person probability alone (the paper); the
    # ranking at 0.75 is that of probability times the third power of the mean (ours).
    cfg.MODEL.INSPOSE.KEYPOINT_SCORE_WEIGHT_TEST = 0.0

    # Evaluate and save the exponential moving average of the weights with this decay per step, such
    # as 0.999; 0 for none (the paper). A checkpoint's "model" is then the average.
    cfg.SOLVER.EMA_DECAY = 0.0

    # What SOLVER.AMP.ENABLED (Detectron2's) trains in: "float16", as there, with a scaled loss, or
    # "bfloat16", whose range needs none. Weights, KP-Nets, coordinates and losses stay float32.
    cfg.SOLVER.AMP.PRECISION = "float16"

    # "SGD" (the paper) or "ADAMW" (ours, for short training from scratch in configs/quick).
    cfg.SOLVER.OPTIMIZER = "SGD"
