"""The program ``inspose``: one module a subcommand, one place where errors become a line.

May import every room.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from .parsers import make_parser

USAGE, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: words of the command line; None takes those of the process.

    Returns:
        The exit status: that of the subcommand, 2 for bad input, 130 after Ctrl-C.
    """
    args = make_parser().parse_args(argv)
    name = f"inspose {args.command}"
    _check_options(name, getattr(args, "opts", []))
    try:
        # The packages below warn of each other's futures at every start.
        warnings.filterwarnings("ignore", category=FutureWarning)
        # Late: PyTorch takes seconds, which --help and a wrong option need not wait for.
        if args.command != "install-detectron2":
            import_module("inspose_d2.public")  # registers architectures and data sets
        return import_module(f"{__name__}.{args.module}").run(args)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; what was done until now is whole", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "detectron2":
            raise
        print(f"{name}: Detectron2 is missing: inspose install-detectron2", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"{name}: {error}", file=sys.stderr)
    except RuntimeError as error:
        from ..checkpoint import CheckpointError

        if not isinstance(error, CheckpointError):
            raise
        print(f"{name}: {error}", file=sys.stderr)
    return USAGE


def _check_options(name: str, opts: Sequence[str]) -> None:
    """Refuse options among KEY VALUE, which argparse would hand on as keys."""
    for word in opts[::2]:
        if word.startswith("-"):
            print(
                f"{name}: {word}: no such option, or it stands after KEY VALUE: options go first "
                f"({name} --help)",
                file=sys.stderr,
            )
            raise SystemExit(USAGE)
