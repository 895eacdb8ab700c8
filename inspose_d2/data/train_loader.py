"""Training data in an order and with random numbers that a seed and a step fix.

What step i sees depends on the seed and on i alone: not on the steps before it, on the number of
loader processes or on what they have read ahead. So a resumed run goes on as if it had never been
interrupted. The order is that of Detectron2's `TrainingSampler`, the batches are those of its
`AspectRatioGroupedDataset`.
"""

import itertools
import logging
import operator
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..workers import guard_loader
from .coco_file import MAX_UNREADABLE
from .images import ImageError

logger = logging.getLogger(__name__)

Sample = tuple[int, int]  # index of an image, position in the order of all workers


class TrainingBatches(Sampler[list[Sample]]):
    """Batches of this worker, endless; all of wide images or all of tall ones, where asked.

    Attributes:
        seed: of the order.
        start: number of batches to leave out, for a run that is resumed.
    """

    def __init__(self, is_wide: Sequence[bool], batch_size: int, seed: int, *, group: bool) -> None:
        """Take what the batches are made from.

        Args:
            is_wide: of each image of the data set.
            batch_size: images of a batch.
            seed: the same on all workers.
            group: whether a batch is all wide or all tall.
        """
        self.is_wide = is_wide
        self.batch_size = batch_size
        self.seed = seed
        self.group = group
        self.start = 0

    def __iter__(self) -> Iterator[list[Sample]]:
        return itertools.islice(self._batches(), self.start, None)

    def _batches(self) -> Iterator[list[Sample]]:
        positions = itertools.count(comm.get_rank(), comm.get_world_size())
        waiting: tuple[list[Sample], list[Sample]] = ([], [])
        indices = TrainingSampler(len(self.is_wide), seed=self.seed)
        for index, position in zip(indices, positions, strict=False):
            batch = waiting[self.group and self.is_wide[index]]
            batch.append((index, position))
            if len(batch) == self.batch_size:
                yield batch[:]
                batch.clear()


class TrainingImages(Dataset[dict[str, Any]]):
    """Mapped images by :data:`Sample`; another one in place of one that cannot be read."""

    def __init__(
        self,
        dataset: Sequence[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], dict[str, Any] | None],
        batches: TrainingBatches,
    ) -> None:
        """Take what is read.

        Args:
            dataset: Detectron2's dicts.
            mapper: makes a sample of one of them; None takes another image.
            batches: has the seed that random numbers begin from.
        """
        self.dataset = dataset
        self.mapper = mapper
        self.batches = batches
        self.unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: Sample) -> dict[str, Any]:
        """Map an image.

        Raises:
            ImageError: more than `MAX_UNREADABLE` of the images cannot be read, as far as this
                process has met them.
        """
        index, position = sample
        with _seeded(self.batches.seed, position):
            while True:
                try:
                    mapped = self.mapper(self.dataset[index])
                except ImageError as error:
                    self._count(index, error)
                else:
                    if mapped is not None:
                        return mapped
                index = np.random.randint(len(self.dataset))

    def _count(self, index: int, error: ImageError) -> None:
        if index not in self.unreadable:
            logger.warning("left out an image: %s", error)
        self.unreadable.add(index)
        if len(self.unreadable) > MAX_UNREADABLE * len(self.dataset):
            raise ImageError(
                f"{len(self.unreadable)} of {len(self.dataset)} training images cannot be read, "
                f"more than {MAX_UNREADABLE:.0%}; the last one: {error}"
            ) from error


def build_train_loader(
    dataset: Sequence[dict[str, Any]],
    mapper: Callable[[dict[str, Any]], dict[str, Any] | None],
    *,
    batch_size: int,
    seed: int,
    num_workers: int,
    group: bool,
) -> DataLoader[dict[str, Any]]:
    """Build the loader of this worker.

    Args:
        dataset: Detectron2's dicts, as ``get_detection_dataset_dicts`` gives them.
        mapper: see :class:`TrainingImages`.
        batch_size: images of this worker in a batch.
        seed: the same on all workers.
        num_workers: loader processes.
        group: see :class:`TrainingBatches`.

    Returns:
        Endless batches; ``loader.batch_sampler`` is a :class:`TrainingBatches`.
    """
    is_wide = [image["width"] > image["height"] for image in dataset]
    batches = TrainingBatches(is_wide, batch_size, seed, group=group)
    return guard_loader(
        DataLoader(
            TrainingImages(dataset, mapper, batches),
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=operator.itemgetter(slice(None)),  # the list as it is
            generator=torch.Generator(),  # or it would draw from the global one
        )
    )


def mix(*numbers: int) -> int:
    """Make one seed below 2^32 of several numbers; other numbers, another seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def _seeded(seed: int, position: int) -> Iterator[None]:
    """Begin Python's, NumPy's and torch's random numbers anew, and put them back afterwards."""
    numpy_state, python_state, torch_state = (
        np.random.get_state(),
        random.getstate(),
        torch.get_rng_state(),
    )
    own_seed = mix(seed, position)
    np.random.seed(own_seed)
    random.seed(own_seed)
    torch.random.default_generator.manual_seed(own_seed)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
