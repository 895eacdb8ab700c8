"""Models by the names of their configs, with weights that are checked by their sha256."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import torch
from detectron2.modeling import build_model
from iopath.common.file_io import get_cache_dir
from torch import nn

from ..checkpoint import InsPoseCheckpointer
from ..config import get_cfg
from ..config.files import did_you_mean, list_configs
from ..workers import stay_usable_after_fork

CHECKPOINTS = Path(__file__).parent / "checkpoints"
MANIFEST = CHECKPOINTS / "manifest.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Trained weights: one entry of the manifest."""

    config: str  # name in list_configs()
    location: str  # a file beside the manifest, or a URL
    size: int  # bytes
    sha256: str  # of the file
    metrics: dict[str, float]  # such as "synthetic_people_val/keypoints/AP", in percent
    training: dict[str, Any]  # how it was made: command, steps, machine
    score_threshold: float = 0.4  # from which poses are shown, chosen for few false ones


def list_checkpoints() -> dict[str, Checkpoint]:
    """All trained weights of the manifest, by name."""
    entries = json.loads(MANIFEST.read_text(encoding="utf-8"))
    return {name: Checkpoint(**entry) for name, entry in entries.items()}


def get_model(
    name: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    device: str | None = None,
) -> nn.Module:
    """Build a model in evaluation mode.

    Args:
        name: of a config (:func:`inspose_d2.list_configs`), or a YAML file.
        weights: a ``.pth`` file, or a name in :func:`list_checkpoints`; None leaves the weights
            random and says so.
        device: "cuda", "cpu", ...; None takes CUDA where there is such a device.

    Returns:
        The model on its device; called with images as
        :meth:`InsPose.forward <inspose_d2.InsPose.forward>` takes them.

    Raises:
        ValueError: no such config or weights.
        CheckpointError: the weights cannot be read, or are of another model.
        OSError: the weights cannot be downloaded.
    """
    file = None if weights is None else find_weights(weights)
    # The weights of timm would be replaced by those of the checkpoint.
    opts = ["MODEL.TIMM.PRETRAINED", False] + (["MODEL.DEVICE", device] if device else [])
    model = build_model(get_cfg(name, opts)).eval()
    stay_usable_after_fork()
    if file is None:
        logger.warning(f"The weights of {name} are random: get_model was called without weights")
    else:
        InsPoseCheckpointer(model).load(str(file))
    return model


def find_weights(weights: str | os.PathLike[str]) -> Path:
    """Find a file of weights; what the manifest names is downloaded if need be, and verified.

    Args:
        weights: a file, or a name in :func:`list_checkpoints`.

    Returns:
        The file on this machine.

    Raises:
        ValueError: there is no such file or name, or the file is not the one of the manifest.
        OSError: the download failed.
    """
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    name, known = str(weights), list_checkpoints()
    if name in known:
        return _verified(name, known[name])
    if name in list_configs():
        raise ValueError(
            f"{name} is not trained: no weights of it are offered. "
            f"python train_net.py --config-file {name} trains it"
        )
    raise ValueError(
        f"weights {name!r} are no file, and none of the trained weights: "
        f"{', '.join(known) or 'there are none'}.{did_you_mean(name, known)}"
    )


def _verified(name: str, checkpoint: Checkpoint) -> Path:
    """Have the file of a checkpoint, downloaded once into iopath's cache folder."""
    path = CHECKPOINTS / checkpoint.location
    if "://" in checkpoint.location:
        file_name = f"{name}-{checkpoint.sha256[:8]}.pth"
        path = Path(get_cache_dir()) / "inspose_d2" / file_name
        if not path.is_file():
            _download(checkpoint, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != checkpoint.sha256:
        raise ValueError(
            f"{path} is damaged or another file: its sha256 is {found}, expected "
            f"{checkpoint.sha256}. Delete it, and get it anew from {checkpoint.location}"
        )
    return path


def _download(checkpoint: Checkpoint, path: Path) -> None:
    """Download under another name, verify, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    by_hand = f"By hand: put the file at {path}"
    try:
        torch.hub.download_url_to_file(checkpoint.location, str(path), checkpoint.sha256)
    except OSError as error:
        if isinstance(error, HTTPError):
            error.close()  # or it keeps the connection
        raise OSError(f"{checkpoint.location} cannot be downloaded: {error}. {by_hand}") from error
    except RuntimeError as error:  # torch's word for a wrong hash
        raise ValueError(
            f"{checkpoint.location} is not the file of the manifest: {error}. {by_hand}"
        ) from error
