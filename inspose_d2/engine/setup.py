"""What a run says before its first step: a dozen lines to read, and all the rest in files."""

import copy
import logging
import os
import platform
import warnings
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch.utils.flop_counter import FlopCounterMode

from .. import __version__

logger = logging.getLogger(__name__)


def setup_run(cfg: CfgNode) -> None:
    """Open the logs and draw the seed, in place of Detectron2's ``default_setup``.

    That prints the machine, the config twice and the whole model. Here they go to
    ``environment.txt`` and ``config.yaml`` in ``OUTPUT_DIR``, the model to ``model.txt`` by
    :func:`describe_model`; ``log.txt`` has no colours.

    Args:
        cfg: the whole config.

    Raises:
        OSError: ``OUTPUT_DIR`` cannot be written.
    """
    folder, rank = cfg.OUTPUT_DIR, comm.get_rank()
    for name in ("fvcore", "detectron2"):
        setup_logger(folder, rank, name=name)
    setup_logger(folder, rank, name="inspose_d2", abbrev_name="inspose_d2")
    logging.getLogger("detectron2.data").setLevel(logging.WARNING)  # what is said here in one line
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA, no operators
    warnings.filterwarnings("ignore", category=FutureWarning)  # the packages below, of each other
    warnings.filterwarnings("ignore", message="Creating a tensor from a list of numpy.ndarrays")
    if comm.is_main_process():
        _write(folder, "config.yaml", cfg.dump())
        _write(folder, "environment.txt", collect_env_info())
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    logger.info(
        "InsPose-D2 %s, Detectron2 %s, PyTorch %s, Python %s",
        *(__version__, detectron2.__version__, torch.__version__, platform.python_version()),
    )
    logger.info("Device: %s, %d worker(s)", cfg.MODEL.DEVICE, comm.get_world_size())
    logger.info("Output: %s, with log.txt, config.yaml, environment.txt, model.txt", folder)


def describe_model(cfg: CfgNode, model: Any) -> None:
    """Say how large a model is, and write all its layers to ``model.txt``."""
    if not comm.is_main_process():
        return
    _write(cfg.OUTPUT_DIR, "model.txt", str(model))
    parameters, macs = list(model.parameters()), ""
    if hasattr(model, "predict"):  # not every architecture has it
        height, width = size = input_size(cfg, model)
        macs = f"; {count_macs(model, size) / 1e9:.1f} GMACs at {width} x {height} pixels"
    logger.info(
        "Model: %s, %s: %.1f M parameters, %.1f M of them trained%s",
        cfg.MODEL.META_ARCHITECTURE,
        cfg.MODEL.BACKBONE.NAME,
        sum(x.numel() for x in parameters) / 1e6,
        sum(x.numel() for x in parameters if x.requires_grad) / 1e6,
        macs,
    )


def input_size(cfg: CfgNode, model: Any) -> tuple[int, int]:
    """Size (H, W) in pixels of a picture of 2:3 in evaluation, padded."""
    low, high = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    divisor = max(model.backbone.size_divisibility, 1)
    height, width = (-(-round(x) // divisor) * divisor for x in (low, min(1.5 * low, high)))
    return height, width


def count_macs(model: Any, size: tuple[int, int]) -> int:
    """Count the multiply-adds of ``model.predict``, all that depends on no person.

    Nothing is computed: a copy of the model has shapes alone.

    Args:
        model: an InsPose; stays as it is.
        size: (H, W) of the image, pixels.
    """
    shapes = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shapes.predict(torch.empty(1, len(shapes.pixel_mean), *size, device="meta"))
    return counter.get_total_flops() // 2


def _write(folder: str, name: str, text: str) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(f"{text}\n")
