"""JSON, Markdown and plots of what ``python -m benchmarks`` measured."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.models import BACKBONE, INSPOSE, MODELS

mpl.use("Agg")
from matplotlib import pyplot as plt

Result = dict[str, Any]
DEFINED = "Median (smallest to largest) of {repeats} rounds in one process, all taking turns."


def write_latency(folder: Path, result: Result) -> Path:
    """Write ``latency.{json,md,png}``; the path of the Markdown comes back."""
    rows = {(row["model"], row["persons"]): row for row in result["latency"]}
    ratios = {row["persons"]: row["ratio"] for row in result["ratios"]}
    table = [
        [
            str(n),
            *(time_of(rows[name, n]) for name in MODELS),
            f"{ratio:.2f}",
            *(f"{rows[name, n]['GMACs']:.4g}" for name in MODELS[:2]),
            number(rows[INSPOSE, n]["floor"]),
            percent(rows[INSPOSE, n]["floor"] / rows[INSPOSE, n]["median"]),
        ]
        for n, ratio in ratios.items()
    ]
    header = ["persons in the image", *(f"{name}, s" for name in MODELS)]
    header += ["InsPose / faster Keypoint R-CNN", *(f"GMACs, {name}" for name in MODELS[:2])]
    header += ["floor of InsPose, s", "floor / InsPose"]
    backbone = rows[BACKBONE, None]
    parts = [
        "# Latency against the number of persons",
        *introduction(result),
        markdown_table(header, table),
        DEFINED.format(**result) + " The number of persons is forced: InsPose takes that many "
        "locations for persons; Keypoint R-CNN finds and classifies its proposals, then its "
        "keypoint head gets that many boxes of persons 60 to 400 pixels high.",
        f"{BACKBONE}: {time_of(backbone)} s, floor {number(backbone['floor'])} s.",
        limits_text(result) + " The floor is multiply-adds / that rate.",
        "![latency against the number of persons](latency.png)",
        f"## Stages of InsPose, persons in the image: {result['stages']['persons']}",
        stage_table(result["stages"]["seconds"], result["stages"]["floors"]),
        f"Outside backbone + FPN + dense convolutions: {percent(result['stages']['outside'])}. "
        f"Medians of {result['repeats']} calls, without torch.compile; a GPU is waited for after "
        "every stage, so that the sum is above the latency there.",
        *memory_part(result),
    ]
    plot_latency(folder, result)
    return write(folder, "latency", result, parts)


def write_training(folder: Path, result: Result) -> Path:
    """Write ``training.{json,md}``; the path of the Markdown comes back."""
    rows = {(row["model"], row["persons"]): row for row in result["steps"]}
    persons = list(dict.fromkeys(row["persons"] for row in result["steps"]))
    table = []
    for n in persons:
        peer = min(rows[name, n]["median"] for name in MODELS[1:])
        row = [str(n), *(time_of(rows[name, n]) for name in MODELS)]
        row += [f"{rows[INSPOSE, n]['median'] / peer:.2f}"]
        table.append([*row, *(str(rows[name, n]["regions"]) for name in MODELS[:2])])
    header = ["persons in an image", *(f"{name}, s" for name in MODELS)]
    header += ["InsPose / faster Keypoint R-CNN", "positive locations", "keypoint regions of R-CNN"]
    batch, loading = result["setting"]["batch"], result.get("loading")
    parts = [
        "# Seconds of a training step",
        *introduction(result),
        markdown_table(header, table),
        DEFINED.format(**result) + " Forward pass, losses, gradient and optimizer, "
        f"batch of {batch}. The last columns say for how many regions keypoints are learned: "
        "proposals of random weights seldom hit a person, so that the keypoint head of R-CNN "
        "trains on little more than the annotated boxes.",
    ]
    for stages in result["stages"]:
        parts += [
            f"## Parts of InsPose's step, persons in an image: {stages['persons']}",
            stage_table(stages["seconds"]),
        ]
    if loading is not None:
        consumed = batch / rows[INSPOSE, persons[0]]["median"]
        parts += loading_part(loading, persons[0], consumed)
    parts += memory_part(result)
    return write(folder, "training", result, parts)


def loading_part(loading: Result, num_persons: int, consumed: float) -> list[str]:
    """Headline and text on the data loader; ``consumed`` are the images a second of training."""
    return [
        "## Data loading",
        f"One worker makes {number(loading['images per second'])} images a second of "
        f"`{loading['data']}` with the config's augmentation; the steps of InsPose with "
        f"{num_persons} persons in an image take {number(consumed)} a second, from "
        f"{math.ceil(consumed / loading['images per second'])} such worker(s).",
    ]


def write_kp_net(folder: Path, result: Result) -> Path:
    """Write ``kp_net.{json,md,png}``; the path of the Markdown comes back."""
    rates = {unit: x["rate"] for unit, x in result["limits"].items()}
    height, width = result["maps"]
    table = []
    for row in result["KP-Nets"]:
        bound = max(row["floors"], key=row["floors"].get)
        line = [f"{row['task']}, {row['backend']}", str(row["persons"]), time_of(row)]
        line += [number(row["work"][unit]) for unit in rates]
        line += [number(row["floor"]), bound, f"{row['median'] / row['floor']:.2g}"]
        table.append(line)
    header = ["", "persons", "s", *(f"1e9 {unit}" for unit in rates)]
    header += ["floor, s", "set by", "s / floor"]
    parts = [
        f"# KP-Nets alone, maps of {height} x {width} cells",
        *introduction(result),
        markdown_table(header, table),
        DEFINED.format(**result) + " Work is counted before any implementation: nothing twice, "
        "maps never in memory, features read once. The floor is the longest of the three at the "
        "machine's best rates.",
        limits_text(result),
        *(f"Not run: {problem}." for problem in result["not run"]),
        f"Beside the definition in float64 on the CPU, {result['errors']['persons']} persons, the "
        "largest errors; those of gradients relative to the largest gradient:",
        error_table(result["errors"]["by backend"]),
        "![seconds against the number of persons](kp_net.png)",
    ]
    plot_kp_net(folder, result)
    return write(folder, "kp_net", result, parts)


def write(folder: Path, name: str, result: Result, parts: Sequence[str]) -> Path:
    """Write the JSON and the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    path = folder / f"{name}.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def introduction(result: Result) -> list[str]:
    """The command, and the lines on setting and machine."""
    setting, machine = result["setting"], result["machine"]
    height, width = setting["size"]
    how = [
        f"{height} x {width} pixels, batch {setting['batch']}",
        setting["amp"] or "float32",
        *["channels-last"] * setting["channels_last"],
        *["compiled"] * setting["compile"],
        "random weights, noise",
    ]
    lines = [f"- {key}: {value}" for key, value in machine.items() if value is not None]
    return [f"`{result['command']}`", "\n".join([f"- {', '.join(how)}", *lines])]


def limits_text(result: Result) -> str:
    """The machine's best rates as a sentence."""
    best = [f"{number(x['rate'])}e9 {u} ({x['probe']})" for u, x in result["limits"].items()]
    return f"Best of this machine in the same turns, a second: {', '.join(best)}."


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def stage_table(seconds: dict[str, float], floors: dict[str, float] | None = None) -> str:
    """A table of stages with their shares of the sum, and their floors where there are any."""
    total = sum(seconds.values())
    header = ["", "s", "share"]
    rows = [[name, number(x), percent(x / total)] for name, x in seconds.items()]
    rows.append(["sum", number(total), percent(1)])
    if floors is not None:
        header.append("floor, s")
        lows = [*(floors.get(name) for name in seconds), sum(floors.values())]
        rows = [[*row, number(x) if x else "-"] for row, x in zip(rows, lows, strict=True)]
    return markdown_table(header, rows)


def error_table(errors: dict[str, dict[str, float]]) -> str:
    """A table of how far each backend is off."""
    header = ["", *next(iter(errors.values()))]
    return markdown_table(
        header, [[backend, *map(number, found.values())] for backend, found in errors.items()]
    )


def memory_part(result: Result) -> list[str]:
    """Headline, table and definition of the peak memory, where it was measured."""
    if "memory" not in result:
        return []
    rows = [
        [
            row["what"],
            str(row["persons"]),
            *(f"{row[key] / 2**20:.0f}" for key in ("bytes more", "bytes before")),
        ]
        for row in result["memory"]
    ]
    return [
        "## Peak memory",
        markdown_table(["", "persons", "peak above that, MiB", "before the call, MiB"], rows),
        "A process for each row; the same call with one person came before. On the CPU resident "
        "memory, with all that a process with torch has; on a GPU what torch allocated. Before a "
        "training step that includes the last gradients and the state of the optimizer.",
    ]


def time_of(row: Result) -> str:
    """Median and range of a row's seconds."""
    return f"{number(row['median'])} ({number(row['min'])} to {number(row['max'])})"


def number(value: float) -> str:
    """Three digits, without an exponent where that reads well."""
    return f"{value:.3g}" if 1e-4 < abs(value) < 1000 or value == 0 else f"{value:.2e}"


def percent(part: float) -> str:
    """A share as text."""
    return f"{100 * part:.1f} %"


def draw(axes: Axes, rows: Sequence[Result], label: str, style: str) -> None:
    """Draw the medians of rows against the persons, with their range."""
    persons, medians = ([row[key] for row in rows] for key in ("persons", "median"))
    below = [row["median"] - row["min"] for row in rows]
    above = [row["max"] - row["median"] for row in rows]
    axes.errorbar(persons, medians, [below, above], fmt=style, capsize=4, label=label)


def plot_latency(folder: Path, result: Result) -> None:
    """Plot latency against the number of persons."""
    picture, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, style in zip(MODELS, ("o-", "s-", "^--"), strict=True):
        draw(axes, [row for row in result["latency"] if row["model"] == name], name, style)
    backbone = next(row for row in result["latency"] if row["model"] == BACKBONE)
    axes.axhline(backbone["median"], color="gray", linestyle=":", label=BACKBONE)
    axes.set_ylim(bottom=0)
    finish(axes, [row["persons"] for row in result["ratios"]], "latency", result)
    save(picture, folder / "latency.png")


def plot_kp_net(folder: Path, result: Result) -> None:
    """Plot the seconds of the KP-Nets, a panel for each task, above their floor."""
    tasks = list(dict.fromkeys(row["task"] for row in result["KP-Nets"]))
    picture, panels = plt.subplots(1, len(tasks), figsize=(11, 4.5), layout="constrained")
    for task, axes in zip(tasks, panels, strict=True):
        rows = [row for row in result["KP-Nets"] if row["task"] == task]
        for backend in dict.fromkeys(row["backend"] for row in rows):
            draw(axes, [row for row in rows if row["backend"] == backend], backend, "o-")
        floors = {row["persons"]: row["floor"] for row in rows}
        axes.plot(list(floors), list(floors.values()), ":", color="gray", label="floor")
        axes.set_yscale("log")
        finish(axes, list(floors), task, result)
    save(picture, folder / "kp_net.png")


def finish(axes: Axes, persons: Sequence[int], title: str, result: Result) -> None:
    """Put the numbers of persons, logarithmic, and the words to a panel."""
    machine = result["machine"]
    where = machine["GPU"] or f"{machine['CPU']}, {machine['CPU threads used']} threads"
    axes.set_xscale("log")
    axes.set_xticks(persons, [str(n) for n in persons])
    axes.minorticks_off()
    axes.set(xlabel="persons in the image", ylabel="seconds", title=f"{title}; {where}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def save(picture: Figure, path: Path) -> None:
    """Write a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=100)
    plt.close(picture)
