"""What a batch's targets are, and whether predictions and targets can be scored at all."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_cf.errors import ContinualError

if TYPE_CHECKING:
    from lightning_cf.tasks import Task

IGNORED = -100
"""The label that torch's losses leave out by default; no class has it."""

_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss)


def one_hot_labels(target: Any) -> Int64[Tensor, "samples"] | None:
    """The label of each row that holds a single one and else zeros; None where a row is anything else.

    >>> one_hot_labels(torch.tensor([[0., 1.], [1., 0.]])).tolist()
    [1, 0]
    >>> one_hot_labels(torch.tensor([[0., 1.], [1., 1.]])) is None
    True
    """
    if not isinstance(target, Tensor) or target.ndim != 2 or target.shape[1] < 2 or target.numel() == 0:
        return None
    ones = target == 1
    exact = (ones | (target == 0)).all() & (ones.sum(dim=1) == 1).all()
    return ones.long().argmax(dim=1) if bool(exact) else None


def labels_of(batch: Any, columns: int | None = None) -> Int64[Tensor, "samples"] | None:
    """The labels of a batch of (input, target) pairs; None where its targets are no labels, one a sample.

    Args:
        batch: of a loader.
        columns: how many outputs there are: targets that are one-hot rows of so many numbers are labels too.
    """
    target = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    if not isinstance(target, Tensor):
        return None
    if target.ndim == 2 and target.shape[1] == columns:
        return one_hot_labels(target)
    whole = not target.is_floating_point() and not target.is_complex() and target.dtype != torch.bool
    return target.long() if whole and target.ndim == 1 else None


def left_out(task: Task, module: nn.Module | None = None) -> set[int]:
    """Labels that are no class but may be there: what the task's metric or the module's losses ignore."""
    found = {IGNORED}
    losses = [] if module is None else [m for m in module.modules() if isinstance(m, _LOSSES)]
    owners: list[nn.Module] = [*([] if task.metric is None else task.metric.modules()), *losses]
    for owner in owners:
        ignored = getattr(owner, "ignore_index", None)
        if isinstance(ignored, int):
            found.add(ignored)
    return found


def strange(labels: Int64[Tensor, "_"], classes: Collection[int], besides: Collection[int]) -> list[int]:
    """Labels that are no class of the task and are not left out, in order."""
    return sorted(set(labels.tolist()) - set(classes) - set(besides))


def finite(batch: Any) -> bool:
    """Whether all numbers of a batch are finite."""
    numbers = (x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.is_floating_point())
    return all(bool(x.isfinite().all()) for x in numbers)


def check_pair(task: Task, predictions: Any, target: Any) -> None:
    """Raises ContinualError if what a task's ``evaluate`` gave is no pair of tensors."""
    for what, value in (("predictions", predictions), ("targets", target)):
        if not isinstance(value, Tensor):
            raise ContinualError(
                f"Task '{task.name}': its evaluate gives {what} of type {type(value).__name__}, not a tensor."
            )


def check_for_accuracy(task: Task, predictions: Tensor, target: Tensor) -> None:
    """Raises ContinualError where the share of right classes, the default metric, says nothing."""
    shapes = f"predictions {list(predictions.shape)} and targets {list(target.shape)} of {target.dtype}"
    way = "Give the task metric=..., or evaluate=lambda module, batch: (predictions, target) with labels as targets."
    if target.is_floating_point() or target.is_complex():
        kind = "are rows of numbers (soft or multi-label)" if target.ndim > 1 else "are numbers"
        raise ContinualError(
            f"Task '{task.name}': its targets {kind}, and the default metric counts right classes, which of {shapes}"
            f" would be meaningless. {way}"
        )
    if predictions.ndim < 2 or predictions.shape[:1] + predictions.shape[2:] != target.shape:
        raise ContinualError(
            f"Task '{task.name}': the default metric counts right classes, for which {shapes} do not fit each other: it"
            f" needs one label a row of outputs. {way}"
        )


def check_labels(task: Task, target: Tensor, besides: Collection[int], where: str) -> None:
    """Raises ContinualError for a label that is no class of the task.

    Args:
        task: with classes.
        target: labels.
        besides: what may be there too.
        where: the data and the batch.
    """
    found = strange(target.flatten(), task.classes or [], besides)
    if found:
        raise ContinualError(
            f"Task '{task.name}' declares classes {task.classes}, but {where} holds label {found[0]}; correct"
            " classes=[...] or the data. A label that counts for nothing is one of the metric's:"
            " metric=MulticlassAccuracy(..., ignore_index=LABEL)."
        )


def check_finite(task: Task, batch: Any, predictions: Tensor, target: Tensor, where: str) -> None:
    """Raises ContinualError for predictions or targets that are not finite: a metric takes them for a class.

    Infinity below is what a masked output has, as long as another of the sample's outputs is finite.
    """
    ignored = left_out(task)
    counted = torch.ones((), dtype=torch.bool, device=predictions.device)
    by_class = predictions.ndim > 1 and predictions.shape[:1] + predictions.shape[2:] == target.shape
    if by_class and not target.is_floating_point():
        for label in ignored:
            counted = counted & (target != label).unsqueeze(1)
    bad = predictions.isnan() | (predictions == torch.inf)
    if predictions.ndim > 1:
        bad = bad | predictions.isinf().all(dim=1, keepdim=True)
    elif predictions.is_floating_point():
        bad = bad | predictions.isinf()
    if bool((bad & counted).any()):
        inputs = any(
            isinstance(x, Tensor) and x.is_floating_point() and not bool(x.isfinite().all()) for x in tree_leaves(batch)
        )
        cause = " The batch itself holds NaN or infinity: clean the data." if inputs else ""
        raise ContinualError(
            f"Task '{task.name}': predictions for {where} are NaN or infinite, so that no score of them means"
            f" anything.{cause}"
        )
    if target.is_floating_point() and not bool(target.isfinite().all()):
        raise ContinualError(f"Task '{task.name}': targets of {where} are NaN or infinite: clean the data.")
