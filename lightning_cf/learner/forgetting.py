"""A live module forgets a task on purpose: as if it had never been learned, as far as other tasks allow."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Int64
from torch import Tensor

from lightning_cf.errors import ContinualError
from lightning_cf.functional.forgetting import check_known, run_forget
from lightning_cf.learner.accumulating import training_of
from lightning_cf.learner.inferring import inference_of, keep_inference
from lightning_cf.learner.keeping import keep_ledger, state_for, state_of
from lightning_cf.learner.state import ContinualState
from lightning_cf.lightning_api import LightningModule
from lightning_cf.network.consumers import input_units
from lightning_cf.task_inference import STRATEGIES, TaskInference
from lightning_cf.task_inference.cumulative import cumulative
from lightning_cf.task_inference.forgetting import forgotten
from lightning_cf.tasks.task import Task
from lightning_cf.utilities.randomness import isolated_generators


def forget_task(module: LightningModule, task: Task | str, *, seed: int = 0) -> dict[str, int]:
    """Takes a task out of a module: what infers tasks, ledger and weights.

    Its units become free and get fresh weights, as do its outputs; units that a later task reads are kept, so that the
    outputs of all other tasks stay bitwise what they are. What all tasks share to be inferred by
    (``task_inference.cumulative``) is bitwise what it would be had the task never been there, but for features that
    were found on the first one's data.

    Args:
        module: the network, in place; between fits.
        task: the task with its training data, or its name where what tasks add is kept apart or nothing is shared.
        seed: what fresh weights depend on, with the task's name.

    Returns:
        for each group of units, how many are free now that were not.

    Raises:
        ContinualError: for a task that the module does not know, and where it cannot be forgotten; nothing changed.
    """
    name = task if isinstance(task, str) else task.name
    state = state_of(module) if isinstance(task, str) else state_for(module, task)
    check_known(None if state is None else state.ledger, name)
    assert state is not None
    if state.safe is not None:
        raise ContinualError(f"forget: task '{name}' cannot be forgotten within a fit; do it between fits.")
    state.undisturb()
    ledger, inference = copy.deepcopy(state.ledger), inference_of(state.ledger)
    wanted = _looked_at(inference, state)
    if inference is not None:
        if any(known.name == name for known in inference.tasks):
            training = None if isinstance(task, str) else training_of(module, task, inference)
            with isolated_generators():
                inference = forgotten(inference, name, training)
        inference.left_out = [other for other in inference.left_out if other != name]
        if inference.training_task == name:
            inference.forget_training()
        keep_inference(ledger, inference)
    freed = run_forget(module, state.structure, ledger, name, seed=seed, wanted=wanted)
    state.start = state.outcome = None
    keep_ledger(module, ledger)
    return freed


def _looked_at(inference: TaskInference | None, state: ContinualState) -> Int64[Tensor, "_"] | None:
    """Units that what all tasks share looks at."""
    looking = [] if inference is None else cumulative(STRATEGIES[name] for name in inference.strategies)
    if inference is None or not inference.tasks or not any(strategy.needs == "frozen" for strategy in looking):
        return None
    sites = inference.looks or inference.tasks[0].sites
    found = [input_units(state.structure.entries[site.weight][0])[site.columns] for site in sites.hidden]
    units = torch.cat([*found, torch.empty(0, dtype=torch.long)])
    return units[units >= 0]
