"""From what a trace found to a network's structure: units are numbered, gathered in groups, and found in tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor

from lightning_cf.errors import StructureError
from lightning_cf.network.structure import NO_UNIT, Entries, Mixing, Role, Rows, Structure, UnitGroup, layer_of
from lightning_cf.network.tracing.labels import NONE, Units, compress
from lightning_cf.network.tracing.shadows import UNUSED, Origin


@dataclass(frozen=True)
class Use:
    """One use of a tensor.

    Attributes:
        name: of the parameter or buffer.
        role: what it is there.
        origin: which of its entries the tensor used was made from.
        shape: of that tensor.
        target: labels of what each of its elements helps to compute; broadcasts with it, or names all that it meets.
        source: labels of what it reads.
        way: number of the way through the network that uses it.
        aside: whether what it is used for reaches nothing that the network returns.
    """

    name: str
    role: Role
    origin: Origin
    shape: tuple[int, ...]
    target: Tensor
    source: Tensor | None
    way: int = 0
    aside: bool = False


@dataclass(frozen=True)
class Found:
    """Labels that an operation united, or took out of the tensors."""

    operation: str
    module: str
    labels: Tensor
    unknown: bool


@dataclass(frozen=True)
class _Placed:
    """A use in the parameter's own layout."""

    role: Role
    target: Tensor
    source: Tensor
    ways: frozenset[int]
    used: Tensor | None = None

    def same(self, other: _Placed) -> bool:
        """Whether it says the same of the tensor's entries, in whatever way through the network."""
        if self.used is None or other.used is None:
            alike = self.used is other.used
        else:
            alike = torch.equal(self.used, other.used)
        return alike and torch.equal(self.target, other.target) and torch.equal(self.source, other.source)


def assemble(
    tensors: Mapping[str, Tensor],
    units: Units,
    uses: Sequence[Use],
    outputs: Sequence[tuple[Tensor, bool]],
    batch: int,
    norms: Mapping[str, Tensor],
    mixings: Sequence[Found],
    reads: Sequence[Found],
    branches: Sequence[Found],
    computed: Mapping[str, str],
    written: Mapping[str, str],
    ended_by: str,
    output_ways: Sequence[int],
) -> tuple[Structure, Int64[Tensor, "labels"]]:
    """Numbers the units, group after group, the outputs last; also gives the number of each label.

    Args:
        tensors: parameters and buffers by name.
        units: which labels are one.
        uses: every use of a tensor.
        outputs: labels of each tensor that the network returns, and whether an operation over units made it.
        batch: how many samples were traced.
        norms: labels of the elements that a module normalises together.
        mixings: where labels were united.
        reads: where values of units were read.
        branches: where values of the network's input were read.
        computed: of parameters that are changed before they are used, by what.
        written: of buffers that the forward pass writes, by what.
        ended_by: the operation that gave the outputs.
        output_ways: of each tensor that the network returns, the way through it that does.
    """
    live = {use.name for use in uses if not use.aside}
    uses = [use for use in uses if not use.aside or use.name not in live]
    _unite_shared_layers(units, uses)
    placed = _place(units, uses)
    producers = _Producers(placed, tensors)
    sources = [compress(use.source).unique() for uses in placed.values() for use in uses]
    read = {label for labels in sources for label in labels.tolist() if label > NONE}
    head = _head([units.resolve(labels) for labels, _ in outputs], producers, read, ended_by)
    members = [*producers.groups(without=head), head]

    numbers = torch.full((len(units),), NO_UNIT)
    numbers[torch.tensor([label for labels in members for label in labels])] = torch.arange(sum(map(len, members)))
    entries = {
        name: tuple(
            Entries(compress(numbers[use.target]), compress(numbers[use.source]), use.role, use.ways, use.used)
            for use in _merged(found)
        )
        for name, found in placed.items()
    }
    ways = frozenset(use.way for use in uses) | frozenset(output_ways)
    if all(use.ways == ways for found in entries.values() for use in found):  # they differ in nothing that is used
        entries = {n: tuple(replace(use, ways=frozenset({0})) for use in found) for n, found in entries.items()}
        ways, output_ways = frozenset({0}), [0] * len(output_ways)
    groups: list[UnitGroup] = []
    for labels in members:
        first = groups[-1].first + groups[-1].size if groups else 0
        sites = _rows(entries, tensors, first, len(labels))
        layers = tuple(dict.fromkeys(layer_of(name) for label in labels for name in producers.sites[label]))
        taken = sum(group.name.partition("#")[0] == layers[0] for group in groups)
        name = f"{layers[0]}#{taken + 1}" if taken else layers[0]
        groups.append(UnitGroup(name, first, len(labels), layers, sites))

    def numbered(labels: Tensor) -> Tensor:
        return numbers[units.resolve(labels)]

    structure = Structure(
        tuple(groups[:-1]),
        groups[-1],
        tuple(_of_one_sample(numbered(labels), batch, mixed) for labels, mixed in outputs),
        entries,
        returned=tuple(_columns(numbered(labels), groups[-1]) for labels, _ in outputs),
        norms={path: numbered(labels) for path, labels in norms.items()},
        mixings=tuple(_mixing(found, numbered, groups[:-1], tensors) for found in mixings),
        reads=tuple(_mixing(found, numbered, groups[:-1], tensors) for found in reads),
        branches=tuple(_mixing(found, numbered, groups[:-1], tensors) for found in branches),
        computed=dict(computed),
        written=dict(written),
        ways=max(ways) + 1,
        output_ways=tuple(output_ways),
    )
    return structure, numbers


def _columns(numbers: Tensor, head: UnitGroup) -> Tensor:
    """Which of the network's output columns a tensor holds."""
    found: Tensor = numbers.unique()
    return found[found >= head.first] - head.first


def _of_one_sample(numbers: Tensor, batch: int, mixed: bool) -> Tensor:
    """Units of one sample's outputs; none where each depends on several, or where samples are not told apart."""
    if mixed or numbers.ndim == 0 or len(numbers) != batch:
        return torch.full((1, *numbers.shape[1:]), NO_UNIT)
    return numbers[:1]


def _unite_shared_layers(units: Units, uses: Sequence[Use]) -> None:
    """A layer that is used at several places computes the same units at each of them."""
    first: dict[str, list[Tensor]] = {}
    for use in uses:
        if use.role == "weight":
            target = use.origin.place(use.target, use.shape).clamp_min(NONE)
            for other in first.setdefault(use.name, []):
                if _meet(target, other):
                    units.unite(target, other)
                    break
            else:
                first[use.name].append(target)


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two uses lay their units along the same axes."""
    return compress(a).shape == compress(b).shape


def _place(units: Units, uses: Sequence[Use]) -> dict[str, list[_Placed]]:
    """Every use by the tensor's name, in the tensor's own layout, with resolved labels."""
    placed: dict[str, list[_Placed]] = {}
    for use in uses:
        target = use.origin.place(units.resolve(use.target), use.shape)
        nothing = torch.where(target == UNUSED, UNUSED, NONE)
        source = nothing if use.source is None else use.origin.place(units.resolve(use.source), use.shape)
        found = placed.setdefault(use.name, [])
        for position, other in enumerate(found):
            if use.role == other.role and torch.equal(target, other.target) and torch.equal(source, other.source):
                found[position] = replace(other, ways=other.ways | {use.way})
                break
        else:
            found.append(_Placed(use.role, target, source, frozenset({use.way})))
    return placed


def _merged(uses: Sequence[_Placed]) -> list[_Placed]:
    """Uses of parts of a tensor say nothing of the rest of it: each takes over there what another one knows.

    First another one on the same way; where that way does not use the rest, what is taken over is noted as not used.
    """
    merged: list[_Placed] = []
    for way in sorted(frozenset().union(*(use.ways for use in uses))):
        own, others = [u for u in uses if way in u.ways], [u for u in uses if way not in u.ways]
        for use in own:
            filled, used = _filled(use, own), None
            if others and bool((filled.target == UNUSED).any()):
                used = filled.target != UNUSED
                filled = _filled(filled, others)
            target, source = filled.target.clamp_min(NONE), filled.source.clamp_min(NONE)
            found = _Placed(use.role, target, source, frozenset({way}), used)
            for position, other in enumerate(merged):
                if found.same(other):
                    merged[position] = replace(other, ways=other.ways | {way})
                    break
            else:
                merged.append(found)
    return merged


def _filled(use: _Placed, others: Sequence[_Placed]) -> _Placed:
    """A use that takes over from others what it does not know of a tensor's entries."""
    target, source = use.target, use.source
    for other in others:
        unused = target == UNUSED
        if not bool(unused.any()):
            break
        target = torch.where(unused, other.target, target)
        source = torch.where(unused, other.source, source)
    return replace(use, target=target, source=source)


class _Producers:
    """Which rows of which weights compute each unit."""

    def __init__(self, placed: Mapping[str, Sequence[_Placed]], tensors: Mapping[str, Tensor]) -> None:
        self.sites: dict[int, dict[str, tuple[tuple[int, ...], int, int]]] = {}
        self.ways: dict[int, frozenset[int]] = {}
        """In which ways through the network each unit is computed."""
        self.united: set[str] = set()
        """Weights of which several rows or columns share one unit."""
        for name, uses in placed.items():
            known: list[Tensor] = []
            for use in uses:
                if use.role == "weight":
                    target = compress(use.target)
                    for label in target.unique().tolist():
                        self.ways[label] = self.ways.get(label, frozenset()) | use.ways
                    if any(torch.equal(target, other) for other in known):
                        continue  # a layer that is used at several places computes its units once
                    known.append(target)
                    self._add(name, target)
                    if target.numel() not in tensors[name].shape[:2]:
                        self.united.add(name)

    def _add(self, name: str, target: Tensor) -> None:
        flat = target.flatten()
        known = (flat > NONE).nonzero().flatten()
        ordered = known[flat[known].argsort(stable=True)]
        labels, counts = flat[ordered].unique_consecutive(return_counts=True)
        firsts = ordered[counts.cumsum(0) - counts]
        for label, count, first in zip(labels.tolist(), counts.tolist(), firsts.tolist(), strict=True):
            sites = self.sites.setdefault(label, {})
            shape, total, least = sites.get(name, (tuple(target.shape), 0, first))
            sites[name] = (shape, total + count, min(least, first))

    def groups(self, without: Sequence[int]) -> list[list[int]]:
        """Labels that sit alike in the same weights, group by group."""
        hidden = self.sites.keys() - set(without)
        signatures: dict[tuple[object, ...], list[int]] = {}
        for label in sorted(hidden):
            signature = (
                self.ways[label],
                *((name, shape, count) for name, (shape, count, _) in self.sites[label].items()),
            )
            signatures.setdefault(signature, []).append(label)
        return list(signatures.values())


def _head(outputs: Sequence[Tensor], producers: _Producers, read: Set[int], ended_by: str) -> list[int]:
    """Labels of the output columns, in the order of the rows of the layers that compute them.

    What other layers read is hidden, though the network may return it too, as long as it returns something else.
    """
    columns = {label: None for x in outputs for label in x.flatten().tolist() if label}
    made = [label for label in columns if label in producers.sites]
    made = [label for label in made if label not in read] or made
    if not made:
        raise StructureError(
            f"The network cannot be traced: no layer with weights computes its output, which {ended_by} gives."
        )
    layers: dict[str, None] = {}
    for label in made:
        found = dict.fromkeys(layer_of(name) for name in producers.sites[label])
        rows = max(count for _, count, _ in producers.sites[label].values())
        united = not producers.united.isdisjoint(producers.sites[label])
        if rows > 1 or united or (len(found) > 1 and label in read):
            names = ", ".join(f"'{name}'" for name in sorted({*found, *layers}))
            raise StructureError(
                f"The network cannot be traced: its outputs mix the columns of {names}; {ended_by} gives them."
                " Let the forward pass end in layers that compute one column an output each, and return their outputs"
                " or the outputs joined; or give the task evaluate= that runs the network so."
            )
        layers |= found
    order = list(layers)

    def place(label: int) -> tuple[int, int]:
        name, (_, _, first) = next(iter(producers.sites[label].items()))
        return order.index(layer_of(name)), first

    sites = {(name, shape) for label in made for name, (shape, _, _) in producers.sites[label].items()}
    rest = [
        label
        for label, own in producers.sites.items()
        if label not in columns and {(name, shape) for name, (shape, _, _) in own.items()} <= sites
    ]
    return sorted([*made, *rest], key=place)


def _rows(
    entries: Mapping[str, tuple[Entries, ...]], tensors: Mapping[str, Tensor], first: int, size: int
) -> tuple[Rows, ...]:
    """Where the units ``first`` to ``first + size - 1`` sit; not in tensors that hold more of some than of others."""
    found: dict[tuple[str, Role], Rows] = {}
    for name, uses in entries.items():
        for use in uses:
            axes = [axis for axis, length in enumerate(use.target.shape) if length > 1] or [0]
            target = use.target if len(axes) == 1 else use.target.expand(tensors[name].shape)
            inside = ((target >= first) & (target < first + size)).flatten()
            if use.role in ("statistic", "constant") or (name, use.role) in found or not bool(inside.any()):
                continue
            positions = inside.nonzero().flatten()
            numbers = target.flatten()[positions]
            counts = (numbers - first).bincount(minlength=size)
            if bool((counts != counts[0]).any()):
                continue
            by_unit = positions[numbers.argsort(stable=True)]
            found[name, use.role] = Rows(name, axes[0] if len(axes) == 1 else None, by_unit.reshape(size, -1), use.role)
    return tuple(found.values())


def _mixing(
    found: Found, numbered: Callable[[Tensor], Tensor], groups: Sequence[UnitGroup], tensors: Mapping[str, Tensor]
) -> Mixing:
    numbers = numbered(found.labels).unique()
    touched = tuple(
        group for group in groups if bool(((numbers >= group.first) & (numbers < group.first + group.size)).any())
    )
    collapsed = tuple(
        layer
        for group in touched
        if group.size == 1
        and any(rows.role == "weight" and tensors[rows.tensor].shape[rows.axis or 0] > 1 for rows in group.rows)
        for layer in group.layers
    )
    layers = tuple(dict.fromkeys(layer for group in touched for layer in group.layers))
    return Mixing(found.operation, found.module, len(found.labels), layers, found.unknown, collapsed)
