"""Checkpoints that a crash, a full disk or a wrong file cannot spoil, and the best one of a run."""

import codecs
import errno
import hashlib
import logging
import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import hooks
from detectron2.utils import comm
from fvcore.common.checkpoint import _filter_reused_missing_keys
from torch import nn

from ..files import UNFINISHED, sha256_of, sync_folder, whole_file
from ..workers import on_one_worker

LAST, BEST, DIVERGED = "last_checkpoint", "model_best", "_diverged.pth"
NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
SHOWN_KEYS = 10

# All that weights in a .pkl need, under the module names of NumPy 2 and before; `_codecs.encode`
# is how protocol 2 writes bytes, `_frombuffer` how protocol 5 writes arrays. Anything else could
# run code while it is read.
PICKLE_GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": codecs.encode,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
}
for _core in ("numpy.core", "numpy._core"):
    PICKLE_GLOBALS[f"{_core}.multiarray._reconstruct"] = np.array(0).__reduce__()[0]
    PICKLE_GLOBALS[f"{_core}.multiarray.scalar"] = np.float64(0).__reduce__()[0]
    PICKLE_GLOBALS[f"{_core}.numeric._frombuffer"] = np.zeros(1).__reduce_ex__(5)[0]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message says why and what to do."""


class NoValidCheckpoint(CheckpointError):  # noqa: N818
    """There are checkpoints to resume from, but none that is whole."""


class InsPoseCheckpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` whose files are whole or not there, and are checked when read.

    ``model.pth`` has its checksum beside it in ``model.pth.sha256`` (``sha256sum -c`` reads it).
    Files without one, as plain Detectron2 writes them, load as well. No file that is loaded can
    run code.

    Attributes:
        model_to_save: the model whose weights are saved in the place of the model's own, such as
            their average; None saves these.
    """

    model_to_save: nn.Module | None = None
    _resumed = False
    _path, _strict = "", True  # of the load under way

    def save(self, name: str, *, tag_last: bool = True, **extra: Any) -> None:
        """Write ``<name>.pth``; a crash at any moment leaves the old file or the new one.

        Args:
            name: without folder and ``.pth``.
            tag_last: resume from this file next time.
            **extra: more to store.

        Raises:
            CheckpointError: weights are not finite, or the file cannot be written. What was saved
                before is as it was.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        data = {"model": (self.model_to_save or self.model).state_dict()}
        _require_finite(data["model"], path)
        data |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        self.logger.info("Saving checkpoint to %s", path)
        with _explained(path):
            self._remove_unfinished()  # of a save that was killed: their room may be needed
            self._write(path, data | extra)
        if tag_last:
            self.tag_last_checkpoint(os.path.basename(path))

    def _write(self, path: str, data: dict[str, Any]) -> None:
        """Write a checkpoint and, in a file beside it, its checksum."""
        checksum = Path(path + ".sha256")
        with whole_file(checksum) as line:
            with whole_file(path, "wb") as file:
                writer = _HashingWriter(file)
                try:
                    torch.save(data, cast(IO[bytes], writer))
                except RuntimeError:
                    if writer.error:  # which PyTorch hides behind its own
                        raise writer.error from None
                    raise
                # While a file is exchanged it has no checksum: never that of another.
                checksum.unlink(missing_ok=True)
                sync_folder(checksum.parent)
            line.write(f"{writer.sha256.hexdigest()}  {os.path.basename(path)}\n")

    def _remove_unfinished(self) -> None:
        """Remove what a save that was killed left; only a save may, or it would harm another's."""
        for ending in (".pth", ".sha256", LAST):
            for path in Path(self.save_dir).glob(f"*{ending}{UNFINISHED}"):
                path.unlink()

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the file to resume from.

        Args:
            last_filename_basename: in the folder of the checkpoints.

        Raises:
            CheckpointError: it cannot be written.
        """
        path = os.path.join(self.save_dir, LAST)
        with _explained(path), whole_file(path) as file:
            file.write(last_filename_basename)

    def has_checkpoint(self) -> bool:
        """Whether there is a ``last_checkpoint``, or `resume_or_load` resumed without one."""
        return self._resumed or super().has_checkpoint()

    def resume_or_load(
        self, path: str, *, resume: bool = True, strict: bool = False
    ) -> dict[str, Any]:
        """Resume the training in this folder if asked and if there is one, else load weights.

        Where the file that ``last_checkpoint`` names is not valid, the newest valid one is taken.
        The first worker chooses for all.

        Args:
            path: weights to start from, "" for none; the rest of the file is not loaded.
            resume: look for checkpoints first.
            strict: as in `load`, for ``path``; what is resumed is always loaded strictly.

        Returns:
            What the file holds beside.

        Raises:
            NoValidCheckpoint: there are checkpoints, but none is valid.
            CheckpointError: as in `load`.
            WorkersEnd: of several workers the first one cannot get the file.
        """
        last = self._choose() if resume else ""
        self._resumed = bool(last)
        if last or path:
            on_one_worker(lambda: self._require_file(last or path))
        if last:
            return self.load(last)
        return self.load(path, checkpointables=[], strict=strict)

    def load(
        self, path: str, checkpointables: list[str] | None = None, *, strict: bool = True
    ) -> dict[str, Any]:
        """Load a file of Detectron2 (.pth, .pkl), Caffe2 (.pkl) or pycls (.pyth).

        Also a ResNet of torchvision or timm (.pth), whose names become those of Detectron2.

        Args:
            path: of the file, or its URL; "" loads nothing.
            checkpointables: what to load beside the model, None for all that is there.
            strict: every weight of the model must be in the file, in its shape. Otherwise what
                fits is loaded, as the start of a training; of the backbone something must.

        Returns:
            What the file holds beside.

        Raises:
            CheckpointError: the file is missing, damaged, forbidden or does not fit.
        """
        if not path:
            self.logger.info("Weights: none are loaded, MODEL.WEIGHTS is empty")
            return {}
        self._require_file(path)
        self._path, self._strict = path, strict
        try:
            return super().load(path, checkpointables)
        finally:
            self._parsed_url_during_load = None  # else an error would spoil the next load

    def _choose(self) -> str:
        """Let the first worker choose the file to resume from; its errors are everyone's."""
        choice: str | CheckpointError = ""
        if comm.is_main_process():
            try:
                choice = self._newest_valid()
            except CheckpointError as error:
                choice = error
        choice = comm.all_gather(choice)[0]
        if isinstance(choice, CheckpointError):
            raise choice
        return choice

    def _newest_valid(self) -> str:
        """Find what ``last_checkpoint`` names, else the newest valid checkpoint, else ""."""
        if not os.path.isdir(self.save_dir):
            return ""
        path, refused = "", {}
        try:
            path = self._last()
            if path:
                _check_sum(path)
                self._inspect(path)
                return path
        except CheckpointError as error:
            refused[os.path.basename(path) or LAST] = str(error)
        for iteration, path in self._newest_first(refused):
            try:
                _check_sum(path)
            except CheckpointError as error:
                refused[os.path.basename(path)] = str(error)
                continue
            self.logger.warning(
                "%s. Resuming from the newest valid checkpoint, %s of iteration %d",
                "; ".join(refused.values()) or f"{os.path.join(self.save_dir, LAST)} is missing",
                path,
                iteration,
            )
            return path
        if not refused:
            return ""
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in refused.items())
        raise NoValidCheckpoint(
            f"None of the checkpoints in {self.save_dir} can be resumed from:\n{reasons}\n"
            "Put back a copy of one of them, or start anew: without --resume, in another "
            "OUTPUT_DIR"
        )

    def _newest_first(self, refused: dict[str, str]) -> list[tuple[int, str]]:
        """List iteration and path of the folder's checkpoints that can be read.

        Diverged trainings, mere weights and what is refused are left out; ``refused``, reasons by
        name, gets the unreadable.
        """
        found = []
        for name in sorted(os.listdir(self.save_dir)):
            if not name.endswith(".pth") or name.endswith(DIVERGED) or name in refused:
                continue
            path = os.path.join(self.save_dir, name)
            try:
                found.append((self._inspect(path), path))
            except CheckpointError as error:
                refused[name] = str(error)
        return sorted(((i, path) for i, path in found if i is not None), reverse=True)

    def _last(self) -> str:
        """Path of the file that ``last_checkpoint`` names, "" where that is missing."""
        path = os.path.join(self.save_dir, LAST)
        if not os.path.isfile(path):
            return ""
        with open(path, "rb") as file:
            name = file.read(1000).decode(errors="replace").strip()
        if not name:
            raise CheckpointError(f"{path} is empty")
        if not re.fullmatch(r"[^/\\\0]+\.pth", name):
            raise CheckpointError(f"{path} must name a .pth file of its folder, got {name!r}")
        last = os.path.join(self.save_dir, name)
        if not os.path.isfile(last):
            raise CheckpointError(f"{path} names {name}, which is not there")
        return last

    def _inspect(self, path: str) -> int | None:
        """Read the iteration of a checkpoint, not its weights; None for one of no training.

        Raises:
            CheckpointError: it is damaged, or was not saved by such a training.
        """
        data = torch_load(path, mmap=zipfile.is_zipfile(path))
        trainer = data.get("trainer")
        known = trainer if isinstance(trainer, dict) else {}
        iteration = data.get("iteration", known.get("iteration"))
        missing = {"model", *self.checkpointables} - data.keys()
        if missing and (iteration is not None or path == self._last()):
            raise CheckpointError(f"{path} holds no {' and no '.join(sorted(missing))}")
        return iteration

    def _require_file(self, path: str) -> None:
        """Refuse a file that is not there, or that cannot be downloaded."""
        try:
            local = self.path_manager.get_local_path(path.split("?")[0])
        except (OSError, HTTPException, RuntimeError, LookupError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be downloaded ({type(error).__name__}: {error}). Download it with "
                "another program and set MODEL.WEIGHTS to the file"
            ) from error
        if not os.path.isfile(local):
            raise CheckpointError(
                f"{path} is not there. Set MODEL.WEIGHTS to a .pth file that a training wrote "
                "(model_final.pth in its OUTPUT_DIR), to pretrained weights such as "
                "detectron2://ImageNetPretrained/MSRA/R-50.pkl, or to '' to start from none. "
                "Several machines need the file on each"
            )

    def _load_file(self, filename: str) -> dict[str, Any]:
        """Read a file in the formats that ``DetectionCheckpointer`` knows, and no code."""
        _check_sum(filename)
        if filename.endswith(".pkl"):
            data = _read_pickle(filename)
            if not ("model" in data and "__author__" in data):  # Caffe2's, else Detectron2's
                blobs = data.get("blobs", data)
                weights = {k: v for k, v in blobs.items() if not k.endswith("_momentum")}
                data = {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
        elif filename.endswith(".pyth"):
            data = torch_load(filename)
            if "model_state" not in data:
                raise CheckpointError(f"{filename} has no 'model_state', as pycls's .pyth have")
            state = data["model_state"].items()
            weights = {k: v for k, v in state if not k.endswith("num_batches_tracked")}
            data = {"model": weights, "__author__": "pycls", "matching_heuristics": True}
        elif filename.endswith(".safetensors"):
            data = {"model": _read_safetensors(filename)}
        else:
            data = super()._load_file(filename)
        _require_weights(filename, data["model"])
        if "layer1.0.conv1.weight" in data["model"]:
            renamed = {_name_of_resnet(name): value for name, value in data["model"].items()}
            data = {"model": renamed, "__author__": "torchvision", "matching_heuristics": True}
        return data

    def _torch_load(self, f: str) -> dict[str, Any]:
        return torch_load(f)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        """Load what fits; whether that is enough depends on ``strict``."""
        incompatible = super()._load_model(checkpoint)
        missing = _filter_reused_missing_keys(self.model, incompatible.missing_keys)
        wrong = {key: shape for key, shape, _ in incompatible.incorrect_shapes}
        not_loaded = {*missing, *wrong}
        if self._strict and not_loaded:
            self._refuse(not_loaded, wrong)
        if not self._strict:
            self._report(not_loaded)
        return incompatible

    def _refuse(self, not_loaded: set[str], wrong: dict[str, tuple[int, ...]]) -> None:
        state = self.model.state_dict()
        keys = [key for key in state if key in not_loaded]
        lines = [
            f"  {key} {tuple(state[key].shape)}: "
            + (f"{wrong[key]} in the file" if key in wrong else "not in the file")
            for key in keys[:SHOWN_KEYS]
        ]
        if len(keys) > SHOWN_KEYS:
            lines.append(f"  and {len(keys) - SHOWN_KEYS} more")
        listed = "\n".join(lines)
        raise CheckpointError(
            f"{self._path} does not fit the model: {len(keys)} of its {len(state)} weights are "
            f"missing or of another shape:\n{listed}\nIs it of another config? Keys such as "
            "MODEL.META_ARCHITECTURE, the backbone (RESNETS.DEPTH), INSPOSE.NUM_KEYPOINTS, "
            "INSPOSE.CONV_DIM or INSPOSE.KP_NET.NUM_LAYERS must be those of its training "
            "(config.yaml in its OUTPUT_DIR)"
        )

    def _report(self, not_loaded: set[str]) -> None:
        """Say how much of the model was loaded; refuse nothing of the backbone."""
        sizes = {name: value.numel() for name, value in self.model.state_dict().items()}
        backbone = [name for name in sizes if name.startswith("backbone.")] or list(sizes)

        def percent(names: list[str]) -> float:
            loaded = sum(sizes[name] for name in names if name not in not_loaded)
            return 100 * loaded / max(sum(sizes[name] for name in names), 1)

        if all(name in not_loaded for name in backbone):
            raise CheckpointError(
                f"{self._path} has no weight of the backbone: it is of another network, or names "
                "its weights otherwise (then add ?matching_heuristics=True to MODEL.WEIGHTS). "
                "MODEL.WEIGHTS '' trains from random weights"
            )
        of_all, of_backbone = percent(list(sizes)), percent(backbone)
        level = logging.WARNING if of_backbone < 50 else logging.INFO
        message = "Training starts with %.1f %% of the weights, %.1f %% of the backbone, from %s%s"
        hint = ": is it of another backbone?" if of_backbone < 50 else ""
        self.logger.log(level, message, of_all, of_backbone, self._path, hint)


class BestCheckpointer(hooks.BestCheckpointer):
    """Saves ``model_best.pth`` where an evaluation beats all before; ``last_checkpoint`` stays.

    The best value is in the file, so it survives a resume; a new training starts anew. To be
    registered after ``EvalHook``, on the first worker.
    """

    def before_train(self) -> None:
        """Read the best value so far if the training is resumed."""
        path = os.path.join(self._checkpointer.save_dir, f"{BEST}.pth")
        if not self.trainer.start_iter or not os.path.isfile(path):
            return
        try:
            _check_sum(path)
            data = torch_load(path, mmap=zipfile.is_zipfile(path))
            if data.get("best_metric") == self._val_metric:
                self._update_best(data["best_value"], data["iteration"])
        except CheckpointError as error:
            self._logger.warning("%s. The best model is looked for anew.", error)

    def _best_checking(self) -> None:
        value, _ = self.trainer.storage.latest().get(self._val_metric, (math.nan, 0))
        if not value > (-math.inf if self.best_metric is None else self.best_metric):  # NaN neither
            self._logger.info("%s %.3f is not the best so far", self._val_metric, value)
            return
        # After the last step the trainer counts on, but the step that was done is the one before.
        iteration = min(self.trainer.iter, self.trainer.max_iter - 1)
        self._checkpointer.save(
            BEST,
            tag_last=False,
            iteration=iteration,
            best_metric=self._val_metric,
            best_value=value,
        )
        self._update_best(value, iteration)
        if value > 0:  # nothing found is nothing to praise
            self._logger.info("%s %.3f is the best so far: %s.pth", self._val_metric, value, BEST)


class _HashingWriter:
    """A file for ``torch.save`` that hashes what goes through, and keeps the error it met."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn errors of the system while a file is written into words."""
    try:
        yield
    except OSError as error:
        reason, cure = f"{error.strerror}", "Look at the folder and its permissions"
        if error.errno in NO_SPACE:
            reason = f"no space left ({reason})"
            cure = "Free space, or raise the quota"
        raise CheckpointError(
            f"{path} could not be written: {reason}. Earlier checkpoints are as they were. {cure}, "
            "then go on with --resume"
        ) from error


def _require_finite(state: dict[str, Any], path: str) -> None:
    bad = [name for name, value in state.items() if not value.isfinite().all()]
    if bad:
        count = int((~state[bad[0]].isfinite()).sum())
        raise CheckpointError(
            f"{path} is not written: {bad[0]} has {count} values that are not finite, as have "
            f"{len(bad) - 1} of the other {len(state) - 1} weights. The training has diverged; "
            "earlier checkpoints are as they were. Lower SOLVER.BASE_LR or clip the gradients "
            "(SOLVER.CLIP_GRADIENTS.ENABLED), then go on with --resume"
        )


def _check_sum(path: str) -> None:
    """Compare a file with the checksum beside it, if there is one.

    Raises:
        CheckpointError: they differ, or one cannot be read.
    """
    beside = path + ".sha256"
    if not os.path.isfile(beside):
        return
    try:
        with open(beside, "rb") as file:
            expected = file.read(64).decode(errors="replace")
        found = sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if found != expected:
        raise CheckpointError(
            f"{path} is damaged: it differs from its checksum. If another program has written it "
            f"on purpose, remove {beside}"
        )


def torch_load(path: str, *, mmap: bool = False) -> dict[str, Any]:
    """Read a file of ``torch.save`` onto the CPU; it can hold tensors, numbers, text, no code."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)  # noqa: TID251
    except Exception as error:
        raise CheckpointError(_why_unreadable(path, error)) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not weights by name")
    return data


def read_weights(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read the weights of a ``.pth`` or ``.safetensors`` file as they are stored.

    Raises:
        CheckpointError: the file is damaged or forbidden.
    """
    path = str(path)
    if path.endswith(".safetensors"):
        return _read_safetensors(path)
    data = torch_load(path)
    weights: dict[str, torch.Tensor] = data.get("model", data)
    return weights


def save_safetensors(
    weights: dict[str, torch.Tensor],
    path: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors by name as a ``.safetensors`` file, whole or not at all.

    Args:
        weights: on any device.
        path: of the file.
        metadata: what the file says of itself besides.

    Raises:
        CheckpointError: safetensors is missing.
        OSError: the file cannot be written.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise CheckpointError(f"{path} needs safetensors: pip install safetensors") from error
    own = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
    with whole_file(path, "wb") as file:
        file.write(save(own, {"format": "pt"} | (metadata or {})))


def _read_safetensors(path: str) -> dict[str, Any]:
    """Read a file of tensors as timm publishes them."""
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"{path} needs safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:
        raise CheckpointError(_why_unreadable(path, error)) from error


def _read_pickle(path: str) -> dict[str, Any]:
    """Read a pickle of arrays, as Detectron2 and Caffe2 publish them."""
    try:
        with open(path, "rb") as file:
            data = _ArraysUnpickler(file, encoding="latin1").load()
    except Exception as error:
        raise CheckpointError(_why_unreadable(path, error)) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not weights by name")
    return data


class _ArraysUnpickler(pickle.Unpickler):  # noqa: TID251
    """Unpickles arrays and containers; imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in PICKLE_GLOBALS:
            raise pickle.UnpicklingError(f"GLOBAL {full_name}")
        return PICKLE_GLOBALS[full_name]


def _why_unreadable(path: str, error: Exception) -> str:
    """Say in words why a file of weights cannot be read."""
    forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and forbidden:
        return (
            f"{path} is refused: it asks for {forbidden[1]}, and could run code. If you trust the "
            "file, convert it elsewhere to a .pth that holds nothing but tensors by name"
        )
    try:
        with open(path, "rb") as file:
            start = file.read(100)
    except OSError as unread:
        return f"{path} cannot be read: {unread.strerror}"
    if not start:
        return f"{path} is empty"
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a pointer of git-lfs, not the weights: run 'git lfs pull'"
    if start.lstrip().startswith(b"<"):
        return f"{path} is a web page, not weights: the download went wrong"
    if start.startswith((b"PK", b"\x80")):
        return f"{path} is damaged or cut short ({type(error).__name__}): copy it again"
    return f"{path} is no checkpoint: a .pth, .pkl, .pyth or .safetensors file is needed"


def _name_of_resnet(name: str) -> str:
    """Rename a parameter of torchvision's and timm's ResNets to that of Detectron2's."""
    name = re.sub(r"^conv1\.", "stem.conv1.", re.sub(r"^bn1\.", "stem.conv1.norm.", name))
    name = re.sub(r"^layer(\d)\.", lambda found: f"res{int(found[1]) + 1}.", name)
    name = re.sub(r"\.bn(\d)\.", r".conv\1.norm.", name)
    return name.replace(".downsample.0.", ".shortcut.").replace(".downsample.1.", ".shortcut.norm.")


def _require_weights(path: str, weights: Any) -> None:
    if not isinstance(weights, dict) or not all(
        isinstance(value, (torch.Tensor, np.ndarray)) for value in weights.values()
    ):
        keys = list(weights)[:SHOWN_KEYS] if isinstance(weights, dict) else type(weights).__name__
        raise CheckpointError(
            f"{path} must hold tensors by name, at its top or under 'model', got {keys}"
        )
