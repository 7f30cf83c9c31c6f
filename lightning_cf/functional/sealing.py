"""A task is sealed: what it owns never moves again."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_cf.errors import (
    ContinualError,
    check_count,
    check_function,
)
from lightning_cf.functional.belonging import check_parts
from lightning_cf.functional.inputs import number_of
from lightning_cf.network.finite import check_finite
from lightning_cf.network.structure import Structure
from lightning_cf.ownership.fingerprints import keep_fingerprints
from lightning_cf.ownership.fresh_start import reinitialise_free
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.partition.cost import warn_of_cost
from lightning_cf.partition.options import PartitionOptions


def seal(
    module: nn.Module,
    structure: Structure,
    ledger: NeuronLedger,
    *,
    seed: int = 0,
    options: PartitionOptions | None = None,
    score: Callable[[], float] | None = None,
    higher_is_better: bool = True,
) -> None:
    """Ends the current task: what it owns never moves again; under ``exact`` free units get a fresh start.

    Args:
        module: the network, in place.
        structure: as :func:`trace` found it.
        ledger: whose current task is sealed.
        seed: what the fresh weights depend on, with the task's name.
        options: of its partition, which say whether free units start afresh, and how much the claim may have cost.
        score: as :func:`claim` got it; then it is told where training after the claim did not win back what it cost.
        higher_is_better: the score's direction.

    Warns:
        PartitionWarning: if the task is sealed with a score that is worse by more than the tolerance.

    Raises:
        ContinualError: if no task is being learned, or it has no claim yet.
        DivergenceError: if the network holds numbers that are not finite.
    """
    check_parts("seal", module, structure, ledger)
    check_count("seal", "seed", seed, least=0)
    task = ledger.current
    if task is None:
        raise ContinualError("seal: no task is being learned; ledger.begin(name, outputs=[...]) starts one.")
    if task.phase == "learn":
        raise ContinualError(
            f"seal: task '{task.name}' has no claim yet, so nothing would protect it; call claim(...) first."
        )
    if score is not None:
        check_function("seal", "score", score, "")
        tolerance = (options or PartitionOptions()).tolerance
        warn_of_cost(ledger, tolerance, now=number_of(module, score), lower_is_better=not higher_is_better)
    run_seal(module, structure, ledger, seed=seed, options=options)


def run_seal(
    module: nn.Module,
    structure: Structure,
    ledger: NeuronLedger,
    *,
    seed: int,
    options: PartitionOptions | None = None,
    keep: Callable[[], None] | None = None,
) -> None:
    """What :func:`seal` does, also of a task that nothing partitioned.

    Args:
        module: the network, in place.
        structure: of it.
        ledger: with a current task.
        seed: as in :func:`seal`.
        options: as in :func:`seal`.
        keep: called between both, for what is to be kept of the task; if it fails, nothing is sealed.
    """
    task = ledger.tasks[-1]
    check_finite(module, structure, f"Task '{task.name}' cannot be sealed")
    phase = task.phase
    ledger.seal()
    try:
        if keep is not None:
            keep()
    except BaseException:
        task.phase = phase
        ledger.revision += 1
        raise
    partitioned = any(record["task"] == task.name for record in ledger.records)
    if ledger.exact and partitioned and (options is None or options.reinitialise):
        reinitialise_free(module, structure, ledger, seed, task.name)
    keep_fingerprints(module, structure, ledger, [task.name])
