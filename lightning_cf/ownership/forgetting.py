"""A task leaves the ledger: its units become free, but for those that something else needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from lightning_cf.errors import ContinualError
from lightning_cf.network.structure import NO_UNIT, Structure, lookup
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE
from lightning_cf.ownership.phases import TaskEntry


def take_out(
    ledger: NeuronLedger,
    structure: Structure,
    name: str,
    tensors: Mapping[str, Tensor],
    wanted: Int64[Tensor, "_"] | None = None,
) -> dict[str, int]:
    """Takes a task out of a ledger: its units that nobody needs are free, and so are its output columns.

    Units that a later task reads, through whatever others, stay what they are and go on being held still, so that no
    later task's outputs change. They stay under the task's number, as a task without outputs; where there are none, and
    no task came after it, nothing of it is left.

    Args:
        ledger: in place.
        structure: of its network.
        name: of the task.
        tensors: the network's parameters and buffers by name.
        wanted: units that must stay whoever reads them, as long as there is another task.

    Returns:
        for each group of units, how many are free now that were not.

    Raises:
        ContinualError: for tasks that run the network in ways of their own; the ledger stays as it was.
    """
    if structure.ways > 1:
        raise ContinualError(
            f"Task '{name}' cannot be forgotten: tasks run the network in ways of their own, so who needs its units is"
            " not known."
        )
    number, owner = ledger.index(name), ledger.owner_of_units(structure)
    gone = [n for n, task in enumerate(ledger.tasks) if n == number or not task.outputs]
    loose, others = torch.isin(owner, torch.tensor(gone)), len(gone) < len(ledger.tasks)
    needed = torch.zeros_like(loose)
    if others:
        if wanted is not None:
            needed[wanted] = True
        for group in structure.groups:
            needed[group.first : group.first + group.size] |= group.name in ledger.whole
        norms = ledger.norms.values() if ledger.exact else ()
        needed = _needed(structure, owner, loose, tensors, norms, needed & loose)
    owner = torch.where(loose & ~needed, FREE, owner)
    freed = {}
    for group in structure.groups:
        units = slice(group.first, group.first + group.size)
        freed[group.name] = int((loose & ~needed)[units].sum())
        ledger.owners[group.name] = owner[units].clone()
    ledger.outputs = owner[structure.head.units].clone()
    ledger.tasks[number] = TaskEntry(f"{name} (forgotten {number})", [], [], "sealed")
    while ledger.tasks and not ledger.tasks[-1].outputs and not bool((owner == len(ledger.tasks) - 1).any()):
        ledger.tasks.pop()
    for kept in (ledger.reserved, ledger.positions, ledger.fingerprints):
        kept.pop(name, None)
    ledger.records = [record for record in ledger.records if record["task"] != name]
    ledger.ways = [other for other in ledger.ways if other != name]
    ledger.whole = ledger.whole if others else []
    ledger.revision += 1
    return freed


def _needed(
    structure: Structure,
    owner: Int64[Tensor, "units"],
    loose: Bool[Tensor, "units"],
    tensors: Mapping[str, Tensor],
    norms: Iterable[Int64[Tensor, "..."]],
    needed: Bool[Tensor, "units"],
) -> Bool[Tensor, "units"]:
    """Units of tasks that are gone which later tasks read, with what these units read in turn.

    Args:
        structure: of the network.
        owner: of every unit, the outputs' at the end.
        loose: units of tasks that are gone.
        tensors: the network's parameters and buffers by name.
        norms: for each module that normalises several units together by owners, the unit of each element.
        needed: such units that are needed anyway.
    """
    needed = needed.clone()
    for units in norms:
        units = units[units != NO_UNIT].flatten()
        last = max([FREE, *owner[units][~loose[units]].tolist()])
        needed[units] |= loose[units] & (owner[units] < last)  # a norm's statistics are taken over earlier units, too
    while True:
        before = int(needed.sum())
        reading = torch.where((owner != FREE) & (needed | ~loose), owner, FREE)
        for name, tensor in tensors.items():
            for use in structure.entries.get(name, ()):
                # What an entry that is part of no unit reads may be anybody's.
                reader = lookup(use.target, reading, none=int(owner.max()) + 1)
                there = lookup(use.source, loose, none=False) & (reader >= lookup(use.source, owner, none=FREE))
                there = (there & (reader != FREE)).expand(tensor.shape)
                if bool(there.any()):
                    there = there & (tensor.detach() != 0).cpu()
                    needed[use.source.expand(tensor.shape)[there]] = True
        if int(needed.sum()) == before:
            return needed


def withdraw(ledger: NeuronLedger, name: str) -> None:
    """Takes a task back that has claimed nothing yet, as if it had never been heard of; its outputs are free again.

    Args:
        ledger: in place.
        name: of a task that was not begun, or of the current one.
    """
    if ledger.current is not None and ledger.current.name == name:
        ledger.outputs[ledger.outputs == len(ledger.tasks) - 1] = FREE
        ledger.tasks.pop()
    for kept in (ledger.reserved, ledger.positions):
        kept.pop(name, None)
    ledger.revision += 1
