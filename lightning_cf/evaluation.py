"""Scores of a module on a task's data, by the task's own metric."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_cf.errors import ContinualError
from lightning_cf.structure import eval_mode, in_precision_of
from lightning_cf.tasks import Batches, Task, supervised


def on_device(module: LightningModule, task: Task, batch: Any) -> Any:
    """A batch as a training step would get it: in the network's precision, through the data's or module's hooks."""
    batch = in_precision_of(module, batch)
    for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
        owner: Any = task if hook in task.__dict__ else module
        between = (module.device,) if hook == "transfer_batch_to_device" else ()
        batch = getattr(owner, hook)(batch, *between, 0)
    return batch


@contextmanager
def forward_context(module: LightningModule) -> Iterator[None]:
    """What the Trainer's precision puts around a forward pass, such as autocast; nothing without a Trainer."""
    trainer = getattr(module, "_trainer", None)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
    with ExitStack() as stack:
        if trainer is not None:
            with trainer.precision_plugin.forward_context():
                converted = torch.get_default_dtype() == dtype
            if converted:  # else the Trainer has not yet given the module its precision
                stack.enter_context(trainer.precision_plugin.forward_context())
        yield


def predict(module: LightningModule, task: Task, batch: Any) -> tuple[Tensor, Tensor]:
    """The task's predictions and targets for a batch, computed in the Trainer's precision, with numbers of 4 bytes."""
    with forward_context(module):
        predictions, target = task.evaluate(module, on_device(module, task, batch))
    half = predictions.dtype in (torch.float16, torch.bfloat16)
    return (predictions.float() if half else predictions).contiguous(), target.contiguous()


def metric_for(task: Task, predictions: Tensor) -> Metric:
    """A fresh metric for the task: its own, or the share of right classes.

    It does not gather over processes: each process scores all of the data, or only the first does.
    """
    metric = (
        task.metric.clone() if task.metric is not None else MulticlassAccuracy(predictions.shape[1], average="micro")
    )
    metric.reset()
    metric.distributed_available_fn = lambda: False
    return metric.to(predictions.device)


@torch.no_grad()
def check_scoring(module: LightningModule, task: Task) -> None:
    """Scores the first batch that judges partitions.

    Raises:
        ContinualError: if that does not work: better now than after training.
    """
    with eval_mode(module), isolate_rng():
        for batch in task.judging_batches():
            shapes = ""
            advice = "Give the task evaluate=lambda module, batch: (predictions, target)."
            if task.evaluate is not supervised:
                advice = "It must give predictions and target of a batch, whose shapes are those of its loaders."
            try:
                predictions, target = predict(module, task, batch)
                shapes = f" of predictions {list(predictions.shape)} and targets {list(target.shape)}"
                metric_for(task, predictions).update(predictions, target)
            except Exception as error:  # whatever a user's evaluate or metric raises
                raise ContinualError(
                    f"Task '{task.name}' cannot be scored: {error} That is what its metric says{shapes}. Give the task"
                    " evaluate=lambda module, batch: (predictions, target) and metric=... that fit each other."
                    if shapes
                    else f"Task '{task.name}' cannot be scored: its evaluate says: {error} {advice}"
                ) from error
            return


@torch.no_grad()
def evaluate(module: LightningModule, task: Task, batches: Batches) -> float:
    """The task's metric over some batches, in eval mode.

    Args:
        module: scored as it stands; which outputs it shows is the caller's business.
        task: whose metric and ``evaluate`` are used.
        batches: what to score on.

    Raises:
        ContinualError: if there is no batch.
    """
    metric: Metric | None = None
    with eval_mode(module):
        for batch in batches:
            predictions, target = predict(module, task, batch)
            metric = metric or metric_for(task, predictions)
            metric.update(predictions, target)
    if metric is None:
        raise ContinualError(f"Task '{task.name}' has no data to score it on; give it a test or validation loader.")
    return float(metric.compute())


@torch.no_grad()
def constant_predictor(
    module: LightningModule, task: Task, batches: Batches, *, shown: AbstractContextManager[Any]
) -> float | None:
    """The best score that one and the same class for every sample reaches; None for a task without classes.

    Args:
        module: gives the shape of predictions.
        task: whose metric and ``evaluate`` are used.
        batches: what to score on.
        shown: shows the task's outputs meanwhile.
    """
    if task.classes is None:
        return None
    metrics: dict[int, Metric] = {}
    with eval_mode(module), shown:
        for batch in batches:
            predictions, target = predict(module, task, batch)
            for label in task.classes:
                metric = metrics.setdefault(label, metric_for(task, predictions))
                constant = torch.zeros_like(predictions)
                constant[:, label] = 1
                metric.update(constant, target)
    scores = [float(metric.compute()) for metric in metrics.values()]
    best = min if task.metric is not None and task.metric.higher_is_better is False else max
    return best(scores)
