"""Keypoint sets: registered, checked, read, augmented and loaded.

May import ``modeling`` and ``config``.
"""

from .builtin import (
    register_coco_test_dev,
    register_crowdpose,
    register_people,
    register_synthetic_people,
)
from .keypoint_sets import register_coco_keypoints

__all__ = [
    "register_coco_keypoints",
    "register_coco_test_dev",
    "register_crowdpose",
    "register_people",
    "register_synthetic_people",
]
