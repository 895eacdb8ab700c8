"""Quantised files: which convolutions have 8 bits, and what becomes of the results."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="pip install -e '.[export]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e '.[export]'")

from experiments import onnx_int8  # noqa: E402


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two convolutions of a picture, ``body.weight`` and ``pred.weight``."""
    helper, random = onnx.helper, np.random.default_rng(0)
    weights = [
        onnx.numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name)
        for name, shape in (("body.weight", (8, 3, 3, 3)), ("pred.weight", (4, 8, 3, 3)))
    ]
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["moved"], perm=[2, 0, 1]),
        helper.make_node("Unsqueeze", ["moved", "first"], ["batch"]),
        helper.make_node("Conv", ["batch", "body.weight"], ["hidden"], name="one"),
        helper.make_node("Conv", ["hidden", "pred.weight"], ["result"], name="two"),
    ]
    inputs = helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, ["h", "w", 3])
    outputs = helper.make_tensor_value_info("result", onnx.TensorProto.FLOAT, [1, 4, None, None])
    first = onnx.numpy_helper.from_array(np.array([0]), "first")
    graph = helper.make_graph(nodes, "g", [inputs], [outputs], [*weights, first])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(made, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: Path) -> None:
    model, pictures, output = map(str, arguments)
    command = ["onnx_int8", model, "--input", pictures, "--output", output]
    monkeypatch.setattr(sys, "argv", command)
    onnx_int8.main()


def test_body_has_8_bits_and_the_last_layer_has_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, output = tmp_path / "pictures", tmp_path / "int8.onnx"
    pictures.mkdir()
    random = np.random.default_rng(1)
    image = random.integers(0, 256, (40, 30, 3), np.uint8)
    for number in range(3):
        cv2.imwrite(str(pictures / f"{number}.png"), image)
    run_tool(monkeypatch, model, pictures, output)

    types = {x.name: x.data_type for x in onnx.load(output).graph.initializer}
    assert types["pred.weight"] == onnx.TensorProto.FLOAT
    assert types["body.weight_quantized"] == onnx.TensorProto.INT8
    expected, got = (
        onnxruntime.InferenceSession(file).run(None, {"image": image})[0]
        for file in (model, output)
    )
    # Of noise, sums of products overflow on CPUs without VNNI: 0.13 there.
    assert 0 < np.abs(got - expected).max() < 0.2 * np.abs(expected).max()


def test_folder_without_photographs_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"empty: no photographs there"):
        run_tool(monkeypatch, model, tmp_path / "empty", tmp_path / "int8.onnx")
