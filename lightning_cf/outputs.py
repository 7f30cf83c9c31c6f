"""Outputs of its own for each task: the head shows a task's columns at its classes and masks the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_cf.errors import ContinualError
from lightning_cf.structure import Structure

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
        head: the layer whose outputs are the network's: Linear (columns on the last axis) or convolution (axis 1).
        width: how many positions the view has: the classes of the module as the user built it.
        views: for each view its pairs (class, column).
    """

    def __init__(self, head: nn.Module, *, width: int, views: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.head = head
        self.columns: Int64[Tensor, "views width"] = torch.full((len(views), width), MASKED)
        for view, pairs in enumerate(views):
            for label, column in pairs:
                self.columns[view, label] = column
        self.view_of_sample: Int64[Tensor, "batch"] | None = None
        self.handle: RemovableHandle | None = None

    def __enter__(self) -> OutputView:
        self.handle = self.head.register_forward_hook(self._hook)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.handle is not None:
            self.handle.remove()

    def _hook(self, head: nn.Module, args: object, output: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        axis = output.ndim - 1 if isinstance(head, nn.Linear) else 1
        columns = self.columns.to(output.device)
        columns = columns[:1] if self.view_of_sample is None else columns[self.view_of_sample.to(output.device)]
        shape = [len(columns)] + [1] * (output.ndim - 1)
        shape[axis] = columns.shape[1]
        columns = columns.reshape(shape)
        shown = torch.take_along_dim(output, columns.clamp_min(0), dim=axis)
        return shown.masked_fill(columns == MASKED, torch.finfo(output.dtype).min)


def head_of(module: nn.Module, structure: Structure) -> Head:
    """The layer whose outputs are the network's outputs.

    Raises:
        ContinualError: if it is no Linear or convolution.
    """
    head = dict(module.named_modules()).get(structure.head_layer)
    if not isinstance(head, Head):
        raise ContinualError(
            f"The output head '{structure.head_layer}' is a {type(head).__name__}; outputs of their own for each task"
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
