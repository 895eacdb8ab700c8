"""The config: every key with its default, files and changes into it, and what values must be.

May import nothing of the other rooms.
"""

from .defaults import add_inspose_config, get_cfg
from .files import ConfigError, find_config, list_configs

__all__ = ["ConfigError", "add_inspose_config", "find_config", "get_cfg", "list_configs"]
