"""A task is taken out of what tasks are inferred by, as if it had never been there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from lightning_cf.errors import ContinualError
from lightning_cf.task_inference.cumulative import Cumulative, Labelled, Shared, cumulative, in_full, moved
from lightning_cf.task_inference.inference import TaskInference
from lightning_cf.task_inference.known import Known
from lightning_cf.task_inference.registry import STRATEGIES
from lightning_cf.task_inference.sites import Sites, kept

Training = Callable[[Sites], Iterable[Labelled]]
"""Gives a task's training data from the start, as when it was learned."""


def forgotten(inference: TaskInference, name: str, training: Training | None = None) -> TaskInference:
    """What would be known had a task never been there, but for what features found once on the first one's data.

    What a task added is subtracted. Where it was not kept apart (:attr:`TaskInference.apart`), its data are added once
    more to find it: sums are exact, so that the same samples give it in any order.

    Args:
        inference: what is known; it stays as it is.
        name: of the task.
        training: gives its training data; not needed where what tasks add is kept apart.

    Raises:
        ContinualError: for a task that is not known, for other data than it had, and for a strategy that cannot take
            away what a task added.
    """
    gone = next((task for task in inference.tasks if task.name == name), None)
    if gone is None:
        known = ", ".join(task.name for task in inference.tasks)
        raise ContinualError(f"task_inference: no task '{name}' is known that could be forgotten; known are {known}.")
    left = [task for task in inference.tasks if task is not gone]
    sites, shared = inference.looks or inference.tasks[0].sites, {}
    for strategy in cumulative(STRATEGIES[each] for each in inference.strategies) if left else ():
        before = inference.shared[strategy.name]
        own = strategy.subtract(before, _added(strategy, before, sites, gone, training))
        shared[strategy.name] = {key: kept(value) for key, value in own.items()}
    return replace(inference, tasks=left, shared=shared, looks=sites if left else None)


def _added(strategy: Cumulative, shared: Shared, sites: Sites, task: Known, training: Training | None) -> Shared:
    """What a task added: kept apart, or found once more from its data."""
    if strategy.name in task.fitted:
        return task.fitted[strategy.name]
    if training is None:
        raise ContinualError(
            f"task_inference={strategy.name}: what task '{task.name}' added was not kept apart. Give the task with the"
            " training data that it had, or keep apart what each task adds from the first one on:"
            " TaskInferenceCallback(apart=True)."
        )
    return added_by(strategy, shared, sites, training)


def added_by(strategy: Cumulative, shared: Shared, sites: Sites, training: Training) -> Shared:
    """What a task's data add to what a strategy keeps, whether they were added before or not.

    Args:
        strategy: whose it is.
        shared: what it keeps.
        sites: where the first task's scores looked.
        training: gives the data.
    """
    again = shared
    for seen, columns in training(sites):
        with in_full(seen):
            again = strategy.add(moved(strategy, again, seen), seen, sites, columns.to(seen.outputs.device))
    return strategy.added(shared, again)
