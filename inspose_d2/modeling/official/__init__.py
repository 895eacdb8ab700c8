"""The model that the authors of InsPose released, and the converter of its weights."""

from .inspose_official import InsPoseOfficial

__all__ = ["InsPoseOfficial"]
