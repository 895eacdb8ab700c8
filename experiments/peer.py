"""The peer, Detectron2's Keypoint R-CNN, trained and evaluated as ``train_net.py`` does InsPose.

python -m experiments.peer --config-file configs/quick/keypoint_rcnn.yaml
"""

import sys
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from torch import nn

from inspose_d2.cli import told
from inspose_d2.engine.launch import run
from inspose_d2.engine.trainer import Trainer


class PeerTrainer(Trainer):
    """Trains with Detectron2's mapper, for the peer does not know persons without keypoints."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model, on the CPU in channels-last layout, as InsPose's are."""
        model = super().build_model(cfg)
        if model.device.type == "cpu":
            for name, part in model.named_children():
                if name != "roi_heads":  # Detectron2's keypoint head cannot
                    part.to(memory_format=torch.channels_last)
        return model

    @classmethod
    def build_mapper(cls, cfg: CfgNode, is_train: bool) -> DatasetMapper:
        """Build Detectron2's."""
        return DatasetMapper(cfg, is_train)


def trainer_of(cfg: CfgNode) -> type[Trainer]:
    """What trains a config: the peer's trainer, or InsPose's."""
    return PeerTrainer if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" else Trainer


if __name__ == "__main__":
    sys.exit(told("experiments.peer", partial(run, trainer=PeerTrainer)))
