"""Outputs of its own for each task: the head shows a task's columns at its classes and masks the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_cf.errors import ContinualError
from lightning_cf.hooks import Hook
from lightning_cf.structure import Structure, layer_of

MASKED = -1

Head = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class OutputView:
    """While attached, the head's output holds at position ``c`` the column of class ``c``, else the lowest number.

    So an unchanged loss over all classes trains, and an unchanged metric scores, the task's own outputs only; classes
    that return in another domain are found at their labels though their columns stand elsewhere.

    >>> head = nn.Linear(1, 4, bias=False)
    >>> _ = head.weight.data.copy_(torch.arange(4.)[:, None])
    >>> with OutputView(head, width=2, views=[[(0, 2), (1, 3)]]):
    ...     head(torch.ones(1, 1)).tolist()
    [[2.0, 3.0]]

    Args:
        head: the layer whose outputs are the network's: Linear (columns on the last axis) or convolution (axis 1);
            or several such layers, each with the columns that it computes: they mask theirs, where they stand.
        width: how many positions the view has: the classes of the module as the user built it.
        views: for each view its pairs (class, column).
    """

    def __init__(
        self,
        head: nn.Module | Mapping[nn.Module, Int64[Tensor, "_"]],
        *,
        width: int,
        views: Sequence[Sequence[tuple[int, int]]],
    ) -> None:
        self.heads = {head: torch.arange(width)} if isinstance(head, nn.Module) else dict(head)
        self.columns: Int64[Tensor, "views width"] = torch.full((len(views), width), MASKED)
        for view, pairs in enumerate(views):
            for label, column in pairs:
                self.columns[view, label] = column
        self.view_of_sample: Int64[Tensor, "batch"] | None = None
        if len(self.heads) > 1 and bool(((self.columns != torch.arange(width)) & (self.columns != MASKED)).any()):
            raise ContinualError(
                f"The network has {len(self.heads)} output heads, so a class can only be shown at a column of its own"
                " number. Give the task classes that are numbered like its outputs, or join the heads in one layer."
            )
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> OutputView:
        single = len(self.heads) == 1
        self.handles = [
            head.register_forward_hook(Hook(self._hook if single else partial(self._mask, columns)))
            for head, columns in self.heads.items()
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        while self.handles:
            self.handles.pop().remove()

    def _mask(
        self, own: Int64[Tensor, "_"], head: nn.Module, args: object, output: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """One of several heads keeps its columns and shows those of the task."""
        columns = self._columns(output)[:, own.to(output.device)]
        lowest = torch.finfo(output.dtype).min / len(self.heads)  # the heads' outputs may be added up
        return output.masked_fill(_along(head, columns == MASKED, output), lowest)

    def _hook(self, head: nn.Module, args: object, output: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        columns = _along(head, self._columns(output), output)
        shown = torch.take_along_dim(output, columns.clamp_min(0), dim=_axis(head, output))
        return shown.masked_fill(columns == MASKED, torch.finfo(output.dtype).min)

    def _columns(self, output: Float[Tensor, "..."]) -> Int64[Tensor, "views_or_batch width"]:
        columns = self.columns.to(output.device)
        return columns[:1] if self.view_of_sample is None else columns[self.view_of_sample.to(output.device)]


def _axis(head: nn.Module, output: Tensor) -> int:
    return output.ndim - 1 if isinstance(head, nn.Linear) else 1


def _along(head: nn.Module, columns: Tensor, output: Tensor) -> Tensor:
    """Columns laid along the output's axis of columns, views along the batch."""
    shape = [len(columns)] + [1] * (output.ndim - 1)
    shape[_axis(head, output)] = columns.shape[1]
    return columns.reshape(shape)


def heads_of(module: nn.Module, structure: Structure) -> dict[nn.Module, Int64[Tensor, "_"]]:
    """The layers whose outputs are the network's outputs, each with the columns that it computes.

    Raises:
        ContinualError: if one of them is no Linear or convolution.
    """
    found: dict[nn.Module, Tensor] = {}
    for layer in structure.head.layers:
        for name, uses in structure.entries.items():
            if layer_of(name) == layer and uses[0].role == "weight":
                columns = uses[0].target.flatten() - structure.head.first
                found[_head(module, layer)] = columns[columns >= 0]
    return found


def head_of(module: nn.Module, structure: Structure) -> Head:
    """The layer whose outputs are the network's outputs.

    Raises:
        ContinualError: if it is no Linear or convolution, or if there are several.
    """
    if len(structure.head.layers) > 1:
        raise ContinualError(
            f"The network has {len(structure.head.layers)} output heads ({', '.join(structure.head.layers)}), to which"
            " no outputs can be added for classes that return. Give each task outputs=[...] of its own."
        )
    return _head(module, structure.head_layer)


def _head(module: nn.Module, path: str) -> Head:
    head = dict(module.named_modules()).get(path)
    if not isinstance(head, Head):
        raise ContinualError(
            f"The output head '{path}' is a {type(head).__name__}; outputs of their own for each task"
            " need a Linear or a convolution. Use MaskedGradientCallback(mask_outputs=False) to do without."
        )
    return head


def grow_head(head: Head, columns: int) -> None:
    """Widens a Linear or convolution in place to ``columns`` outputs; the existing ones keep their values.

    New rows start like those of a new layer of that kind, drawn from the global generator.
    """
    old = head.weight.shape[0]
    if columns <= old:
        return
    if not isinstance(head, nn.Linear) and head.groups > 1:
        raise ContinualError(
            f"The output head is a convolution in {head.groups} groups, to which no outputs can be added; give each"
            " task outputs=[...] that the head has, or use groups=1."
        )
    bias = head.bias is not None
    if isinstance(head, nn.Linear):
        fresh: nn.Module = nn.Linear(head.in_features, columns - old, bias=bias)
        head.out_features = columns
    else:
        fresh = type(head)(head.in_channels, columns - old, head.kernel_size, bias=bias)  # type: ignore[arg-type]
        head.out_channels = columns
    fresh = fresh.to(head.weight)
    for name, parameter in fresh.named_parameters():
        grown = torch.cat([getattr(head, name).detach(), parameter.detach()])
        setattr(head, name, nn.Parameter(grown, requires_grad=getattr(head, name).requires_grad))
