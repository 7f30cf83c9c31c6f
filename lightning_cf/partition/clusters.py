"""Splits the units of a group into non-redundant ones (representatives of a cluster) and redundant ones (the rest)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from lightning_cf.partition.representatives import Representative, check_generator, first_members, represented
from lightning_cf.partition.similarity import Similarity
from lightning_cf.partition.spanning_forest import Forest, spanning_forest
from lightning_cf.partition.thresholds import TOLERANCE, components_threshold, double_at, place_of, threshold_above

Clusters = Literal["leader", "components"]
CLUSTERS = ("leader", "components")


TILE = 1024

KEPT = 4096
"""Up to how many units all similarities are kept while a threshold is found, 128 MiB; beyond, computed tile by tile."""

WIDE = 8192
"""From how many units on a threshold is found by few passes over them instead of many."""


@dataclass(frozen=True)
class Partition:
    """The outcome for one group.

    Attributes:
        representative: the representative of each unit's cluster, itself for a non-redundant unit.
        threshold: the similarity at which units formed clusters.
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

    @property
    def cluster(self) -> Int64[Tensor, "units"]:
        """Number of each unit's cluster, from 0 on in the order of the clusters' first units."""
        first = first_members(self.representative, torch.arange(len(self.representative)))
        number: Tensor = first.unique(return_inverse=True)[1]
        return number


def partition(
    similarity: Similarity,
    threshold: float,
    *,
    limit: int | None = None,
    clusters: Clusters = "leader",
    representative: Representative = "magnitude",
    generator: torch.Generator | None = None,
) -> Partition:
    """Clusters of units whose similarity reaches a threshold (US 12387107, paragraphs 15-17 and 49).

    ``"leader"`` goes through the units in the order of falling magnitude: each joins the first leader whose
    similarity reaches the threshold, else it leads a cluster of its own. ``"components"`` (single linkage) are the
    connected components of the graph of all pairs whose similarity reaches it, so a chain of units is one cluster.
    Either way the cluster's unit of highest magnitude represents it, or any of its units (paragraph 16). Equal
    magnitudes are ordered by number. Memory: a few numbers for each pair in one tile of 1024 by 1024 units.

    >>> directions = torch.tensor([0.0, 0.4, 0.8, 1.2])
    >>> chain = Similarity(torch.stack([directions.cos(), directions.sin()], dim=1), torch.zeros(4), 0.0)
    >>> partition(chain, 0.9).cluster.tolist(), partition(chain, 0.9, clusters="components").cluster.tolist()
    ([0, 0, 1, 1], [0, 0, 0, 0])

    Args:
        similarity: of the units to split.
        threshold: a similarity; 1 and less are useful, with a given measure any number. Similarities that fall short
            of it by up to 1e-9, whatever the measure's scale, count as reaching it.
        limit: keep only this many clusters, those whose largest unit is largest; the units of the others join the
            cluster of the most similar one of these largest units.
        clusters: how clusters form.
        representative: ``"random"`` draws each cluster's representative uniformly from its units; the clusters stay.
        generator: on the CPU; draws the representatives.

    Raises:
        ContinualError: if representatives are to be drawn without a generator.
    """
    check_generator(representative, generator)
    if clusters == "components":
        forest = spanning_forest(similarity, TILE, threshold - TOLERANCE)
        leaders, members = _connect(similarity, forest, threshold, limit)
    else:
        leaders, members = _lead(similarity, threshold, limit)
        for block in (members < 0).nonzero().flatten().split(TILE):
            members[block] = _first_leader(similarity, block, leaders, threshold)
    members = _join(similarity, leaders, members)
    return Partition(represented(members, representative, generator), threshold)


def partition_into(
    similarity: Similarity,
    count: int,
    *,
    clusters: Clusters = "leader",
    representative: Representative = "magnitude",
    generator: torch.Generator | None = None,
) -> Partition:
    """The partition into ``count`` clusters: the threshold is found instead of given.

    It is the lowest one that yields at least ``count`` clusters, of which those with the largest units are kept:
    leaders are counted again and again while the threshold is bisected, components counted once in a spanning forest.
    With more than ``WIDE`` units it is found in single precision, and yields up to a fiftieth more than ``count``.

    Args:
        similarity: of the units to split.
        count: how many units are non-redundant; between 1 and the number of units.
        clusters: how clusters form, as in ``partition``.
        representative: which unit stands for its cluster, as in ``partition``.
        generator: draws the representatives.

    Raises:
        ContinualError: if representatives are to be drawn without a generator.
    """
    check_generator(representative, generator)
    if clusters == "components":
        forest = spanning_forest(similarity, TILE)
        threshold = components_threshold(forest, count)
        members = _join(similarity, *_connect(similarity, forest, threshold, count))
        return Partition(represented(members, representative, generator), threshold)
    if len(similarity) <= KEPT:
        similarity = similarity.kept()
    if similarity.measure is not None:
        threshold = _leader_threshold_of_measure(similarity, count)
    elif len(similarity) > WIDE:
        similarity = replace(similarity, precision=torch.float32)
        threshold = _leader_threshold_of_many(similarity, count)
    else:
        threshold = _leader_threshold(similarity, count)
    return partition(similarity, threshold, limit=count, representative=representative, generator=generator)


def _leader_threshold(similarity: Similarity, count: int) -> float:
    spread = float(similarity.biases.double().max() - similarity.biases.double().min())
    # By log(2 - s), since one outlying bias stretches the similarities over many orders of magnitude.
    lowest, highest = math.log1p(2.0 + similarity.bias_weight * spread**2), math.log1p(-1e-6)
    leaders = _leader_counter(similarity, count)
    for _ in range(40):
        middle = (lowest + highest) / 2
        if leaders(1.0 - math.expm1(middle)) >= count:
            highest = middle
        else:
            lowest = middle
    return 1.0 - math.expm1(highest)


def _leader_threshold_of_many(similarity: Similarity, count: int) -> float:
    """A threshold that yields ``count`` leaders or a few more; each pass ends as soon as there are too many.

    The first guess is the similarity that a unit and one of three leaders reach by chance, as a sample of pairs tells;
    then the share of pairs that reach it is bracketed and bisected, and in the end the threshold itself.
    """
    most = count + count // 50
    sample = torch.linspace(0, len(similarity) - 1, TILE).long()
    values = similarity.tile(sample, sample)
    pairs = values[torch.triu(torch.ones_like(values, dtype=torch.bool), diagonal=1)].sort(descending=True).values
    spread = float(similarity.biases.double().max() - similarity.biases.double().min())
    lowest, highest = -1.0 - similarity.bias_weight * spread**2, 1.0 + 1e-6
    few, many, reached = 0.0, math.inf, 3 * len(pairs) / count  # how many of the pairs reach the threshold
    for _ in range(60):
        threshold = float(pairs[min(len(pairs) - 1, int(reached))])
        if not lowest < threshold < highest:
            threshold = (lowest + highest) / 2
        found = len(_lead(similarity, threshold, most + 1)[0])
        if count <= found <= most:
            return threshold
        if found < count:
            lowest, many = threshold, reached
        else:
            highest, few = threshold, reached
        reached = math.sqrt(few * many) if few and many < math.inf else (reached / 2 if found < count else reached * 2)
    return highest


def _leader_threshold_of_measure(similarity: Similarity, count: int) -> float:
    ends = [values.aminmax() for _, _, values in similarity.tiles(TILE)]
    lowest = place_of(min(float(end.min) for end in ends))
    highest = place_of(threshold_above(max(float(end.max) for end in ends)))
    # The scale is unknown and may span many orders of magnitude: halves the number of doubles between, not their range.
    leaders = _leader_counter(similarity, count)
    while lowest < highest:
        middle = (lowest + highest) // 2
        if leaders(double_at(middle)) >= count:
            highest = middle
        else:
            lowest = middle + 1
    return double_at(highest)


def _leader_counter(similarity: Similarity, most: int) -> Callable[[float], int]:
    """How many leaders, up to ``most``, a threshold yields: as :func:`_lead`, faster where similarities are kept."""
    if similarity.matrix is None:
        return lambda threshold: len(_lead(similarity, threshold, most)[0])
    order = similarity.norms.argsort(descending=True, stable=True)
    kept = similarity.matrix[order][:, order]
    for end in range(TILE, len(order), TILE):  # leaders are compared with units of their block, later units with them
        kept[end - TILE : end, end:] = kept[end:, end - TILE : end].T
    rows = kept.numpy()

    def count(threshold: float) -> int:
        led = np.zeros(len(rows), dtype=bool)
        for found in range(most):
            leader = int(led.argmin())
            if led[leader]:
                return found
            led |= rows[leader] >= threshold - TOLERANCE
            led[leader] = True
        return most

    return count


def _connect(
    similarity: Similarity, forest: Forest, threshold: float, limit: int | None
) -> tuple[list[int], Int64[Tensor, "units"]]:
    """The largest unit of each component by falling magnitude, and each unit's; -1 for the units beyond ``limit``."""
    order = similarity.norms.argsort(descending=True, stable=True)
    members = first_members(forest.components(threshold - TOLERANCE), order)
    leaders = order[members[order] == order][:limit]
    members[~torch.isin(members, leaders)] = -1
    return leaders.tolist(), members


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


def _join(similarity: Similarity, leaders: list[int], members: Int64[Tensor, "units"]) -> Int64[Tensor, "units"]:
    """Each unit's leader, the most similar one where it had none."""
    for block in (members < 0).nonzero().flatten().split(TILE):
        members[block] = _nearest(similarity, block, leaders)
    return members


def _nearest(similarity: Similarity, units: Int64[Tensor, "block"], leaders: list[int]) -> Int64[Tensor, "block"]:
    """For each unit the most similar leader, the first of equals."""
    best = torch.full((len(units),), -torch.inf, dtype=torch.float64)
    nearest = torch.full((len(units),), -1)
    for block in torch.tensor(leaders).split(TILE):
        values, positions = similarity.tile(units, block).max(dim=1)
        better = values > best
        best[better], nearest[better] = values[better], block[positions[better]]
    return nearest
