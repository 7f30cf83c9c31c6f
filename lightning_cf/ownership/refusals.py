"""What a ledger refuses, and why: outputs that are taken, tasks out of their turn, other networks, full layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral

from jaxtyping import Int64
from torch import Tensor

from lightning_cf.errors import CapacityError, ContinualError, check_list, check_text
from lightning_cf.network.structure import Structure
from lightning_cf.ownership.levels import FREE
from lightning_cf.ownership.phases import TaskEntry


def check_outputs(
    name: str, outputs: Sequence[int], reserved: Mapping[str, Sequence[int]], width: int, tasks: Sequence[TaskEntry]
) -> list[int]:
    """The output columns that a task asks for, as a list.

    Args:
        name: of the task.
        outputs: the columns.
        reserved: columns of each task by name.
        width: how many columns the head has.
        tasks: those that were begun, which keep what they have.

    Raises:
        ContinualError: for a column that another task has, or that the head does not have; for none, or one twice.
    """
    owner = f"Task '{check_text('NeuronLedger', 'name', name)}'"
    columns = _columns(owner, outputs)
    for task in tasks:
        if task.name == name and task.outputs != columns:
            raise ContinualError(
                f"{owner} was begun with outputs {task.outputs}, which stay its own, and cannot go on with {columns}."
                f" Call begin('{name}') without outputs= to go on, or give other data a name of its own."
            )
    for output in columns:
        if not 0 <= output < width:
            raise ContinualError(
                f"Task '{name}' needs output {output}, but the output head has {width} columns"
                f" (0 to {width - 1}). Widen the head, the old rows first (a ContinualModule does it"
                " for classes; in a loop of your own trace it again and call ledger.add_outputs(count)), or correct the"
                f" task's classes or outputs.{one_column(width)}"
            )
        for other, taken in reserved.items():
            if other != name and output in taken:
                raise ContinualError(
                    f"Task '{name}' and task '{other}' both have output {output}. Give one of them outputs=[...] of"
                    " its own, or wrap the module in ContinualModule, which adds outputs for classes that return."
                )
    return columns


def _columns(owner: str, outputs: Sequence[int]) -> list[int]:
    """Columns as plain numbers; raises ContinualError for what names no columns, whatever the head's width."""
    given = check_list(owner, "outputs", outputs, "columns")
    if not given:
        raise ContinualError(f"{owner}: outputs=[] leaves it no output; name the columns of the head that are its own.")
    columns = [x.item() if isinstance(x, Tensor) and x.ndim == 0 else x for x in given]
    for x in columns:
        if isinstance(x, bool) or not isinstance(x, Integral):
            raise ContinualError(
                f"{owner}: outputs must be whole numbers, got {x!r}. Name columns of the head, such as [0, 1]."
            )
        if x < 0:
            raise ContinualError(f"{owner}: outputs must be whole numbers from 0 on, got {x}; columns count from 0.")
    if len(set(columns)) < len(columns):
        raise ContinualError(f"{owner}: outputs must differ from one another, got {columns}; name each column once.")
    return [int(x) for x in columns]


def one_column(width: int) -> str:
    """What to do where the head's only output tells two classes apart; for messages."""
    if width > 1:
        return ""
    return (
        " Where one output tells two classes apart, say so: outputs=[0], and to a Task also metric=torchmetrics."
        "classification.BinaryAccuracy() and evaluate= that gives that output as the target's shape has it."
    )


def is_current(name: str, tasks: Sequence[TaskEntry], origin: str) -> bool:
    """Whether the task of that name is the current one, and so goes on; else it starts.

    Args:
        name: of the task.
        tasks: those that were begun.
        origin: the file that the ledger was read from, or empty.

    Raises:
        ContinualError: for a task that is over, a task after one that was never partitioned, and a name that is none.
    """
    check_text("NeuronLedger.begin", "name", name)
    unsealed = bool(tasks) and tasks[-1].phase != "sealed"
    if any(task.name == name for task in tasks):
        if not unsealed or tasks[-1].name != name:
            raise ContinualError(
                f"Task '{name}' was learned before and its units are sealed; give new data a name of its own."
            )
        return True
    if unsealed:
        check_partitioned(tasks[-1], name, origin)
    return False


def same_task(begun: TaskEntry, classes: Sequence[int] | None, outputs: Sequence[int] | None) -> bool:
    """Whether a task that has begun is to go on with the classes and outputs that it has, or says nothing of them.

    Raises:
        ContinualError: for others, where it was partitioned already.
    """
    for what, was, now in (("classes", begun.classes, classes), ("outputs", begun.outputs, outputs)):
        if was and now and list(was) != list(now):
            if begun.phase == "learn":
                return False
            raise ContinualError(
                f"Task '{begun.name}' was partitioned with {what}={list(was)}, not {list(now)}, and goes on with these."
                " Give another task another name."
            )
    return True


def check_set_aside(name: str, reserved: Mapping[str, Sequence[int]]) -> None:
    """Raises ContinualError for a task that is to start without outputs."""
    if name not in reserved:
        raise ContinualError(
            f"Task '{name}' cannot start: no outputs are set aside for it; reserve them first, or say which they are:"
            f" begin('{name}', outputs=[...])."
        )


def check_partitioned(before: TaskEntry, name: str, origin: str) -> None:
    """Raises ContinualError if the task before the one of that name was not partitioned.

    Args:
        before: the task before.
        name: of the task that is to start.
        origin: the file that the ledger was read from, or empty.
    """
    if before.phase == "learn":
        source = f" The ledger was read from {origin}: load a later checkpoint, or" if origin else ""
        raise ContinualError(
            f"Task '{name}' cannot start: task '{before.name}' was never partitioned, so nothing would"
            f" protect it.{source} {'fit' if source else 'Fit'} '{before.name}' again up to its partition"
            " (PartitionCallback, after=..., or claim(...) in a loop of your own)."
        )


def check_network(
    owners: Mapping[str, Int64[Tensor, "_"]], outputs: Int64[Tensor, "columns"], structure: Structure
) -> None:
    """Raises ContinualError if a network is not the one that a ledger was made for.

    Args:
        owners: the ledger's owners of each group's units, by the group's name.
        outputs: its owners of the output columns.
        structure: of the network.
    """
    sizes = {group.name: group.size for group in structure.groups}
    known = {name: len(owner) for name, owner in owners.items()}
    if sizes != known or structure.head.size != len(outputs):
        raise ContinualError(
            f"The ledger was made for another network: it knows units {known} and {len(outputs)} outputs,"
            f" the network has {sizes} and {structure.head.size}. Take the ledger and what trace(...) found of one"
            " network. Where earlier tasks have heads of their own, make them known first:"
            " ContinualModule(module).add_task(task)."
        )


def check_capacity(
    name: str, owners: Mapping[str, Int64[Tensor, "_"]], groups: Iterable[str], tasks: Sequence[TaskEntry]
) -> None:
    """Raises CapacityError if a group has no free unit left for the task of that name.

    Args:
        name: of the task that is to start.
        owners: of each group's units, by the group's name.
        groups: names of those of which it must own some units.
        tasks: those so far, by their number.
    """
    for group in groups:
        owner = owners[group]
        if not bool((owner == FREE).any()):
            shares = ", ".join(
                f"{int((owner == i).sum())} by '{task.name}'"
                for i, task in enumerate(tasks)
                if bool((owner == i).any())
            )
            raise CapacityError(
                f"Task '{name}' cannot start: no free unit is left in '{group}' ({len(owner)} of"
                f" {len(owner)} owned: {shares}). Lower max_claim for the tasks before it, raise"
                " reserve_tasks, or widen the layer."
            )


def check_reserved(name: str, reserved: Mapping[str, Sequence[int]]) -> None:
    """Refuses to tell the outputs of a task that has none.

    Raises:
        ContinualError: names the tasks that have some.
    """
    if name not in reserved:
        known = ", ".join(f"'{task}'" for task in reserved) or "none"
        raise ContinualError(f"No outputs are set aside for a task '{name}'; known tasks: {known}.")
