"""A task meets the network: how it runs it becomes known, and which of its outputs are its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_cf.errors import ContinualError
from lightning_cf.learner.keeping import forget_state, ledger_of, state_for, state_of
from lightning_cf.learner.state import ContinualState
from lightning_cf.learner.widening import add_classes, follow_head, grow, note_heads
from lightning_cf.lightning_api import LightningModule
from lightning_cf.network.output_heads import fit_head, head_of
from lightning_cf.ownership.forgetting import withdraw
from lightning_cf.ownership.refusals import one_column, same_task
from lightning_cf.tasks.task import Task


def meet_task(module: LightningModule, task: Task, *, new_classes: bool = True) -> list[int]:
    """Makes a task known and sets its outputs aside.

    Where a module says ``adds_outputs_for_tasks``, as a ContinualModule does, the head grows by columns that it lacks.

    Args:
        module: the network.
        task: whose data are read.
        new_classes: whether it grows for class numbers beyond its columns too, not only for classes that return.

    Returns:
        the output column of each of the task's classes.

    Raises:
        ContinualError: for outputs that another task has, or that the head does not have; for a task that was begun
            with others.
    """
    state = state_for(module, task)
    _take_back(state, task)
    follow_head(module, state)
    outputs = state.meet(module, task)
    if task.name not in state.ledger.reserved:
        if getattr(module, "adds_outputs_for_tasks", False):
            outputs = _with_new_columns(module, state, task, outputs, new_classes)
        state.ledger.reserve(task.name, outputs)
    note_heads(state)
    return state.ledger.reserved[task.name]


def _take_back(state: ContinualState, task: Task) -> None:
    """A task that was refused, and now says something else, is met as if for the first time.

    Raises:
        ContinualError: for one that was partitioned, and so goes on with what it was begun with.
    """
    ledger, says = state.ledger, (task.classes, task.outputs)
    begun, other = ledger.current, state.declared.get(task.name, says) != says
    if begun is not None and begun.name == task.name:
        other = not same_task(begun, *says)
    if other and (not ledger.knows(task.name) or (begun is not None and begun.name == task.name)):
        withdraw(ledger, task.name)
        state.met.discard(task.name)
    state.declared[task.name] = says


def make_place(module: LightningModule, name: str) -> None:
    """Takes back a task that was refused before its first step, where one of another name is fitted instead."""
    state = state_of(module)
    begun = None if state is None else state.ledger.current
    if state is not None and begun is not None and begun.name == state.untrained != name and begun.phase == "learn":
        withdraw(state.ledger, begun.name)
        state.met.discard(begun.name)


@contextmanager
def unless_refused(module: LightningModule) -> Iterator[None]:
    """Whatever is raised meanwhile, a module forgets the tasks that it met meanwhile, and columns that they added."""
    ledger = ledger_of(module)
    before = None if ledger is None else set(ledger.reserved)
    try:
        yield
    except BaseException:
        state = state_of(module)
        if state is not None:
            _leave(module, state, before)
        raise


def _leave(module: LightningModule, state: ContinualState, before: set[str] | None) -> None:
    """Takes back tasks that were not known before and have not begun; where none was or has, nothing is left."""
    if before is None and not state.ledger.tasks:
        if len(state.ledger.outputs) > state.ledger.width:
            fit_head(head_of(module, state.structure), state.ledger.width)
        forget_state(module)
        return
    for name in [name for name in state.ledger.reserved if name not in (before or ()) and not state.ledger.knows(name)]:
        withdraw(state.ledger, name)
        state.met.discard(name)
        state.declared.pop(name, None)


def _with_new_columns(
    module: LightningModule, state: ContinualState, task: Task, outputs: list[int], new_classes: bool
) -> list[int]:
    """The task's outputs, of which those that another task has, or the head has not, are new columns."""
    taken = {output for others in state.ledger.reserved.values() for output in others}
    returns = task.outputs is None and taken & set(outputs) and max(outputs) < state.ledger.width
    if task.outputs is task.classes is None and (returns or len(outputs) == state.ledger.width):
        state.ledger.positions[task.name] = outputs  # where it sees its columns, wherever they stand
    if returns:
        return grow(module, state, len(outputs))
    if task.outputs is None and task.classes is not None and max(outputs) >= state.ledger.width:
        if not new_classes:
            raise ContinualError(_beyond(task, outputs, state.ledger.width))
        return add_classes(module, state, outputs)
    return outputs


def _beyond(task: Task, outputs: list[int], width: int) -> str:
    """What a user is told of classes beyond the head's columns where only classes that return get new ones."""
    return (
        f"Task '{task.name}' needs output {next(output for output in outputs if output >= width)}, but the output head"
        f" has {width} columns (0 to {width - 1}). Widen the head, or correct the task's classes. If they are new ones,"
        f" add them before the run: ContinualModule(module).add_task(task).{one_column(width)}"
    )
