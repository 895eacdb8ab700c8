"""The network of the paper, stage by stage: ``inspose.py`` is its figure 3.

May import ``config`` alone, and no library of images or files.
"""

from .backbone import build_inspose_resnet_fpn_backbone
from .inspose import InsPose
from .official import InsPoseOfficial

__all__ = ["InsPose", "InsPoseOfficial", "build_inspose_resnet_fpn_backbone"]
