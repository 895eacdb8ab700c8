"""Markdown, CSV and a plot of measured rows, the paper's figures beside them."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import markdown_table, plt
from experiments.coco_ap import METRICS

NOT_MEASURED = "not measured"
ELSEWHERE = "AP, "  # before the name of a further test set


@dataclass(frozen=True)
class Line:
    """A row of a report.

    Attributes:
        label: its name.
        results: what was measured, by seed.
        paper: the paper's figures, by metric.
    """

    label: str
    results: dict[int, dict[str, Any]]
    paper: dict[str, float] = field(default_factory=dict)

    def values(self, metric: str) -> list[float]:
        """A metric of every seed that has it; COCO says -1 where there was nothing to find."""
        values = (result.get(metric) for result in self.results.values())
        return [float(x) for x in values if x is not None and x >= 0]


@dataclass(frozen=True)
class Report:
    """A table to write: its headline, both data sets, its lines, and what to say below it."""

    title: str
    data: str
    paper_data: str
    lines: Sequence[Line]
    notes: Sequence[str]

    def write(self, stem: Path) -> None:
        """Write ``stem.md``, ``stem.csv`` and ``stem.png``."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".md").write_text(markdown(self, stem.name))
        with stem.with_suffix(".csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(csv_rows(self))
        plot(self, stem.with_suffix(".png"))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, which a single value has not."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), spread


def figure(values: Sequence[float]) -> str:
    """A measured figure as text."""
    if not values:
        return NOT_MEASURED
    mean, spread = mean_and_spread(values)
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} ± {spread:.1f}"


def cell(line: Line, metric: str) -> str:
    """A measured figure of a line; "-" where its runs have no such thing (boxes)."""
    has_it = any(result.get(metric) is not None for result in line.results.values())
    return figure(line.values(metric)) if has_it or not line.results else "-"


def metrics_of(report: Report) -> list[str]:
    """The keypoint metrics, box AP where there is one, and AP on further test sets."""
    has_boxes = any(line.values("box AP") or "box AP" in line.paper for line in report.lines)
    measured = [x for line in report.lines for result in line.results.values() for x in result]
    elsewhere = dict.fromkeys(x for x in measured if x.startswith(ELSEWHERE))
    return [*METRICS, *["box AP"] * has_boxes, *elsewhere]


def training_seconds(line: Line) -> list[float]:
    """Seconds of training of every seed: steps times the median seconds of a step."""
    trained = [x for x in line.results.values() if x.get("seconds per step") and x["steps"]]
    return [result["seconds per step"] * result["steps"] for result in trained]


def markdown(report: Report, stem: str) -> str:
    """The whole Markdown file."""
    metrics, has_paper = metrics_of(report), any(line.paper for line in report.lines)
    ours = []
    for line in report.lines:
        seconds = training_seconds(line)
        ours.append(
            [line.label]
            + [cell(line, metric) for metric in metrics]
            + [f"{np.mean(seconds):.0f}" if seconds else "-", str(len(line.results))]
            + [f"{line.paper['AP']:.1f}" if line.paper else "-"] * has_paper
        )
    columns = ["", *metrics, "seconds of training", "seeds"]
    paper = [
        f"## The paper's: {report.paper_data}",
        "Another data set: only the trend can be compared.",
        markdown_table(
            ["", *metrics],
            [
                [x.label, *(f"{x.paper[m]:.1f}" if m in x.paper else "-" for m in metrics)]
                for x in report.lines
            ],
        ),
    ]
    parts = [
        f"# {report.title}",
        f"## Ours: {report.data}",
        markdown_table(columns + [f"the paper's AP, {report.paper_data}"] * has_paper, ours),
        "Mean ± sample standard deviation over the seeds, in percent.",
        f"![AP of each row]({stem}.png)",
        *paper * has_paper,
        "## How it was made",
        "\n".join(f"- {note}" for note in report.notes),
    ]
    return "\n\n".join(parts) + "\n"


def csv_rows(report: Report) -> list[list[Any]]:
    """A header, a row for every seed of every line, and a row for the paper's figures of it."""
    metrics = metrics_of(report)
    rows: list[list[Any]] = [["row", "data", "seed", *metrics, "seconds per step", "steps"]]
    for line in report.lines:
        for seed, result in sorted(line.results.items()):
            keys = [*metrics, "seconds per step", "steps"]
            rows.append([line.label, f"ours, {report.data}", seed, *map(result.get, keys)])
        if line.paper:
            paper = [line.paper.get(metric) for metric in metrics]
            rows.append([line.label, f"paper, {report.paper_data}", None, *paper, None, None])
    return rows


def plot(report: Report, path: Path) -> None:
    """Draw AP of every row as a bar: ours with seeds and spread, the paper's beside them."""
    has_paper = any(line.paper for line in report.lines)
    figure, panels = plt.subplots(
        1, 1 + has_paper, figsize=(5 + 5 * has_paper, 4), layout="constrained", squeeze=False
    )
    places = {line.label: x for x, line in enumerate(report.lines)}
    ours, *papers = panels[0]
    measured = [line for line in report.lines if line.values("AP")]
    points = [places[line.label] for line in measured]
    stats = [mean_and_spread(line.values("AP")) for line in measured]
    spreads = [s or 0 for _, s in stats]
    ours.bar(points, [m for m, _ in stats], 0.6, yerr=spreads, capsize=5, zorder=2)
    for line in measured:
        seeds = line.values("AP")
        ours.plot([places[line.label]] * len(seeds), seeds, "k.", markersize=4, zorder=3)
    ours.set_title(f"ours, {report.data}", fontsize=10)
    for axes in papers:
        lines = [line for line in report.lines if line.paper]
        axes.bar(
            [places[x.label] for x in lines], [x.paper["AP"] for x in lines], 0.6, color="gray"
        )
        axes.set_title(f"paper, {report.paper_data}: another data set", fontsize=10)
    for axes in panels[0]:
        axes.set_xticks(range(len(places)), list(places))
        if len(places) > 4:
            axes.tick_params("x", rotation=20)
            plt.setp(axes.get_xticklabels(), ha="right")
        axes.set(ylabel="keypoint AP", xlim=(-0.5, len(places) - 0.5))
        axes.grid(alpha=0.3)
    figure.suptitle(report.title)
    figure.savefig(path, dpi=100)
    plt.close(figure)
