"""What travels beside a tensor while a network is traced: labels of units, and the parameter entries it is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cf.network.tracing.labels import NO_LABEL, UNUSED, Labels, Units, sole


@dataclass(frozen=True)
class Origin:
    """Which entry of a parameter or buffer each element of a tensor is made from.

    Attributes:
        shape: of the parameter.
        axes: the parameter's axis behind each of the tensor's, None behind an axis of size one, where the tensor is
            the parameter with its axes in another order.
        numbers: else the number of each element's entry, -1 where there is none.
        trained: whether it is a parameter.
    """

    shape: torch.Size
    axes: tuple[int | None, ...] | None = None
    numbers: Tensor | None = None
    trained: bool = True

    @classmethod
    def whole(cls, tensor: Tensor) -> Origin:
        """The origin of a parameter or buffer as it stands: each element is its own entry."""
        return cls(tensor.shape, tuple(range(tensor.ndim)), trained=isinstance(tensor, nn.Parameter))

    def of(self, shape: tuple[int, ...]) -> Tensor:
        """For a tensor of this shape, the number of each element's entry in the parameter, -1 where there is none."""
        if self.numbers is not None:
            return self.numbers
        assert self.axes is not None
        numbers = torch.arange(self.shape.numel()).reshape(self.shape)
        ordered = [axis for axis in self.axes if axis is not None]
        rest = [axis for axis in range(len(self.shape)) if axis not in ordered]
        return numbers.permute([*ordered, *rest]).reshape(shape)

    def moved(self, shape: tuple[int, ...], move: Callable[[Tensor], Tensor]) -> Origin:
        """The origin of what a movement, such as a view or a permutation, makes of a tensor of this shape."""
        if self.axes is not None:
            axes = self._axes_after(move)
            if axes is not None:
                return Origin(self.shape, axes, trained=self.trained)
        return Origin(self.shape, numbers=move(self.of(shape)).clone(), trained=self.trained)

    def _axes_after(self, move: Callable[[Tensor], Tensor]) -> tuple[int | None, ...] | None:
        assert self.axes is not None
        strides = torch.empty(self.shape, device="meta").stride()
        known = {(strides[axis], n): axis for axis, n in enumerate(self.shape) if n > 1}
        view = torch.empty_strided(
            tuple(1 if axis is None else self.shape[axis] for axis in self.axes),
            tuple(1 if axis is None else strides[axis] for axis in self.axes),
            device="meta",
        )
        try:
            view = move(view)
        except (RuntimeError, NotImplementedError):
            return None
        if view.storage_offset() or view.numel() != self.shape.numel():
            return None
        axes = tuple(
            None if n == 1 else known.get((stride, n), -1) for stride, n in zip(view.stride(), view.shape, strict=True)
        )
        return axes if sorted(axis for axis in axes if axis is not None) == sorted(known.values()) else None

    @property
    def distinct(self) -> bool:
        """Whether no two elements are made from the same entry."""
        if self.numbers is None:
            return True
        entries = self.numbers[self.numbers >= 0]
        return len(entries.unique()) == len(entries)

    def repeats(self) -> bool:
        """Whether all slices along the first axis are the same entries."""
        return self.numbers is not None and bool((self.numbers == self.numbers[:1]).all())

    def unite_repeats(self, units: Units, labels: Labels) -> None:
        """Units that one entry computes, or reads, at several places share one fate; ``labels`` are the elements'."""
        assert self.numbers is not None
        numbers, labels = self.numbers[self.numbers >= 0], labels[self.numbers >= 0]
        first = torch.zeros(self.shape.numel(), dtype=torch.int64).scatter_reduce(0, numbers, labels, "amax")
        units.unite(first[numbers], labels)

    def place(self, labels: Labels, shape: tuple[int, ...]) -> Labels:
        """Labels of the elements as labels of the parameter's entries; several at one entry are NO_LABEL.

        Args:
            labels: broadcast with the tensor, or larger than it.
            shape: the tensor's.

        Returns:
            labels that broadcast to the parameter, UNUSED where no element is made from an entry.
        """
        labels = labels.reshape((1,) * (len(shape) - labels.ndim) + tuple(labels.shape))
        labels = sole(labels, shape)
        if self.axes is not None:
            ordered = [axis for axis in self.axes if axis is not None]
            sizes = {axis: labels.shape[at] for at, axis in enumerate(self.axes) if axis is not None}
            labels = labels.reshape([sizes[axis] for axis in ordered])
            labels = labels.permute([ordered.index(axis) for axis in sorted(ordered)])
            return labels.reshape([sizes.get(axis, 1) for axis in range(len(self.shape))])
        assert self.numbers is not None
        known = self.numbers >= 0
        numbers, values = self.numbers[known], labels.expand(shape)[known]
        low = torch.full((self.shape.numel(),), torch.iinfo(torch.int64).max)
        low = low.scatter_reduce(0, numbers, values, "amin")
        placed = torch.full((self.shape.numel(),), UNUSED).scatter_reduce(0, numbers, values, "amax")
        placed[(low != placed) & (placed != UNUSED)] = NO_LABEL
        return placed.reshape(self.shape)


@dataclass(frozen=True)
class Level:
    """Units over which a module takes a reduction that can be taken by owners (see ``ownership/owner_aware_norms.py``).

    Attributes:
        module: path of the module.
        axis: along which they lie, counted from the last one, -1.
        elements: their labels.
        inline: whether the module does other things too, so that it is to run once, with a result for each unit.
    """

    module: str
    axis: int
    elements: Labels
    inline: bool


@dataclass(frozen=True)
class Pending:
    """A union of units that waits until something reads the result of an operation that mixes them.

    Attributes:
        settle: makes it, and gives the label of the united units.
        final: whether to make it also where the network returns the result.
        level: where the result is one for each owner, and has no label yet: what it is made from.
    """

    settle: Callable[[], Labels]
    final: bool
    level: Level | None = None


@dataclass
class Shadow:
    """What travels beside a tensor.

    Attributes:
        tensor: kept alive, so that its identity is not used again.
        labels: the unit of each element, 0 where none computed it; of a weight, the units with whom it is coupled.
        origins: for what is made from parameters or buffers alone, entry by entry.
        live: whether it is an activation: it depends on the network's input, or units compute it from parameters alone.
        pending: unions to make when a later operation reads it.
    """

    tensor: Tensor
    labels: Tensor
    origins: dict[str, Origin] = field(default_factory=dict)
    live: bool = False
    pending: list[Pending] = field(default_factory=list)

    @property
    def weight(self) -> bool:
        """Whether a parameter stands behind it, entry by entry."""
        return any(origin.trained for origin in self.origins.values())

    @property
    def writable(self) -> bool:
        """Whether the labels may be written in place: those of parameters and buffers share one number."""
        return not self.origins


def laid_out_like(x: Tensor, labels: Labels) -> Labels:
    """A copy of labels in the memory layout of a tensor, so that every view of it has a view of them."""
    if x.layout != torch.strided:
        return labels.expand(x.shape).clone()
    return torch.empty_like(x, dtype=torch.int64, device="cpu").copy_(labels.expand(x.shape))


class Shadows:
    """The shadow of every tensor, by identity, or by its memory where a tensor was taken past the dispatcher."""

    def __init__(self, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> None:
        self._of: dict[int, Shadow] = {}
        self._at: dict[Any, Shadow] = {}
        nothing = torch.zeros((), dtype=torch.int64)
        for name, tensor in tensors.items():
            self[tensor] = Shadow(tensor, nothing.expand(tensor.shape), {name: Origin.whole(tensor)})
        for x in inputs:
            self[x] = Shadow(x, laid_out_like(x, nothing), live=True)

    def get(self, x: Tensor) -> Shadow | None:
        """The shadow of a tensor that was met before."""
        found = self._of.get(id(x))
        if found is None and (alias := self._at.get(_memory(x))) is not None:
            found = self._of[id(x)] = Shadow(x, alias.labels, alias.origins, alias.live, alias.pending)
        return found

    def __getitem__(self, x: Tensor) -> Shadow:
        found = self.get(x)
        if found is None:
            found = self[x] = Shadow(x, laid_out_like(x, torch.zeros((), dtype=torch.int64)))
        return found

    def __setitem__(self, x: Tensor, shadow: Shadow) -> None:
        self._of[id(x)] = shadow
        if x.numel():
            self._at[_memory(x)] = shadow


def _memory(x: Tensor) -> Any:
    try:
        return x.untyped_storage().data_ptr(), x.storage_offset(), tuple(x.shape), x.stride(), x.dtype
    except (NotImplementedError, RuntimeError):  # no memory of its own: sparse
        return id(x)
