"""What the partition of a task found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_cf.network.structure import UnitGroup
from lightning_cf.partition.clusters import Partition
from lightning_cf.partition.similarity import Similarity


@dataclass(frozen=True)
class GroupOutcome:
    """What the partition of one group found.

    Attributes:
        group: the group.
        candidates: its units that took part, numbered within it.
        partition: over the candidates.
        similarity: of the candidates; None where it was not kept.
        vectors: incoming weights of all units of the group as they were when the candidates were compared, or None.
        biases: their biases, or None.
        budget: how many of them might be claimed.
    """

    group: UnitGroup
    candidates: Int64[Tensor, "some"]
    partition: Partition
    similarity: Similarity | None
    vectors: Float[Tensor, "units inputs"] | None
    biases: Float[Tensor, "units"] | None
    budget: int

    def __repr__(self) -> str:
        """How many of the units were claimed, and at which threshold; no tensors, which are long."""
        claimed = int(self.partition.non_redundant.sum())
        return f"'{self.group.name}': {_of(claimed, len(self.candidates))}, threshold {self.partition.threshold:.4g}"


@dataclass(frozen=True)
class Outcome:
    """What the partition of a task found.

    Attributes:
        accuracy: the task's score before its first partition.
        ablation_accuracy: its score without the redundant units, right after this one.
        groups: what each group's partition found.
    """

    accuracy: float
    ablation_accuracy: float
    groups: tuple[GroupOutcome, ...]

    def __repr__(self) -> str:
        """The scores, what was claimed in all, and a line for each group; no tensors, which are long."""
        claimed = sum(int(found.partition.non_redundant.sum()) for found in self.groups)
        total = _of(claimed, sum(len(found.candidates) for found in self.groups))
        said = f"score {self.accuracy:.4g}, {self.ablation_accuracy:.4g} right after the claim; {total}"
        return "\n  ".join([f"Outcome: {said}", *map(repr, self.groups)])

    def after(self, earlier: Outcome) -> Outcome:
        """This outcome of a later partition, told of all units that the first one was about, as that one saw them."""
        first = {outcome.group.name: outcome for outcome in earlier.groups}
        return replace(self, groups=tuple(_joined(first[now.group.name], now) for now in self.groups))


def _of(claimed: int, units: int) -> str:
    return f"{claimed} of {units} units claimed" + (f" ({claimed / units:.1%})" if units else "")


def _joined(then: GroupOutcome, now: GroupOutcome) -> GroupOutcome:
    """Units follow their representative of ``then`` to its representative of ``now``."""
    representative = torch.arange(now.group.size)
    representative[then.candidates] = then.candidates[then.partition.representative]
    later = torch.arange(now.group.size)
    later[now.candidates] = now.candidates[now.partition.representative]
    position = torch.full((now.group.size,), -1)
    position[then.candidates] = torch.arange(len(then.candidates))
    joined = position[later[representative[then.candidates]]]
    return replace(then, partition=Partition(joined, now.partition.threshold))


def records_with(
    records: Sequence[dict[str, Any]],
    task: str,
    outcomes: Sequence[GroupOutcome],
    before: float,
    after: float,
    within: bool,
) -> list[dict[str, Any]]:
    """The ledger's records with those of a task's partition in the place of what it had before.

    Args:
        records: of all partitions so far.
        task: its name.
        outcomes: what was found in each group.
        before: the task's score before the partition.
        after: right after it.
        within: whether the claim costs no more than the tolerance.
    """
    earlier = [record for record in records if record["task"] == task]
    claims = {record["layer"]: record["claims"] for record in earlier}
    within &= all(record.get("within_tolerance", True) for record in earlier)
    kept = [record for record in records if record["task"] != task]
    for found in outcomes:
        claimed = int(found.partition.non_redundant.sum())
        kept.append(
            {
                "task": task,
                "layer": found.group.name,
                "units": len(found.candidates),
                "claimed": claimed,
                "redundant": int(found.partition.redundant.sum()),
                "claims": [*claims.get(found.group.name, []), claimed],
                "threshold": found.partition.threshold,
                "accuracy": before,
                "ablation_accuracy": after,
                "within_tolerance": within,
            }
        )
    return kept
