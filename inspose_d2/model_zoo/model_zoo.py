"""Models by the names of their configs, with weights that are checked by their sha256."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from iopath.common.file_io import get_cache_dir
from torch import nn

from ..checkpoint import InsPoseCheckpointer, read_weights, save_safetensors
from ..config import get_cfg
from ..config.files import did_you_mean, list_configs
from ..files import sha256_of
from ..workers import stay_usable_after_fork
from . import hub

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
        weights: as for :func:`find_weights`; None leaves the weights random and says so.
        device: "cuda", "cpu", ...; None takes CUDA where there is such a device.

    Returns:
        The model on its device; called with images as
        :meth:`InsPose.forward <inspose_d2.InsPose.forward>` takes them.

    Raises:
        ValueError: no such config or weights.
        CheckpointError: the weights cannot be read, or are of another model.
        OSError: the weights cannot be downloaded.
    """
    file = "" if weights is None else str(find_weights(weights))
    opts = ["MODEL.WEIGHTS", file]
    if not file:
        opts += ["MODEL.TIMM.PRETRAINED", "False"]
    return load_model(get_cfg(name, opts + (["MODEL.DEVICE", device] if device else [])))


def load_model(cfg: CfgNode) -> Any:
    """Build the model of a config in evaluation mode, with the weights of ``MODEL.WEIGHTS``.

    Args:
        cfg: the whole config; without weights they are random, and a warning says so.

    Raises:
        CheckpointError: the weights cannot be read, or are of another model.
    """
    model = build_model(cfg).eval()
    stay_usable_after_fork()
    if not cfg.MODEL.WEIGHTS:
        logger.warning("MODEL.WEIGHTS is empty: the weights of the model are random")
    InsPoseCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def find_weights(weights: str | os.PathLike[str]) -> Path:
    """Find a file of weights; what the manifest names is downloaded if need be, and verified.

    Args:
        weights: a file; a name in :func:`list_checkpoints`; a folder with ``config.yaml`` and
            ``model.safetensors``; or such a repository of the Hugging Face hub,
            ``organisation/name``.

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
    if path.is_dir() or hub.is_repository(name):
        return hub.model_folder(name) / hub.WEIGHTS
    raise ValueError(
        f"weights {name!r} are no file, and none of the trained weights: "
        f"{', '.join(known) or 'there are none'}.{did_you_mean(name, known)}"
    )


def config_of(weights: str | os.PathLike[str]) -> str | None:
    """Give the config that belongs to weights: a name or a file; None where only a file is known.

    Args:
        weights: as for :func:`find_weights`, which says what is wrong with them.
    """
    name, known = str(weights), list_checkpoints()
    if name in known:
        return known[name].config
    is_folder = Path(name).expanduser().is_dir() or hub.is_repository(name)
    if Path(name).expanduser().is_file() or name in list_configs() or not is_folder:
        return None
    return str(hub.model_folder(name) / hub.CONFIG)


def score_threshold_of(weights: str | os.PathLike[str]) -> float:
    """Score from which the poses of weights are shown: what comes with them says it, else 0.4.

    Args:
        weights: as for :func:`find_weights`.
    """
    known = list_checkpoints().get(str(weights))
    found = known.score_threshold if known else hub.score_threshold(find_weights(weights))
    return Checkpoint.score_threshold if found is None else found


def write_folder(
    weights: str | os.PathLike[str], folder: Path, config: str | os.PathLike[str] | None = None
) -> None:
    """Write a model as a folder that can be pushed to the Hugging Face hub.

    Args:
        weights: as for :func:`find_weights`; their numbers stay as precise as they are.
        folder: made if need be; its ``config.yaml``, ``model.safetensors`` and ``README.md`` are
            written anew.
        config: of the weights, a name or a YAML file; None takes that of :func:`config_of`.

    Raises:
        ValueError: no config is known, or huggingface_hub is missing, which makes the card.
        CheckpointError: the weights do not fit the config.
        OSError: something cannot be read or written.
    """
    config = config or config_of(weights)
    if config is None:
        raise ValueError(f"{weights} does not say which config it is of: give --config-file")
    file, entry = find_weights(weights), list_checkpoints().get(str(weights))
    names = get_model(config, file, device="cpu").state_dict()  # refuses what does not fit
    found = read_weights(file)
    folder.mkdir(parents=True, exist_ok=True)
    hub.write_card(
        folder / hub.CARD,
        str(weights) if entry else folder.absolute().name,
        entry.metrics if entry else {},
        "apache-2.0" if entry else None,
    )
    hub.write_config(get_cfg(config), folder / hub.CONFIG)
    threshold = {"score_threshold": str(score_threshold_of(weights))}
    save_safetensors({x: found[x] for x in names}, folder / hub.WEIGHTS, threshold)


def _verified(name: str, checkpoint: Checkpoint) -> Path:
    """Have the file of a checkpoint, downloaded once into iopath's cache folder."""
    path = CHECKPOINTS / checkpoint.location
    if "://" in checkpoint.location:
        file_name = f"{name}-{checkpoint.sha256[:8]}.pth"
        path = Path(get_cache_dir()) / "inspose_d2" / file_name
        if not path.is_file():
            _download(checkpoint, path)
    found = sha256_of(path)
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
