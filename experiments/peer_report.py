"""InsPose beside Keypoint R-CNN: AP per number of persons in the image, seconds, parameters."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.utils.events import EventStorage

from benchmarks.report import markdown_table, plt
from benchmarks.timing import by_turns
from experiments.coco_ap import MAX_PEOPLE
from experiments.peer import trainer_of
from experiments.report import figure, mean_and_spread

TIMED_STEPS, TIMED_IMAGES = 20, 40

ApByPeople = dict[int, list[float]]  # number of persons: AP of every seed


def measure(cfgs: Sequence[CfgNode], weights: Sequence[Path]) -> list[dict[str, float]]:
    """Time trained models by turns, so that what else the machine does falls on all of them.

    Args:
        cfgs: configs of the models, with the same data.
        weights: their checkpoints.

    Returns:
        For each: M parameters, and the median seconds of a training step and of a test image.
    """
    models = []
    for cfg, checkpoint in zip(cfgs, weights, strict=True):
        model = trainer_of(cfg).build_model(cfg)
        DetectionCheckpointer(model).load(str(checkpoint))
        models.append(model)
    tests = [test_step(cfg, model) for cfg, model in zip(cfgs, models, strict=True)]
    image_seconds = by_turns(tests, TIMED_IMAGES)  # first: the steps change the weights
    steps = [train_step(cfg, model) for cfg, model in zip(cfgs, models, strict=True)]
    with EventStorage():
        step_seconds = by_turns(steps, TIMED_STEPS)
    return [
        {
            "M parameters": sum(p.numel() for p in model.parameters()) / 1e6,
            "seconds per training step": step_seconds[i].median,
            "seconds per test image": image_seconds[i].median,
        }
        for i, model in enumerate(models)
    ]


def train_step(cfg: CfgNode, model: torch.nn.Module) -> Callable[[int], None]:
    """Make the function that trains one step, the i-th on the same images for every model."""
    mapper = trainer_of(cfg).build_mapper(cfg, is_train=True)
    records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN)
    optimizer = trainer_of(cfg).build_optimizer(cfg, model)
    size = cfg.SOLVER.IMS_PER_BATCH

    def step(i: int) -> None:
        losses = model.train()(
            [mapper(records[(i * size + j) % len(records)]) for j in range(size)]
        )
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    return step


def test_step(cfg: CfgNode, model: torch.nn.Module) -> Callable[[int], None]:
    """Make the function that finds the people of the i-th test image."""
    mapper = DatasetMapper(cfg, is_train=False)
    records = get_detection_dataset_dicts(cfg.DATASETS.TEST, filter_empty=False)

    def step(i: int) -> None:
        with torch.inference_mode():
            model.eval()([mapper(records[i % len(records)])])

    return step


def write_people_report(
    stem: Path,
    num_images: dict[int, int],
    aps: dict[str, ApByPeople],
    costs: dict[str, dict[str, float]],
    data: str,
) -> None:
    """Add to ``stem.md``, and write ``stem_people.{csv,png}``.

    Args:
        stem: path of the report without its suffix.
        num_images: number of test images by number of persons.
        aps: for each model its AP by number of persons.
        costs: for each model what :func:`measure` says; may lack a model that has no weights.
        data: what the AP was measured on.
    """
    header = ["persons in the image", "images", *aps]
    rows = [
        [people_label(n), str(images), *(figure(ap[n]) for ap in aps.values())]
        for n, images in num_images.items()
    ]
    parts = [
        "## AP by the number of persons in the image",
        markdown_table(header, rows),
        f"![AP by the number of persons]({stem.name}_people.png)",
    ]
    if costs:
        keys = list(next(iter(costs.values())))
        parts += [
            "## Cost",
            markdown_table(
                ["", *keys], [[name, *(f"{c[k]:.3g}" for k in keys)] for name, c in costs.items()]
            ),
            f"Medians of {TIMED_STEPS} steps and {TIMED_IMAGES} images, the models taking turns on "
            "the same images; reading the images is counted.",
        ]
    with stem.with_suffix(".md").open("a") as file:
        file.write("\n" + "\n\n".join(parts) + "\n")
    with stem.with_name(f"{stem.name}_people.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "persons", "images", "AP of each seed"])
        for name, ap in aps.items():
            writer.writerows([name, people_label(n), num_images[n], *ap[n]] for n in num_images)
    plot_people(stem.with_name(f"{stem.name}_people.png"), num_images, aps, data)


def people_label(count: int) -> str:
    """A number of persons as text."""
    return f"{count} or more" if count == MAX_PEOPLE else str(count)


def plot_people(
    path: Path, num_images: dict[int, int], aps: dict[str, ApByPeople], data: str
) -> None:
    """Plot AP with its spread over the seeds against the number of persons."""
    picture, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for place, (name, ap) in enumerate(aps.items()):
        counts = [n for n in num_images if ap[n]]
        stats = [mean_and_spread(ap[n]) for n in counts]
        at = np.array(counts) + 0.06 * (place - (len(aps) - 1) / 2)  # bars beside each other
        means, spreads = [m for m, _ in stats], [s or 0 for _, s in stats]
        axes.errorbar(at, means, spreads, fmt="o-", capsize=4, label=name)
    labels = [f"{people_label(n)}\n({images} images)" for n, images in num_images.items()]
    axes.set_xticks(list(num_images), labels, fontsize=8)
    axes.set(xlabel="persons in the image", ylabel="keypoint AP", title=f"ours, {data}")
    axes.grid(alpha=0.3)
    axes.legend()
    picture.savefig(path, dpi=100)
    plt.close(picture)
