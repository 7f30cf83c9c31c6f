"""The method's steps on a plain network: trace it, check it, claim what carries a task, seal it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_cf.errors import (
    ContinualError,
    check_choice,
    check_count,
    check_flag,
    check_function,
    check_kind,
)
from lightning_cf.exactness.check import check_exact
from lightning_cf.exactness.probe import probe
from lightning_cf.functional.belonging import check_parts, check_weights
from lightning_cf.functional.inputs import Inputs, number_of
from lightning_cf.network.finite import check_finite, infinite_on_purpose
from lightning_cf.network.forward import Example, Forward, call, eval_mode
from lightning_cf.network.structure import Structure, buffer_shapes
from lightning_cf.network.tracing.trace import trace as follow
from lightning_cf.ownership.fingerprints import keep_fingerprints
from lightning_cf.ownership.ledger import ISOLATIONS, Isolation, NeuronLedger
from lightning_cf.partition.claim import Claimer
from lightning_cf.partition.options import PartitionOptions
from lightning_cf.partition.outcome import Outcome
from lightning_cf.utilities.randomness import derive_seed, isolated_generators, seed_all


def trace(module: nn.Module, example: Any, forward: Forward = call, *, isolation: Isolation = "exact") -> Structure:
    """The units of a network, and who computes and who reads each of its weights, found by one forward pass.

    Args:
        module: the network; its state stays as it is.
        example: an input whose first axis is the batch, a tuple of them for a network that takes several; the first two
            samples are used.
        forward: how to run the network on an input: ``forward(module, x)`` gives its outputs.
        isolation: ``perturb`` leaves units apart that ``exact`` has to unite, since an operation mixes them.

    Raises:
        StructureError: if the network's outputs are not the columns of layers, or its forward pass writes into a
            parameter.
    """
    check_kind("trace", "module", module, nn.Module, "the network")
    check_choice("trace", "isolation", isolation, ISOLATIONS)
    structure = follow(module, example, forward, apart=isolation == "perturb")
    infinite, buffers = infinite_on_purpose(structure, module), buffer_shapes(module)
    return replace(structure, infinite=infinite, buffers=buffers, example=Example.of(example, forward))


def new_ledger(structure: Structure, *, isolation: Isolation = "exact") -> NeuronLedger:
    """A ledger in which every unit is free.

    Args:
        structure: as :func:`trace` found it under the same isolation.
        isolation: ``exact`` promises that a sealed task never changes; under ``perturb`` nothing is cut (US 12387107).
    """
    check_kind("new_ledger", "structure", structure, Structure, "what trace(net, example) found")
    check_choice("new_ledger", "isolation", isolation, ISOLATIONS)
    ledger = NeuronLedger.for_structure(structure)
    ledger.isolation = isolation
    return ledger


def select(structure: Structure, ledger: NeuronLedger, options: PartitionOptions) -> None:
    """Notes in the ledger which groups are not partitioned; what the first partition left whole stays so.

    Raises:
        ContinualError: for layers that the network does not have, or if none is left to partition.
    """
    chosen = {group.name for group in options.partitioned(structure)}
    known = ledger.whole if len(ledger.tasks) > 1 else []
    names = [group.name for group in structure.groups]
    ledger.whole = [name for name in names if name not in chosen or name in known]


def check(
    module: nn.Module,
    structure: Structure,
    ledger: NeuronLedger,
    example: Any,
    forward: Forward = call,
    *,
    options: PartitionOptions | None = None,
    said: set[str] | None = None,
) -> None:
    """Before any training: whether the isolation can hold on this network, found out on random claims.

    Args:
        module: the network; it is put back as it was, bit for bit.
        structure: as :func:`trace` found it.
        ledger: takes note of what ``options`` leaves out of partitions.
        example: an input whose first axis is the batch.
        forward: as it was traced with.
        options: those that the claims are to have.
        said: warnings that need no saying again; takes those that are new.

    Raises:
        StructureError: if ``exact`` cannot hold; names the module and the operation, or the layer.
        ContinualError: for layers that the network does not have.
    """
    check_parts("check", module, structure, ledger)
    options = options or PartitionOptions()
    select(structure, ledger, options)
    if ledger.exact:
        check_exact(module, structure, ledger, example, forward, least=options.min_trainable, said=said)


def claim(
    module: nn.Module,
    structure: Structure,
    ledger: NeuronLedger,
    *,
    batches: Iterable[Any],
    score: Callable[[], float],
    options: PartitionOptions | None = None,
    forward: Forward = call,
    higher_is_better: bool = True,
    tasks_left: int = 1,
    seed: int = 0,
    start: Mapping[str, Tensor] | None = None,
) -> Outcome:
    """Partitions the current task's units and claims those that carry it; INVARIANCE follows, then :func:`seal`.

    Under ``exact`` the claimed units take over from the redundant ones by regression, the weights from redundant into
    claimed units become zero for good, and a probe shows that no claimed output hangs on what may still move. Where
    anything fails, nothing is claimed: weights and ledger are as before.

    Several processes must call this with the same batches and scores, or call it on one and broadcast weights and
    ledger.

    Args:
        module: the network, in place, in whatever mode.
        structure: as :func:`trace` found it.
        ledger: takes the claim.
        batches: the task's training data: inputs, or (input, target) pairs, the first axis of which is the batch. An
            input has as many parts as the example that was traced with: ``(x, mask)``, with its target
            ``((x, mask), y)``. At most 4,096 inputs are used; an iterator is read that far.
        score: the task's metric on validation data, of the network as it then is; called once for each claim that is
            tried.
        options: how units are compared, and how many may be claimed.
        forward: how to run the network on an input, as it was traced with.
        higher_is_better: the metric's direction.
        tasks_left: tasks still to come, this one counted, as far as known.
        seed: what randomly chosen representatives depend on.
        start: parameters at the task's start by name, for ``measure="update"``.

    Returns:
        the scores before and after, and what was found in each group of units.

    Raises:
        ContinualError: if no task was begun, there are no batches, or others than the network was traced with, or the
            score is no number.
        DivergenceError: if the network holds numbers that are not finite.
        LeakError: if a claimed output still depends on free weights.
    """
    check_parts("claim", module, structure, ledger)
    check_function("claim", "score", score, "")
    check_function("claim", "forward", forward, "module, inputs")
    check_flag("claim", "higher_is_better", higher_is_better)
    check_count("claim", "tasks_left", tasks_left)
    check_count("claim", "seed", seed, least=0)
    check_kind("claim", "options", options, (PartitionOptions, type(None)), "PartitionOptions(...)")
    if ledger.current is None:
        raise ContinualError("claim: no task is being learned; ledger.begin(name, outputs=[...]) starts one.")
    check_weights("claim", module, ledger)
    if options is not None:
        select(structure, ledger, options)
    inputs = Inputs(module, batches, structure.example, forward)
    claimer = Claimer(
        module=module,
        structure=structure,
        ledger=ledger,
        options=options or PartitionOptions(),
        score=lambda: number_of(module, score),
        higher_is_better=higher_is_better,
        passes=lambda: (partial(forward, module, x) for x in inputs),
        start=start,
        tasks_left=tasks_left,
        seed=seed,
        keep=False,
    )
    return run_claim(claimer, inputs.first, forward)


def run_claim(
    claimer: Claimer, example: Any, forward: Forward = call, *, record: Callable[[Outcome], None] | None = None
) -> Outcome:
    """What :func:`claim` does once it is known what to claim by; all or nothing.

    Args:
        claimer: made for the current task.
        example: an input to probe with.
        forward: how to run the network on it.
        record: called with what was found, before the claim counts.
    """
    module, structure, ledger = claimer.module, claimer.structure, claimer.ledger
    name, again = ledger.tasks[-1].name, ledger.phase == "invariance"
    check_finite(module, structure, f"Task '{name}' cannot be partitioned")
    if not again:
        ledger.whole += held_by_the_user(module, structure, ledger)
    with isolated_generators(), eval_mode(module):
        seed_all(derive_seed("partition", name))
        with claimer.all_or_nothing():
            outcome = claimer.claim()
            check_finite(module, structure, f"The partition of task '{name}'")
    with claimer.all_or_nothing():
        if ledger.exact:
            probe(module, structure, ledger, example, forward)
        if record is not None:
            record(outcome)
    known = [task for task in ledger.fingerprints if task != name]
    keep_fingerprints(module, structure, ledger, known)  # where nothing held them, connections were cut
    return outcome


def held_by_the_user(module: nn.Module, structure: Structure, ledger: NeuronLedger) -> list[str]:
    """Groups to be partitioned none of whose weights train (``requires_grad=False``), such as a pretrained backbone.

    Those that the current task runs as the first one.
    """
    parameters = dict(module.named_parameters())
    *before, way = [structure.way_of(task.name) for task in ledger.tasks]
    known = {group.name for earlier in set(before) for group in structure.groups_on(earlier)}
    return [
        group.name
        for group in structure.groups_on(way)
        if group.name not in {*ledger.whole, *known}
        and not any(
            parameters[r.tensor].requires_grad for r in group.rows if r.role == "weight" and r.tensor in parameters
        )
    ]
