"""From which task on an entry is held still: the owner of what it computes, in the way in which a task computes it.

A unit that task a owns computes for task b too, and may do so in another way through the network: fed by b's own stem,
shifted by b's own adapter. What only b's way uses is b's to train, though the unit is a's; from b's seal on it stays.
So an entry's level, at one use, is the first task that owns the unit or comes after its owner and runs the network in
a way that has this use. Where all tasks go one way, that is the unit's owner.
"""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from lightning_cf.network.structure import Entries, Structure, lookup

FREE = -1
"""The owner of a unit that no task owns."""

NO_OWNER = -2
"""Stands for what no unit computes, such as the network's input: it counts for every task."""


class Levels:
    """Levels of entries.

    Args:
        structure: the network's.
        owner: of every unit, the outputs' at the end.
        names: of the tasks that count, in their order.
    """

    def __init__(self, structure: Structure, owner: Int64[Tensor, "units"], names: list[str]) -> None:
        self.structure, self.owner, self.names = structure, owner, names
        self._of: dict[frozenset[int], Tensor] = {}

    def riders(self, use: Entries) -> list[int]:
        """Numbers of the tasks whose way has a use."""
        return [n for n, name in enumerate(self.names) if self.structure.way_of(name) in use.ways]

    def of(self, use: Entries, *, none: int = FREE) -> Int64[Tensor, "..."]:
        """For each entry the level of what it helps to compute; broadcasts to the tensor.

        An output column belongs to its task alone: to others' ways it means nothing.

        Args:
            use: one use of a tensor.
            none: for entries that are part of no unit.
        """
        return _where_used(use, lookup(use.target, self.of_units(use.ways), none=none))

    def owners(self, use: Entries, *, none: int = FREE) -> Int64[Tensor, "..."]:
        """As :meth:`of`, but an output column counts in whatever way: its entries are its task's."""
        levels = self.of_units(use.ways).clone()
        levels[self.structure.head.units] = self.owner[self.structure.head.units]
        return _where_used(use, lookup(use.target, levels, none=none))

    def first(self, use: Entries) -> int:
        """The first task whose way has a use: what is part of no unit moves with it. FREE where there is none."""
        return min(self.riders(use), default=FREE)

    def of_units(self, ways: frozenset[int]) -> Int64[Tensor, "units"]:
        """The level of each unit in some ways through the network."""
        if self.structure.ways == 1:
            return self.owner
        if ways not in self._of:
            riders = [n for n, name in enumerate(self.names) if self.structure.way_of(name) in ways]
            after = [min((r for r in riders if r >= n), default=FREE) for n in range(len(self.names))]
            levels = torch.tensor([*after, FREE])[self.owner]
            own = self.owner[self.structure.head.units]
            held = torch.tensor([n in riders for n in range(len(self.names))] + [False])[own]
            levels[self.structure.head.units] = torch.where(held, own, FREE)
            self._of[ways] = levels
        return self._of[ways]


def _where_used(use: Entries, levels: Tensor) -> Tensor:
    return levels if use.used is None else torch.where(use.used, levels, FREE)
