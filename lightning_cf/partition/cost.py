"""Whether a claim cost more than was allowed, and training after it did not win that back."""

from __future__ import annotations

from lightning_cf.errors import ContinualWarning, warn
from lightning_cf.ownership.ledger import NeuronLedger


class PartitionWarning(ContinualWarning):
    """A partition that works, but not as its options suggest."""


def warn_of_cost(
    ledger: NeuronLedger, tolerance: float, *, now: float | None = None, lower_is_better: bool = False
) -> None:
    """Warns where the current task's claim cost more than the tolerance, and training after it did not win that back.

    Args:
        ledger: after the task's partition.
        tolerance: how much of the metric a claim may cost.
        now: the task's score after INVARIANCE, None where that was left out.
        lower_is_better: the metric's direction.
    """
    name = ledger.tasks[-1].name
    record = next((r for r in ledger.records if r["task"] == name and not r.get("within_tolerance", True)), None)
    if record is None:
        return
    before, right_after = record["accuracy"], record["ablation_accuracy"]
    if now is not None and (now - before if lower_is_better else before - now) <= tolerance:
        return
    warn(
        f"Task '{name}': no claim within the budget keeps the metric within tolerance={tolerance}, so it has the whole"
        f" budget: {before:.4f} before the partition, {right_after:.4f} right after it,"
        + (f" {now:.4f} when its claim is sealed." if now is not None else " and no INVARIANCE followed.")
        + " Raise max_claim or lower reserve_tasks, so that it may claim more; train longer after the partition; or"
        " raise tolerance, if that is good enough.",
        PartitionWarning,
    )
