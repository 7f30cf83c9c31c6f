"""A task is forgotten on purpose: what it owned is free again, as far as no other task needs it."""

from __future__ import annotations

from jaxtyping import Int64
from torch import Tensor, nn

from lightning_cf.errors import ContinualError, check_count
from lightning_cf.functional.belonging import check_parts, check_weights
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.structure import Structure
from lightning_cf.ownership.forgetting import take_out
from lightning_cf.ownership.fresh_start import reinitialise_free
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.owner_aware_norms import make_owner_aware


def forget(
    module: nn.Module, structure: Structure, ledger: NeuronLedger, task: str, *, seed: int = 0
) -> dict[str, int]:
    """Takes a task out of network and ledger; all other tasks' outputs stay bitwise what they are.

    Its outputs and those of its units that nobody needs get fresh weights and are free. Units that a later task reads,
    through whatever others, are kept and held still; a network whose layers are dense reads nearly all earlier units.

    Args:
        module: the network, in place; outside of :func:`hold`.
        structure: as :func:`trace` found it.
        ledger: that knows the task.
        task: its name.
        seed: what the fresh weights depend on, with the task's name.

    Returns:
        for each group of units, how many are free now that were not.

    Raises:
        ContinualError: for a task that the ledger does not know, and where it cannot be forgotten; nothing changed.
    """
    check_parts("forget", module, structure, ledger)
    check_count("forget", "seed", seed, least=0)
    check_known(ledger, task)
    check_weights("forget", module, ledger)
    return run_forget(module, structure, ledger, task, seed=seed)


def check_known(ledger: NeuronLedger | None, task: str) -> None:
    """Raises ContinualError for a task that a ledger does not know, or that was forgotten before."""
    known = [] if ledger is None else [entry.name for entry in ledger.tasks if entry.outputs]
    if task not in known:
        names = ", ".join(known) or "none"
        raise ContinualError(f"forget: no task '{task}' is known that could be forgotten; known: {names}.")


def run_forget(
    module: nn.Module,
    structure: Structure,
    ledger: NeuronLedger,
    task: str,
    *,
    seed: int,
    wanted: Int64[Tensor, "_"] | None = None,
) -> dict[str, int]:
    """What :func:`forget` does, also where something else looks at units.

    Args:
        module: the network, in place.
        structure: of it.
        ledger: in place.
        task: its name.
        seed: as in :func:`forget`.
        wanted: units that must stay whoever reads them, as long as there is another task.
    """
    outputs = ledger.outputs_of(task)
    freed = take_out(ledger, structure, task, named_tensors(module), wanted)
    reinitialise_free(module, structure, ledger, seed, task, outputs=outputs)
    make_owner_aware(module, ledger.norm_owners())
    return freed
