"""What tensors of a network held at one moment: kept, compared, put back. One way, whoever needs it.

:class:`KeptEntries` keeps some entries of one tensor, :class:`Snapshot` all of a network; :func:`values_kept` and
:func:`replaced` are contexts after which all is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_cf.network.forward import named_tensors


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are bitwise equal, but for the bits of NaN.

    >>> same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan])), same_bits(torch.ones(1), torch.ones(2))
    (True, False)
    """
    if a.shape != b.shape:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


class KeptEntries:
    """Some entries of one tensor, remembered as they were: all of it, rows along an axis, or any mask; rows cost least.

    >>> weight = torch.zeros(2, 2)
    >>> entries = KeptEntries(weight, torch.tensor([[True], [False]]))
    >>> entries.save()
    >>> _ = weight.fill_(1.0)
    >>> entries.moved()
    True
    >>> entries.restore()
    >>> weight.tolist()
    [[0.0, 0.0], [1.0, 1.0]]

    Args:
        parameter: the tensor, in place; its device is followed.
        mask: which entries; broadcasts to the tensor.
    """

    saved: Shaped[Tensor, "..."]

    def __init__(self, parameter: Tensor, mask: Bool[Tensor, "..."]) -> None:
        self.parameter = parameter
        self.saved = parameter.detach()[:0] if parameter.ndim else parameter.detach()
        self.axis = 0
        self.index: Tensor | None = None
        self.mask: Tensor | None = None
        mask = _lean(mask.reshape((1,) * (parameter.ndim - mask.ndim) + mask.shape))
        self.broadcast = mask
        wide = [axis for axis, size in enumerate(mask.shape) if size > 1]
        if not bool(mask.all()):
            if len(wide) == 1:
                self.axis, self.index = wide[0], mask.flatten().nonzero().flatten().to(parameter.device)
            else:
                self.mask = mask.to(parameter.device)

    def follow(self) -> None:
        """Goes where the parameter is: a Trainer takes a module off its GPU before the last hooks of a fit run."""
        device = self.parameter.device
        self.index = None if self.index is None else self.index.to(device)
        self.mask = None if self.mask is None else self.mask.to(device)
        self.saved = self.saved.to(device)

    def fill_zero(self, tensor: Tensor) -> None:
        """Fills these entries of a tensor of the parameter's shape with zero."""
        if self.index is not None:
            tensor.index_fill_(self.axis, self.index, 0)
        elif self.mask is not None:
            tensor.masked_fill_(self.mask, 0)
        else:
            tensor.zero_()

    def zero_gradient(self, parameter: Tensor) -> None:
        """Fills these entries of the gradient with zero."""
        if parameter.grad is None:
            return
        if parameter.grad.is_sparse:
            gradient = parameter.grad.coalesce()
            there = self.broadcast.to(gradient.device).expand(parameter.shape)[tuple(gradient.indices())]
            gradient.values().masked_fill_(there, 0)
            parameter.grad = gradient
        else:
            self.fill_zero(parameter.grad)

    def save(self) -> None:
        """Remembers them as they are now."""
        self.saved = self.now()

    def now(self) -> Shaped[Tensor, "..."]:
        """A copy of them, as :meth:`restore` takes it."""
        self.follow()
        data = self.parameter.detach()
        return data.clone() if self.index is None else data.index_select(self.axis, self.index)

    def moved(self) -> bool:
        """Whether some of them are not what they were, bit for bit."""
        self.follow()
        data = self.parameter.detach()
        if self.mask is not None:
            there = self.mask.expand(data.shape)
            return not same_bits(data[there], self.saved[there])
        return not same_bits(data if self.index is None else data.index_select(self.axis, self.index), self.saved)

    @torch.no_grad()
    def restore(self, values: Shaped[Tensor, "..."] | None = None) -> None:
        """Puts them back, or other values in their place."""
        self.follow()
        values = (self.saved if values is None else values).to(self.parameter.dtype)
        if self.index is not None:
            self.parameter.index_copy_(self.axis, self.index, values)
        elif self.mask is not None:
            torch.where(self.mask, values, self.parameter, out=self.parameter)
        else:
            self.parameter.copy_(values)


def _lean(mask: Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """The same mask along one axis alone, where it does not vary along the others: rows, say, of a whole matrix.

    >>> _lean(torch.tensor([[True, True], [False, False]])).tolist()
    [[True], [False]]
    """
    wide = [axis for axis, size in enumerate(mask.shape) if size > 1]
    for axis in wide if len(wide) > 1 else ():
        rows = mask.all(dim=[other for other in wide if other != axis], keepdim=True)
        if torch.equal(rows.expand_as(mask), mask):
            return rows
    return mask


@dataclass(frozen=True)
class Snapshot:
    """A network's numbers at one moment, in the CPU's memory.

    Attributes:
        values: parameters and buffers by name.
    """

    values: Mapping[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> Snapshot:
        """Copies all parameters and buffers of a network as they are now; lazy ones have no numbers yet."""
        tensors = named_tensors(module).items()
        return cls({name: x.detach().to("cpu", copy=True) for name, x in tensors if not is_lazy(x)})

    @torch.no_grad()
    def put_back(self, module: nn.Module) -> None:
        """Copies the numbers back into the network, in place; tensors that are new or of another shape stay."""
        for name, tensor in named_tensors(module).items():
            kept = self.values.get(name)
            if kept is not None and kept.shape == tensor.shape:
                tensor.copy_(kept)


@contextmanager
def values_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Afterwards these tensors hold, bit for bit, what they held before, whatever was written into them meanwhile."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, values in kept:
            tensor.detach().copy_(values)


@contextmanager
def replaced(tensor: Tensor, mask: Bool[Tensor, "..."], values: Callable[[torch.Size], Tensor]) -> Iterator[None]:
    """Some entries of a tensor with other values, meanwhile.

    Args:
        tensor: in place.
        mask: which entries; broadcasts to the tensor. One that varies along a single axis costs no more memory than
            the entries themselves.
        values: gives new ones of the shape of the old ones, however they are laid out.
    """
    entries = KeptEntries(tensor, mask)
    entries.save()
    if entries.mask is None:
        entries.restore(values(entries.saved.shape).to(entries.saved))
    else:
        there, others = entries.mask.expand(tensor.shape), entries.now()
        others[there] = values(others[there].shape).to(others)
        entries.restore(others)
    try:
        yield
    finally:
        entries.restore()
