"""Whether exact isolation can hold on a network: found out before anything is trained."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from lightning_cf.errors import StructureError, StructureWarning
from lightning_cf.ledger import FREE, NeuronLedger, TaskEntry
from lightning_cf.normalisation import make_owner_aware
from lightning_cf.probe import first_leak, replaced
from lightning_cf.randomness import keyed_generator
from lightning_cf.structure import Forward, Structure, call, layer_of

DRAWS = 2
"""How many random claims are tried."""


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
            layer becomes one unit.

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
    for draw in range(DRAWS):
        layer = _leak(module, structure, ledger, example, forward, draw)
        if layer is not None:
            hidden = _names([layer] if layer in partitioned else sorted(partitioned))
            raise StructureError(
                f"isolation='exact' cannot hold: {_where(module, layer)} change when only free weights change, though"
                f" the weights from free into claimed units are zero{_why(structure, layer)}. Use"
                f" isolation='perturb', or exclude=[{hidden}], which leaves the layers there to the first task."
            )


def _leak(
    module: nn.Module, structure: Structure, ledger: NeuronLedger, example: Any, forward: Forward, draw: int
) -> str | None:
    """The first layer that leaks under a random claim, or None."""
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


def _why(structure: Structure, layer: str) -> str:
    """The operation that changes the layer's weights before they are used, else that of another weight, if any."""
    found = [f", until {by} changes '{name}'" for name, by in structure.computed.items() if layer_of(name) == layer]
    others = [f"; it may be that {by} changes '{name}' before it is used" for name, by in structure.computed.items()]
    return next(iter([*found, *others]), "")


def _names(layers: list[str]) -> str:
    return ", ".join(f"'{layer}'" for layer in layers)
