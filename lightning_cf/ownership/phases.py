"""How far the ledger's tasks have come: learned, partitioned, sealed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Phase = Literal["learn", "invariance", "sealed"]
PHASES = ("learn", "invariance", "sealed")
"""In the order in which a task goes through them."""


@dataclass
class TaskEntry:
    """What the ledger knows of a task.

    Attributes:
        name: its name.
        classes: labels in its data.
        outputs: the head's columns that belong to it, one a class.
        phase: "learn" until it is partitioned, then "invariance", then "sealed".
    """

    name: str
    classes: list[int]
    outputs: list[int]
    phase: Phase = "learn"


def undone(tasks: Sequence[TaskEntry], others: Sequence[TaskEntry]) -> list[str]:
    """Names of the tasks that are not as far among others as they are here: not there at all, or in an earlier phase.

    >>> undone([TaskEntry("a", [], [], "sealed")], [TaskEntry("a", [], [], "learn")])
    ['a']
    """
    there = {task.name: task.phase for task in others}
    return [
        task.name
        for task in tasks
        if task.name not in there or PHASES.index(there[task.name]) < PHASES.index(task.phase)
    ]
