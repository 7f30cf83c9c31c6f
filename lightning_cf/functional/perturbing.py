"""The redundant units are perturbed while the claimed ones train, in any loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_cf.errors import ContinualError
from lightning_cf.functional.belonging import check_parts
from lightning_cf.invariance.disturbance import Disturbance
from lightning_cf.invariance.perturbations import Perturbation, Resample, check_perturbation
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.structure import Structure
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.subspaces.bases import bases_of
from lightning_cf.subspaces.subspace import Subspace
from lightning_cf.utilities.randomness import keyed_generator


@contextmanager
def perturb(
    module: nn.Module,
    structure: Structure,
    ledger: NeuronLedger,
    *key: int | str,
    perturbation: Perturbation | None = None,
    subspace: Subspace | None = None,
) -> Iterator[None]:
    """Meanwhile the redundant units are perturbed, for one step of INVARIANCE (US 12387107, paragraphs 19, 20).

    Put forward, backward and the optimiser's step into it, within :func:`~lightning_cf.functional.hold`. Afterwards the
    units are what they were, bit for bit. Under ``exact`` nothing is done: what is claimed does not read them.

    Args:
        module: the network, in place.
        structure: as :func:`~lightning_cf.functional.trace` found it.
        ledger: its free units are the redundant ones.
        key: what the random numbers depend on, such as (seed, task, step).
        perturbation: how; default :class:`lightning_cf.Resample`.
        subspace: what the perturbation keeps to (paragraph 21).

    Raises:
        ContinualError: outside of INVARIANCE.
    """
    check_parts("perturb", module, structure, ledger)
    if not key:
        raise ContinualError("perturb: give a key, such as seed, task and step; else each step draws the same numbers.")
    perturbation = Resample() if perturbation is None else perturbation
    check_perturbation("perturb", perturbation)
    if ledger.phase != "invariance":
        raise ContinualError("perturb: the task has no claim yet; call claim(...) first, and train on in this context.")
    if ledger.exact:
        yield
        return
    bases = bases_of(structure, ledger, subspace, named_tensors(module))
    disturbance = Disturbance(module, structure, ledger, perturbation, keyed_generator(*key), bases)
    try:
        yield
    finally:
        disturbance.undo()
