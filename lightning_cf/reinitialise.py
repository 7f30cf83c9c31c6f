"""Gives free units a fresh start before the next task."""

import torch
from torch import nn

from lightning_cf.ledger import FREE, NeuronLedger
from lightning_cf.randomness import derive_seed
from lightning_cf.structure import Structure


def reinitialise_free(module: nn.Module, structure: Structure, ledger: NeuronLedger, *key: int | str) -> None:
    """Resets the incoming weights, biases and norm entries of free units as their layers' ``reset_parameters`` does.

    Where tasks run the network in ways of their own, only what the last task's way uses: nobody trained the rest yet.

    Entries of owned units and outputs keep their values; layers without that method are left alone. The global
    generator is left as it was.

    Args:
        module: the network, in place.
        structure: its structure.
        ledger: says which units are free.
        key: what the random numbers depend on, such as (seed, task).
    """
    levels = ledger.levels(structure)
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
                        ((levels.owners(use, none=0) == FREE) & (use.target < structure.head.first)).expand(
                            own[name].shape
                        )
                        for use in uses
                    ]
                ).all(dim=0)
        if not callable(reset) or not any(bool(mask.any()) for mask in masks.values()):
            continue
        before = {name: tensor.detach().clone() for name, tensor in own.items()}
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(derive_seed(*key, path))
            reset()
            for name, tensor in own.items():
                mask = masks.get(name, torch.zeros((), dtype=torch.bool)).to(tensor.device)
                tensor.copy_(torch.where(mask, tensor, before[name]))
