"""``inspose install-detectron2``."""

import argparse

from ..install_detectron2 import main


def run(args: argparse.Namespace) -> int:
    """Keep a working Detectron2, or install one."""
    main(args.wheel)
    return 0
