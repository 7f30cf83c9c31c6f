"""Redundant units of a live network, perturbed in place and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Generator, Tensor, nn

from lightning_cf.errors import ContinualError
from lightning_cf.invariance.perturbations import InSubspace, Perturbation
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.structure import Rows, Structure, UnitGroup, lookup
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE


class Disturbance:
    """The redundant units' incoming vectors, perturbed until :meth:`undo`.

    A unit whose vector becomes zero is silent: its bias, norm scale and norm shift become zero with it. Entries that a
    claimed unit or output uses too, since layers share a tensor, stay.

    Args:
        module: the network, in place.
        structure: its structure.
        ledger: free units are the redundant ones.
        perturbation: how.
        generator: what it draws from, group after group.
        bases: orthonormal bases of the sub-spaces that hold it, for those groups that have one.
    """

    @torch.no_grad()
    def __init__(
        self,
        module: nn.Module,
        structure: Structure,
        ledger: NeuronLedger,
        perturbation: Perturbation,
        generator: Generator,
        bases: Mapping[str, Float[Tensor, "_ _"]] | None = None,
    ) -> None:
        self.tensors = named_tensors(module)
        owner = ledger.owner_of_units(structure)
        groups = structure.groups_on(structure.way_of(ledger.tasks[-1].name)) if ledger.tasks else structure.groups
        redundant = [(group, (owner[group.units] == FREE).nonzero().flatten()) for group in groups]
        redundant = [(group, units) for group, units in redundant if len(units)]
        # All groups before the first is perturbed: they may share a tensor.
        self.base = [
            _Base(
                group.name,
                rows := part.among(units),
                rows.read(tensor := self.tensors[rows.tensor]),
                _shared(structure, owner, rows, tensor),
            )
            for group, units in redundant
            for part in group.rows
            if part.role != "statistic"
        ]
        try:
            for group, _ in redundant:
                basis = (bases or {}).get(group.name)
                self._disturb(group, perturbation if basis is None else InSubspace(perturbation, basis), generator)
        except BaseException:
            self.undo()
            raise

    @torch.no_grad()
    def undo(self) -> None:
        """Copies the undisturbed values back, bit for bit; does nothing where nothing is perturbed."""
        for base in self.base:
            base.put_back(self.tensors)
        self.base = []

    @property
    def lasts(self) -> bool:
        """Whether the network is perturbed at this moment, so that what is frozen is not as it is owned."""
        return bool(self.base)

    def changes(self, tensor: Tensor) -> bool:
        """Whether it perturbs entries of this tensor."""
        return any(self.tensors[base.rows.tensor] is tensor for base in self.base)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Meanwhile the undisturbed values are there, bitwise; afterwards the same perturbed ones again."""
        disturbed = [base.rows.read(self.tensors[base.rows.tensor]) for base in self.base]
        for base in self.base:
            base.put_back(self.tensors)
        yield
        for base, values in zip(self.base, disturbed, strict=True):
            base.rows.fill(self.tensors[base.rows.tensor], values)

    def _disturb(self, group: UnitGroup, perturbation: Perturbation, generator: Generator) -> None:
        own = [base for base in self.base if base.group == group.name]
        weights = [base for base in own if base.rows.role == "weight"]
        vectors = self._vectors(weights)
        zero = _are_zero(vectors)
        disturbed = perturbation(vectors, generator)
        if not isinstance(disturbed, Tensor) or disturbed.shape != vectors.shape:
            found = list(disturbed.shape) if isinstance(disturbed, Tensor) else type(disturbed).__name__
            raise ContinualError(
                f"invariance: the perturbation must give a tensor {list(vectors.shape)} for the units of"
                f" '{group.name}', one row a unit, as it gets it; it gave {found}."
            )
        for base, values in zip(weights, disturbed.split([base.values.shape[1] for base in weights], 1), strict=True):
            base.rows.fill(self.tensors[base.rows.tensor], values)
        for base in own:
            base.put_back_shared(self.tensors)
        if any(base.shared is not None for base in weights):
            disturbed = self._vectors(weights)
        silent = _are_zero(disturbed.to(vectors)) & ~zero
        if bool(silent.any()):
            self._silence([base for base in own if base.rows.role != "weight"], silent.nonzero().flatten())

    def _vectors(self, weights: Sequence[_Base]) -> Float[Tensor, "units inputs"]:
        """Copies of a group's redundant units' incoming vectors as they are now."""
        parts = [base.rows.read(self.tensors[base.rows.tensor]) for base in weights]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _silence(self, own: Sequence[_Base], units: Int64[Tensor, "some"]) -> None:
        """Biases, norm scales and norm shifts of units, numbered within the redundant ones, become zero."""
        for base in own:
            there = base.rows.among(units)
            there.fill(self.tensors[there.tensor], torch.zeros_like(base.values[units]))
            base.put_back_shared(self.tensors)


@dataclass(frozen=True, eq=False)
class _Base:
    """What a group's redundant units hold in one tensor, undisturbed.

    Attributes:
        group: the group's name.
        rows: where these units sit in the tensor.
        values: theirs.
        shared: entries that a claimed unit or output uses too; None where there is none.
    """

    group: str
    rows: Rows
    values: Shaped[Tensor, "units values"]
    shared: Bool[Tensor, "units values"] | None

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the undisturbed values back, but for entries that claimed units or outputs use too."""
        tensor, values = tensors[self.rows.tensor], self.values
        if self.shared is not None:
            values = torch.where(self.shared, self.rows.read(tensor), values)
        self.rows.fill(tensor, values)

    def put_back_shared(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the values back of entries that claimed units or outputs use too: these may not be disturbed."""
        tensor = tensors[self.rows.tensor]
        if self.shared is not None:
            self.rows.fill(tensor, torch.where(self.shared, self.values, self.rows.read(tensor)))


def _are_zero(vectors: Float[Tensor, "units inputs"]) -> Bool[Tensor, "units"]:
    """Which vectors are zero; several times as fast as ``any``."""
    return vectors.abs().amax(dim=1) == 0


def _shared(
    structure: Structure, owner: Int64[Tensor, "all"], rows: Rows, tensor: Tensor
) -> Bool[Tensor, "units values"] | None:
    """Which entries of these rows claimed units or outputs use too; None where there are none."""
    uses = structure.entries[rows.tensor]
    if len(uses) == 1:
        return None
    claimed = torch.zeros(tensor.shape, dtype=torch.bool)
    for use in uses:
        claimed |= lookup(use.target, owner, none=FREE) != FREE
    shared = rows.read(claimed)
    return shared.to(tensor.device) if bool(shared.any()) else None
