"""From what a trace found to a network's structure: units are numbered, gathered in groups, and found in tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int64
from torch import Tensor

from lightning_cf.network.structure import NO_UNIT, Entries, Mixing, Role, Rows, Structure, UnitGroup, layer_of
from lightning_cf.network.tracing.findings import Findings, Found, Use
from lightning_cf.network.tracing.labels import NO_LABEL, compress
from lightning_cf.network.tracing.placing import Placed, merged, place, unite_shared_layers
from lightning_cf.network.tracing.producers import Producers, head_labels


def assemble(
    found: Findings, outputs: Sequence[tuple[Tensor, bool]], output_ways: Sequence[int], batch: int, ended_by: str
) -> tuple[Structure, Int64[Tensor, "labels"]]:
    """Numbers the units, group after group, the outputs last; also gives the number of each label.

    Args:
        found: by the trace.
        outputs: labels of each tensor that the network returns, and whether an operation over units made it.
        output_ways: of each tensor that the network returns, the way through it that does.
        batch: how many samples were traced.
        ended_by: the operation that gave the outputs, for messages.
    """
    units, tensors, uses = found.units, found.tensors, _uses_that_count(found)
    unite_shared_layers(units, uses)
    placed = place(units, uses)
    producers = Producers(placed, tensors)
    head = head_labels([units.resolve(labels) for labels, _ in outputs], producers, _labels_read(placed), ended_by)
    members = [*producers.groups(without=head), head]

    numbers = _numbers(members, len(units))
    entries = _entries(placed, numbers)
    ways = frozenset(use.way for use in uses) | frozenset(output_ways)
    if all(use.ways == ways for several in entries.values() for use in several):
        entries, ways, output_ways = _as_one_way(entries), frozenset({0}), [0] * len(output_ways)
    *groups, outputs_group = _groups(members, producers, entries, tensors)

    def numbered(labels: Tensor) -> Tensor:
        return numbers[units.resolve(labels)]

    def told(met: Sequence[Found]) -> tuple[Mixing, ...]:
        return tuple(_mixing(each, numbered, groups, tensors) for each in met)

    structure = Structure(
        tuple(groups),
        outputs_group,
        tuple(_of_one_sample(numbered(labels), batch, mixed) for labels, mixed in outputs),
        entries,
        returned=tuple(_columns(numbered(labels), outputs_group) for labels, _ in outputs),
        norms={path: numbered(labels) for path, labels in found.norms.items()},
        mixings=told(found.mixings),
        reads=told(found.reads),
        branches=told(found.branches),
        computed=dict(found.computed),
        written=dict(found.written),
        ways=max(ways) + 1,
        output_ways=tuple(output_ways),
    )
    return structure, numbers


def _uses_that_count(found: Findings) -> list[Use]:
    """All uses but those aside of tensors that are used otherwise too."""
    uses = found.all_uses()
    live = {use.name for use in uses if not use.aside}
    return [use for use in uses if not use.aside or use.name not in live]


def _labels_read(placed: Mapping[str, Sequence[Placed]]) -> set[int]:
    """Labels of the units that some weight reads."""
    sources = [compress(use.source).unique() for uses in placed.values() for use in uses]
    return {label for labels in sources for label in labels.tolist() if label > NO_LABEL}


def _numbers(members: Sequence[Sequence[int]], count: int) -> Int64[Tensor, "labels"]:
    """The unit's number of each of ``count`` labels, group after group; NO_UNIT of those that are in no group."""
    numbers = torch.full((count,), NO_UNIT)
    numbers[torch.tensor([label for labels in members for label in labels])] = torch.arange(sum(map(len, members)))
    return numbers


def _as_one_way(entries: Mapping[str, tuple[Entries, ...]]) -> dict[str, tuple[Entries, ...]]:
    """The same for ways through the network that differ in nothing that is used: they count as one."""
    return {name: tuple(replace(use, ways=frozenset({0})) for use in uses) for name, uses in entries.items()}


def _entries(
    placed: Mapping[str, Sequence[Placed]], numbers: Int64[Tensor, "labels"]
) -> dict[str, tuple[Entries, ...]]:
    """For each tensor by name, which unit each of its entries computes and reads."""
    return {
        name: tuple(
            Entries(compress(numbers[use.target]), compress(numbers[use.source]), use.role, use.ways, use.used)
            for use in merged(uses)
        )
        for name, uses in placed.items()
    }


def _groups(
    members: Sequence[Sequence[int]],
    producers: Producers,
    entries: Mapping[str, tuple[Entries, ...]],
    tensors: Mapping[str, Tensor],
) -> list[UnitGroup]:
    """The groups of units, called by the layer that computes them; a number tells apart those of one layer."""
    groups: list[UnitGroup] = []
    for labels in members:
        first = groups[-1].first + groups[-1].size if groups else 0
        sites = _rows(entries, tensors, first, len(labels))
        layers = tuple(dict.fromkeys(layer_of(name) for label in labels for name in producers.sites[label]))
        taken = sum(group.name.partition("#")[0] == layers[0] for group in groups)
        name = f"{layers[0]}#{taken + 1}" if taken else layers[0]
        groups.append(UnitGroup(name, first, len(labels), layers, sites))
    return groups


def _columns(numbers: Tensor, head: UnitGroup) -> Tensor:
    """Which of the network's output columns a tensor holds."""
    found: Tensor = numbers.unique()
    return found[found >= head.first] - head.first


def _of_one_sample(numbers: Tensor, batch: int, mixed: bool) -> Tensor:
    """Units of one sample's outputs; none where each depends on several, or where samples are not told apart."""
    if mixed or numbers.ndim == 0 or len(numbers) != batch:
        return torch.full((1, *numbers.shape[1:]), NO_UNIT)
    return numbers[:1]


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
