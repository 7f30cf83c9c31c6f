"""The bases of a sub-space on a network: one for each group of units that the current task computes."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from lightning_cf.errors import ContinualError
from lightning_cf.network.structure import Structure, UnitGroup
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.subspaces.subspace import GivenSubspace, Subspace


def current_groups(structure: Structure, ledger: NeuronLedger) -> tuple[UnitGroup, ...]:
    """The groups that the current task's way through the network computes, and by what; all of them between tasks."""
    task = ledger.current
    return structure.groups if task is None else structure.groups_on(structure.way_of(task.name))


def bases_of(
    structure: Structure, ledger: NeuronLedger, subspace: Subspace | None, tensors: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, "_ _"]]:
    """The orthonormal basis (inputs x dimensions) of a sub-space in each group that it holds.

    Args:
        structure: of the network.
        ledger: knows the directions that were learned.
        subspace: None holds nothing.
        tensors: parameters and buffers by name.

    Raises:
        ContinualError: for a basis of other vectors than the current task's way gives the group.
    """
    found: dict[str, Float[Tensor, "_ _"]] = {}
    if subspace is None:
        return found
    if isinstance(subspace, GivenSubspace):
        subspace.check_layers([group.name for group in structure.groups])
    for group in current_groups(structure, ledger):
        inputs = sum(rows.width(tensors[rows.tensor]) for rows in group.rows if rows.role == "weight")
        basis = subspace.basis(group.name, inputs, ledger.directions)
        if basis is not None and len(basis) != inputs:
            raise ContinualError(
                f"The sub-space of '{group.name}' is one of {len(basis)} inputs, but the current task gives it"
                f" {inputs}: it runs other layers there, such as an adapter. Leave the sub-space out."
            )
        if basis is not None:
            found[group.name] = basis
    return found
