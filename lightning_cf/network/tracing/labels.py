"""Labels of units that travel beside activations, in disjoint sets: units that must share one fate are united."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Int64
from torch import Tensor

NO_LABEL = 0
"""The label of what no unit computes: inputs and constants."""

UNUSED = -1
"""Stands for the label of an entry of a tensor of which nothing is known, since no element is made from it."""

Labels = Int64[Tensor, "..."]


class Units:
    """Disjoint sets of labels.

    >>> units = Units()
    >>> labels = units.new(4)
    >>> _ = units.unite(labels[:2], labels[2:])
    >>> units.resolve(labels).tolist()
    [1, 2, 1, 2]
    """

    def __init__(self) -> None:
        self._roots = torch.zeros(1, dtype=torch.int64)
        self._count = 1
        self._edges: list[Tensor] = []
        self.still = False
        """While set, nothing is united."""

    def __len__(self) -> int:
        """How many labels there are, NO_LABEL included."""
        return self._count

    def new(self, count: int) -> Int64[Tensor, "count"]:
        """Fresh labels, each in a set of its own."""
        self._count += count
        return torch.arange(self._count - count, self._count)

    def unite(self, a: Labels, b: Labels) -> Labels:
        """Unites labels pair by pair, broadcast; returns the labels, the other side's where one side has none."""
        a, b = torch.broadcast_tensors(a, b)
        if self.still:
            return torch.where(a != NO_LABEL, a, b)
        both = (a != NO_LABEL) & (b != NO_LABEL) & (a != b)
        if bool(both.any()):
            pairs = (a[both] * self._count + b[both]).unique()
            self._edges.append(torch.stack([pairs // self._count, pairs % self._count]))
        return torch.where(a != NO_LABEL, a, b)

    def unite_along(self, labels: Labels, dims: Iterable[int]) -> Labels:
        """Unites labels that differ only in their position along ``dims``; those dims keep size one."""
        for dim in dims:
            united = (
                labels.amax(dim, keepdim=True)
                if labels.shape[dim]
                else labels.new_zeros(()).expand(
                    *(1 if d == dim % labels.ndim else n for d, n in enumerate(labels.shape))
                )
            )
            if labels.shape[dim] > 1:
                self.unite(united, labels)
            labels = united
        return labels

    def resolve(self, labels: Labels) -> Labels:
        """For each label the smallest one of its set."""
        known = len(self._roots)
        if known < self._count:
            self._roots = torch.cat([self._roots, torch.arange(known, self._count)])
        if self._edges:
            from scipy.sparse import coo_matrix
            from scipy.sparse.csgraph import connected_components

            rows, columns = self._roots[torch.cat(self._edges, dim=1)].int().numpy()
            self._edges = []
            graph = coo_matrix((torch.ones(len(rows), dtype=torch.int8).numpy(), (rows, columns)), (self._count,) * 2)
            components = torch.from_numpy(connected_components(graph, directed=False)[1]).long()
            smallest = torch.full((int(components.max()) + 1,), self._count)
            smallest = smallest.scatter_reduce(0, components, torch.arange(self._count), "amin")
            self._roots = smallest[components][self._roots]
        return self._roots[labels]


def sole(labels: Labels, shape: tuple[int, ...]) -> Labels:
    """Labels reduced to a shape that broadcasts to theirs: ``NO_LABEL`` where several different ones meet."""
    while labels.ndim > len(shape):
        labels = sole_along(labels, [0]).squeeze(0)
    return sole_along(labels, [dim for dim, size in enumerate(shape) if size == 1 and labels.shape[dim] != 1])


def sole_along(labels: Labels, dims: Iterable[int]) -> Labels:
    """The label that all positions along ``dims`` share, ``NO_LABEL`` for several; those dims keep size one."""
    for dim in dims:
        if labels.shape[dim] == 0:
            labels = labels.new_zeros([1 if d == dim % labels.ndim else n for d, n in enumerate(labels.shape)])
            continue
        top = labels.amax(dim, keepdim=True)
        labels = top * (top == labels.amin(dim, keepdim=True))
    return labels


def compress(labels: Labels) -> Labels:
    """The same labels with size one along every axis on which they are constant."""
    for axis in range(labels.ndim):
        first = labels.narrow(axis, 0, 1)
        if bool((labels == first).all()):
            labels = first
    return labels.clone()
