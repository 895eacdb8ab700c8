"""Persons over the frames of a video: ids that stay, and keypoints that do not tremble.

May import ``modeling``.
"""

from .smoothing import OneEuro, smooth_recorded
from .tracker import InsPoseTracker, PoseTracker, track_frames

__all__ = ["InsPoseTracker", "OneEuro", "PoseTracker", "smooth_recorded", "track_frames"]
