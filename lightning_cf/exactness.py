"""Whether exact isolation can hold on a network: found out before anything is trained."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_cf.errors import StructureError, StructureWarning
from lightning_cf.ledger import FREE, NeuronLedger, TaskEntry
from lightning_cf.normalisation import make_owner_aware
from lightning_cf.probe import Leak, first_leak, replaced
from lightning_cf.randomness import keyed_generator
from lightning_cf.structure import Forward, Mixing, Structure, call, layer_of, samples
from lightning_cf.tracing import trace

DRAWS = 2
"""How many random claims are tried."""

PATHS = 8
"""On how many pairs of samples a network is traced that chooses its way by its input."""


def check_exact(
    module: nn.Module, structure: Structure, ledger: NeuronLedger, example: Any, forward: Forward = call
) -> None:
    """Tries random claims, and probes them for leaks; the module is put back as it was, bitwise.

    Args:
        module: the network.
        structure: its structure, as traced.
        ledger: says which groups are not partitioned.
        example: an input whose first axis is the batch.
        forward: how to run the network on the example.

    Warns:
        StructureWarning: names operations that make units share one fate: unknown ones, and those by which a whole
            layer becomes one unit; and those by which the way through the network may depend on its input.

    Raises:
        StructureError: names the module and the operation, or the layer, by which free units reach claimed ones.
    """
    for message in dict.fromkeys(found.message() for found in structure.mixings if found.unknown or found.collapsed):
        warnings.warn(message, StructureWarning, stacklevel=2)
    partitioned = {layer for group in structure.groups if group.name not in ledger.whole for layer in group.layers}
    for found in structure.reads:
        layers = [layer for layer in found.layers if layer in partitioned]
        if layers:
            raise StructureError(
                f"isolation='exact' cannot hold: module '{found.module or 'forward'}' reads values of units of"
                f" {_names(layers)} into Python ('{found.operation}': .item(), float() or an if), where nothing can"
                f" tell what they change. Take that out, use isolation='perturb', or exclude={layers}, which leaves"
                " these layers to the first task."
            )
    if structure.branches and partitioned:
        _check_branches(module, structure, example, forward)
    for draw in range(DRAWS):
        leak = _leak(module, structure, ledger, example, forward, draw)
        if leak is not None:
            hidden = _names([leak.layer] if leak.layer in partitioned else sorted(partitioned))
            raise StructureError(
                f"isolation='exact' cannot hold: {_where(module, leak.layer)} change when only free weights change,"
                f" though the weights from free into claimed units are zero{_why(structure, leak)}. Use"
                f" isolation='perturb', or exclude=[{hidden}], which leaves the layers there to the first task."
            )


def _check_branches(module: nn.Module, structure: Structure, example: Any, forward: Forward) -> None:
    """Whether a network that looks at its input goes the same way through its layers for other samples too."""
    found = next((branch for branch in structure.branches if branch.unknown), structure.branches[0])
    unseen = [n for n, p in module.named_parameters() if p.requires_grad and n not in structure.entries]
    if unseen:
        layers = list(dict.fromkeys(map(layer_of, unseen)))
        raise StructureError(
            f"isolation='exact' cannot hold: {_looks(found)}, and {_names(layers)} did not run for the samples that"
            " were followed, so nobody knows what these layers read. Run every branch and choose with torch.where, or"
            " give the task evaluate= that runs them all; or use isolation='perturb'."
        )
    count = next((len(x) for x in tree_leaves(example) if isinstance(x, Tensor) and x.ndim), 0)
    for start in range(2, min(count, 2 * PATHS), 2):
        if not _alike(structure, trace(module, samples(module, example, 2, start), forward)):
            raise StructureError(
                f"isolation='exact' cannot hold: {_looks(found)}, and samples {start} and {start + 1} of the first"
                " batch go another way through its layers than the first two. Run every branch and choose with"
                " torch.where, or use isolation='perturb'."
            )
    if found.unknown:
        warnings.warn(
            f"{_looks(found)}. All layers ran, and {max(1, min(count, 2 * PATHS))} samples took the same way through"
            " them; an input that takes another one could change what earlier tasks compute.",
            StructureWarning,
            stacklevel=3,
        )


def _looks(found: Mixing) -> str:
    return (
        f"module '{found.module or 'forward'}' reads the network's input into Python ('{found.operation}': .item(), an"
        " if or a shape), by which it may choose what runs"
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
