"""The weights that come with the package, models by the names of their configs, and the hub's form.

May import ``checkpoint`` and ``config``.
"""

from .model_zoo import (
    Checkpoint,
    config_of,
    find_weights,
    get_model,
    list_checkpoints,
    load_model,
    score_threshold_of,
    write_folder,
)

__all__ = [
    "Checkpoint",
    "config_of",
    "find_weights",
    "get_model",
    "list_checkpoints",
    "load_model",
    "score_threshold_of",
    "write_folder",
]
