"""Scores of a module on a task's data, by the task's own metric."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_cf.errors import ContinualError, DataWarning, warn
from lightning_cf.lightning_api import LightningModule
from lightning_cf.network.forward import eval_mode, fresh, in_precision_of
from lightning_cf.tasks.reading import samples_in
from lightning_cf.tasks.targets import (
    IGNORED,
    check_finite,
    check_for_accuracy,
    check_labels,
    checked_pair,
    left_out,
    one_hot_labels,
    place_of,
    renumbered,
    strange,
    unreachable,
)
from lightning_cf.tasks.task import Batches, Task, supervised


def on_device(module: LightningModule, task: Task, batch: Any) -> Any:
    """A batch as a training step would get it: in the network's precision, through the data's or module's hooks.

    What runs on it may change it: the batch stays as it is.
    """
    return transferred(module, task, in_precision_of(module, fresh(batch)))


def transferred(module: LightningModule, task: Task, batch: Any) -> Any:
    """A batch through the data's or the module's hooks, in the precision in which it comes."""
    for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
        owner: Any = task if hook in task.__dict__ else module
        between = (module.device,) if hook == "transfer_batch_to_device" else ()
        batch = getattr(owner, hook)(batch, *between, task.task_loaders.place)
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
    """The task's predictions and targets for a batch, computed in the Trainer's precision, with numbers of 4 bytes.

    Where the default metric counts right classes, targets that are one-hot rows become labels.
    """
    with forward_context(module):
        given = on_device(module, task, batch)
        whole = fresh(given, lambda x: x)  # which an evaluate= that pops leaves as it is
        predictions, target = checked_pair(task, task.evaluate(module, given))
    loaders = task.task_loaders
    if loaders.place_of_targets is None and task.evaluate is not supervised:
        loaders.place_of_targets = place_of(target, whole)
        loaders.renumbered = loaders.renumbered or renumbered(task, loaders.labels_of(batch), target)
    if task.metric is None:
        labels = one_hot_labels(target) if predictions.shape == target.shape else None
        target = target if labels is None else labels
        target = target.long() if target.dtype in (torch.uint16, torch.uint32) else target  # which no metric compares
    half = predictions.dtype in (torch.float16, torch.bfloat16)
    return (predictions.float() if half else predictions).contiguous(), target.contiguous()


def metric_for(task: Task, predictions: Tensor) -> Metric:
    """A fresh metric for the task: its own, or the share of right classes.

    It does not gather over processes: each process scores all of the data, or only the first does.
    """
    metric = (
        task.metric.clone()
        if task.metric is not None
        else MulticlassAccuracy(predictions.shape[1], average="micro", ignore_index=IGNORED)
    )
    metric.reset()
    metric.distributed_available_fn = lambda: False
    return metric.to(predictions.device)


class Scorer:
    """The task's metric over some batches, each of which is looked at before it counts."""

    def __init__(self, module: LightningModule, task: Task, what: str) -> None:
        self.module, self.task, self.what = module, task, what
        self.metric: Metric | None = None
        self.shapes = ""
        self._left_out = left_out(task, module)
        # A metric or an evaluate= of the user's own may make labels into anything.
        self._known = task.metric is None or type(task.metric).__module__.startswith("torchmetrics.")
        self.one_hot = False
        self.apart = False
        self.counted = False

    def add(self, batch: Any, number: int) -> None:
        """Runs the network on a batch, looks at predictions and targets, and adds them to the metric."""
        task, where = self.task, f"batch {number} of {self.what}"
        self.shapes = ""
        predictions, target = predict(self.module, task, batch)
        if task.metric is None:
            check_for_accuracy(task, predictions, target)
        self.one_hot = isinstance(batch, (tuple, list)) and len(batch) == 2 and predictions.shape == _shape(batch[1])
        self.apart = self._targets_apart(batch, target)
        check_finite(task, batch, predictions, target, where)
        if self._known and not target.is_floating_point():
            self._check_labels(batch, predictions, target, where)
        self.counted = self.counted or target.is_floating_point() or bool(strange(target.flatten(), [], self._left_out))
        self.shapes = f" of predictions {list(predictions.shape)} and targets {list(target.shape)}"
        self.metric = self.metric or metric_for(task, predictions)
        self.metric.update(predictions, target)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Says whose evaluate or metric it was, whatever that raises meanwhile."""
        try:
            yield
        except ContinualError:
            raise
        except Exception as error:
            raise self._cannot(error) from error

    def score(self) -> float:
        """What the metric says.

        Raises:
            ContinualError: if there was no batch, or the metric gives several numbers.
        """
        task = self.task
        if self.metric is None:
            raise ContinualError(
                f"Task '{task.name}': no batch came of {self.what}. Give it a validation or test loader that has"
                " samples."
            )
        if not self.counted:
            ignored = ", ".join(map(str, sorted(self._left_out)))
            raise ContinualError(
                f"Task '{task.name}': all labels of {self.what} are left out ({ignored}), so that no score means"
                " anything. Give it data with labels."
            )
        value = self.metric.compute()
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            return float(value)
        if isinstance(value, (int, float)) or (isinstance(value, (np.number, np.ndarray)) and value.size == 1):
            return float(np.asarray(value).item())
        found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ContinualError(
            f"Task '{task.name}': its metric {type(self.metric).__name__} gives {found}, but a partition is judged by"
            " one number. Use a metric that averages, such as average='macro', or one of those in a collection."
        )

    def _cannot(self, error: Exception) -> ContinualError:
        told, said = f"Task '{self.task.name}' cannot be scored:", str(error)
        if isinstance(error, KeyError):
            said = f"KeyError {said}."
        if self.shapes:
            return ContinualError(
                f"{told} {said} That is what its metric says{self.shapes}. Give the task"
                " evaluate=lambda module, batch: (predictions, target) and metric=... that fit each other."
            )
        advice = "Give the task evaluate=lambda module, batch: (predictions, target)."
        if self.task.evaluate is not supervised:
            advice = "It must give predictions and target of a batch, whose shapes are those of its loaders."
        return ContinualError(f"{told} its evaluate says: {said} {advice}")

    def _targets_apart(self, batch: Any, target: Tensor) -> bool:
        """Whether a batch has its labels, one a sample, elsewhere than where they are known to be."""
        if self.task.evaluate is supervised or target.is_floating_point() or target.numel() > samples_in(batch):
            return False
        labels = self.task.task_loaders.labels_of(batch)
        return labels is None or not torch.equal(labels.cpu(), target.flatten().cpu())

    def _check_labels(self, batch: Any, predictions: Tensor, target: Tensor, where: str) -> None:
        """Labels of samples are the task's classes; of pixels and tokens some may be void, which is said."""
        task = self.task
        labels = target if self.one_hot else task.task_loaders.labels_of(batch)
        one_each = labels is not None and labels.numel() == target.numel()
        if one_each and task.classes is not None and task.evaluate is supervised:
            check_labels(task, target, self._left_out, where)
        elif predictions.ndim > 1 and predictions.shape[:1] + predictions.shape[2:] == target.shape:
            self._check_reachable(predictions, target, where, void=not one_each and target.numel() > samples_in(batch))

    def _check_reachable(self, predictions: Tensor, target: Tensor, where: str, *, void: bool) -> None:
        """A label for which the predictions have no output, or one of another task's, is never right."""
        task = self.task
        found = (
            unreachable(predictions, target, task.classes or [], self._left_out)
            if predictions.numel() and predictions.is_floating_point()
            else []
        )
        if not found or found[0] in task._told:
            return
        foreign = task.classes is not None and found[0] not in task.classes
        told = f"Task '{task.name}' declares classes {task.classes}, but" if foreign else f"Task '{task.name}':"
        told += f" {where} holds label {found[0]}"
        if not void:
            way = "correct classes=[...] or the data" if foreign else "let evaluate= number labels as its columns are"
            raise ContinualError(
                f"{told}, for which its predictions of {predictions.shape[1]} columns hold no output of the task's;"
                f" {way}. A label that counts for nothing is one of the metric's:"
                " metric=MulticlassAccuracy(..., ignore_index=LABEL)."
            )
        task._told.add(found[0])
        warn(
            f"{told}, which counts as wrong. If it stands for nothing, give the task"
            f" metric=MulticlassAccuracy(..., ignore_index={found[0]}).",
            DataWarning,
        )


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


@torch.no_grad()
def evaluate(module: LightningModule, task: Task, batches: Batches) -> float:
    """The task's metric over some batches, in eval mode.

    Args:
        module: scored as it stands; which outputs it shows is the caller's business.
        task: whose metric and ``evaluate`` are used.
        batches: what to score on.

    Raises:
        ContinualError: if there is no batch, a label that is no class of the task, a prediction that is not finite, or
            a metric of several numbers.
    """
    scorer = Scorer(module, task, "the data that it is scored on")
    with eval_mode(module), scorer.naming():
        for number, batch in enumerate(batches):
            scorer.add(batch, number)
        return scorer.score()


def judge(module: LightningModule, task: Task) -> float:
    """The task's metric on the data that judges partitions, which must be a finite number.

    Raises:
        ContinualError: if it is not, and as :func:`evaluate`.
    """
    score = evaluate(module, task, task.judging_batches())
    if not math.isfinite(score):
        metric = "accuracy" if task.metric is None else type(task.metric).__name__
        raise ContinualError(
            f"Task '{task.name}': its {metric} is {score} on the data that judges its partition, which nothing can be"
            " judged by. Give it other judging data, or another metric."
        )
    return score


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
            if predictions.ndim < 2:
                return None
            columns = task.classes if max(task.classes) < predictions.shape[1] else range(predictions.shape[1])
            for label in columns:
                metric = metrics.setdefault(label, metric_for(task, predictions))
                constant = torch.zeros_like(predictions)
                constant[:, label] = 1
                metric.update(constant, target)
    scores = [float(metric.compute()) for metric in metrics.values()]
    best = min if task.metric is not None and task.metric.higher_is_better is False else max
    return best(scores)
