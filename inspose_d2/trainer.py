"""Detectron2's default trainer with what InsPose needs: its mapper, its evaluator, CPU workers."""

import logging
import os
import weakref
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, TrainerBase
from detectron2.engine.defaults import create_ddp_model
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from .config_check import check_config
from .data.annotations import check_annotations
from .data.dataset_mapper import InsPoseDatasetMapper
from .evaluation import InsPoseEvaluator
from .test_time_augmentation import InsPoseWithTTA


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` that trains InsPose and evaluates its keypoints."""

    def __init__(self, cfg: CfgNode) -> None:
        """Build everything that training needs.

        ``DefaultTrainer.__init__`` gives DistributedDataParallel a device number, which it refuses
        for a model on the CPU; otherwise this does the same.

        Args:
            cfg: the whole config.

        Raises:
            ConfigError: see :func:`check_config`.
        """
        check_config(cfg)
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()  # nobody did
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)

        on_cpu = model.device.type == "cpu"
        device_ids = {"device_ids": None} if on_cpu else {}
        model = create_ddp_model(model, broadcast_buffers=False, **device_ids)
        trainer = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = trainer(model, data_loader, optimizer)

        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DetectionCheckpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Keep the images per worker when there are more or fewer than the config is made for.

        ``DefaultTrainer`` multiplies batch and rate by num_workers / REFERENCE_WORLD_SIZE and
        divides steps, warm-up and periods by it.

        Args:
            cfg: reads ``SOLVER`` and ``TEST.EVAL_PERIOD``.
            num_workers: that train now.

        Returns:
            The config for them.

        Raises:
            ValueError: the batch has no whole number of images per worker.
        """
        batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
        if reference and batch % reference:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH {batch} must be a multiple of SOLVER.REFERENCE_WORLD_SIZE "
                f"{reference}, the workers it is meant for; SOLVER.REFERENCE_WORLD_SIZE 0 takes "
                "all of SOLVER as it stands, for any number of workers"
            )
        return DefaultTrainer.auto_scale_workers(cfg, num_workers)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model; the peer's on the CPU in channels-last layout, as InsPose's are."""
        model = super().build_model(cfg)
        if model.device.type == "cpu" and cfg.MODEL.META_ARCHITECTURE != "InsPose":
            for name, part in model.named_children():
                if name != "roi_heads":  # Detectron2's keypoint head cannot
                    part.to(memory_format=torch.channels_last)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build SGD as Detectron2 does, or AdamW with ``SOLVER.OPTIMIZER: "ADAMW"``."""
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return super().build_optimizer(cfg, model)
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        adamw = torch.optim.AdamW(
            params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY
        )
        return maybe_add_gradient_clipping(cfg, adamw)

    @classmethod
    def build_train_mapper(cls, cfg: CfgNode) -> DatasetMapper:
        """Build :class:`InsPoseDatasetMapper` for InsPose, Detectron2's for ``configs/peer``.

        Other models do not know persons without keypoints.
        """
        is_inspose = cfg.MODEL.META_ARCHITECTURE == "InsPose"
        return (InsPoseDatasetMapper if is_inspose else DatasetMapper)(cfg, is_train=True)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Check the annotations, load training data through :meth:`build_train_mapper`."""
        for name in cfg.DATASETS.TRAIN:
            cls.check_dataset(cfg, name)
        return build_detection_train_loader(cfg, mapper=cls.build_train_mapper(cfg))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Check the annotations that poses will be scored by, load the images."""
        cls.check_dataset(cfg, dataset_name, evaluation=True)
        is_inspose = cfg.MODEL.META_ARCHITECTURE == "InsPose"
        mapper = (InsPoseDatasetMapper if is_inspose else DatasetMapper)(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @staticmethod
    def check_dataset(cfg: CfgNode, name: str, *, evaluation: bool = False) -> None:
        """Refuse bad annotations before Detectron2 trips over them, or trains on them.

        Args:
            cfg: reads ``MODEL.INSPOSE.NUM_KEYPOINTS``.
            name: of a registered data set; one without a ``json_file`` is not in COCO's format.
            evaluation: see :func:`check_annotations`.

        Raises:
            ValueError: says what is wrong, where, and what to do.
        """
        metadata = MetadataCatalog.get(name)
        if metadata.get("json_file"):
            check_annotations(
                metadata.json_file,
                cfg.MODEL.INSPOSE.NUM_KEYPOINTS,
                evaluation=evaluation,
                class_names=metadata.get("thing_classes"),
            )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> InsPoseEvaluator:
        """Evaluate keypoints, and boxes where there is a box head.

        Without it the boxes of the poses are only what encloses their keypoints.
        """
        with_boxes = cfg.MODEL.INSPOSE.BOX_HEAD.ENABLED
        return InsPoseEvaluator(
            dataset_name,
            tasks=("bbox", "keypoints") if with_boxes else ("keypoints",),
            output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"),
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )

    @classmethod
    def test_with_augmentation(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate with the views of ``TEST.AUG``, each resized from the original image."""
        cfg = cfg.clone()
        cfg.defrost()
        cfg.INPUT.MIN_SIZE_TEST = 0  # Detectron2's word for: do not resize
        return cls.test(cfg, InsPoseWithTTA(cfg, model))
