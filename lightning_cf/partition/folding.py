"""Folding and cutting on a live network: claimed units take over from redundant ones, and read them no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from lightning_cf.errors import LeakError
from lightning_cf.network.consumers import consumers, input_units
from lightning_cf.network.structure import Structure, lookup
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE
from lightning_cf.ownership.masks import cut_by
from lightning_cf.partition.regression import Seen, fold, input_moments

Passes = Callable[[], Iterator[Callable[[], Any]]]
"""Gives forward passes over a task's data, one a batch."""


def consumer_moments(module: nn.Module, structure: Structure, passes: Passes, way: int = 0) -> dict[str, Seen]:
    """Second moments of what each consumer reads, over one pass in some way through the network."""
    parameters = dict(module.named_parameters())
    return input_moments({name: parameters[name] for name, _ in consumers(module, structure, way)}, passes())


def fold_claimed(module: nn.Module, structure: Structure, ledger: NeuronLedger, moments: Mapping[str, Seen]) -> None:
    """Solves the rows of the current task's units and outputs again, so that they read owned units alone.

    Args:
        module: the network, in place.
        structure: its structure.
        ledger: with the claim.
        moments: as :func:`consumer_moments` found them before the claim.
    """
    owner, levels = ledger.owner_of_units(structure), ledger.levels(structure)
    task = len(ledger.tasks) - 1
    parameters = dict(module.named_parameters())
    sealed = ledger.sealed(structure, parameters)
    for name, use in consumers(module, structure, structure.way_of(ledger.tasks[-1].name)):
        if name not in moments:
            continue
        weight, bias = parameters[name].detach(), _bias(parameters, name)
        own = (levels.of(use) == task) & ~sealed[name]
        rows = own.expand(weight.shape).flatten(1).all(dim=1).nonzero().flatten().to(weight.device)
        source = lookup(input_units(use), owner, none=0)
        kept = (source != FREE).repeat_interleave(weight[0].numel() // len(source)).to(weight.device)
        if len(rows) == 0 or bool(kept.all()):
            continue
        flat, solved = fold(weight[rows].flatten(1), None if bias is None else bias[rows], moments[name], kept)
        weight[rows] = flat.reshape(weight[rows].shape)
        if bias is not None and solved is not None:
            bias[rows] = solved


@torch.no_grad()
def cut_claimed(module: nn.Module, structure: Structure, ledger: NeuronLedger) -> None:
    """Sets the weights from redundant into claimed units and outputs to zero.

    Raises:
        LeakError: if earlier tasks compute with one of them, where isolation is exact.
    """
    parameters = dict(module.named_parameters())
    for name, uses in structure.entries.items():
        if name in parameters:
            cut = ledger.cut(structure, uses)
            if ledger.exact and len(uses) > 1:
                before = ledger.levels(structure, len(ledger.tasks) - 1)
                lost = cut & ~cut_by(uses, before) & ledger.sealed(structure, [name])[name]
                _check_lost(name, parameters[name], lost, ledger.tasks[-1].name)
            parameters[name].masked_fill_(cut.to(parameters[name].device), 0)


def _check_lost(name: str, weight: Tensor, lost: Bool[Tensor, "..."], task: str) -> None:
    """Raises LeakError where a claim would newly cut what earlier tasks compute with."""
    if bool(torch.where(lost.to(weight.device), weight, 0).any()):
        raise LeakError(
            f"'{name}' is used at several places, and the claim of task '{task}' would cut weights at one of them that"
            " earlier tasks compute with at another. Give the places weights of their own, or use isolation='perturb'."
        )


def _bias(parameters: Mapping[str, Tensor], weight: str) -> Tensor | None:
    """The bias of the same layer, if its units are the weight's."""
    bias = parameters.get(weight.removesuffix("weight") + "bias")
    return None if bias is None or len(bias) != len(parameters[weight]) else bias.detach()
