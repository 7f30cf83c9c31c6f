"""A task is taken out of what tasks are inferred by, as if it had never been there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor

from lightning_cf.errors import ContinualError
from lightning_cf.task_inference.cumulative import Cumulative, Labelled, Shared, cumulative, in_full, moved
from lightning_cf.task_inference.inference import TaskInference
from lightning_cf.task_inference.registry import STRATEGIES
from lightning_cf.task_inference.sites import Sites, kept


def forgotten(inference: TaskInference, name: str, training: Callable[[Sites], Iterable[Labelled]]) -> TaskInference:
    """What would be known had a task never been there, but for what features found once on the first one's data.

    Sums are exact, so that what the task's data add once more is what it added: the same samples in any order.

    Args:
        inference: what is known; it stays as it is.
        name: of the task.
        training: gives its training data from the start, as when it was learned.

    Raises:
        ContinualError: for a task that is not known, and for a strategy that cannot take away what a task added.
    """
    left = [task for task in inference.tasks if task.name != name]
    if len(left) == len(inference.tasks):
        known = ", ".join(task.name for task in inference.tasks)
        raise ContinualError(f"task_inference: no task '{name}' is known that could be forgotten; known are {known}.")
    sites, shared = inference.looks or inference.tasks[0].sites, {}
    for strategy in cumulative(STRATEGIES[each] for each in inference.strategies) if left else ():
        own = _without(strategy, inference.shared[strategy.name], sites, training(sites))
        shared[strategy.name] = {key: kept(value) for key, value in own.items()}
    return replace(inference, tasks=left, shared=shared, looks=sites)


def _without(strategy: Cumulative, shared: Shared, sites: Sites, training: Iterable[Labelled]) -> dict[str, Tensor]:
    for seen, columns in training:
        with in_full(seen):
            shared = strategy.add(moved(strategy, shared, seen), seen, sites, columns.to(seen.outputs.device))
    return dict(strategy.subtract(shared))
