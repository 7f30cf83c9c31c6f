"""Splits the units of a group into non-redundant ones (leaders of a cluster) and redundant ones (its other members)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from lightning_cf.similarity import Similarity

TOLERANCE = 1e-9
"""Slack of every comparison with the threshold, so that rounding does not part identical units at threshold 1."""

TILE = 1024


@dataclass(frozen=True)
class Partition:
    """The outcome for one group.

    Attributes:
        representative: the representative of each unit's cluster, itself for a non-redundant unit.
        threshold: the similarity at which units joined a leader.
    """

    representative: Int64[Tensor, "units"]
    threshold: float

    @property
    def non_redundant(self) -> Bool[Tensor, "units"]:
        """Unclustered units and the representative of each cluster (paragraph 49)."""
        return self.representative == torch.arange(len(self.representative))

    @property
    def redundant(self) -> Bool[Tensor, "units"]:
        """The other members of the clusters."""
        return ~self.non_redundant


def partition(similarity: Similarity, threshold: float, *, limit: int | None = None) -> Partition:
    """Greedy leader clustering in the order of falling magnitude.

    Each unit joins the first leader, from the largest vector on, whose similarity reaches the threshold, else it
    leads a cluster of its own; so the leader is the cluster's unit of highest magnitude, which the patent takes as
    its representative (paragraph 16). Equal magnitudes are ordered by number. Memory: one tile of 1024 units by the
    leaders so far, at most 1024 at a time.

    Args:
        similarity: of the units to split.
        threshold: a similarity; 1 and less are useful.
        limit: keep only this many leaders, those of the highest magnitude; every unit that finds none of them
            similar enough joins the most similar one.
    """
    leaders, representative = _lead(similarity, threshold, limit)
    for block in (representative < 0).nonzero().flatten().split(TILE):
        representative[block] = _first_leader(similarity, block, leaders, threshold)
    for block in (representative < 0).nonzero().flatten().split(TILE):
        representative[block] = _nearest(similarity, block, leaders)
    return Partition(representative, threshold)


def partition_into(similarity: Similarity, count: int) -> Partition:
    """The partition with ``count`` leaders: the threshold is found instead of given.

    Bisects the threshold to the lowest one that yields at least ``count`` leaders, and keeps the largest of them.

    Args:
        similarity: of the units to split.
        count: how many units lead; between 1 and the number of units.
    """
    spread = float(similarity.biases.double().max() - similarity.biases.double().min())
    # By log(2 - s), since one outlying bias stretches the similarities over many orders of magnitude.
    lowest, highest = math.log1p(2.0 + similarity.bias_weight * spread**2), math.log1p(-1e-6)
    for _ in range(40):
        middle = (lowest + highest) / 2
        if len(_lead(similarity, 1.0 - math.expm1(middle), count)[0]) >= count:
            highest = middle
        else:
            lowest = middle
    return partition(similarity, 1.0 - math.expm1(highest), limit=count)


def _lead(similarity: Similarity, threshold: float, limit: int | None) -> tuple[list[int], Int64[Tensor, "units"]]:
    """Leaders by falling magnitude, and each unit's leader; stops at ``limit`` and leaves -1 from there."""
    order = similarity.norms.argsort(descending=True, stable=True)
    leaders: list[int] = []
    representative = torch.full((len(order),), -1)
    for block in order.split(TILE):
        found = _first_leader(similarity, block, leaders, threshold)
        within = similarity.tile(block, block) >= threshold - TOLERANCE
        while len(unled := (found < 0).nonzero()) > 0 and (limit is None or len(leaders) < limit):
            position = int(unled[0])
            leader = int(block[position])
            leaders.append(leader)
            found[(found < 0) & within[position]] = leader
            found[position] = leader
        representative[block] = found
        if limit is not None and len(leaders) >= limit:
            break
    return leaders, representative


def _first_leader(
    similarity: Similarity, units: Int64[Tensor, "block"], leaders: list[int], threshold: float
) -> Int64[Tensor, "block"]:
    """For each unit the first leader that is similar enough, -1 if none is."""
    found = torch.full((len(units),), -1)
    for block in torch.tensor(leaders, dtype=torch.int64).split(TILE):
        open_ = (found < 0).nonzero().flatten()
        if len(open_) == 0 or len(block) == 0:
            break
        close = similarity.tile(units[open_], block) >= threshold - TOLERANCE
        hit = close.any(dim=1)
        found[open_[hit]] = block[close[hit].to(torch.int8).argmax(dim=1)]
    return found


def _nearest(similarity: Similarity, units: Int64[Tensor, "block"], leaders: list[int]) -> Int64[Tensor, "block"]:
    """For each unit the most similar leader, the first of equals."""
    best = torch.full((len(units),), -torch.inf, dtype=torch.float64)
    nearest = torch.full((len(units),), -1)
    for block in torch.tensor(leaders).split(TILE):
        values, positions = similarity.tile(units, block).max(dim=1)
        better = values > best
        best[better], nearest[better] = values[better], block[positions[better]]
    return nearest
