"""Poses and keypoint maps, drawn onto images.

May import ``data`` and ``modeling``.
"""

from .poses import draw_keypoint_maps, draw_poses

__all__ = ["draw_keypoint_maps", "draw_poses"]
