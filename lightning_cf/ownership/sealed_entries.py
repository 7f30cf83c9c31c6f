"""What earlier tasks own, as it was before a task was trained: compared in the end, and put back."""

from __future__ import annotations

import torch
from torch import nn

from lightning_cf.network.forward import named_tensors
from lightning_cf.network.kept_entries import KeptEntries
from lightning_cf.network.structure import Structure
from lightning_cf.ownership.ledger import NeuronLedger


class SealedEntries:
    """The entries of parameters and buffers that earlier tasks own, remembered as they are now.

    Args:
        module: the network.
        structure: its structure.
        ledger: says what earlier tasks own.

    Attributes:
        entries: by name of the tensor.
    """

    def __init__(self, module: nn.Module, structure: Structure, ledger: NeuronLedger) -> None:
        self.module, tensors = module, named_tensors(module)
        masks = ledger.sealed(structure, tensors)
        self.entries = {name: KeptEntries(tensors[name], mask) for name, mask in masks.items() if bool(mask.any())}
        for entries in self.entries.values():
            entries.save()

    def put_back(self) -> list[str]:
        """Puts back what is not what it was, also where another tensor stands in the place of the one that was there.

        Returns:
            names of the tensors that had moved.
        """
        now, moved = named_tensors(self.module), []
        for name, entries in self.entries.items():
            if name in now and now[name].shape == entries.parameter.shape:
                entries.parameter = now[name]
            if entries.moved():
                entries.restore()
                moved.append(name)
        return moved


def isolated(ledger: NeuronLedger) -> bool:
    """Whether what each task owns reads nothing else: isolation is exact, and every task so far was partitioned."""
    known = {record["task"] for record in ledger.records}
    return ledger.exact and all(task.name in known for task in ledger.tasks if task.phase != "learn")


def cut_again(module: nn.Module, structure: Structure, ledger: NeuronLedger) -> list[str]:
    """Sets what was cut for good to zero again, where isolation is exact.

    Args:
        module: the network, in place.
        structure: its structure.
        ledger: says what was cut.

    Returns:
        names of the tensors where it was not zero.
    """
    if not isolated(ledger):
        return []
    found, parameters = [], dict(module.named_parameters())
    sealed = ledger.sealed(structure, parameters)
    for name, parameter in parameters.items():
        cut = ledger.cut(structure, structure.entries.get(name, ()))
        if structure.ways > 1 and name in sealed:
            cut = cut & ~sealed[name]  # in no way through the network is anything cut that another one reads
        if bool(cut.any()):
            cut = cut.to(parameter.device)
            if bool(torch.where(cut, parameter.detach(), 0).any()):
                parameter.detach().masked_fill_(cut, 0)
                found.append(name)
    return found
