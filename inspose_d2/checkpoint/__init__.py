"""Weights and states of training, from files and into files, whole or not at all.

May import ``config`` and ``workers``.
"""

from .checkpointer import (
    BestCheckpointer,
    CheckpointError,
    InsPoseCheckpointer,
    NoValidCheckpoint,
    read_weights,
    save_safetensors,
    torch_load,
)

__all__ = [
    "BestCheckpointer",
    "CheckpointError",
    "InsPoseCheckpointer",
    "NoValidCheckpoint",
    "read_weights",
    "save_safetensors",
    "torch_load",
]
