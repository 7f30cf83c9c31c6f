"""Where the known tasks' outputs and classes stand side by side: found once, whatever the number of batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from lightning_cf.task_inference.known import Known

Values = Float[Tensor, "batch outputs"]
"""One a sample and output, the outputs as :class:`Lineup` has them."""


@dataclass(frozen=True)
class Lineup:
    """The outputs of some tasks, those of one behind those of another.

    Attributes:
        columns: of the network's outputs, where each stands.
        classes: the label of each.
        task: the position of each one's task.
        first: where each task's begin.
        sizes: how many each task has.
    """

    columns: Int64[Tensor, "outputs"]
    classes: Int64[Tensor, "outputs"]
    task: Int64[Tensor, "outputs"]
    first: Int64[Tensor, "tasks"]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, tasks: Sequence[Known], device: torch.device) -> Lineup:
        """Of some tasks that are known, on a device."""
        sizes = tuple(len(task.sites.outputs) for task in tasks)
        columns = torch.cat([task.sites.outputs for task in tasks])
        classes = torch.tensor([label for task in tasks for label in task.classes])
        task = torch.arange(len(tasks)).repeat_interleave(torch.tensor(sizes))
        first = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        return cls(columns.to(device), classes.to(device), task.to(device), first.to(device), sizes)

    @cached_property
    def alike(self) -> bool:
        """Whether all tasks have as many outputs, so that they can be computed with at once."""
        return len(set(self.sizes)) == 1

    def each(self, change: Callable[..., Tensor], *values: Values) -> Values:
        """What a function makes of each task's own values, such as a softmax over them.

        >>> places = torch.arange(3)
        >>> two = Lineup(places, places, torch.tensor([0, 1, 1]), torch.tensor([0, 1]), (1, 2))
        >>> two.each(lambda x: x.softmax(-1), torch.zeros(1, 3)).tolist()
        [[1.0, 0.5, 0.5]]

        Args:
            change: along the last axis.
            values: what it takes.
        """
        if self.alike:
            return change(*(x.unflatten(1, (len(self.sizes), -1)) for x in values)).flatten(1)
        parts = zip(*(x.split(self.sizes, dim=1) for x in values), strict=True)
        return torch.cat([change(*part) for part in parts], dim=1)

    def reduced(self, change: Callable[[Tensor], Tensor], values: Values) -> Shaped[Tensor, "batch tasks"]:
        """One number a task, which a function makes of its values along the last axis."""
        if self.alike:
            return change(values.unflatten(1, (len(self.sizes), -1)))
        return torch.stack([change(part) for part in values.split(self.sizes, dim=1)], dim=1)

    def likeliest(self, values: Values) -> Int64[Tensor, "batch tasks"]:
        """The class that each task sees in each sample: that of its highest value."""
        found: Tensor = self.classes[self.reduced(lambda x: x.argmax(dim=-1), values) + self.first]
        return found
