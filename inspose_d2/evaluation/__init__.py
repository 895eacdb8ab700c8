"""Poses against annotations: COCO's protocol.

May import ``data``, ``modeling`` and ``config``.
"""

from .coco import InsPoseEvaluator, keypoint_ap, make_coco_eval

__all__ = ["InsPoseEvaluator", "keypoint_ap", "make_coco_eval"]
