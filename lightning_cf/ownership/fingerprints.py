"""Whether weights are those that a ledger was made for: some values of what each task owns are kept in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from lightning_cf.network.forward import named_tensors
from lightning_cf.network.structure import NO_UNIT, Structure, layer_of, lookup
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE, Levels
from lightning_cf.utilities.randomness import keyed_generator

SAMPLES = 256
"""How many values are kept of a tensor; of one that computes outputs, all up to ``ALL``."""

ALL = 2**16
DRAWS = 2**14
"""How often a large tensor is probed for entries that a task owns."""

ROUNDED = 2.0**-7
"""A weight that went through another precision and back differs by less, relative to itself."""


def keep_fingerprints(
    module: nn.Module, structure: Structure, ledger: NeuronLedger, tasks: Iterable[str] | None = None
) -> None:
    """Keeps values of what tasks own in the ledger; of all tasks that were partitioned or sealed, if none are named."""
    if _sizes(structure) != _known(ledger):
        return  # read from a checkpoint, and not all of its tasks were met again
    tensors = named_tensors(module)
    levels = ledger.levels(structure)
    for number, task in enumerate(ledger.tasks):
        if task.phase != "learn" and (tasks is None or task.name in tasks):
            way = structure.way_of(task.name)  # what others feed into its units is not its own
            found = {name: _places(name, tensor, structure, levels, number, way) for name, tensor in tensors.items()}
            ledger.fingerprints[task.name] = {
                name: {
                    "shape": list(tensors[name].shape),
                    "places": places,
                    "values": tensors[name].detach().flatten()[places.to(tensors[name].device)].cpu(),
                }
                for name, places in found.items()
                if len(places)
            }


def _sizes(structure: Structure) -> tuple[dict[str, int], int]:
    return {group.name: group.size for group in structure.groups}, structure.head.size


def _known(ledger: NeuronLedger) -> tuple[dict[str, int], int]:
    return {name: len(owner) for name, owner in ledger.owners.items()}, len(ledger.outputs)


def _places(
    name: str, tensor: Tensor, structure: Structure, levels: Levels, task: int, way: int
) -> Int64[Tensor, "some"]:
    """Some entries of a tensor that a task owns, by their place among all; none of what a forward pass writes.

    What is part of no unit, such as a buffer that shifts the input, belongs to the first task that runs it.
    """
    nothing = torch.empty(0, dtype=torch.int64)
    if name not in structure.entries or name in structure.written or tensor.is_complex():
        return nothing
    mask = torch.zeros((1,) * tensor.ndim, dtype=torch.bool)
    for use in structure.uses_on(name, way):
        own = lookup(use.target, levels.owner, none=FREE) == task
        first = levels.first(use) == task and not _table(tensor)
        mask = mask | torch.where(use.target == NO_UNIT, first, own)
    if not bool(mask.any()):
        return nothing
    most = ALL if layer_of(name) in structure.head.layers else SAMPLES
    if tensor.numel() <= ALL:
        places = mask.expand(tensor.shape).flatten().nonzero().flatten()
        return places if len(places) <= most else places[torch.linspace(0, len(places) - 1, most).long()]
    # Without a number beside each entry of a large tensor.
    drawn = torch.randint(tensor.numel(), (DRAWS,), generator=keyed_generator("fingerprint", name))
    index = torch.unravel_index(drawn, tensor.shape)
    there = mask[tuple(i if size > 1 else 0 for i, size in zip(index, mask.shape, strict=True))]
    return drawn[there][:most]


def _table(tensor: Tensor) -> bool:
    """Whether it may hold a row a task, of which earlier tasks read their own only."""
    return sum(size > 1 for size in tensor.shape) > 1


@dataclass(frozen=True)
class Difference:
    """What differs between weights and a ledger's fingerprint of a task.

    Attributes:
        task: its name.
        tensors: names of the tensors that differ.
        distance: how far, relative to the size of what the ledger knows.
        connected: whether entries are not zero that were zero for good.
    """

    task: str
    tensors: list[str]
    distance: float
    connected: bool


def differences(
    ledger: NeuronLedger, tensors: Mapping[str, Tensor], *, bitwise: Iterable[str] = ()
) -> list[Difference]:
    """For each task whose values are kept and are not the weights' own, what differs.

    What another precision rounds does not count.

    Args:
        ledger: with the fingerprints.
        tensors: the weights by name; those that are not there are not compared.
        bitwise: names of tensors of which every bit counts.
    """
    found = []
    for task, samples in ledger.fingerprints.items():
        different, squares, size, connected = [], 0.0, 0.0, False
        for name, sample in samples.items():
            if name not in tensors:
                continue
            before, now = sample["values"], _read(tensors[name], sample)
            if name in bitwise and now is not None and now.dtype == before.dtype and torch.equal(now, before):
                continue
            if now is None:
                different.append(name)
                squares, size = squares + 1, size + 1
                continue
            before, now = (x.double().nan_to_num(posinf=0.0, neginf=0.0) for x in (before, now))
            away = (now - before).abs() > ROUNDED * torch.maximum(now.abs(), before.abs()) + 1e-6
            if bool(away.any()) or name in bitwise:
                different.append(name)
            connected = connected or bool((away & (before == 0)).any())
            squares, size = squares + float((now - before).square().sum()), size + float(before.square().sum())
        if different:
            found.append(Difference(task, different, (squares / size) ** 0.5 if size else 1.0, connected))
    return found


def _read(tensor: Tensor, sample: Mapping[str, Any]) -> Tensor | None:
    """The values at the places of a sample, also where an axis became longer; None in a tensor of another shape."""
    shape = sample["shape"]
    if len(shape) != tensor.ndim or any(now < before for now, before in zip(tensor.shape, shape, strict=True)):
        return None
    if not shape:
        return tensor.detach().cpu().flatten()
    index = torch.unravel_index(sample["places"].to(tensor.device), shape)
    return tensor.detach()[index].cpu()
