"""Looks at the labels of every training batch: a label of another task makes the loss infinite or trains on nothing."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_cf.errors import ContinualError, DataWarning, warn
from lightning_cf.learner.keeping import ledger_of
from lightning_cf.lightning_api import LightningModule, Trainer
from lightning_cf.tasks.loaders import pairs_in
from lightning_cf.tasks.targets import labels_of, left_out, strange
from lightning_cf.tasks.task import Task

_NONE = -1

_CPU = "cpu"
"""Where labels are looked at at once."""


class LabelWatch:
    """Raises ContinualError for training labels that are no classes of the task; warns of classes without any.

    Labels on a GPU are compared there, and what was found is fetched once an epoch, so that no step waits.

    Args:
        module: whose losses may leave labels out.
        task: with classes or without.
    """

    def __init__(self, module: LightningModule, task: Task) -> None:
        self.task = task
        self.known = frozenset({*(task.classes or []), *left_out(task, module)})
        ledger = ledger_of(module)
        self.columns = None if ledger is None else ledger.width
        self.seen = _NONE
        self.missing: set[int] | None = set(task.classes or [])
        """Classes of which no label was found so far; None where that is not known, or was told."""
        self.whole = False
        """Whether any epoch was looked at whole."""
        self._known: Tensor | None = None
        self._found: Tensor | None = None
        self._trained: Tensor | None = None

    def look(self, batch: Any, batch_idx: int, count: int) -> None:
        """Looks at a batch, once for each count of batches."""
        if self.task.classes is None or count == self.seen:
            return
        if self.seen == _NONE and batch_idx != 0:
            self.missing = None  # a fit that goes on in the middle of an epoch
        self.seen = count
        loaders = self.task.task_loaders
        whole = loaders.labels_of(batch, self.columns)
        pairs = [] if loaders.renumbered else pairs_in(batch)
        parts = [whole] if whole is not None else [labels_of(pair, self.columns) for pair in pairs]
        if not parts or any(labels is None for labels in parts):
            self.missing = None
        for labels in parts:
            if labels is None or labels.numel() == 0:
                continue
            if labels.device.type == _CPU:
                found = set(labels.tolist())
                if not found <= self.known:
                    self._refuse(min(found - self.known), batch_idx)
                self.missing = None if self.missing is None else self.missing - found
            else:
                self._note(labels, batch_idx)

    def settle(self, *, whole: bool = False) -> None:
        """Fetches what was found on a GPU.

        Args:
            whole: whether all that there is to train on in an epoch was looked at.
        """
        self.whole |= whole
        if self._found is not None:
            label, batch_idx = self._found.tolist()
            self._found = None
            if batch_idx != _NONE:
                self._refuse(label, batch_idx)

    def tell(self) -> None:
        """Warns, at the end of a fit, of classes that none of its epochs held; not where no epoch was whole."""
        missing = self.missing - self._fetched() if self.whole and self.missing else None
        if not missing:
            return
        self.missing = None
        opened = self.task.task_loaders.opened.get("train")
        held = opened is not None and opened.split.held is not opened.split.train
        way = "its samples may be held out to judge: give the task a validation loader" if held else "look at the data"
        warn(
            f"Task '{self.task.name}' declares classes {self.task.classes}, but no training batch of the fit holds"
            f" label {min(missing)}, so that class is not learned; {way}, or correct classes=[...].",
            DataWarning,
        )

    def _note(self, labels: Tensor, batch_idx: int) -> None:
        """Keeps the first label of another task and its batch, without waiting for the device."""
        if self._known is None or self._known.device != labels.device:
            self._known = torch.tensor(sorted(self.known), device=labels.device)
        if self._found is None:
            self._found = torch.full((2,), _NONE, device=labels.device)
        there = torch.isin(self._known, labels)
        self._trained = there if self._trained is None else there | self._trained.to(there.device)
        other = ~torch.isin(labels, self._known)
        first = torch.stack([labels[other.long().argmax()], torch.full_like(labels[0], batch_idx)])
        self._found = torch.where(other.any() & (self._found[1] == _NONE), first, self._found)

    def _fetched(self) -> set[int]:
        """Labels that were found on a GPU."""
        none = self._known is None or self._trained is None
        return set() if none else set(self._known[self._trained].tolist())  # type: ignore[index]

    def _refuse(self, label: int, batch_idx: int) -> None:
        raise ContinualError(
            f"Task '{self.task.name}' declares classes {self.task.classes}, but batch {batch_idx} of its training data"
            f" holds label {label}; correct classes=[...] or the data. What is to be left out is -100, or the"
            f" ignore_index of a loss that is a module, nn.CrossEntropyLoss(ignore_index={label}), or of metric=."
        )


_WATCHES: WeakKeyDictionary[Trainer, LabelWatch] = WeakKeyDictionary()


def label_watch_of(trainer: Trainer, module: LightningModule) -> LabelWatch | None:
    """The one watch of a fit, whichever of the callbacks are there; None where what it fits is no single Task."""
    task = getattr(trainer, "datamodule", None)
    if not isinstance(task, Task):
        return None
    watch = _WATCHES.get(trainer)
    if watch is None or watch.task is not task:
        watch = _WATCHES[trainer] = LabelWatch(module, task)
    return watch


def renumbered_in(trainer: Trainer, batch: Any) -> str:
    """Which label of a batch is a class by what ``evaluate=`` makes of it alone, for a message; empty if none is."""
    task = getattr(trainer, "datamodule", None)
    if not isinstance(task, Task) or not task.task_loaders.renumbered:
        return ""
    labels = labels_of(batch)
    found = [] if labels is None else strange(labels, task.classes or [], left_out(task))
    if not found:
        return ""
    return (
        f"The batch holds label {found[0]}, which evaluate= makes a class of task '{task.name}': let the training step"
        " number labels as evaluate= does, or correct classes=[...] or the data. "
    )
