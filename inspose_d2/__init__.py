"""InsPose in Detectron2: keypoints of many persons in one pass, without boxes or grouping.

``import inspose_d2`` registers architectures and data sets with Detectron2. Without Detectron2 it
succeeds, and every public name says the cure.
"""

import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the public names when the first of them is asked for."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(name)
    try:
        public = _import_public()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "detectron2":
            raise
        raise ImportError(
            f"inspose_d2.{name} needs Detectron2, which is on no package index. This installs it: "
            "inspose install-detectron2"
        ) from error
    if name not in (*public.__all__, "__all__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(public, name)


def _import_public() -> Any:
    with warnings.catch_warnings():  # Detectron2 warns of PyTorch's future at each start
        warnings.simplefilter("ignore", FutureWarning)
        return import_module(".public", __name__)


def _is_program() -> bool:
    """Whether this is ``inspose`` or ``python -m inspose_d2``, which load PyTorch later."""
    as_module = sys.argv[:1] == ["-m"] and __name__ in sys.orig_argv
    return as_module or Path(sys.argv[0] if sys.argv else "").stem == "inspose"


if not _is_program():
    try:
        _import_public()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "detectron2":
            raise
