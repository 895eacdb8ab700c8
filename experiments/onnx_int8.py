#!/usr/bin/env python
"""Quantise the convolutions of an ONNX file to 8 bits, by ONNX Runtime's own quantiser.

The file takes pictures as they are:

    inspose export --weights people_lite0 --preprocess --output model.onnx
    python -m experiments.onnx_int8 model.onnx --input datasets/people/train --output int8.onnx
    python -m benchmarks.onnx_ap model.onnx int8.onnx --dataset people_val

What is no convolution stays in float: KP-Nets, decoding, NMS.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from inspose_d2.data.folders import list_folder
from inspose_d2.data.images import read_image

MAX_PIXELS = 50_000_000
# Parts of the names of weights. The last layers ask for precision; depthwise and early convolutions
# have channels of very different ranges.
FLOAT = ["pred", "cls_score", "conv_dw", "conv_stem", "blocks.0.", "blocks.1.", "blocks.2."]


class Pictures(CalibrationDataReader):
    """Pictures to find the ranges of activations with."""

    def __init__(self, files: list[Path]) -> None:
        """Take files in the order that they are read in."""
        self.files = iter(files)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Read the next one; None behind the last."""
        file = next(self.files, None)
        return None if file is None else {"image": read_image(file, "BGR", MAX_PIXELS)}


def quantise(model: Path, files: list[Path], output: Path, floats: list[str]) -> int:
    """Write the quantised model.

    Args:
        model: file of ``inspose export --preprocess``.
        files: pictures for calibration.
        output: file to write.
        floats: convolutions stay as they are where one of these is part of their weight's name.

    Returns:
        How many convolutions have 8 bits.
    """
    with tempfile.TemporaryDirectory() as folder:
        folded = Path(folder) / "folded.onnx"
        quant_pre_process(model, folded, skip_symbolic_shape=True)
        nodes = [
            node.name
            for node in onnx.load(folded).graph.node
            if node.op_type == "Conv" and not any(part in node.input[1] for part in floats)
        ]
        quantize_static(
            folded,
            output,
            Pictures(files),
            quant_format=QuantFormat.QDQ,
            nodes_to_quantize=nodes,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
        )
    return len(nodes)


def main() -> None:
    """Read the command line and quantise."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="of inspose export --preprocess")
    parser.add_argument("--input", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--num", type=int, default=32, help="of photographs, the first ones (32)")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--float", nargs="*", default=FLOAT, help="parts of the names of weights")
    args = parser.parse_args()
    files = list_folder(args.input).images[: args.num]
    if not files:
        raise SystemExit(f"--input {args.input}: no photographs there")
    count = quantise(args.model, files, args.output, args.float)
    print(f"{args.output}: {count} convolutions have 8 bits")


if __name__ == "__main__":
    main()
