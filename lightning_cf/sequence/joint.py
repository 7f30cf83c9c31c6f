"""All tasks at once: the upper bound that sequential training is measured against."""

from __future__ import annotations

import traceback
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from lightning_cf.errors import ContinualError, DataWarning, warn
from lightning_cf.lightning_api import LightningDataModule, LightningModule
from lightning_cf.ownership.output_view import OutputView
from lightning_cf.tasks.part_samplers import PartSampler
from lightning_cf.tasks.targets import left_out, strange
from lightning_cf.tasks.task import Task

_KNOWN = (PartSampler, RandomSampler, SequentialSampler, SubsetRandomSampler)
"""Samplers that draw each of their samples once a pass, in some order."""


class JointTask(LightningDataModule):
    """The training data of all tasks, shuffled together; tells the output view which task each sample is of.

    Args:
        tasks: whose data to join; their loaders must be DataLoaders over map-style data sets.
        view: a view of all tasks' outputs, in the same order, or None where outputs are not masked.
    """

    name = "joint"

    def __init__(self, tasks: Sequence[Task], view: OutputView | None) -> None:
        super().__init__()
        self.tasks, self.view = list(tasks), view
        self.loaders = [task.train_dataloader() for task in tasks]
        for task, loader in zip(tasks, self.loaders, strict=True):
            data = loader.dataset if isinstance(loader, DataLoader) else None
            if not hasattr(data, "__getitem__") or isinstance(data, IterableDataset):
                raise ContinualError(
                    f"method='joint' mixes the samples of all tasks, but task '{task.name}' gives no DataLoader over a"
                    " map-style data set."
                )
            if loader.batch_size is None:
                raise ContinualError(
                    f"method='joint' draws batches over all tasks itself, but the DataLoader of task '{task.name}' has"
                    " a batch_sampler or no batches. Give it a batch_size."
                )
            if not isinstance(loader.sampler, _KNOWN):
                warn(
                    f"method='joint' draws each sample of all tasks once an epoch itself, so the"
                    f" {type(loader.sampler).__name__} of task '{task.name}' decides nothing there.",
                    DataWarning,
                )

    def train_dataloader(self) -> DataLoader[Any]:
        """Samples of all tasks in batches of the first task's size."""
        first = self.loaders[0]
        return DataLoader(
            _Numbered([_drawn(loader) for loader in self.loaders]),
            batch_size=first.batch_size,
            shuffle=True,
            num_workers=first.num_workers,
            collate_fn=partial(_joined, [loader.collate_fn for loader in self.loaders]),
            drop_last=first.drop_last,
        )

    def on_before_batch_transfer(self, batch: tuple[Any, torch.Tensor], dataloader_idx: int) -> Any:
        """Takes the task numbers off the batch and hands them to the view.

        Raises:
            ContinualError: for labels that are no classes of the task that they come from.
        """
        samples, tasks = batch
        self._check_labels(samples, tasks)
        if self.view is not None:
            self.view.mix(tasks)
        return samples

    def _check_labels(self, samples: Any, tasks: torch.Tensor) -> None:
        for number, task in enumerate(self.tasks):
            labels = task.task_loaders.labels_of(samples)
            if task.classes is None or labels is None or len(labels) != len(tasks):
                continue
            found = strange(labels[tasks == number], task.classes, left_out(task, self._module))
            if found:
                raise ContinualError(
                    f"Task '{task.name}' declares classes {task.classes}, but its training data holds label {found[0]};"
                    " correct classes=[...] or the data."
                )

    @property
    def _module(self) -> LightningModule | None:
        return None if self.trainer is None else self.trainer.lightning_module


@contextmanager
def blaming_joint_batches(module: LightningModule) -> Iterator[None]:
    """Says of a training step that fails before anything trained what is different when all tasks train together.

    Raises:
        ContinualError: in its place.
    """
    try:
        yield
    except ContinualError:
        raise
    except Exception as error:  # whatever a user's training step raises
        inside = any(frame.name == "training_step" for frame in traceback.extract_tb(error.__traceback__))
        if not inside or module.trainer.global_step > 0:
            raise
        raise ContinualError(
            f"method='joint' trains on samples of all tasks in one batch, and trainer.datamodule is none of them then"
            f" (its name is '{JointTask.name}'). The training step of {type(module).__name__} cannot take the first of"
            f" these batches: {type(error).__name__}: {error}. Leave joint training out, or let the training step run"
            " each sample as its label says, without asking which task it is."
        ) from error


def _drawn(loader: DataLoader[Any]) -> Dataset[Any]:
    """A loader's data set, less what its sampler leaves out."""
    sampler = loader.sampler
    if isinstance(sampler, (PartSampler, SubsetRandomSampler)):
        return Subset(loader.dataset, list(sampler.indices))
    return loader.dataset


class _Numbered(Dataset[Any]):
    """Samples of several data sets, with the number of the data set that they are of."""

    def __init__(self, datasets: Sequence[Dataset[Any]]) -> None:
        self.joined: ConcatDataset[Any] = ConcatDataset(datasets)

    def __len__(self) -> int:
        return len(self.joined)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, int, Any]]:
        """By data set: its number, how many of the samples are its, and these, fetched as torch's loader does."""
        ends, parts = self.joined.cumulative_sizes, []
        own: dict[int, list[int]] = {}
        for index in indices:
            number = bisect_right(ends, index)
            own.setdefault(number, []).append(index - (ends[number - 1] if number else 0))
        for number, places in own.items():
            data = self.joined.datasets[number]
            several = getattr(data, "__getitems__", None)
            parts.append((number, len(places), several(places) if several else [data[place] for place in places]))
        return parts


def _joined(collate: Sequence[Callable[[Any], Any]], parts: list[tuple[int, int, Any]]) -> tuple[Any, torch.Tensor]:
    """A batch of all parts, and the number of each sample's data set.

    Data sets that give lists of samples are collated together, as one task's would be; those that give whole batches
    one by one.
    """
    numbers = torch.cat([torch.full((count,), number) for number, count, _ in parts])
    if all(isinstance(part, list) for _, _, part in parts):
        return collate[0]([sample for _, _, part in parts for sample in part]), numbers
    leaves, shapes = zip(*(tree_flatten(collate[number](part)) for number, _, part in parts), strict=True)
    return tree_unflatten([torch.cat(values) for values in zip(*leaves, strict=True)], shapes[0]), numbers
