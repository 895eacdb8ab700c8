"""``inspose models``: configs and trained weights."""

import argparse

from tabulate import tabulate

from ..config import list_configs
from ..model_zoo import find_weights, list_checkpoints, write_folder


def run(args: argparse.Namespace) -> int:
    """List, download or write as a folder."""
    if args.what == "download":
        print(find_weights(args.weights))
    elif args.what == "folder":
        write_folder(args.weights, args.output, args.config_file)
        print(args.output)
    else:
        _list()
    return 0


def _list() -> None:
    """Print a line for each config and for each checkpoint."""
    checkpoints = list_checkpoints()
    rows = [
        (name, x.config, f"{x.size / 1e6:.1f} MB", *_best(x.metrics))
        for name, x in checkpoints.items()
    ]
    print(tabulate(rows, ("weights", "config", "size", "keypoint AP", "of"), floatfmt=".1f"))
    print("\nconfigs, without weights unless they stand above:")
    print("\n".join(f"  {name}" for name in list_configs()))


def _best(metrics: dict[str, float]) -> tuple[float | str, str]:
    """Keypoint AP in percent and its data set, of the first that has one."""
    found = ((value, key.split("/")[0]) for key, value in metrics.items() if key.endswith("/AP"))
    return next(found, ("", ""))
