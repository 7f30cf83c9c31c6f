"""Sums over features that all tasks share: exact, so that the same features add up to the same bits in any order.

Features are rounded to whole multiples of a step before they are multiplied (:func:`rounded`). Sums of products of such
small whole numbers are whole numbers that floating point holds exactly, as long as not too many are added at a time; so
they can be added up in any order, over tasks, batches and processes, and what a task added can be subtracted again
(Zhuang et al. 2022, ACIL, and McDonnell et al. 2023, RanPAC, add up such sums, in floating point).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

STEP = 1 / 16
"""To multiples of what features are rounded; they are of the order of 1."""

LARGEST = 127
"""So many steps at most: products of two fit into fourteen bits."""

ROWS = 1024
"""So many products of fourteen bits add up exactly within the 24 bits that float32 has."""


def rounded(features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
    """Features as whole numbers of steps; what lies further than ``LARGEST`` steps from zero is taken there.

    >>> rounded(torch.tensor([[1.0, -0.03, 99.0]])).tolist()
    [[16.0, -0.0, 127.0]]
    """
    return (features / STEP).round().clamp(-LARGEST, LARGEST)


@dataclass(frozen=True)
class Sums:
    """What is kept of a task's features: enough for any linear classifier in closed form, and no sample.

    Attributes:
        classes: numbers of the classes, in ascending order.
        gram: the upper triangle of the sum of outer products, row after row.
        totals: for each class the sum of its features.
        counts: for each class how many samples it had.
    """

    classes: list[int]
    gram: Int64[Tensor, "pairs"]
    totals: Int64[Tensor, "classes features"]
    counts: Int64[Tensor, "classes"]

    @classmethod
    def of(
        cls,
        gram: Float[Tensor, "features features"],
        totals: Float[Tensor, "columns features"],
        counts: Int64[Tensor, "columns"],
    ) -> Sums:
        """Sums whose products stand in a square, and in which every column has a row; those without samples go.

        >>> x = rounded(torch.tensor([[1.0, 0.5]]))
        >>> sums = Sums.of(products(x), torch.cat([torch.zeros(1, 2), x]), torch.tensor([0, 1]))
        >>> sums.classes, sums.gram.tolist(), sums.totals.tolist()
        ([1], [256, 128, 64], [[16, 8]])
        """
        rows, columns = torch.triu_indices(len(gram), len(gram), device=gram.device)
        there = counts.nonzero().flatten()
        packed = gram[rows, columns].round().long().cpu()
        return cls(there.tolist(), packed, totals[there].round().long().cpu(), counts[there].cpu())

    @property
    def features(self) -> int:
        """How many features there are."""
        return self.totals.shape[1]

    def square(self) -> Float[Tensor, "features features"]:
        """The sum of outer products, in float64."""
        found = torch.zeros(self.features, self.features, dtype=torch.float64)
        rows, columns = torch.triu_indices(self.features, self.features)
        found[rows, columns] = self.gram.double()
        return found + found.triu(1).T

    def __add__(self, other: Sums) -> Sums:
        """The sums of both; classes that both have are one."""
        classes = sorted({*self.classes, *other.classes})
        totals, counts = torch.zeros(len(classes), self.features, dtype=torch.long), torch.zeros(len(classes)).long()
        for part in (self, other):
            places = torch.tensor([classes.index(label) for label in part.classes], dtype=torch.long)
            totals.index_add_(0, places, part.totals)
            counts.index_add_(0, places, part.counts)
        return Sums(classes, self.gram + other.gram, totals, counts)

    def __sub__(self, other: Sums) -> Sums:
        """What is left where the other's samples never were; classes of which nothing is left go."""
        left = self + Sums(other.classes, -other.gram, -other.totals, -other.counts)
        kept = ((left.counts != 0) | (left.totals != 0).any(dim=1)).nonzero().flatten()
        return Sums([left.classes[i] for i in kept.tolist()], left.gram, left.totals[kept], left.counts[kept])

    def renumbered(self, at: Mapping[int, int]) -> Sums:
        """The same sums under other numbers.

        >>> sums = Sums([0, 1], torch.ones(1).long(), torch.tensor([[3], [5]]), torch.tensor([1, 2]))
        >>> moved = sums.renumbered({0: 4})
        >>> moved.classes, moved.totals.tolist()
        ([1, 4], [[5], [3]])

        Args:
            at: by number so far, the number of each class that has another now.
        """
        named = [at.get(label, label) for label in self.classes]
        order = sorted(range(len(named)), key=named.__getitem__)
        return Sums([named[i] for i in order], self.gram, self.totals[order], self.counts[order])


def products(features: Float[Tensor, "batch features"]) -> Float[Tensor, "features features"]:
    """The sum of outer products of rounded features, exact, in float64."""
    parts = features.float().split(ROWS)
    found: Tensor = (parts[0].T @ parts[0]).double()
    for part in parts[1:]:
        found += (part.T @ part).double()
    return found


def packed(sums: Sums) -> Mapping[str, Tensor]:
    """The sums as tensors by name, for a checkpoint."""
    classes = torch.tensor(sums.classes, dtype=torch.long)
    return {"classes": classes, "gram": sums.gram, "totals": sums.totals, "counts": sums.counts}


def unpacked(kept: Mapping[str, Tensor]) -> Sums:
    """The sums that :func:`packed` gave."""
    return Sums(kept["classes"].tolist(), kept["gram"], kept["totals"], kept["counts"])
