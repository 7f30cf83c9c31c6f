"""Whether the numbers that a network holds are finite, where the first stand that are not, and the way back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from lightning_cf.errors import (
    DivergenceError,
)
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.structure import Structure, layer_of

_MULTIPLIED = {"weight", "scale", "statistic"}
"""What a tensor is where a number that is not finite makes outputs that are none; masks may well hold -inf."""


def stored(x: Tensor) -> Tensor:
    """The numbers that a tensor holds, in a plain one: of sparse and nested tensors those that they store.

    >>> stored(torch.tensor([[0.0, 2.0], [0.0, 0.0]]).to_sparse()).tolist()
    [2.0]
    """
    if x.layout == torch.strided and not x.is_nested:
        return x
    if x.layout == torch.sparse_coo:
        return x.coalesce().values()
    return x.to_dense() if x.is_mkldnn else x.values()


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those that hold a number which is not finite, in their order; a device is asked once.

    >>> not_finite({"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan]), "c": torch.tensor([3])})
    ['b']
    """
    found: dict[str, bool] = {}
    devices: dict[torch.device, list[str]] = {}
    for name, x in tensors.items():
        if (x.is_floating_point() or x.is_complex()) and not is_lazy(x):
            devices.setdefault(x.device, []).append(name)
    for names in devices.values():
        values = [tensors[name].detach() for name in names]
        flags = torch.stack([stored(x).isfinite().all() for x in values])
        found |= dict(zip(names, flags.tolist(), strict=True))
    return [name for name in tensors if not found.get(name, True)]


def described(names: Collection[str], tensors: Mapping[str, Tensor]) -> str:
    """The first of some tensors that are not finite, with its layer, and how many there are.

    >>> described(["net.0.weight"], {"net.0.weight": torch.tensor([1.0, torch.nan])})
    "layer 'net.0' ('net.0.weight': 1 of 2 numbers are nan)"
    """
    first = next(iter(names))
    x = stored(tensors[first].detach())
    nan, bad = int(x.isnan().sum()), int((~x.isfinite()).sum())
    kind = "inf" if nan == 0 else "nan" if nan == bad else "nan or inf"
    others = f", and {len(names) - 1} tensors behind it" if len(names) > 1 else ""
    return f"layer '{layer_of(first)}' ('{first}': {bad} of {x.numel()} numbers are {kind}){others}"


def in_forward_order(structure: Structure, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, those first that the forward pass meets first."""
    met = [name for name in structure.entries if name in tensors]
    return {name: tensors[name] for name in [*met, *(n for n in tensors if n not in structure.entries)]}


def infinite_on_purpose(structure: Structure, module: nn.Module) -> frozenset[str]:
    """Names of tensors of an untrained network that hold infinite numbers and may: masks, bounds, what is unused."""
    tensors = named_tensors(module)
    found = set()
    for name in not_finite(tensors):
        roles = {use.role for use in structure.entries.get(name, ())}
        learned = isinstance(tensors[name], nn.Parameter) and bool(tensors[name].isnan().any())
        if not roles or not (learned or roles & _MULTIPLIED):
            found.add(name)
    return frozenset(found)


def rows_finite(parts: Iterable[Shaped[Tensor, "rows ..."]]) -> Bool[Tensor, "rows"]:
    """Which rows are finite in every one of some tensors.

    >>> rows_finite([torch.tensor([[1.0], [torch.inf]]), torch.tensor([1.0, 2.0])]).tolist()
    [True, False]
    """
    fine: Tensor | None = None
    for x in parts:
        rows = x.isfinite().flatten(1).all(dim=1) if x.ndim > 1 else x.isfinite()
        fine = rows if fine is None else fine & rows.to(fine.device)
    assert fine is not None
    return fine


def sample_axis(x: Tensor, count: int, *, turned: bool = False) -> int | None:
    """Along which axis of a part of an input its samples lie; None where it does not hold one part a sample.

    >>> x = torch.ones(4, 2)
    >>> sample_axis(x, 4), sample_axis(x, 2), sample_axis(x, 2, turned=True), sample_axis(x[0], 2, turned=True)
    (0, None, 1, 0)

    Args:
        x: that part.
        count: how many samples there are.
        turned: whether they lie along the second axis, behind tokens, where it has two.
    """
    if turned and x.ndim > 1 and x.shape[1] == count:
        return 1
    return 0 if x.ndim and x.shape[0] == count else None


def rows_of(x: Any, count: int, *, turned: bool = False) -> list[Shaped[Tensor, "rows ..."]]:
    """The floating-point tensors of an input that hold one part a sample, the samples first (see ``sample_axis``)."""
    leaves = [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    axes = [sample_axis(leaf, count, turned=turned) for leaf in leaves]
    return [leaf.to_dense().movedim(axis, 0) for leaf, axis in zip(leaves, axes, strict=True) if axis is not None]


def infinite_rows(rows: Iterable[Shaped[Tensor, "rows ..."]]) -> Bool[Tensor, "rows"] | None:
    """Which rows hold infinite numbers, which gates and the like make finite; None where there are no tensors."""
    found = [x.isinf().flatten(1).any(dim=1) if x.ndim > 1 else x.isinf() for x in rows]
    return torch.stack(found).any(dim=0) if found else None


def watched(module: nn.Module, structure: Structure) -> dict[str, Tensor]:
    """What must be finite, in the order of the forward pass: all but masks and bounds that hold infinity on purpose.

    Of a buffer that no operation was seen to read, such as a mask that is built for each length, nobody knows.
    """
    tensors = in_forward_order(structure, named_tensors(module))
    return {
        name: x
        for name, x in tensors.items()
        if name not in structure.infinite and (name in structure.entries or isinstance(x, nn.Parameter))
    }


def check_finite(module: nn.Module, structure: Structure, when: str) -> None:
    """Raises DivergenceError if the network holds numbers that are not finite, and names the first layer."""
    tensors = watched(module, structure)
    names = not_finite(tensors)
    if names:
        raise DivergenceError(f"{when}: the network is not finite, first in {described(names, tensors)}.")
