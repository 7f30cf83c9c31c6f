"""Outputs of its own for each task: the head shows a task's columns at its classes and masks the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_cf.errors import ContinualError
from lightning_cf.network.output_heads import column_axis
from lightning_cf.utilities.hooks import Hook

NO_COLUMN = -1
"""Stands for the column of a class that a view does not show."""


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
        self.columns: Int64[Tensor, "views width"] = torch.full((len(views), width), NO_COLUMN)
        for view, pairs in enumerate(views):
            for label, column in pairs:
                self.columns[view, label] = column
        self._view_of_sample: Int64[Tensor, "batch"] | None = None
        if len(self.heads) > 1 and bool(((self.columns != torch.arange(width)) & (self.columns != NO_COLUMN)).any()):
            raise ContinualError(
                f"The network has {len(self.heads)} output heads, so a class can only be shown at a column of its own"
                " number. Let evaluate= return the task's own head alone, in which its classes count from 0 on; or give"
                " the task classes that are numbered like its outputs."
            )
        self.handles: list[RemovableHandle] = []
        self._masks = self._shows = True

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

    def mix(self, views: Int64[Tensor, "batch"]) -> None:
        """From now on each sample of a batch is shown by a view of its own: these are their numbers."""
        self._view_of_sample = views

    def _mask(
        self, own: Int64[Tensor, "_"], head: nn.Module, args: object, output: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """One of several heads keeps its columns and shows those of the task."""
        if not self._shows:
            return output
        columns = self._columns(output)[:, own.to(output.device)]
        lowest = self._lowest(output) / len(self.heads)  # the heads' outputs may be added up
        return output.masked_fill(_along(head, columns == NO_COLUMN, output), lowest)

    def _hook(self, head: nn.Module, args: object, output: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        if not self._shows:
            return output
        columns = _along(head, self._columns(output), output)
        shown = torch.take_along_dim(output, columns.clamp_min(0), dim=column_axis(head, output))
        return shown.masked_fill(columns == NO_COLUMN, self._lowest(output))

    def _lowest(self, output: Float[Tensor, "..."]) -> float:
        return torch.finfo(output.dtype).min if self._masks else 0.0

    def zeroed(self) -> AbstractContextManager[None]:
        """Meanwhile what is masked is zero, so that nothing made from it overflows, and one view shows all samples."""
        return self._without("_masks")

    def lifted(self) -> AbstractContextManager[None]:
        """Meanwhile all columns are seen as they stand."""
        return self._without("_shows")

    @contextmanager
    def _without(self, switch: str) -> Iterator[None]:
        setattr(self, switch, False)
        try:
            yield
        finally:
            setattr(self, switch, True)

    def _columns(self, output: Float[Tensor, "..."]) -> Int64[Tensor, "views_or_batch width"]:
        columns = self.columns.to(output.device)
        if self._view_of_sample is None or not self._masks:
            return columns[:1]
        return columns[self._view_of_sample.to(output.device)]


def _along(head: nn.Module, columns: Tensor, output: Tensor) -> Tensor:
    """Columns laid along the output's axis of columns, views along the batch."""
    shape = [len(columns)] + [1] * (output.ndim - 1)
    shape[column_axis(head, output)] = columns.shape[1]
    return columns.reshape(shape)
