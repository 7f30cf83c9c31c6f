"""How well what is unknown is told from what is known: each task is held out in turn, as if it was never learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from lightning_cf.errors import ContinualError
from lightning_cf.learner.accumulating import training_of
from lightning_cf.learner.labels import Kept
from lightning_cf.lightning_api import LightningModule
from lightning_cf.network.forward import eval_mode
from lightning_cf.task_inference import STRATEGIES, TaskInference
from lightning_cf.task_inference.cumulative import Cumulative, Shared, cumulative
from lightning_cf.task_inference.forgetting import added_by
from lightning_cf.tasks.evaluation import predict
from lightning_cf.tasks.task import Batches, Task
from lightning_cf.utilities.randomness import isolated_generators

MOST = 2000
"""So many test samples of each task are looked at; more tell no better how it is, on the average."""

CHANCE = 0.6
"""Below this area under the ROC curve, what is said of unknown inputs is close to nothing."""


@torch.no_grad()
def none_in_turn(
    module: LightningModule, inference: TaskInference, tasks: Sequence[tuple[Task, Batches]]
) -> dict[str, list[float]]:
    """By strategy, for each task: how well it would be told from the others, had it never been learned.

    The area under the ROC curve of the probability of "none of the known", over test samples. One task alone, the last
    one, misleads: it may be unlike the others, or hard to tell.

    Args:
        module: as it stands.
        inference: what is kept of its tasks.
        tasks: those of the sequence that have classes, each with its test data.

    Returns:
        nothing of a strategy that cannot take away what a task added, and nothing at all for fewer than two tasks.
    """
    names = {known.name for known in inference.tasks}
    if len(names) < 2 or {task.name for task, _ in tasks} != names:
        return {}
    with eval_mode(module), isolated_generators():
        try:
            left = _left(module, inference, [task for task, _ in tasks])
        except ContinualError:  # a strategy of the user's own
            return {}
        values = {task.name: _none(module, inference, left, task, batches) for task, batches in tasks}
    found: dict[str, list[float]] = {name: [] for name in inference.strategies}
    for gone in left:
        for name, areas in found.items():
            none = {task: by[gone][name] for task, by in values.items()}
            strange = torch.cat([torch.full_like(x, task == gone) for task, x in none.items()]).long()
            areas.append(float(binary_auroc(torch.cat(list(none.values())), strange)))
    return found


def _left(module: LightningModule, inference: TaskInference, tasks: Sequence[Task]) -> dict[str, TaskInference]:
    """By task, what would be known without it: from the data of all others, which may be changed at random."""
    sites, strategies = (
        inference.looks or inference.tasks[0].sites,
        cumulative(STRATEGIES[name] for name in inference.strategies),
    )
    added: dict[str, dict[str, Shared]] = {strategy.name: {} for strategy in strategies}
    for known in inference.tasks:
        task = next(task for task in tasks if task.name == known.name)
        training = training_of(module, task, inference)
        for strategy in strategies:
            added[strategy.name][known.name] = added_by(strategy, inference.shared[strategy.name], sites, training)
    left = {}
    for gone in inference.tasks:
        shared = {}
        for strategy in strategies:
            others = [x for name, x in added[strategy.name].items() if name != gone.name]
            kept = strategy.only(inference.shared[strategy.name], others)
            shared[strategy.name] = {k: x for k, x in kept.items() if not k.startswith(Cumulative.at_rest)}
        tasks_left = [known for known in inference.tasks if known is not gone]
        left[gone.name] = replace(inference, tasks=tasks_left, shared=shared, looks=sites)
    return left


def _none(
    module: LightningModule, inference: TaskInference, left: Mapping[str, TaskInference], task: Task, batches: Batches
) -> dict[str, dict[str, Tensor]]:
    """By task that is held out and strategy, the probability of none for each of a task's test samples."""
    parts: dict[str, dict[str, list[Tensor]]] = {gone: {name: [] for name in inference.strategies} for gone in left}
    seen = 0
    for batch in batches:
        readout = inference.read(module, Kept(partial(predict, module, task)), batch)
        for gone, others in left.items():
            for name, values in parts[gone].items():
                values.append(others.infer(readout, name).probabilities[:, -1])
        seen += len(readout.outputs)
        if seen >= MOST:
            break
    return {gone: {name: torch.cat(x)[:MOST] for name, x in by.items()} for gone, by in parts.items()}
