"""A task's training data in batches that its ``evaluate`` takes, also where a step gets several loaders' at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lightning_cf.errors import ContinualError
from lightning_cf.lightning_api import LightningModule
from lightning_cf.network.forward import eval_mode
from lightning_cf.tasks.evaluation import predict
from lightning_cf.tasks.loaders import pairs_in
from lightning_cf.tasks.reading import empty
from lightning_cf.tasks.task import Task, supervised
from lightning_cf.utilities.randomness import isolated_generators


@torch.no_grad()
def training_batches(module: LightningModule, task: Task, *, ordered: bool = False) -> Iterator[Any]:
    """The task's training data, in batches that its ``evaluate`` takes.

    ``ordered``: each sample once, in the data set's order, where that can be known; else as a fit draws them.

    Where a training step gets batches of several loaders at once, these are such batches if ``evaluate`` takes them,
    else the (input, target) pairs in them, else validation data.
    """
    loaders = task.task_loaders
    if not loaders.side_by_side:
        yield from loaders.training(ordered=ordered)
        return
    settle(module, task)
    for batch in loaders.judging() if loaders.batches == "val" else loaders.training():
        yield from (pair for pair in pairs_in(batch) if not empty(pair)) if loaders.batches == "pairs" else [batch]


def first_batch(module: LightningModule, task: Task) -> Any:
    """The first of :func:`training_batches`.

    Raises:
        ContinualError: if there is none, or its labels are no classes of the task.
    """
    first = task.check_data()
    return next(iter(training_batches(module, task)), first) if task.task_loaders.side_by_side else first


def settle(module: LightningModule, task: Task) -> None:
    """Finds out what of batches of several loaders the task's ``evaluate`` takes.

    Raises:
        ContinualError: if it takes nothing of them.
    """
    if task.task_loaders.side_by_side and task.task_loaders.batches is None:
        task.task_loaders.batches = _kind_of_batches(module, task)


def _kind_of_batches(module: LightningModule, task: Task) -> str:
    loaders = task.task_loaders
    with eval_mode(module), isolated_generators():
        batch = next(iter(loaders.training()), None)
        pairs = list(pairs_in(batch))
        tries = [("whole", batch)] if task.evaluate is not supervised else []
        tries += [("pairs", pair) for pair in pairs[:1]]
        tries += [("val", next(iter(loaders.judging()), None))] if loaders.validates() else []
        for kind, tried in tries:
            try:
                predict(module, task, tried)
            except Exception:  # whatever a user's evaluate raises on batches that it was not made for
                continue
            return kind
    raise ContinualError(
        f"Task '{task.name}': its training batches hold batches of several loaders ({type(batch).__name__}), which its"
        " evaluate does not take, nor a part of them. Give the task evaluate=lambda module, batch: (predictions,"
        " target) for such batches, or validation data in (input, target) pairs."
    )
