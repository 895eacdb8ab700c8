"""``inspose benchmark``: the latency of one model on this machine."""

import argparse
import statistics
import time

import numpy as np
import torch

from ..data.images import read_image
from .predict import Demo, make_config, threshold_of


def run(args: argparse.Namespace) -> int:
    """Time ``inspose predict`` from a picture's pixels to its poses, and print the figures."""
    cfg = make_config(args)
    demo = Demo(cfg, threshold_of(args), batch_size=1)
    if args.input:
        image = read_image(args.input, "BGR", cfg.INPUT.MAX_PIXELS)
    else:
        size = cfg.INPUT.MIN_SIZE_TEST or 640
        shape = (size, min(size * 4 // 3, cfg.INPUT.MAX_SIZE_TEST), 3)
        image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for _ in range(3):  # the first ones choose and compile kernels
        (poses,) = demo.predict([image])
    milliseconds = sorted(1000 * _seconds(demo, image) for _ in range(args.num))
    device = cfg.MODEL.DEVICE
    if device.startswith("cuda"):
        device = f"{device} ({torch.cuda.get_device_name()})"
    height, width = image.shape[:2]
    print(f"{args.config_file or cfg.MODEL.WEIGHTS} on {device}, {torch.get_num_threads()} threads")
    print(
        f"{width} x {height} pixels, {len(poses)} poses of a score of {demo.score_threshold:.2f} "
        f"or more, {args.num} images one by one"
    )
    print(
        f"median {statistics.median(milliseconds):.1f} ms, fastest {milliseconds[0]:.1f} ms, "
        f"slowest {milliseconds[-1]:.1f} ms"
    )
    return 0


def _seconds(demo: Demo, image: np.ndarray) -> float:
    start = time.perf_counter()
    demo.predict([image])  # on the CPU, so a GPU has been waited for
    return time.perf_counter() - start
