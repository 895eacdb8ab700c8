"""``inspose export``: a model with its weights as ONNX or as a program of ``torch.export``."""

import argparse
import importlib.util
import logging
import time
import warnings
from pathlib import Path

import torch
from detectron2.utils.logger import setup_logger

from ..checkpoint import save_safetensors
from ..config import get_cfg
from ..export import export_onnx, export_program
from ..model_zoo import config_of, find_weights, load_model

FORMATS = ("onnx", "pt2", "safetensors")

logger = logging.getLogger("inspose_d2.export")


def check_packages() -> None:
    """Stop where the packages that write and run ONNX are missing."""
    missing = [x for x in ("onnx", "onnxruntime", "onnxscript") if not importlib.util.find_spec(x)]
    if missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}: pip install 'inspose_d2[export]'")


def export(
    config_file: str,
    opts: list[str],
    output: Path,
    file_format: str,
    *,
    batch: int | None,
    preprocess: bool,
) -> None:
    """Build a model and write it.

    Args:
        config_file: of the model, or its name.
        opts: changes of the config, ``MODEL.WEIGHTS`` among them: a file, or a name of the zoo.
        output: file to write.
        file_format: one of ``FORMATS``.
        batch: images of a batch, ONNX alone; None takes a single image.
        preprocess: whether the file takes pictures as OpenCV reads them, of any size.
    """
    cfg = get_cfg(config_file, ["MODEL.DEVICE", "cpu", *opts])
    if cfg.MODEL.WEIGHTS:
        cfg.MODEL.WEIGHTS = str(find_weights(cfg.MODEL.WEIGHTS))
    model = load_model(cfg)
    logger.info("Tracing the model and writing %s: a minute or two", output)
    start = time.perf_counter()
    own_cfg = cfg if preprocess else None
    if file_format == "onnx":
        export_onnx(model, output, batch=batch, preprocess=own_cfg)
    elif file_format == "safetensors":
        save_safetensors(model.state_dict(), output)
    else:
        torch.export.save(export_program(model, preprocess=own_cfg), output)
    size, seconds = output.stat().st_size / 1e6, time.perf_counter() - start
    colours = "BGR" if preprocess else cfg.INPUT.FORMAT
    logger.info(f"{output}: {size:.1f} MB in {seconds:.0f} s; colours are {colours}")


def run(args: argparse.Namespace) -> int:
    """Read the command line and export."""
    file_format = args.format or args.output.suffix.removeprefix(".")
    if file_format not in FORMATS:
        raise ValueError(
            f"--output {args.output}: must end in .onnx, .pt2 or .safetensors, or give --format"
        )
    if args.batch and file_format != "onnx":
        raise ValueError("--batch is for ONNX")
    if args.preprocess and (args.batch or file_format == "safetensors"):
        raise ValueError("--preprocess is for .onnx and .pt2 of single images, without --batch")
    if args.output.is_dir():
        raise ValueError(f"--output {args.output}: is a folder; give a file in it")
    if not args.output.absolute().parent.is_dir():
        raise ValueError(f"--output {args.output}: there is no such folder")
    if file_format == "onnx":
        check_packages()
    setup_logger(name="inspose_d2", abbrev_name="inspose")
    setup_logger(name="fvcore")
    warnings.filterwarnings("ignore")  # the exporter's own, about its own code
    weights = ["MODEL.WEIGHTS", args.weights] if args.weights else []
    config = args.config_file or (config_of(args.weights) if args.weights else None)
    if config is None:
        raise ValueError("--config-file is needed: no --weights that say which config they are of")
    export(
        config,
        [*args.opts, *weights],
        args.output,
        file_format,
        batch=args.batch,
        preprocess=args.preprocess,
    )
    return 0
