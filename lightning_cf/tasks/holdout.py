"""Some training samples are held out by the loader's sampler; the loader, its data set and its workers stay."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    StackDataset,
    Subset,
    TensorDataset,
)
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_cf.lightning_api import _is_dataloader_shuffled
from lightning_cf.tasks.part_samplers import Part, PartSampler, Rest
from lightning_cf.tasks.reading import resample
from lightning_cf.tasks.targets import labels_of
from lightning_cf.utilities.randomness import derive_seed, keyed_generator

MOST = 10_000
"""How many samples are held out at most: more judge no better."""

_LISTED = 1_000_000
"""Up to which size all samples of a data set are put in an order."""


@dataclass(frozen=True)
class Split:
    """A loader in two.

    Attributes:
        train: what is left to train on.
        held: what is held out, in order.
        why: why nothing could be held out, where both are the loader itself.
    """

    train: Any
    held: Any
    why: str = ""


def split(loader: Any, share: float, *, name: str, processes: int = 1, classes: bool = True) -> Split:
    """Holds some of a loader's samples out.

    Args:
        loader: as the user made it; it stays as it is.
        share: of the samples.
        name: of the task, which decides which samples.
        processes: over how many Lightning distributes the rest.
        classes: whether the task says its classes; else whole numbers that mostly occur once are no labels.
    """
    why = _unlike_plain(loader)
    if why:
        return Split(loader, loader, why)
    size = len(loader.dataset)
    count = _count(size, share, loader.batch_size, loader.drop_last, processes)
    if count == 0:
        rest = " and drop_last" if loader.drop_last else ""
        return Split(
            loader, loader, f"{size} samples in batches of {loader.batch_size}{rest} cannot spare {share:.0%} of them"
        )
    order = _order(size, count, name)
    found = _labels(loader.dataset)
    spare = [labels for labels in found if len(_held(order, count, [labels])) == count]
    held = _held(order, count, spare or found)  # beside labels, numbers that mostly occur once are none
    if len(held) < count and not classes:
        held = _held(order, count, [])
    if len(held) < count:
        return Split(loader, loader, f"most of its classes have one sample each, so {size} samples cannot spare any")
    train, judge = copy.copy(loader), copy.copy(loader)
    shuffled = isinstance(loader.sampler, RandomSampler)
    generator = getattr(loader.sampler, "generator", None)
    sampler = PartSampler(
        Rest(loader.dataset, held), data_source=loader.dataset, shuffled=shuffled, generator=generator
    )
    resample(train, sampler)
    if processes > 1 and shuffled:
        if _is_dataloader_shuffled(train):
            sampler.shuffled = False  # Lightning's sampler, which comes around it, shuffles
        else:
            sampler.seed = derive_seed("holdout", name)
    resample(judge, PartSampler(Part(loader.dataset, held), data_source=loader.dataset), drop_last=False)
    judge.__dict__["generator"] = None
    for twin in (train, judge):
        twin.__dict__["_iterator"] = None
    return Split(train, judge)


def in_order(loader: Any) -> Any:
    """A loader that gives each of another's samples once, in the data set's order; itself where these are not known."""
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, PartSampler):
        plain: Sampler[int] = PartSampler(sampler.indices, data_source=loader.dataset)
    elif _unlike_plain(loader):
        return loader
    else:
        plain = SequentialSampler(loader.dataset)
    twin = copy.copy(loader)
    resample(twin, plain, drop_last=False)
    twin.__dict__["_iterator"] = None
    return twin


def samples_of(data: Any) -> tuple[Any, ...]:
    """What tells a data set's samples from other ones without a look at them: how many, and which of another set."""
    inner: tuple[Any, ...] = ()
    if isinstance(data, Subset):
        inner = (hash(tuple(map(int, data.indices))), *samples_of(data.dataset))
    return len(data), *inner


def _unlike_plain(loader: Any) -> str:
    """Why a loader's samples are not known to be those of its data set, each once."""
    if not isinstance(loader, DataLoader):
        return f"a {type(loader).__name__} is no DataLoader"
    sampler = loader.sampler
    if isinstance(loader.dataset, IterableDataset):
        return f"its {type(loader.dataset).__name__} is a stream"
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        return "its DataLoader has a batch_sampler or no batches"
    plain = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    )
    if not plain:
        return f"its {type(sampler).__name__} decides what is drawn"
    if any(isinstance(value, _BaseDataLoaderIter) for key, value in vars(loader).items() if key != "_iterator"):
        return f"its {type(loader).__name__} keeps an iterator of its own"
    return ""


def _order(size: int, count: int, name: str) -> list[int]:
    """Samples in the order in which they are held out: all of them, or enough where that would be a long list."""
    generator = keyed_generator("holdout", name, size)
    if size <= _LISTED:
        return torch.randperm(size, generator=generator).tolist()
    return list(dict.fromkeys(torch.randint(size, (2 * count,), generator=generator).tolist()))


def _held(order: list[int], count: int, found: list[list[int]]) -> list[int]:
    """The first samples of an order, sorted; of each class that is known one stays behind to be learned from."""
    left, held = [Counter(labels) for labels in found], list[int]()
    for index in order:
        if len(held) == count:
            break
        if all(rest[labels[index]] > 1 for rest, labels in zip(left, found, strict=True)):
            held.append(index)
            for rest, labels in zip(left, found, strict=True):
                rest[labels[index]] -= 1
    return sorted(held)


def _labels(data: Any) -> list[list[int]]:
    """What may be the label of each sample, where a data set has such at hand: no sample is read for it."""
    if isinstance(data, Subset):
        return [[labels[int(index)] for index in data.indices] for labels in _labels(data.dataset)]
    if isinstance(data, ConcatDataset):
        parts = [_labels(part) for part in data.datasets]
        return [list(chain(*each)) for each in zip(*parts, strict=True)] if len({*map(len, parts)}) == 1 else []
    found = (_as_labels(column, data) for column in _columns(data))
    return [labels for labels in found if labels is not None]


def _columns(data: Any) -> Iterator[Any]:
    """Where a data set may have its labels; the first of several tensors is the input."""
    if isinstance(data, TensorDataset):
        yield from data.tensors[1:]
    if isinstance(data, StackDataset):
        yield from data.datasets.values() if isinstance(data.datasets, dict) else data.datasets[1:]
    for name in ("targets", "labels"):
        try:
            column = getattr(data, name)
        except Exception:  # whatever a user's property raises
            continue
        yield column


def _as_labels(column: Any, data: Any) -> list[int] | None:
    """Whole numbers, a column of them or one-hot rows as labels, one for each sample of a data set; else None."""

    def read(part: Any) -> Tensor | None:
        values = torch.as_tensor(part)
        values = values.long() if values.dtype == torch.bool else values
        return labels_of(values, values.shape[1] if values.ndim == 2 else None, ())

    try:
        labels = None if read(column[:1]) is None else read(column)  # what is large is no label at its first sample
        return labels.tolist() if labels is not None and len(labels) == len(data) else None
    except Exception:  # whatever torch raises on what a user has there
        return None


def _count(size: int, share: float, batch: int, drop_last: bool, processes: int) -> int:
    """How many samples to hold out: about that share, such that what is left makes batches like those of all.

    A last batch of one sample, which BatchNorm cannot take, comes only where the loader has one by itself; and
    ``drop_last`` must not drop half of the batches.
    """

    def ragged(samples: int) -> bool:
        return not drop_last and batch > 1 and -(-samples // processes) % batch == 1

    def enough(samples: int) -> bool:
        before, after = (-(-n // processes) // batch for n in (size, samples))
        return not drop_last or 2 * after > before or before == 0

    wanted = min(int(size * share), MOST)
    near = range(max(1, wanted - processes - 1), min(size, wanted + processes + 2))
    for count in sorted(near, key=lambda n: (abs(n - wanted), n)) if wanted else ():
        if (ragged(size) or not ragged(size - count)) and enough(size - count):
            return count
    return 0
