"""The bases of a sub-space on a network: one for each group of units that the current task computes."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float, Int64
from torch import Tensor

from lightning_cf.errors import ContinualError
from lightning_cf.network.structure import Structure, UnitGroup
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE
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


def bases_to_train_in(
    structure: Structure, ledger: NeuronLedger, subspace: Subspace | None, tensors: Mapping[str, Tensor]
) -> list[tuple[UnitGroup, Int64[Tensor, "_"], Float[Tensor, "_ _"]]]:
    """The free units of a later task that learns, with the basis that holds them; arguments as in :func:`bases_of`.

    Raises:
        ContinualError: where nothing was learned yet of the sub-space.
    """
    if subspace is None or ledger.phase != "learn" or len(ledger.tasks) == 1:
        return []
    bases = bases_of(structure, ledger, subspace, tensors)
    if not bases:
        name = ledger.tasks[-1].name
        raise ContinualError(
            f"masking: nothing was learned yet of the sub-space that task '{name}' is to train in. Give"
            " InvarianceCallback the same subspace, in the fit of the task before; in a loop of your own, where"
            " nothing learns one, use RandomSubspace or GivenSubspace."
        )
    return [
        (group, (ledger.owners[group.name] == FREE).nonzero().flatten(), bases[group.name])
        for group in current_groups(structure, ledger)
        if group.name in bases
    ]
