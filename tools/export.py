#!/usr/bin/env python
"""Export InsPose with its weights to ONNX or to a program of ``torch.export`` (.pt2).

    python tools/export.py --config-file CONFIG --output model.onnx MODEL.WEIGHTS model_final.pth

One image goes in, its poses come out; NMS is inside.

    input   image      uint8    (3, H, W)   colours in the order of INPUT.FORMAT, any H and W;
                                            resized before, to INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST
    output  boxes      float32  (N, 4)      x0, y0, x1, y1 around the keypoints, pixels of the input
    output  scores     float32  (N,)        of the poses, in [0, 1], best first
    output  keypoints  float32  (N, K, 3)   x, y in pixels of the input, score in [0, 1]

The .pt2 gives the same three as a tuple, for H and W above 128. docs/deployment.md has more.
"""

import argparse
import importlib.util
import logging
import time
import warnings
from pathlib import Path

import torch
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger

from inspose_d2 import get_cfg
from inspose_d2.checkpoint import InsPoseCheckpointer
from inspose_d2.export import export_onnx, export_program
from inspose_d2.model_zoo import find_weights

FORMATS = ("onnx", "pt2")

logger = logging.getLogger("inspose_d2.export")


def check_packages() -> None:
    """Stop where the packages that write and run ONNX are missing."""
    missing = [x for x in ("onnx", "onnxruntime", "onnxscript") if not importlib.util.find_spec(x)]
    if missing:
        raise SystemExit(f"ONNX needs {', '.join(missing)}: pip install -e '.[export]'")


def export(config_file: str, opts: list[str], output: Path, file_format: str) -> None:
    """Build a model and write it.

    Args:
        config_file: of the model, or its name.
        opts: changes of the config, ``MODEL.WEIGHTS`` among them: a file, or a name of the zoo.
        output: file to write.
        file_format: one of ``FORMATS``.
    """
    cfg = get_cfg(config_file, ["MODEL.DEVICE", "cpu", *opts])
    if not cfg.MODEL.WEIGHTS:
        logger.warning("MODEL.WEIGHTS is empty: the exported weights are random")
    else:
        cfg.MODEL.WEIGHTS = str(find_weights(cfg.MODEL.WEIGHTS))
    model = build_model(cfg)
    InsPoseCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    start = time.perf_counter()
    if file_format == "onnx":
        export_onnx(model, output)
    else:
        torch.export.save(export_program(model), output)
    size, seconds = output.stat().st_size / 1e6, time.perf_counter() - start
    logger.info(f"{output}: {size:.1f} MB in {seconds:.0f} s; colours are {cfg.INPUT.FORMAT}")


def main() -> None:
    """Read the command line and export."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--format", choices=FORMATS, help="default: the ending of --output")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config changes: KEY VALUE ...")
    args = parser.parse_args()
    file_format = args.format or args.output.suffix.removeprefix(".")
    if file_format not in FORMATS:
        parser.error(f"--output {args.output}: must end in .onnx or .pt2, or give --format")
    if not args.output.absolute().parent.is_dir():
        parser.error(f"--output {args.output}: there is no such folder")
    if file_format == "onnx":
        check_packages()
    setup_logger(name="inspose_d2", abbrev_name="inspose")
    setup_logger(name="fvcore")
    warnings.filterwarnings("ignore")  # the exporter's own, about its own code
    export(args.config_file, args.opts, args.output, file_format)


if __name__ == "__main__":
    main()
