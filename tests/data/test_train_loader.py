"""Order and random numbers of training data; images that cannot be read."""

import random
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import TrainingSampler

from inspose_d2.data.images import ImageError
from inspose_d2.data.train_loader import TrainingBatches, build_train_loader, mix


def make_dataset(n: int) -> list[dict[str, Any]]:
    # Every third image is tall.
    return [{"image_id": i, "width": 4, "height": 6 if i % 3 == 0 else 3} for i in range(n)]


def draw(image: dict[str, Any]) -> dict[str, Any]:
    """A mapper that takes random numbers from all three sources."""
    numbers = (np.random.rand(), random.random(), torch.rand(()).item())
    return image | {"numbers": numbers}


def take(n: int, start: int = 0, **settings: Any) -> list[Any]:
    made = {"batch_size": 2, "seed": 5, "num_workers": 0, "group": True, **settings}
    loader = build_train_loader(make_dataset(20), draw, **made)
    loader.batch_sampler.start = start
    return list(islice(loader, n))


def ids(batches: Sequence[Sequence[dict[str, Any]]]) -> list[list[int]]:
    return [[image["image_id"] for image in batch] for batch in batches]


@pytest.mark.parametrize("group", [True, False])
def test_order_is_detectron2s(group: bool) -> None:
    theirs = build_detection_train_loader(
        make_dataset(20),
        mapper=lambda image: image,
        sampler=TrainingSampler(20, seed=5),
        total_batch_size=2,
        aspect_ratio_grouping=group,
        num_workers=0,
    )
    assert ids(take(40, group=group)) == ids(list(islice(theirs, 40)))


@pytest.mark.fault
@pytest.mark.parametrize("num_workers", [0, 2])
def test_later_start_gives_the_same_images_and_random_numbers(num_workers: int) -> None:
    assert take(8, num_workers=num_workers)[5:] == take(3, start=5)


@pytest.mark.fault
def test_seed_changes_order_and_numbers() -> None:
    assert ids(take(4)) != ids(take(4, seed=6))
    numbers = {x["numbers"] for seed in (5, 6) for batch in take(9, seed=seed) for x in batch}
    assert len(numbers) == 36


def test_random_numbers_outside_are_left_alone() -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(2), np.random.rand(2)
    torch.manual_seed(3)
    np.random.seed(3)
    first = torch.rand(1), np.random.rand(1)
    take(2)
    assert torch.equal(torch.cat([first[0], torch.rand(1)]), expected[0])
    assert np.array_equal(np.concatenate([first[1], np.random.rand(1)]), expected[1])


def test_workers_share_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    one = [sample for batch in islice(make_batches(1), 6) for sample in batch]
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        shares.append([sample for batch in islice(make_batches(1), 3) for sample in batch])
    assert [sample for pair in zip(*shares, strict=True) for sample in pair] == one


def make_batches(batch_size: int) -> TrainingBatches:
    return TrainingBatches([False] * 20, batch_size, 5, group=False)


def test_mix_depends_on_each_number() -> None:
    seeds = {mix(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**32 for seed in seeds)


class Unreadable:
    """A mapper for which some images are broken, and which skips others."""

    def __init__(self, broken: set[int], skipped: set[int] = frozenset()) -> None:
        self.broken, self.skipped = broken, skipped

    def __call__(self, image: dict[str, Any]) -> dict[str, Any] | None:
        if image["image_id"] in self.broken:
            raise ImageError(f"{image['image_id']}.jpg (image id {image['image_id']}): cut off")
        return None if image["image_id"] in self.skipped else image


@pytest.mark.fault
@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_image_is_replaced_and_logged_once(
    num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    def run(start: int) -> list[list[int]]:
        mapper = Unreadable({3}, skipped={5})
        made = {"batch_size": 4, "seed": 1, "group": False, "num_workers": num_workers}
        loader = build_train_loader(make_dataset(100), mapper, **made)
        loader.batch_sampler.start = start
        return ids(list(islice(loader, 60 - start)))

    batches = run(0)  # each image twice
    seen = {i for batch in batches for i in batch}
    assert seen == set(range(100)) - {3, 5}
    assert all(len(batch) == 4 for batch in batches)
    if num_workers == 0:  # loader processes log to their own standard error
        warnings = [r.message for r in caplog.records if "left out" in r.message]
        assert warnings == ["left out an image: 3.jpg (image id 3): cut off"]
    assert run(40) == batches[40:]  # its substitute is the same after a resume


@pytest.mark.fault
@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_than_one_percent_of_unreadable_images_stops(num_workers: int) -> None:
    mapper = Unreadable({3, 4})
    made = {"batch_size": 4, "seed": 1, "group": False, "num_workers": num_workers}
    loader = build_train_loader(make_dataset(100), mapper, **made)
    message = r"2 of 100 training images cannot be read, more than 1%; the last one: [34]\.jpg"
    with pytest.raises(ImageError, match=message) as failure:
        list(islice(loader, 200))
    # Its frames hold the processes, which the garbage collector would wait for in another test.
    failure.value.__traceback__ = None
    del failure
