"""A task leaves the ledger: its units become free, but for those that something else reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from lightning_cf.errors import ContinualError
from lightning_cf.network.structure import NO_UNIT, Structure, lookup
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE


@dataclass
class Heirs:
    """Who needs the units of a task that leaves: the first later task that reads them, through whatever other units.

    Attributes:
        structure: of the network.
        owner: of every unit, the outputs' at the end.
        number: of the task that leaves.
        nobody: stands where no task reads a unit; larger than the number of any.
    """

    structure: Structure
    owner: Int64[Tensor, "units"]
    number: int
    nobody: int

    def of(
        self, tensors: Mapping[str, Tensor], norms: Mapping[str, Int64[Tensor, "..."]], wanted: Int64[Tensor, "_"]
    ) -> Int64[Tensor, "units"]:
        """For each unit of the task, the number of the task that needs it first.

        Args:
            tensors: the network's parameters and buffers by name.
            norms: for each module that normalises several units together by owners, the unit of each element.
            wanted: units that must stay whoever reads them.
        """
        mine = self.owner == self.number
        heir = torch.full_like(self.owner, self.nobody)
        heir[wanted] = self.number + 1
        for units in norms.values():
            units = units[units != NO_UNIT].flatten()
            later = self.owner[units]
            if bool((later > self.number).any()):
                heir[units] = heir[units].clamp_max(int(later[later > self.number].min()))
        found = torch.where(mine, heir, self.nobody)
        while True:
            before = found.clone()
            for name, tensor in tensors.items():
                self._read(name, tensor, mine, found)
            if torch.equal(found, before):
                return found

    def _read(self, name: str, tensor: Tensor, mine: Bool[Tensor, "units"], heir: Int64[Tensor, "units"]) -> None:
        """Takes note, in place, of who reads the task's units by the entries of one tensor."""
        later = torch.where(mine, heir, torch.where(self.owner > self.number, self.owner, self.nobody))
        for use in self.structure.entries.get(name, ()):
            # What an entry that is part of no unit reads is needed by whoever comes next.
            reader = lookup(use.target, later, none=self.number + 1).expand(tensor.shape)
            there = lookup(use.source, mine, none=False) & (reader < self.nobody)
            if bool(there.any()):
                there &= (tensor.detach() != 0).cpu()
                sources = use.source.expand(tensor.shape)[there]
                heir.scatter_reduce_(0, sources, reader[there], "amin")


def take_out(
    ledger: NeuronLedger,
    structure: Structure,
    name: str,
    tensors: Mapping[str, Tensor],
    wanted: Int64[Tensor, "_"] | None = None,
) -> dict[str, int]:
    """Takes a task out of a ledger, as if the tasks after it had come right after those before it.

    A unit that a later task reads passes to the first that does, and goes on being held still; the others are free.
    So no later task's outputs change. The task's output columns are free, too.

    Args:
        ledger: in place.
        structure: of its network.
        name: of the task.
        tensors: the network's parameters and buffers by name.
        wanted: units that must stay whoever reads them. The last task holds none of them, unless it is alone.

    Returns:
        for each group of units, how many of the task's are free now.

    Raises:
        ContinualError: for tasks that run the network in ways of their own; the ledger stays as it was.
    """
    if structure.ways > 1:
        raise ContinualError(
            f"Task '{name}' cannot be forgotten: tasks run the network in ways of their own, so who needs its units is"
            " not known."
        )
    number, owner, last = ledger.index(name), ledger.owner_of_units(structure), len(ledger.tasks) - 1
    mine, alone = owner == number, last == 0
    stay = [] if wanted is None or alone else [wanted]
    whole = [group for group in structure.groups if group.name in ledger.whole and not alone]
    stay += [torch.arange(group.first, group.first + group.size) for group in whole]
    units = torch.cat([*stay, torch.empty(0, dtype=torch.long)])
    norms = ledger.norms if ledger.exact else {}
    heir = Heirs(structure, owner, number, last + 1).of(tensors, norms, units[mine[units]])
    passed = torch.where(heir > last, FREE, heir - 1)
    owner = torch.where(mine, passed, owner - (owner > number).long())
    freed = {}
    for group in structure.groups:
        units = slice(group.first, group.first + group.size)
        freed[group.name] = int((mine[units] & (owner[units] == FREE)).sum())
        ledger.owners[group.name] = owner[units].clone()
    ledger.outputs = owner[structure.head.units].clone()
    del ledger.tasks[number]
    for kept in (ledger.reserved, ledger.positions, ledger.fingerprints):
        kept.pop(name, None)
    ledger.records = [record for record in ledger.records if record["task"] != name]
    ledger.ways = [other for other in ledger.ways if other != name]
    if not ledger.tasks:
        ledger.whole = []
    ledger.revision += 1
    return freed
