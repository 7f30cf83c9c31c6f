"""Outputs of its own for each task: the head shows a task's columns at its classes and masks the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_cf.errors import ContinualError
from lightning_cf.network.structure import Structure, layer_of
from lightning_cf.utilities.hooks import Hook

MASKED = -1

Head = Any
"""A layer with a weight of its own, one row a column: a Linear, a convolution, or another library's."""


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
        self._masks = True

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
        lowest = self._lowest(output) / len(self.heads)  # the heads' outputs may be added up
        return output.masked_fill(_along(head, columns == MASKED, output), lowest)

    def _hook(self, head: nn.Module, args: object, output: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        columns = _along(head, self._columns(output), output)
        shown = torch.take_along_dim(output, columns.clamp_min(0), dim=column_axis(head, output))
        return shown.masked_fill(columns == MASKED, self._lowest(output))

    def _lowest(self, output: Float[Tensor, "..."]) -> float:
        return torch.finfo(output.dtype).min if self._masks else 0.0

    @contextmanager
    def zeroed(self) -> Iterator[None]:
        """Meanwhile what is masked is zero, so that nothing made from it overflows, and one view shows all samples."""
        self._masks = False
        try:
            yield
        finally:
            self._masks = True

    def _columns(self, output: Float[Tensor, "..."]) -> Int64[Tensor, "views_or_batch width"]:
        columns = self.columns.to(output.device)
        if self.view_of_sample is None or not self._masks:
            return columns[:1]
        return columns[self.view_of_sample.to(output.device)]


def column_axis(head: nn.Module, output: Tensor) -> int:
    """The axis of a layer's output on which its columns lie: the last one of a matrix' product, 1 of a convolution."""
    weight = getattr(head, "weight", None)
    matrix = isinstance(head, nn.Linear) or (isinstance(weight, Tensor) and weight.ndim == 2)
    return output.ndim - 1 if matrix else 1


def _along(head: nn.Module, columns: Tensor, output: Tensor) -> Tensor:
    """Columns laid along the output's axis of columns, views along the batch."""
    shape = [len(columns)] + [1] * (output.ndim - 1)
    shape[column_axis(head, output)] = columns.shape[1]
    return columns.reshape(shape)


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
            " no outputs can be added. Give each task outputs=[...] of its own, or widen one of the heads yourself: a"
            " wider layer with the old rows copied, the new ones behind them."
        )
    return _head(module, structure.head_layer)


def _head(module: nn.Module, path: str) -> Head:
    """The layer of that path, whatever its class: what counts is a weight with one row a column, as a Linear's."""
    head = dict(module.named_modules()).get(path)
    weight = getattr(head, "weight", None)
    transposed = isinstance(head, nn.modules.conv._ConvTransposeNd)
    if head is None or not isinstance(weight, Tensor) or weight.ndim < 2 or transposed:
        raise ContinualError(
            f"The output head '{path}' is a {type(head).__name__}; outputs of their own for each task"
            " need a Linear or a convolution. Use MaskedGradientCallback(mask_outputs=False) to do without."
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
