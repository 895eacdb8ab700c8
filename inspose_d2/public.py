"""What ``from inspose_d2 import ...`` gives; importing it registers architectures and data sets."""

from .config import ConfigError, add_inspose_config, get_cfg, list_configs
from .data import (
    register_coco_keypoints,
    register_coco_test_dev,
    register_crowdpose,
    register_people,
    register_synthetic_people,
)
from .engine.predictor import InsPosePredictor
from .model_zoo import get_model, list_checkpoints
from .modeling import InsPose, InsPoseOfficial, build_inspose_resnet_fpn_backbone
from .tracking import InsPoseTracker

__all__ = [
    "ConfigError",
    "InsPose",
    "InsPoseOfficial",
    "InsPosePredictor",
    "InsPoseTracker",
    "add_inspose_config",
    "build_inspose_resnet_fpn_backbone",
    "get_cfg",
    "get_model",
    "list_checkpoints",
    "list_configs",
    "register_coco_keypoints",
]

register_coco_test_dev()
register_crowdpose()
register_people()
register_synthetic_people()
