"""Whether exact isolation can hold on a network: found out before anything is trained."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_cf.errors import StructureError, StructureWarning, warn
from lightning_cf.exactness.probe import Leak, first_leak
from lightning_cf.exactness.readings import OPERATIONS, decides_nothing
from lightning_cf.exactness.repeating import first_unlike
from lightning_cf.network.forward import Forward, call, samples
from lightning_cf.network.kept_entries import replaced
from lightning_cf.network.structure import Mixing, Structure, layer_of, module_at
from lightning_cf.network.tracing.trace import trace
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE
from lightning_cf.ownership.owner_aware_norms import make_owner_aware
from lightning_cf.ownership.phases import TaskEntry
from lightning_cf.utilities.randomness import keyed_generator

DRAWS = 2
"""How many random claims are tried."""

SHOWN = 3
"""How many operations that mix units a warning names."""

PATHS = 8
"""On how many pairs of samples a network is traced that chooses its way by its input."""


def check_exact(
    module: nn.Module,
    structure: Structure,
    ledger: NeuronLedger,
    example: Any,
    forward: Forward = call,
    *,
    least: float = 0.0,
    said: set[str] | None = None,
) -> None:
    """Tries random claims, and probes them for leaks; the module is put back as it was, bitwise.

    Args:
        module: the network.
        structure: its structure, as traced.
        ledger: says which groups are not partitioned.
        example: an input whose first axis is the batch.
        forward: how to run the network on the example.
        least: the smallest share of the parameters that later tasks must be able to train.
        said: warnings that need no saying again; takes those that are new.

    Warns:
        StructureWarning: says what later tasks can train where operations make units share one fate, unknown ones or
            such that a whole layer becomes one unit, and names them; and names those by which the way through the
            network may depend on its input.

    Raises:
        StructureError: if outputs for one input are not always the same, or later tasks can train too little; else
            names the module and the operation, or the layer, by which free units reach claimed ones.
    """
    said = set() if said is None else said
    _check_repeats(module, structure, example, forward)
    share = trainable_share(module, structure, ledger)
    messages = list(dict.fromkeys(found.message() for found in structure.mixings if found.unknown or found.collapsed))
    if share < least:
        raise StructureError(
            f"partition: later tasks can train {share:.1%} of the parameters, less than min_trainable={least}."
            f" {_causes(messages) or 'The others are in layers that layers= and exclude= leave to the first task.'}"
        )
    if messages:
        _say(f"Later tasks can train {share:.1%} of the parameters. {_causes(messages)}", said)
    partitioned = {layer for group in structure.groups if group.name not in ledger.whole for layer in group.layers}
    _check_reads(module, structure, partitioned, example, forward, said)
    if structure.branches and partitioned:
        doubt = _check_branches(module, structure, example, forward)
        if doubt:
            _say(doubt, said)
    for draw in range(DRAWS):
        leak = _leak(module, structure, ledger, example, forward, draw)
        if leak is not None:
            hidden = _names([leak.layer] if leak.layer in partitioned else sorted(partitioned))
            raise StructureError(
                f"isolation='exact' cannot hold: {_where(module, leak.layer)} change when only free weights change,"
                f" though the weights from free into claimed units are zero{_why(structure, leak)}. Use"
                f" isolation='perturb', or exclude=[{hidden}], which leaves the layers there to the first task."
            )


def _check_repeats(module: nn.Module, structure: Structure, example: Any, forward: Forward) -> None:
    """Raises StructureError for a network that gives other outputs for the same input and the same weights."""
    place = first_unlike(module, example, forward)
    if place is None:
        return
    why = "it keeps a state between passes, draws from a generator of its own, or runs kernels that add in any order"
    if structure.written:
        name, by = next(iter(structure.written.items()))
        why = f"{by} writes '{name}' in the forward pass, so that outputs depend on what came before"
    raise StructureError(
        f"isolation='exact' cannot hold: in eval mode {type(module).__name__} gives other outputs for the same input"
        f" and the same weights, first in module '{place}': {why}. Let every pass in eval mode begin anew and draw"
        " nothing, or use isolation='perturb'."
    )


def _check_reads(
    module: nn.Module, structure: Structure, partitioned: set[str], example: Any, forward: Forward, said: set[str]
) -> None:
    """Raises StructureError where values of units are read into Python and may decide something."""
    for found in structure.reads:
        layers = [layer for layer in found.layers if layer in partitioned]
        if layers and found.operation in OPERATIONS and decides_nothing(module, example, forward):
            _say(
                f"{module_at(found.module)} reads values of units of {_names(layers)} into Python"
                f" ('{found.operation}'). With other numbers in their place every output stayed the same, so they are"
                " taken to be looked at only, as for a log.",
                said,
            )
        elif layers:
            raise StructureError(
                f"isolation='exact' cannot hold: {module_at(found.module)} reads values of units of"
                f" {_names(layers)} into Python ('{found.operation}': .item(), float() or an if), where nothing can"
                f" tell what they change. Take that out, use isolation='perturb', or exclude={layers}, which leaves"
                " these layers to the first task."
            )


def trainable_share(module: nn.Module, structure: Structure, ledger: NeuronLedger) -> float:
    """The share of the parameters that some task after the first may train: those of units that are shared out.

    Args:
        module: the network.
        structure: its structure.
        ledger: says which groups are not partitioned.
    """
    shared = torch.zeros(structure.n_units + 1, dtype=torch.bool)  # the last one stands for what has no unit
    for group in (*structure.groups, structure.head):
        shared[group.units] = group.name not in ledger.whole
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    trainable = 0.0
    for name, parameter in parameters.items():
        masks = [shared[use.target].expand(parameter.shape) for use in structure.entries.get(name, ())]
        if masks:
            trainable += int(torch.stack(masks).all(dim=0).sum()) if len(masks) > 1 else int(masks[0].sum())
    return trainable / max(1, sum(parameter.numel() for parameter in parameters.values()))


def _causes(messages: list[str]) -> str:
    """What mixes units, and what to do about it: the first few operations in full."""
    if not messages:
        return ""
    more = f" So do {len(messages) - SHOWN} others." if len(messages) > SHOWN else ""
    return (
        f"{' '.join(messages[:SHOWN])}{more} A norm is taken by owners within a module's forward, where its means keep"
        " their dims (keepdim=True) or a module of its own takes them; else put another operation there, or use"
        " isolation='perturb'."
    )


def _say(message: str, said: set[str]) -> None:
    """Warns, unless that was said before."""
    if message not in said:
        said.add(message)
        warn(message, StructureWarning)


def _check_branches(module: nn.Module, structure: Structure, example: Any, forward: Forward) -> str | None:
    """Whether a network that looks at its input goes the same way through its layers for other samples too.

    Every ``if`` is also followed the other way. What that leaves open is said.
    """
    found = next((branch for branch in structure.branches if branch.unknown), structure.branches[0])
    unseen = [n for n, p in module.named_parameters() if p.requires_grad and n not in structure.entries]
    if unseen:
        layers = list(dict.fromkeys(map(layer_of, unseen)))
        tried = all(branch.operation in OPERATIONS for branch in structure.branches)
        if tried and decides_nothing(module, example, forward):
            return (
                f"{_looks(found)}. With other numbers in their place every output stayed the same, and"
                f" {_names(layers)} did not run either, so what is read is taken to be looked at only, as for a log."
            )
        raise StructureError(
            f"isolation='exact' cannot hold: {_looks(found)}, and {_names(layers)} did not run for the samples that"
            " were followed, so nobody knows what these layers read. Run every branch and choose with torch.where, or"
            " run them all for the trace (evaluate= of a Task, forward= of trace); take layers out that never run; or"
            " use isolation='perturb'."
        )
    count = next((len(x) for x in tree_leaves(example) if isinstance(x, Tensor) and x.ndim), 0)
    for start in range(2, min(count, 2 * PATHS), 2):
        if not _alike(structure, trace(module, samples(module, example, 2, start), forward)):
            raise StructureError(
                f"isolation='exact' cannot hold: {_looks(found)}, and samples {start} and {start + 1} of the first"
                " batch go another way through its layers than the first two. Run every branch and choose with"
                " torch.where, or use isolation='perturb'."
            )
    seen = f"All layers ran, and {max(1, min(count, 2 * PATHS))} samples took the same way through them"
    if found.unknown:
        return (
            f"{_looks(found)}. {seen}; an input that takes another one could change what earlier tasks compute. A"
            " decision that is an if on a tensor (if x.max() > 1) is followed both ways, one on a number is not."
        )
    if structure.decisions > PATHS or not all(
        _same_way(module, structure, example, forward, number) for number in range(structure.decisions)
    ):
        return (
            f"{_looks(found)}. {seen}; where it decides otherwise, layers read each other in another way, which could"
            " change what earlier tasks compute. Run every branch and choose with torch.where, to be sure."
        )
    return None


def _same_way(module: nn.Module, structure: Structure, example: Any, forward: Forward, decision: int) -> bool:
    """Whether the network goes the same way through its layers where one of its decisions is the opposite."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _alike(structure, trace(module, example, forward, turned=decision))
    except Exception:  # whatever a forward pass raises for such an input: then no output is wrong
        return True


def _looks(found: Mixing) -> str:
    return (
        f"{module_at(found.module)} reads the network's input into Python ('{found.operation}': .item(), an if or a"
        " shape), by which it may choose what runs"
    )


def _alike(a: Structure, b: Structure) -> bool:
    return a.entries.keys() == b.entries.keys() and all(
        len(uses) == len(b.entries[name])
        and all(
            use.role == other.role
            and use.ways == other.ways
            and torch.equal(use.target, other.target)
            and torch.equal(use.source, other.source)
            for use, other in zip(uses, b.entries[name], strict=True)
        )
        for name, uses in a.entries.items()
    )


def _leak(
    module: nn.Module, structure: Structure, ledger: NeuronLedger, example: Any, forward: Forward, draw: int
) -> Leak | None:
    """The first leak under a random claim, or None; the claim holds in all ways through the network."""
    structure = structure.as_one_way()
    trial, generator = NeuronLedger.from_state_dict(ledger.state_dict()), keyed_generator("exactness", draw)
    trial.tasks = [TaskEntry("trial", [], [], "sealed")]
    for name, owner in trial.owners.items():
        drawn = torch.randint(FREE, 1, owner.shape, generator=generator)
        owner.copy_(drawn.new_zeros(()) if name in ledger.whole else drawn)
    trial.outputs = torch.randint(FREE, 1, trial.outputs.shape, generator=generator)
    parameters = dict(module.named_parameters())
    with ExitStack() as stack:
        stack.callback(make_owner_aware, module, ledger.norm_owners())
        for name, uses in structure.entries.items():
            if name in parameters:
                stack.enter_context(replaced(parameters[name], trial.cut(structure, uses), torch.zeros))
        make_owner_aware(module, trial.norm_owners())
        return first_leak(module, structure, trial, example, forward)


def _where(module: nn.Module, layer: str) -> str:
    if layer not in dict(module.named_modules()):
        return "claimed outputs of the network"
    return f"claimed units of layer '{layer}' ({type(module.get_submodule(layer)).__name__})"


def _why(structure: Structure, leak: Leak) -> str:
    """The operation that changes the layer's weights before they are used, else the one where the leak is seen."""
    for name, by in structure.computed.items():
        if layer_of(name) == leak.layer:
            return f", until {by} changes '{name}'"
    if structure.written:
        name, by = next(iter(structure.written.items()))
        return f"{leak.where}; {by} writes '{name}' in the forward pass, so that outputs depend on what came before"
    others = [f"; it may be that {by} changes '{name}' before it is used" for name, by in structure.computed.items()]
    return leak.where + next(iter(others), "")


def _names(layers: list[str]) -> str:
    return ", ".join(f"'{layer}'" for layer in layers)
