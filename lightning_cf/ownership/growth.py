"""What becomes of a ledger's owners when the network is traced anew with a further task's way through it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from lightning_cf.errors import ContinualError
from lightning_cf.network.structure import Structure
from lightning_cf.ownership.levels import FREE


class Owners(NamedTuple):
    """The owner of each unit, group by group, and of each output column."""

    hidden: dict[str, Int64[Tensor, "_"]]
    outputs: Int64[Tensor, "columns"]


def nobody(structure: Structure) -> Owners:
    """Owners of a network of which every unit is free."""
    hidden = {group.name: torch.full((group.size,), FREE) for group in structure.groups}
    return Owners(hidden, torch.full((structure.head.size,), FREE))


def grown(
    hidden: Mapping[str, Int64[Tensor, "_"]], outputs: Int64[Tensor, "columns"], structure: Structure, task: str
) -> Owners | None:
    """The owners of a network that has grown: layers and outputs that a further task brings are free.

    Args:
        hidden: the owner of each unit so far, by the group's name.
        outputs: the owner of each output column so far.
        structure: of all ways, the further one too.
        task: whose way it is, for messages.

    Returns:
        the owners; None where the ledger, read from a checkpoint, knows more than the network shows so far.

    Raises:
        ContinualError: if units that are known are others now.
    """
    fresh = nobody(structure)
    found = {name: len(owner) for name, owner in fresh.hidden.items()}
    same = {name for name, owner in hidden.items() if found.get(name) == len(owner)}
    owners = {n: owner for n, owner in hidden.items() if n in same or bool((owner != FREE).any())}
    known = {name: len(owner) for name, owner in owners.items()}
    lost = known.keys() - same
    joined = next((group.layers for group in structure.groups if not lost.isdisjoint(group.layers)), ())
    if not bool((torch.cat([*hidden.values(), outputs]) >= 0).any()):
        return fresh
    if joined:
        layers = ", ".join(f"'{layer}'" for layer in joined)
        raise ContinualError(
            f"Task '{task}' runs the network in a way that joins units which earlier tasks own one by one: those of"
            f" {layers} would share one fate, since it adds, concatenates or normalises them together, or uses a weight"
            " transposed. Make all tasks known before the first one is learned, ContinualModule(module).add_task(task)"
            " for each, as the runner does; or give this task a layer of its own there."
        )
    if found.items() >= known.items() and len(fresh.outputs) >= len(outputs):
        kept = {name: owners.get(name, owner) for name, owner in fresh.hidden.items()}
        return Owners(kept, torch.cat([outputs, fresh.outputs[len(outputs) :]]))
    if found.items() <= known.items() and len(fresh.outputs) <= len(outputs):
        return None
    raise ContinualError(
        f"Task '{task}' brings layers of its own to a network whose ledger knows others that no task has run"
        " yet in this process. Make the earlier tasks known first: ContinualModule(module).add_task(task)."
    )
