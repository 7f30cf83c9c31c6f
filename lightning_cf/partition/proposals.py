"""Which claims are tried: where the threshold is found, from the smallest up; where it is given, just one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from lightning_cf.errors import warn
from lightning_cf.network.structure import UnitGroup
from lightning_cf.partition.clusters import Partition, partition, partition_into
from lightning_cf.partition.cost import PartitionWarning
from lightning_cf.partition.options import PartitionOptions
from lightning_cf.partition.similarity import Similarity
from lightning_cf.utilities.randomness import keyed_generator

STEP = 1.25
"""By what a claim that costs too much grows."""


class Proposals:
    """Partitions of every group, one after another.

    Args:
        similarities: of the units that may be claimed, for each group by name.
        options: how to cluster.
        seed: what randomly chosen representatives depend on, with the task and the group.
        task: the task's name.
    """

    def __init__(self, similarities: Mapping[str, Similarity], options: PartitionOptions, seed: int, task: str) -> None:
        self.similarities, self.options, self.seed, self.task = similarities, options, seed, task

    def of(
        self, groups: Sequence[UnitGroup], budgets: Mapping[str, int], *, undo: Callable[[], None]
    ) -> Iterator[dict[str, Partition]]:
        """Partitions of the groups, from the smallest claim up to the budget; just one for a fixed threshold.

        Args:
            groups: those to partition.
            budgets: how many units each group may give.
            undo: called before units are compared again: compared are the weights before any claim.
        """
        if self.options.threshold != "auto":
            yield self._fixed(budgets, self.options.threshold)
            return
        share, counts = self.options.min_claim, None
        assert isinstance(share, (int, float)), "that of one task"
        while counts != budgets:
            undo()
            counts = {
                group.name: min(budgets[group.name], max(1, math.ceil(share * group.size - 1e-9))) for group in groups
            }
            yield {
                name: partition_into(
                    self.similarities[name],
                    count,
                    clusters=self.options.clusters,
                    representative=self.options.representative,
                    generator=self._generator(name),
                )
                for name, count in counts.items()
            }
            share *= STEP

    def _fixed(self, budgets: Mapping[str, int], threshold: float) -> dict[str, Partition]:
        partitions, capped = {}, []
        for name, similarity in self.similarities.items():
            partitions[name] = self._partition(name, threshold, None)
            found = int(partitions[name].non_redundant.sum())
            if found > budgets[name]:
                partitions[name] = self._partition(name, threshold, budgets[name])
                median, ninety, ninety_nine, most = similarity.quantiles()
                capped.append(
                    f"'{name}': {found} of {len(similarity)} units non-redundant, capped to {budgets[name]}"
                    f" (similarities: median {median:.2f}, 90% {ninety:.2f}, 99% {ninety_nine:.2f}, largest {most:.2f})"
                )
        if capped:
            warn(
                f"Task '{self.task}': threshold={threshold} finds too little redundancy with"
                f" measure='{self.options.measure_name}'; max_claim caps the claim, the units of highest magnitude"
                " stay. "
                + "; ".join(capped)
                + ". Choose a threshold below the largest similarity, or threshold='auto'.",
                PartitionWarning,
            )
        return partitions

    def _partition(self, group: str, threshold: float, limit: int | None) -> Partition:
        return partition(
            self.similarities[group],
            threshold,
            limit=limit,
            clusters=self.options.clusters,
            representative=self.options.representative,
            generator=self._generator(group),
        )

    def _generator(self, group: str) -> torch.Generator:
        return keyed_generator(self.seed, self.task, "representative", group)
