"""All tasks at once: the upper bound that sequential training is measured against."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from lightning_cf.errors import ContinualError
from lightning_cf.outputs import OutputView
from lightning_cf.tasks import Task


class JointTask(LightningDataModule):
    """The training data of all tasks, shuffled together; tells the output view which task each sample is of.

    Args:
        tasks: whose data to join; their loaders must be DataLoaders over map-style data sets.
        view: a view of all tasks' outputs, in the same order, or None where outputs are not masked.
    """

    name = "joint"

    def __init__(self, tasks: Sequence[Task], view: OutputView | None) -> None:
        super().__init__()
        self.view = view
        self.loaders = [task.train_dataloader() for task in tasks]
        for task, loader in zip(tasks, self.loaders, strict=True):
            if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__getitem__"):
                raise ContinualError(
                    f"method='joint' mixes the samples of all tasks, but task '{task.name}' gives no DataLoader over a"
                    " map-style data set."
                )

    def train_dataloader(self) -> DataLoader[Any]:
        """Samples of all tasks in batches of the first task's size."""
        first = self.loaders[0]
        collate = first.collate_fn

        def collate_with_task(samples: list[tuple[Any, int]]) -> tuple[Any, torch.Tensor]:
            batch, task = zip(*samples, strict=True)
            return collate(list(batch)), torch.tensor(task)

        return DataLoader(
            _Numbered([loader.dataset for loader in self.loaders]),
            batch_size=first.batch_size,
            shuffle=True,
            num_workers=first.num_workers,
            collate_fn=collate_with_task,
            drop_last=first.drop_last,
        )

    def on_before_batch_transfer(self, batch: tuple[Any, torch.Tensor], dataloader_idx: int) -> Any:
        """Takes the task numbers off the batch and hands them to the view."""
        samples, tasks = batch
        if self.view is not None:
            self.view.view_of_sample = tasks
        return samples


class _Numbered(Dataset[tuple[Any, int]]):
    """Samples of several data sets, each with the number of its data set."""

    def __init__(self, datasets: Sequence[Dataset[Any]]) -> None:
        self.joined: ConcatDataset[Any] = ConcatDataset(datasets)

    def __len__(self) -> int:
        return len(self.joined)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.joined[index], bisect_right(self.joined.cumulative_sizes, index)
