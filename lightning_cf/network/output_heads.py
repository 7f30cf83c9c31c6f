"""Output heads: the layers whose columns are the network's outputs; which they are, and how they grow."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from lightning_cf.errors import ContinualError
from lightning_cf.network.structure import Structure, layer_of

Head = Any
"""A layer with a weight of its own, one row a column: a Linear, a convolution, or another library's."""


def column_axis(head: nn.Module, output: Tensor) -> int:
    """The axis of a layer's output on which its columns lie: the last one of a matrix' product, 1 of a convolution."""
    weight = getattr(head, "weight", None)
    matrix = isinstance(head, nn.Linear) or (isinstance(weight, Tensor) and weight.ndim == 2)
    return output.ndim - 1 if matrix else 1


def head_columns(structure: Structure) -> dict[str, Int64[Tensor, "_"]]:
    """For each layer that computes outputs, by its path, the column of each of its rows."""
    found = {}
    for layer in structure.head.layers:
        for name, uses in structure.entries.items():
            if layer_of(name) == layer and uses[0].role == "weight":
                columns = uses[0].target.flatten() - structure.head.first
                found[layer] = columns[columns >= 0]
    return found


def heads_of(module: nn.Module, structure: Structure) -> dict[nn.Module, Int64[Tensor, "_"]]:
    """The layers whose outputs are the network's outputs, each with the columns that it computes.

    Raises:
        ContinualError: if one of them is no layer with a weight of its own.
    """
    return {_head(module, layer): columns for layer, columns in head_columns(structure).items()}


def head_of(module: nn.Module, structure: Structure) -> Head:
    """The layer whose outputs are the network's outputs.

    Raises:
        ContinualError: if it is no layer with a weight of its own, or if there are several.
    """
    if len(structure.head.layers) > 1:
        raise ContinualError(
            f"The network has {len(structure.head.layers)} output heads ({', '.join(structure.head.layers)}), to which"
            " no outputs can be added. Let evaluate= of each task return a head of its own alone, in which its classes"
            " count from 0 on; or widen one of the heads yourself: a wider layer with the old rows copied, the new ones"
            " behind them."
        )
    return _head(module, structure.head_layer)


def _head(module: nn.Module, path: str) -> Head:
    """The layer of that path, whatever its class: what counts is a weight with one row a column, as a Linear's."""
    head = dict(module.named_modules()).get(path)
    weight = getattr(head, "weight", None)
    transposed = isinstance(head, nn.modules.conv._ConvTransposeNd)
    if head is None or not isinstance(weight, Tensor) or weight.ndim < 2 or transposed:
        kind = "parameter of no layer" if head is None else type(head).__name__
        raise ContinualError(
            f"The output head '{path}' is a {kind}; outputs of their own for each task"
            " need a Linear or a convolution. Use MaskedGradientCallback(mask_outputs=False) to do without, in a loop"
            " of your own the columns of its output instead of show(...)."
        )
    return head


def is_known(head: nn.Module) -> bool:
    """Whether a layer is one of torch's own kinds, of which it is known that their outputs are their columns."""
    return isinstance(head, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))


def grow_head(head: Head, columns: int) -> None:
    """Widens a Linear, a convolution or a layer like them in place to ``columns`` outputs; the existing ones stay.

    New rows start like those of a new layer of that kind, drawn from the global generator.

    Raises:
        ContinualError: for a layer of another kind of which it cannot be known what else has to grow.
    """
    old = head.weight.shape[0]
    if columns <= old:
        return
    groups = getattr(head, "groups", 1)
    if is_known(head) and groups > 1:
        raise ContinualError(
            f"The output head is a convolution in {groups} groups, to which no outputs can be added; give each"
            " task outputs=[...] that the head has, or use groups=1."
        )
    check_growth(head, old)
    bias = head.bias is not None
    if head.weight.ndim == 2:
        fresh: nn.Module = nn.Linear(head.weight.shape[1], columns - old, bias=bias)
    else:
        fresh = type(head)(head.in_channels, columns - old, head.kernel_size, bias=bias)
    fresh = fresh.to(head.weight)
    for name, parameter in fresh.named_parameters():
        grown = torch.cat([getattr(head, name).detach(), parameter.detach()])
        setattr(head, name, nn.Parameter(grown, requires_grad=getattr(head, name).requires_grad))
    _note_columns(head, old, columns)


def fit_head(head: Head, columns: int) -> None:
    """Gives a layer ``columns`` outputs, in place: further ones as :func:`grow_head`, or the first ones alone."""
    old = head.weight.shape[0]
    grow_head(head, columns)
    if columns < old:
        check_growth(head, old)
        for name in ("weight", "bias"):
            parameter = getattr(head, name)
            if parameter is not None:
                setattr(head, name, nn.Parameter(parameter.detach()[:columns].clone(), parameter.requires_grad))
        _note_columns(head, old, columns)


_COUNTS = ("out_features", "out_channels")
"""Attributes in which layers keep how many outputs they have."""


def check_growth(head: Head, columns: int) -> None:
    """Raises ContinualError where something unknown of a layer may depend on how many columns it has."""
    tensors = {**dict(head.named_parameters()), **dict(head.named_buffers())}
    strange = [n for n in tensors if n not in ("weight", "bias") and not n.startswith("parametrizations.")]
    if not is_known(head):
        numbers = {n: v for n, v in vars(head).items() if isinstance(v, int) and not isinstance(v, bool)}
        strange += [n for n, v in numbers.items() if v == columns and n not in _COUNTS and not n.startswith("in_")]
        strange += [] if head.weight.ndim == 2 and hasattr(head, "bias") else ["weight"]
    strange += [] if len(head.weight) == columns else ["weight"]
    if strange:
        raise ContinualError(
            f"The output head is a {type(head).__name__}, to which no outputs can be added: nobody knows how its"
            f" '{strange[0]}' grows. Give each task outputs=[...] that the head has, or widen it yourself: a wider"
            " layer with the old rows copied, the new ones behind them."
        )


def _note_columns(head: Head, old: int, columns: int) -> None:
    for name in _COUNTS:
        if getattr(head, name, None) == old:
            setattr(head, name, columns)
