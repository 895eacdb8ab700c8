"""The converter of the authors' checkpoint, on made-up files of its form."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor

from inspose_d2 import cli, get_cfg
from inspose_d2.checkpoint import CheckpointError, InsPoseCheckpointer
from inspose_d2.checkpoint import opera as convert
from inspose_d2.checkpoint.opera import convert_opera_checkpoint
from inspose_d2.files import sha256_of


@pytest.fixture(scope="module")
def shapes(golden_full: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' tensors, in the order of their file."""
    numbers = golden_full("state_dict")
    known = {
        str(name): tuple(shape[:ndim])
        for name, shape, ndim in zip(
            numbers["names"], numbers["shapes"].tolist(), numbers["ndim"].tolist(), strict=True
        )
    }
    return {str(name): known[str(name)] for name in numbers["saved_order"]}


def numbered(shapes: dict[str, tuple[int, ...]]) -> "OrderedDict[str, Tensor]":
    """Tensors whose values are their number; each takes the space of one value in a file."""
    state: OrderedDict[str, Tensor] = OrderedDict()
    for i, (name, shape) in enumerate(shapes.items()):
        kind = torch.int64 if name.endswith("num_batches_tracked") else torch.float32
        state[name] = torch.tensor(i, dtype=kind).expand(shape)
    return state


def save(path: Path, state: dict[str, Tensor], **more: Any) -> Path:
    torch.save({"meta": {"epoch": 36, "CLASSES": ("person",)}, "state_dict": state} | more, path)
    return path


@pytest.mark.slow  # writes 200 MB
def test_whole_file_is_converted_and_loaded_strictly(
    shapes: dict[str, tuple[int, ...]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = numbered(shapes)
    prefixed = OrderedDict((f"module.{name}", value) for name, value in state.items())
    source, target = (
        save(tmp_path / "in.pth", prefixed, optimizer={"state": {}}),
        tmp_path / "o.pth",
    )
    assert cli.main(["convert", "opera", str(source), str(target)]) == 0
    said = capsys.readouterr().out
    assert "36 epochs" in said
    assert "not a file that is known" in said
    assert sha256_of(source) in said

    model = build_model(get_cfg(convert.CONFIG, ["MODEL.DEVICE", "cpu"]))
    InsPoseCheckpointer(model).load(str(target))
    ours = model.state_dict()
    table = dict(convert.prefixes())
    used = set()
    for name, value in state.items():
        prefix, _, last = name.rpartition(".")
        key = f"{table[prefix]}.{last}"
        if key not in ours and last == "num_batches_tracked":
            continue
        assert torch.equal(ours[key], value.to(ours[key])), name
        used.add(key)
    assert used == set(ours)
    assert len(shapes) == 412


def test_known_file_is_named() -> None:
    sha256 = next(iter(convert.KNOWN_FILES))
    assert len(sha256) == 64
    assert "inspose_r50_8x4_36e_coco.pth" in convert.KNOWN_FILES[sha256]


def change(what: str, state: dict[str, Tensor]) -> None:
    if what == "missing":
        del state["neck.fpn_convs.3.conv.bias"]
    elif what == "left over":
        state["bbox_head.scales.0.scale"] = torch.ones(1)
    elif what == "shape":
        state["bbox_head.controller.weight"] = torch.zeros(1).expand(169, 512, 3, 3)
    else:
        state["ema_backbone_conv1_weight"] = torch.ones(1)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing", "backbone.top_block.p6.bias is missing"),
        ("left over", "bbox_head.scales.0.scale is no tensor of this model"),
        ("shape", r"bbox_head.controller.weight is \(169, 512, 3, 3\), must be \(313, 512, 3, 3\)"),
        ("ema", "ema_backbone_conv1_weight is no tensor of this model"),
    ],
)
def test_other_tensors_are_refused_by_name(
    shapes: dict[str, tuple[int, ...]], tmp_path: Path, what: str, said: str
) -> None:
    state = numbered(shapes)
    change(what, state)
    source = save(tmp_path / "in.pth", state)
    with pytest.raises(CheckpointError, match=rf"in.pth.*\(1 tensors differ\): {said}"):
        convert_opera_checkpoint(source, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


class Code:
    def __reduce__(self) -> Any:
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html>Google Drive - Virus scan warning", "is a web page, not weights"),
        (b"", "is empty"),
        ({"model": {"head.cls_score.bias": torch.zeros(1)}}, "it is converted already"),
        ({"state_dict": {}}, "is it the authors' checkpoint?"),
        ({"state_dict": Code()}, "could run code"),
    ],
)
def test_other_files_are_refused_in_a_line_with_status_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: Any,
    said: str,
) -> None:
    source = tmp_path / "in.pth"
    if isinstance(content, bytes):
        source.write_bytes(content)
    else:
        torch.save(content, source)
    assert cli.main(["convert", "opera", str(source), str(tmp_path / "out.pth")]) == cli.USAGE
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert str(source) in message


def test_missing_file_and_wrong_ending_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"docs/official.md says where"):
        convert_opera_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth")
    with pytest.raises(CheckpointError, match=r"out.bin must end in .pth"):
        convert_opera_checkpoint(tmp_path / "in.pth", tmp_path / "out.bin")
