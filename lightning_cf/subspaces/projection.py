"""Training steps that stay in a sub-space, whatever optimiser takes them (US 12387107, paragraph 24)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_cf.errors import ContinualError
from lightning_cf.network.structure import UnitGroup
from lightning_cf.subspaces.subspace import exact_dtype


class Projection:
    """Holds what training adds to the weight vectors of some units in a sub-space.

    A step hook projects the difference from the values at the start, not the gradient: Adam's steps leave the
    sub-space though every gradient lies in it. Biases and norm entries of the units, which have no part in the
    sub-space, stay as they were.

    A tensor that needs no gradient stays too, as long as it needs none: the step is then held in those directions of
    the sub-space that leave it alone.

    Args:
        tensors: the module's parameters and buffers by name.
        held: each group with those of its units (numbered within it) that are held, and an orthonormal basis.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], held: Sequence[tuple[UnitGroup, Int64[Tensor, "_"], Float[Tensor, "_ _"]]]
    ) -> None:
        self.tensors = tensors
        self.held = [_Held(group, units, basis, tensors) for group, units, basis in held if len(units)]
        self.handles: list[RemovableHandle] = []

    def attach(self, optimizers: Iterable[Optimizer]) -> Projection:
        """Starts holding: what every optimiser's steps add from now on."""
        self.handles += [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]
        return self

    def detach(self) -> None:
        """Removes the hooks from the optimisers: steps are free from now on."""
        while self.handles:
            self.handles.pop().remove()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for held in self.held:
            held.project(self.tensors)


class _Held:
    """The held units of one group."""

    def __init__(
        self,
        group: UnitGroup,
        units: Int64[Tensor, "some"],
        basis: Float[Tensor, "inputs dimensions"],
        tensors: Mapping[str, Tensor],
    ) -> None:
        self.group = group
        self.units = units
        vectors = group.weights(tensors)
        self.start = vectors[units.to(vectors.device)]
        # What is off by rounding in an orthonormal basis would, step by step, shrink or stretch what was added.
        exact = exact_dtype(vectors.device)
        self.whole: Tensor = torch.linalg.qr(basis.cpu().double()).Q.to(vectors.device, exact)
        self.others = [
            (rows, rows.read(tensors[rows.tensor])) for rows in group.rows if rows.role in ("bias", "scale", "shift")
        ]
        self.still = {
            rows.tensor for rows in group.rows if rows.role == "weight" and not tensors[rows.tensor].requires_grad
        }
        self.basis = self._leaving_still(tensors)

    @torch.no_grad()
    def project(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes out of what training added to the held vectors all that lies outside the sub-space, in place."""
        if any(tensors[name].requires_grad for name in self.still):
            self.still = {name for name in self.still if not tensors[name].requires_grad}
            self.basis = self._leaving_still(tensors)
        vectors = self.group.weights(tensors)
        there = self.units.to(vectors.device)
        start = self.start.to(self.basis)
        added = vectors[there].to(self.basis) - start
        moved = start + (added @ self.basis) @ self.basis.T
        vectors[there] = torch.where(self.moves, moved, start).to(vectors)
        self.group.write_weights(tensors, vectors, self.units)
        for rows, values in self.others:
            rows.write(tensors[rows.tensor], values, self.units)

    def _leaving_still(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "inputs some"]:
        """Basis of the sub-space's directions that leave the tensors in ``still`` as they are."""
        weights = [rows for rows in self.group.rows if rows.role == "weight"]
        widths = torch.tensor([rows.width(tensors[rows.tensor]) for rows in weights])
        still = torch.tensor([rows.tensor in self.still for rows in weights]).repeat_interleave(widths)
        self.moves = (~still).to(self.whole.device)
        if not bool(still.any()):
            return self.whole
        whole = self.whole.cpu().double()
        _, s, vh = torch.linalg.svd(whole[still])
        basis: Tensor = whole @ vh[int((s > 1e-6).sum()) :].T
        basis[still] = 0
        if basis.shape[1] == 0 and not bool(still.all()):
            raise ContinualError(
                f"masking: no direction of the sub-space of '{self.group.name}' leaves"
                f" {', '.join(sorted(self.still))} alone, which needs no gradient (requires_grad=False). Give the"
                " sub-space more dimensions, or let that tensor train."
            )
        return basis.to(self.whole)
