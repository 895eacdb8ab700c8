#!/usr/bin/env python
"""Count parameters and multiply-adds anew for every row of MODEL_ZOO.md that names a config."""

import re
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from benchmarks.analyze import build, count, load

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "MODEL_ZOO.md"
SIZE, PERSONS = (800, 1216), 20
TRAINING_ALONE = (
    "heatmap_branch",
    "head.regression_pred",
    "dense_branch.heatmap_pred",
    "dense_branch.tag_pred",
)
COLUMNS = ("params (M)", "GMACs")


@cache
def measure(config: Path) -> tuple[float, float]:
    """Million parameters without what training alone has; 1e9 multiply-adds."""
    model = build(load(str(config)), PERSONS)
    params, macs = count(model, [{"image": torch.rand(3, *SIZE) * 255}])
    training = sum(params.get(part, 0) for part in TRAINING_ALONE)
    return (params[""] - training) / 1e6, macs[""] / 1e9


def fill(zoo: str, measure: Callable[[Path], tuple[float, float]]) -> tuple[str, list[str]]:
    """Write the columns ``COLUMNS`` of all rows, and link the configs' names.

    Args:
        zoo: Markdown; tables have the names of configs in the first column.
        measure: gives a config's values of the columns.

    Returns:
        The new Markdown, and the names for which there is no config.
    """
    configs = {path.stem: path for path in sorted(ROOT.glob("configs/**/*.yaml"))}
    lines, missing, header = [], [], []
    for line in zoo.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if "GMACs" in cells:
            header = cells
        name = re.match(r"\| \[?(InsPose\w*_\w+)", line)
        if name and name[1] not in configs:
            missing.append(name[1])
        elif name:
            path = configs[name[1]]
            cells[0] = f"[{name[1]}]({path.relative_to(ROOT).as_posix()})"
            for column, value in zip(COLUMNS, measure(path), strict=True):
                cells[header.index(column)] = f"{value:.2f}"
            line = f"| {' | '.join(cells)} |"
        lines.append(line)
    return "\n".join(lines) + "\n", missing


def main() -> None:
    """Rewrite MODEL_ZOO.md."""
    warnings.filterwarnings("ignore")
    text, missing = fill(ZOO.read_text(encoding="utf-8"), measure)
    ZOO.write_text(text, encoding="utf-8")
    for name in missing:
        print(f"no config of the name {name} in configs/: row left as it is", file=sys.stderr)


if __name__ == "__main__":
    main()
