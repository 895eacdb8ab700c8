"""The weights that come with the package, and models by the names of their configs.

May import ``checkpoint`` and ``config``.
"""

from .model_zoo import Checkpoint, find_weights, get_model, list_checkpoints

__all__ = ["Checkpoint", "find_weights", "get_model", "list_checkpoints"]
