"""Uses of tensors in the tensors' own layout: what each entry computes and reads, wherever the network uses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_cf.network.structure import Role
from lightning_cf.network.tracing.findings import Use
from lightning_cf.network.tracing.labels import NO_LABEL, UNUSED, Units, compress


@dataclass(frozen=True)
class Placed:
    """A use in the parameter's own layout."""

    role: Role
    target: Tensor
    source: Tensor
    ways: frozenset[int]
    used: Tensor | None = None

    def same(self, other: Placed) -> bool:
        """Whether it says the same of the tensor's entries, in whatever way through the network."""
        if self.used is None or other.used is None:
            alike = self.used is other.used
        else:
            alike = torch.equal(self.used, other.used)
        return alike and torch.equal(self.target, other.target) and torch.equal(self.source, other.source)


def unite_shared_layers(units: Units, uses: Sequence[Use]) -> None:
    """A layer that is used at several places computes the same units at each of them."""
    first: dict[str, list[Tensor]] = {}
    for use in uses:
        if use.role == "weight":
            target = use.origin.place(use.target, use.shape).clamp_min(NO_LABEL)
            for other in first.setdefault(use.name, []):
                if _meet(target, other):
                    units.unite(target, other)
                    break
            else:
                first[use.name].append(target)


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two uses lay their units along the same axes."""
    return compress(a).shape == compress(b).shape


def place(units: Units, uses: Sequence[Use]) -> dict[str, list[Placed]]:
    """Every use by the tensor's name, in the tensor's own layout, with resolved labels."""
    placed: dict[str, list[Placed]] = {}
    for use in uses:
        target = use.origin.place(units.resolve(use.target), use.shape)
        nothing = torch.where(target == UNUSED, UNUSED, NO_LABEL)
        source = nothing if use.source is None else use.origin.place(units.resolve(use.source), use.shape)
        found = placed.setdefault(use.name, [])
        for position, other in enumerate(found):
            if use.role == other.role and torch.equal(target, other.target) and torch.equal(source, other.source):
                found[position] = replace(other, ways=other.ways | {use.way})
                break
        else:
            found.append(Placed(use.role, target, source, frozenset({use.way})))
    return placed


def merged(uses: Sequence[Placed]) -> list[Placed]:
    """Uses of parts of a tensor say nothing of the rest of it: each takes over there what another one knows.

    First another one on the same way; where that way does not use the rest, what is taken over is noted as not used.
    """
    together: list[Placed] = []
    for way in sorted(frozenset().union(*(use.ways for use in uses))):
        own, others = [u for u in uses if way in u.ways], [u for u in uses if way not in u.ways]
        for use in own:
            filled, used = _filled(use, own), None
            if others and bool((filled.target == UNUSED).any()):
                used = filled.target != UNUSED
                filled = _filled(filled, others)
            target, source = filled.target.clamp_min(NO_LABEL), filled.source.clamp_min(NO_LABEL)
            found = Placed(use.role, target, source, frozenset({way}), used)
            for position, other in enumerate(together):
                if found.same(other):
                    together[position] = replace(other, ways=other.ways | {way})
                    break
            else:
                together.append(found)
    return together


def _filled(use: Placed, others: Sequence[Placed]) -> Placed:
    """A use that takes over from others what it does not know of a tensor's entries."""
    target, source = use.target, use.source
    for other in others:
        unused = target == UNUSED
        if not bool(unused.any()):
            break
        target = torch.where(unused, other.target, target)
        source = torch.where(unused, other.source, source)
    return replace(use, target=target, source=source)
