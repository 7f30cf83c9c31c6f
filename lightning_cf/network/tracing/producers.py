"""Which rows of which weights compute each unit, and so which units form a group and which are the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from lightning_cf.errors import StructureError
from lightning_cf.network.structure import layer_of
from lightning_cf.network.tracing.labels import NO_LABEL, compress
from lightning_cf.network.tracing.placing import Placed


class Producers:
    """Which rows of which weights compute each unit."""

    def __init__(self, placed: Mapping[str, Sequence[Placed]], tensors: Mapping[str, Tensor]) -> None:
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
        known = (flat > NO_LABEL).nonzero().flatten()
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


def head_labels(outputs: Sequence[Tensor], producers: Producers, read: Set[int], ended_by: str) -> list[int]:
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
                " or the outputs joined; or say how to run the network so (evaluate= of a Task, forward= of trace)."
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
