"""What a batch's targets are, and whether predictions and targets can be scored at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Int64, Integer
from torch import Tensor, nn

from lightning_cf.errors import ContinualError
from lightning_cf.network.finite import stored
from lightning_cf.network.forward import tensors_of
from lightning_cf.tasks.declared import Declared

IGNORED = -100
"""The label that torch's losses leave out by default; no class has it."""

Place = tuple[Any, ...]
"""Where in a batch something is: keys and numbers, from the outside inward."""

_MASK = torch.finfo(torch.float16).min / 8
"""What masks an output is no higher, in whatever precision, also where several heads share it."""

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


def labels_of(batch: Any, columns: int | None = None, place: Place | None = None) -> Int64[Tensor, "samples"] | None:
    """The labels of a batch; None where its targets are no labels, one a sample.

    Args:
        batch: of a loader.
        columns: how many outputs there are: targets that are one-hot rows of so many numbers are labels too.
        place: where in a batch the targets are; default the second of a pair.
    """
    target = part_at(batch, place)
    if not isinstance(target, Tensor):
        return None
    if target.ndim == 2 and target.shape[1] == columns and columns > 1:
        return one_hot_labels(target)
    whole = not target.is_floating_point() and not target.is_complex() and target.dtype != torch.bool
    single = target.ndim == 1 or (target.ndim == 2 and target.shape[1] == 1)
    return target.long().flatten() if whole and single else None


def place_of(target: Tensor, batch: Any) -> Place | None:
    """Where in a batch a tensor comes from, as it is or in another shape; None where it was computed.

    >>> labels = torch.tensor([[0], [1]])
    >>> place_of(labels.squeeze(1), {"x": torch.zeros(2, 3), "labels": labels})
    ('labels',)
    """
    if isinstance(batch, Tensor):
        plain = batch.layout == target.layout == torch.strided  # a sparse one has no place in memory of its own
        same = plain and batch.data_ptr() == target.data_ptr() and batch.dtype == target.dtype
        return () if same and batch.numel() == target.numel() > 0 else None
    for key, part in _parts(batch):
        found = place_of(target, part)
        if found is not None:
            return (key, *found)
    return None


def _parts(batch: Any) -> list[tuple[Any, Any]]:
    """What a batch is made of, by key or number; nothing of what is no container."""
    if dataclasses.is_dataclass(batch):
        return [(field.name, getattr(batch, field.name)) for field in dataclasses.fields(batch)]
    if callable(getattr(batch, "keys", None)) and hasattr(batch, "__getitem__"):  # a mapping, or a graph
        return [(key, batch[key]) for key in batch.keys()]  # noqa: SIM118
    return list(enumerate(batch)) if isinstance(batch, (tuple, list)) else []


def part_at(batch: Any, place: Place | None) -> Any:
    """What is at a place of a batch, if it has such a place; without one the second of a pair."""
    if place is None:
        return batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    for key in place:
        batch = dict(_parts(batch)).get(key)
    return batch


def unreachable(predictions: Tensor, target: Tensor, classes: Collection[int], besides: Collection[int]) -> list[int]:
    """Labels that predictions can never name: they have no column for them, or one that is masked throughout.

    >>> shown = torch.tensor([[0.5, 1.0, torch.finfo().min]])
    >>> labels = torch.tensor([1, 2, 3])
    >>> unreachable(shown, labels, [0, 1], []), unreachable(shown.sigmoid(), labels[:2], [0, 1], [])
    ([2, 3], [2])

    Args:
        predictions: a column a class, as numbers or as probabilities.
        target: labels.
        classes: of the task; a column of these may be zero throughout without being masked.
        besides: labels that count for nothing.
    """
    columns = predictions.detach().movedim(1, 0).flatten(1)
    lowest, highest = columns.amin(dim=1), columns.amax(dim=1)
    masked = (highest == lowest) & (highest <= _MASK) | (highest == -torch.inf)
    if bool((lowest >= 0).all()):
        zero = (highest == 0).nonzero().flatten().tolist()
        masked[[column for column in zero if column not in classes]] = True
    return strange(target.flatten(), (~masked).nonzero().flatten().tolist(), besides)


def left_out(task: Declared, module: nn.Module | None = None) -> set[int]:
    """Labels that are no class but may be there: what the task's metric or the module's losses ignore."""
    found = {IGNORED}
    losses = [] if module is None else [m for m in module.modules() if isinstance(m, _LOSSES)]
    owners: list[nn.Module] = [*([] if task.metric is None else task.metric.modules()), *losses]
    for owner in owners:
        ignored = getattr(owner, "ignore_index", None)
        if isinstance(ignored, int):
            found.add(ignored)
    return found


def strange(labels: Integer[Tensor, "_"], classes: Collection[int], besides: Collection[int]) -> list[int]:
    """Labels that are no class of the task and are not left out, in order."""
    return sorted(set(labels.tolist()) - set(classes) - set(besides))


def renumbered(task: Declared, labels: Int64[Tensor, "samples"] | None, target: Tensor) -> bool:
    """Whether targets are classes of the task, and the labels of the batch that they are computed from are not."""
    if task.classes is None or labels is None or target.is_floating_point():
        return False
    ignored = left_out(task)
    return bool(strange(labels, task.classes, ignored)) and not strange(target.flatten(), task.classes, ignored)


def finite(batch: Any) -> bool:
    """Whether all numbers of a batch are finite."""
    numbers = (x for x in tensors_of(batch) if x.is_floating_point())
    return all(bool(stored(x).isfinite().all()) for x in numbers)


def checked_pair(task: Declared, found: Any) -> tuple[Tensor, Tensor]:
    """What a task's ``evaluate`` gave.

    Raises:
        ContinualError: if that is no pair of tensors.
    """
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        kind = f"{len(found)} things" if isinstance(found, (tuple, list)) else f"a {type(found).__name__}"
        raise ContinualError(
            f"Task '{task.name}': its evaluate gives {kind}, not two tensors; let it return (predictions, target)."
        )
    for what, value in zip(("predictions", "targets"), found, strict=True):
        if not isinstance(value, Tensor):
            raise ContinualError(
                f"Task '{task.name}': its evaluate gives {what} of type {type(value).__name__}, not a tensor."
            )
    return found[0], found[1]


def check_for_accuracy(task: Declared, predictions: Tensor, target: Tensor) -> None:
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


def check_labels(task: Declared, target: Tensor, besides: Collection[int], where: str) -> None:
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


def check_finite(task: Declared, batch: Any, predictions: Tensor, target: Tensor, where: str) -> None:
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
        cause = "" if finite(batch) else " The batch itself holds NaN or infinity: clean the data."
        raise ContinualError(
            f"Task '{task.name}': predictions for {where} are NaN or infinite, so that no score of them means"
            f" anything.{cause}"
        )
    if target.is_floating_point() and not bool(target.isfinite().all()):
        raise ContinualError(f"Task '{task.name}': targets of {where} are NaN or infinite: clean the data.")
