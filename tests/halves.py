"""A network half of whose units are owned, and its weights without what isolation cuts."""

import torch

from lightning_cf.network.forward import named_tensors
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE


def half_owned(structure, seed):
    """About half of the units free, the others owned by two tasks."""
    ledger, generator = NeuronLedger.for_structure(structure), torch.Generator().manual_seed(seed)
    for owner in (*ledger.owners.values(), ledger.outputs):
        owner.copy_(torch.tensor([FREE, FREE, 0, 1])[torch.randint(4, owner.shape, generator=generator)])
    return ledger


def cut(network, structure, ledger):
    """The network's tensors, without the entries from free or later units into owned ones."""
    tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(network).items()}
    for name, uses in structure.entries.items():
        tensors[name][ledger.cut(structure, uses).expand(tensors[name].shape)] = 0
    return tensors
