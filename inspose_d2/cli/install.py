"""``inspose install-detectron2``."""

import argparse

from .. import install_detectron2


def run(args: argparse.Namespace) -> int:
    """Keep a working Detectron2, or install one."""
    install_detectron2.main(args.wheel)
    return 0
