"""``inspose train`` and ``inspose eval``: what ``train_net.py`` does."""

import argparse

from ..engine import launch
from ..model_zoo import find_weights


def run(args: argparse.Namespace) -> int:
    """Train or evaluate; what goes wrong there ends the program with its own status."""
    args.eval_only = args.command == "eval"
    if args.weights:
        args.opts += ["MODEL.WEIGHTS", str(find_weights(args.weights))]
    if args.device:
        args.opts += ["MODEL.DEVICE", args.device]
    launch.run(args)
    return 0
