"""Uses of tensors in the tensors' own layout: what each entry computes and reads, wherever the network uses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_cf.network.structure import Role
from lightning_cf.network.tracing.findings import Use
from lightning_cf.network.tracing.labels import NO_LABEL, UNUSED, Units


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
    """A layer that is used at several places, or in parts, computes the same units at each of them.

    Where it is used transposed too, what an entry computes at the one place shares its fate with what it reads at the
    other: else a claim of one would cut entries that owned units of the other compute with. Ways through the network
    that lay it out otherwise still, as by a reshape, are left apart: that would unite nearly all, and ``cut_claimed``
    refuses what it must not cut.
    """
    found: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    for use in uses:
        if use.role == "weight":
            nothing = torch.full_like(use.target, NO_LABEL)
            labels = (use.target, nothing if use.source is None else use.source)
            target, source = (use.origin.place(each, use.shape).clamp_min(NO_LABEL) for each in labels)
            for way, other, read in found.setdefault(use.name, []):
                if not _turned(target, source, other, read):
                    units.unite(target, other)
                elif way == use.way or not _axes(target) & _axes(other):
                    units.unite(target, read)
                    units.unite(source, other)
            found[use.name].append((use.way, target, source))


def _turned(target: Tensor, source: Tensor, other: Tensor, read: Tensor) -> bool:
    """Whether one use of a tensor lays what it computes along other axes than another one, whose labels follow."""
    along, across = _axes(target), _axes(other)
    if along and across:
        return along != across
    return bool(_axes(source) & across if across else _axes(read) & along)


def _axes(labels: Tensor) -> set[int]:
    """Along which axes one comes from one unit to another."""
    there = labels != NO_LABEL
    top, low = labels.where(there, -1), labels.where(there, torch.iinfo(labels.dtype).max)
    axes = range(labels.ndim if labels.numel() else 0)
    return {axis for axis in axes if bool((top.amax(axis) > low.amin(axis)).any())}


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
