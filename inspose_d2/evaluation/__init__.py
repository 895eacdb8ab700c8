"""Poses against annotations: COCO's protocol.

May import ``data``, ``modeling`` and ``config``.
"""

from .coco import InsPoseEvaluator, count_people, make_coco_eval

__all__ = ["InsPoseEvaluator", "count_people", "make_coco_eval"]
