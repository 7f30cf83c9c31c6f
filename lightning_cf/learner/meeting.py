"""A task meets the network: how it runs it becomes known, and which of its outputs are its own."""

from __future__ import annotations

from lightning_cf.learner.keeping import state_for
from lightning_cf.learner.state import ContinualState
from lightning_cf.learner.widening import add_classes, follow_head, grow, note_heads
from lightning_cf.lightning_api import LightningModule
from lightning_cf.tasks.task import Task


def meet_task(module: LightningModule, task: Task) -> list[int]:
    """Makes a task known and sets its outputs aside.

    Where a module says ``adds_outputs_for_tasks``, as a ContinualModule does, the head grows by columns that it lacks.

    Returns:
        the output column of each of the task's classes.

    Raises:
        ContinualError: for outputs that another task has, or that the head does not have.
    """
    state = state_for(module, task)
    follow_head(module, state)
    outputs = state.meet(module, task)
    if task.name not in state.ledger.reserved:
        if getattr(module, "adds_outputs_for_tasks", False):
            outputs = _with_new_columns(module, state, task, outputs)
        state.ledger.reserve(task.name, outputs)
    note_heads(state)
    return state.ledger.reserved[task.name]


def _with_new_columns(module: LightningModule, state: ContinualState, task: Task, outputs: list[int]) -> list[int]:
    """The task's outputs, of which those that another task has, or the head has not, are new columns."""
    taken = {output for others in state.ledger.reserved.values() for output in others}
    returns = task.outputs is None and taken & set(outputs) and max(outputs) < state.ledger.width
    if task.outputs is task.classes is None and (returns or len(outputs) == state.ledger.width):
        state.ledger.positions[task.name] = outputs  # where it sees its columns, wherever they stand
    if returns:
        return grow(module, state, len(outputs))
    if task.outputs is None and task.classes is not None and max(outputs) >= state.ledger.width:
        return add_classes(module, state, outputs)
    return outputs
