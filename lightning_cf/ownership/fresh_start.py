"""Gives free units a fresh start before the next task."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_cf.network.structure import Structure
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE
from lightning_cf.utilities.randomness import derive_seed, isolated_generators, seed_all


def reinitialise_free(
    module: nn.Module,
    structure: Structure,
    ledger: NeuronLedger,
    *key: int | str,
    outputs: Sequence[int] = (),
) -> None:
    """Resets the incoming weights, biases and norm entries of free units as their layers' ``reset_parameters`` does.

    Where tasks run the network in ways of their own, only what the last task's way uses: nobody trained the rest yet.

    Entries of owned units and outputs keep their values, also where that method of a layer resets its children or
    makes its parameters anew; layers without it are left alone. The global generator is left as it was.

    Args:
        module: the network, in place.
        structure: its structure.
        ledger: says which units are free.
        key: what the random numbers depend on, such as (seed, task).
        outputs: columns of the head that get a fresh start too.
    """
    levels, columns = ledger.levels(structure), structure.head.first + torch.tensor(outputs, dtype=torch.long)
    way = structure.way_of(ledger.tasks[-1].name) if ledger.tasks else 0
    for path, layer in module.named_modules():
        reset = getattr(layer, "reset_parameters", None)
        own = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
        masks = {}
        for name in own:
            uses = structure.entries.get(f"{path}.{name}" if path else name, ())
            held = isinstance(own[name], nn.Parameter) and not own[name].requires_grad
            if any(way in use.ways for use in uses) and not held:
                masks[name] = torch.stack(
                    [
                        (levels.owners(use, none=0) == FREE)
                        .logical_and((use.target < structure.head.first) | torch.isin(use.target, columns))
                        .expand(own[name].shape)
                        for use in uses
                    ]
                ).all(dim=0)
        if not callable(reset) or not any(bool(mask.any()) for mask in masks.values()):
            continue
        kept = _Kept(layer)
        with isolated_generators(), torch.no_grad():
            seed_all(derive_seed(*key, path))
            reset()
            drawn = {
                name: tensor.detach().clone() for name in masks if isinstance(tensor := getattr(layer, name), Tensor)
            }
            kept.put_back()
            for name, fresh in drawn.items():
                if fresh.shape == own[name].shape:
                    own[name].copy_(torch.where(masks[name].to(own[name].device), fresh.to(own[name]), own[name]))
            if getattr(layer, "momentum", 0.0) is None and bool(masks.get("running_mean", torch.zeros(1)).any()):
                # An average over all batches counts them: those before the fresh start are none of its own.
                layer.get_buffer("num_batches_tracked").zero_()


class _Kept:
    """What a layer and its children hold: their ``reset_parameters`` may reset all of it, or make it anew."""

    def __init__(self, layer: nn.Module) -> None:
        self.held: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (held, dict(held)) for part in layer.modules() for held in (part._parameters, part._buffers, part._modules)
        ]
        tensors = [tensor for tensor in (*layer.parameters(), *layer.buffers()) if not is_lazy(tensor)]
        self.values = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def put_back(self) -> None:
        """The same tensors with the same values; those that were drawn in their place are nobody's then."""
        for held, entries in self.held:
            held.clear()
            held.update(entries)
        for tensor, before in self.values:
            tensor.copy_(before)
