"""The program ``inspose``: one module a subcommand, one place where errors become a line.

May import every room.
"""

import warnings
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from importlib import import_module

from .parsers import make_parser
from .rule import INTERRUPTED, TERMINATED, USAGE, told

__all__ = ["INTERRUPTED", "TERMINATED", "USAGE", "main", "told"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: words of the command line; None takes those of the process.

    Returns:
        The exit status, see :mod:`.rule`.
    """
    args = make_parser().parse_args(argv)
    return told(f"inspose {args.command}", partial(_run, args))


def _run(args: Namespace) -> int:
    _check_options(f"inspose {args.command}", getattr(args, "opts", []))
    # The packages below warn of each other's futures at every start.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Late: PyTorch takes seconds, which --help and a wrong option need not wait for.
    if args.command != "install-detectron2":
        import_module("inspose_d2.public")  # registers architectures and data sets
    status: int = import_module(f"{__name__}.{args.module}").run(args)
    return status


def _check_options(name: str, opts: Sequence[str]) -> None:
    """Refuse options among KEY VALUE, which argparse would hand on as keys."""
    for word in opts[::2]:
        if word.startswith("-"):
            raise ValueError(
                f"{word}: no such option, or it stands after KEY VALUE: options go first "
                f"({name} --help)"
            )
