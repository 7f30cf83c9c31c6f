"""Free units of a network that holds numbers that are not finite are drawn anew before a task begins."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from lightning_cf.errors import DivergenceError
from lightning_cf.network.finite import described
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.structure import Structure, lookup
from lightning_cf.ownership.fresh_start import reinitialise_free
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE


@torch.no_grad()
def mend_free(
    module: nn.Module, structure: Structure, ledger: NeuronLedger, names: Collection[str], *key: int | str
) -> None:
    """Draws anew what is not finite and no task's own, as a seal does; zero where a layer has no such method.

    Args:
        module: the network, in place.
        structure: its structure.
        ledger: says what is free; the current task's outputs count while it learns.
        names: the tensors that are not finite, in the order of the forward pass.
        key: what is drawn depends on.

    Raises:
        DivergenceError: if some of these numbers belong to a task, or there is none that is worth the mending.
    """
    owner = ledger.owner_of_units(structure)
    learning = ledger.phase == "learn"
    open_ = (owner == FREE) | (learning & (owner == len(ledger.tasks) - 1))
    tensors = named_tensors(module)
    for name in names:
        mask = torch.zeros(tensors[name].shape, dtype=torch.bool)
        uses = structure.entries.get(name, ())
        if uses and len(ledger.tasks) > 1:
            mask = torch.stack([lookup(use.target, open_, none=False).expand(mask.shape) for use in uses]).all(dim=0)
        if bool((~tensors[name].isfinite().cpu() & ~mask).any()):
            whose = "what its tasks own" if len(ledger.tasks) > 1 else "it"
            raise DivergenceError(
                f"{type(module).__name__} is not finite before the first step, in {whose}:"
                f" {described([name], tensors)}. It was loaded so, or trained so before. Load weights from before that."
            )
    before = {name: x.detach().clone() for name, x in tensors.items()}
    reinitialise_free(module, structure, ledger, *key)
    for name, x in tensors.items():
        if name in names:
            last = torch.ones(()) if name.endswith("running_var") else torch.zeros(())
            drawn = torch.where(x.isfinite(), x, last.to(x))
            x.copy_(torch.where(before[name].isfinite(), before[name], drawn))
        else:
            x.copy_(before[name])
