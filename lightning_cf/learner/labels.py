"""Which of a task's classes each sample of a batch is, by what its ``evaluate`` gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from lightning_cf.tasks.targets import one_hot_labels
from lightning_cf.tasks.task import Task


def positions_of(labels: list[int], target: Any, batch: int) -> Int64[Tensor, "batch"] | None:
    """Which of the labels each target is; None where the targets are no labels, one a sample."""
    one_hot = one_hot_labels(target)
    target = target if one_hot is None else one_hot
    if not isinstance(target, Tensor) or target.is_floating_point() or target.shape != (batch,):
        return None
    found = (target[:, None] == torch.tensor(labels, device=target.device)).long()
    return found.argmax(dim=1) if bool(found.any(dim=1).all()) else None


def why_no_labels(task: Task, target: Any, batch: int) -> str:
    """Why a batch's targets do not say which of the task's classes each sample is, see ``positions_of``."""
    if isinstance(target, Tensor) and not target.is_floating_point() and target.shape == (batch,):
        strange = sorted(set(target.tolist()) - set(task.classes or []))
        return f"task '{task.name}' has classes {task.classes}, but its data holds label {strange[0]}."
    return f"the targets of task '{task.name}' are no labels, one a sample."


class Kept:
    """A function whose last result is kept.

    Args:
        function: what to call.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function
        self.found: Any = None

    def __call__(self, batch: Any) -> None:
        """Runs the function on a batch and keeps what it gives."""
        self.found = self.function(batch)
