"""The authors' checkpoint, renamed for :class:`InsPoseOfficial`: no number is changed."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model
from torch import Tensor

from ..config import get_cfg
from ..files import sha256_of
from . import CheckpointError, InsPoseCheckpointer, torch_load

CONFIG = "InsPose_R50_Official"
BLOCKS = (3, 4, 6, 3)  # of the stages of ResNet-50
SHOWN = 5  # names in a message
# Files that are known by their checksum. The authors state none; any other is as welcome.
KNOWN_FILES = {
    "f4670304d97e66e7cc99c00a8c5f3bb10f85e691cb4bb6784da6c02b8c6f2d6d": (
        "inspose_r50_8x4_36e_coco.pth as a third party circulates it, most likely the authors'"
    ),
}


@dataclass
class Conversion:
    """What was converted."""

    sha256: str  # of the source
    known_as: str  # what file that is, "" for one that is not known
    epoch: int | None  # that the source says
    num_tensors: int  # written
    dropped: list[str]  # names in the source of counters that no layer of the model has


def prefixes() -> Iterator[tuple[str, str]]:
    """Pair the authors' layers with ours: the beginnings of their parameters' names."""
    ours = "backbone.bottom_up."
    yield "backbone.conv1", f"{ours}stem.conv1"
    yield "backbone.bn1", f"{ours}stem.conv1.norm"
    for stage, blocks in enumerate(BLOCKS, start=1):
        theirs, stage_of_ours = f"backbone.layer{stage}", f"{ours}res{stage + 1}"
        yield f"{theirs}.0.downsample.0", f"{stage_of_ours}.0.shortcut"
        yield f"{theirs}.0.downsample.1", f"{stage_of_ours}.0.shortcut.norm"
        for block in range(blocks):
            for i in (1, 2, 3):
                yield f"{theirs}.{block}.conv{i}", f"{stage_of_ours}.{block}.conv{i}"
                yield f"{theirs}.{block}.bn{i}", f"{stage_of_ours}.{block}.conv{i}.norm"
    for i in range(3):
        yield f"neck.lateral_convs.{i}.conv", f"backbone.fpn_lateral{i + 3}"
        yield f"neck.fpn_convs.{i}.conv", f"backbone.fpn_output{i + 3}"
    for i in (3, 4):
        yield f"neck.fpn_convs.{i}.conv", f"backbone.top_block.p{i + 3}"
    yield from _head_prefixes()


def _head_prefixes() -> Iterator[tuple[str, str]]:
    """Pair the layers of the head and of the branches."""
    layers = {f"cls_convs.{i}": f"head.cls_subnet.{i}" for i in range(4)}
    layers |= {f"ctrl_convs.{i}": f"head.params_subnet.{i}" for i in range(4)}
    layers |= {f"kpt_convs.{i}": f"head.pose_subnet.{i}" for i in range(4)}
    layers |= {f"shared_convs.{i}": f"keypoint_branch.tower.{i}" for i in range(4)}
    layers |= {"shared_convs.4": "keypoint_branch.predictor"}
    layers |= {f"hm_convs.{i}": f"dense_branch.low.{i}" for i in range(2)}
    layers |= {"hm_convs.2": "dense_branch.high.0"}
    for theirs, ours in layers.items():
        yield f"bbox_head.{theirs}.conv", ours
        yield f"bbox_head.{theirs}.gn", f"{ours}.norm"
    for theirs, ours in (("cls", "cls"), ("ctr", "params")):
        yield f"bbox_head.{theirs}_star_conv", f"head.{ours}_star"
        yield f"bbox_head.{theirs}_star_gn", f"head.{ours}_star.norm"
    outputs = {
        "conv_cls": "head.cls_score",
        "controller": "head.params_pred",
        "kpt_offset": "head.pose_pred",
        "hm_pred": "dense_branch.heatmap_pred",
        "ae_pred": "dense_branch.tag_pred",
        "hm_offset": "dense_branch.offset_pred",
    }
    yield from ((f"bbox_head.{theirs}", ours) for theirs, ours in outputs.items())


def convert_opera_checkpoint(
    source: str | os.PathLike[str], target: str | os.PathLike[str]
) -> Conversion:
    """Write the authors' weights as a checkpoint of ``configs/InsPose_R50_Official.yaml``.

    Args:
        source: their file (.pth), which cannot run code: it is read as tensors alone.
        target: file to write, ending in .pth; its checksum is written beside it.

    Returns:
        What was converted.

    Raises:
        CheckpointError: the file is none, has other tensors than this model, or cannot be written;
            the message names them.
    """
    source, target = Path(source), Path(target)
    if target.suffix != ".pth":
        raise CheckpointError(f"{target} must end in .pth")
    if not source.is_file():
        raise CheckpointError(f"{source} is not there; docs/official.md says where to get it")
    data = torch_load(str(source))
    sha256 = sha256_of(source)
    with torch.device("meta"):  # names and shapes alone
        model = build_model(get_cfg(CONFIG, ["MODEL.DEVICE", "meta"]))
    weights, dropped = _convert(data, model.state_dict(), source)
    model.load_state_dict(weights, assign=True)
    # A whole number or none: what `meta` holds is the file's own affair.
    meta = data.get("meta")
    epoch = meta.get("epoch") if isinstance(meta, dict) else None
    InsPoseCheckpointer(model, str(target.parent)).save(target.stem, tag_last=False)
    known = KNOWN_FILES.get(sha256, "")
    epoch = epoch if isinstance(epoch, int) else None
    return Conversion(sha256, known, epoch, len(weights), dropped)


def _convert(
    data: dict[str, Any], state: dict[str, Tensor], source: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the tensors of a file and refuse what does not fit a model's state."""
    theirs = data.get("state_dict", data)
    if not isinstance(theirs, dict) or not any(isinstance(x, Tensor) for x in theirs.values()):
        cure = "it is converted already" if "model" in data else "is it the authors' checkpoint?"
        raise CheckpointError(f"{source} has no tensors under 'state_dict': {cure}")
    weights, dropped, problems = {}, [], []
    table = dict(prefixes())
    for name, value in theirs.items():
        prefix, _, last = name.removeprefix("module.").rpartition(".")
        ours = f"{table[prefix]}.{last}" if prefix in table else ""
        if ours in state and isinstance(value, Tensor):
            weights[ours] = value
            if value.shape != state[ours].shape:
                problems.append(
                    f"{name} is {tuple(value.shape)}, must be {tuple(state[ours].shape)}"
                )
        elif ours and last == "num_batches_tracked":  # of a norm that is frozen here
            dropped.append(name)
        else:
            problems.append(f"{name} is no tensor of this model")
    problems += [f"{name} is missing" for name in state if name not in weights]
    if problems:
        shown = "; ".join(problems[:SHOWN])
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"{source} is not the authors' InsPose R-50 ({len(problems)} tensors differ): "
            f"{shown}{more}"
        )
    return weights, dropped
