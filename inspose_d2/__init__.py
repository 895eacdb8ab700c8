"""InsPose in Detectron2: keypoints of many persons in one pass, without boxes or grouping."""

from .backbone import build_inspose_resnet_fpn_backbone
from .config import add_inspose_config, get_cfg, list_configs
from .config_files import ConfigError
from .data import (
    register_coco_keypoints,
    register_coco_test_dev,
    register_crowdpose,
    register_people,
    register_synthetic_people,
)
from .inspose import InsPose
from .model_zoo import get_model, list_checkpoints
from .official import InsPoseOfficial
from .predictor import InsPosePredictor

__all__ = [
    "ConfigError",
    "InsPose",
    "InsPoseOfficial",
    "InsPosePredictor",
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
