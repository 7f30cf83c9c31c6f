"""One operation that ran, and what a rule may ask of the tracer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_cf.network.structure import Role, module_at
from lightning_cf.network.tracing.labels import Units
from lightning_cf.network.tracing.shadows import Shadows

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """One operation that ran.

    Attributes:
        func: the operator.
        args: its positional arguments.
        kwargs: its keywords.
        given: all arguments by their names in the operator's schema, defaults included.
        tensors: every tensor among them.
        results: every tensor that it returned.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: Mapping[str, Any]
    tensors: list[Tensor]
    results: list[Tensor]

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Call:
        """A call as a dispatch mode sees it, with its arguments by the names of the operator's schema."""
        given = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        given |= dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        return cls(func, args, kwargs, given, tensors, [x for x in tree_leaves(out) if isinstance(x, Tensor)])

    @property
    def name(self) -> str:
        """The operator's name without its overload, such as ``aten.add``, for messages."""
        return str(self.func.overloadpacket)

    @property
    def written(self) -> list[Tensor]:
        """The arguments that the operation writes to."""
        arguments = self.func._schema.arguments
        given = [self.given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        return [x for x in given if isinstance(x, Tensor)]

    @property
    def shape_makers(self) -> list[Tensor]:
        """The arguments whose values decide how large the result of an operation is."""
        if self.func.overloadpacket is aten.index:
            return [x for x in self.given["indices"] if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
        deciding = [self.given[name] for name in ("mask", "repeats") if isinstance(self.given.get(name), Tensor)]
        return deciding or self.tensors

    def in_place(self, x: Tensor) -> bool:
        """Whether a result is one of the arguments."""
        return any(x is tensor for tensor in self.tensors)

    def run(self, change: Callable[[Tensor], Tensor], fixed: Sequence[Tensor] = ()) -> list[Tensor]:
        """Runs the operation on changed tensors; those in ``fixed`` stay."""

        def value(x: Tensor) -> Tensor:
            return x if any(x is tensor for tensor in fixed) else change(x)

        args, kwargs = tree_map_only(Tensor, value, (self.args, self.kwargs))
        if self.func.overloadpacket is aten._to_copy:
            return [args[0].clone()]
        if self.func.overloadpacket is aten.constant_pad_nd:
            args = args[:2]
        return [x for x in tree_leaves(self.func(*args, **kwargs)) if isinstance(x, Tensor)]


def named(func: Any, path: str) -> str:
    """An operation and the module that runs it, as messages call them."""
    return f"'{func.overloadpacket}' in {module_at(path)}"


@runtime_checkable
class Tracer(Protocol):
    """What a rule may ask of the tracer."""

    apart: bool
    shadows: Shadows

    @property
    def units(self) -> Units:
        """Which labels are one: those of units that must share one fate."""
        ...

    @property
    def norms(self) -> dict[str, Tensor]:
        """For modules by path, labels of the elements that each normalises together."""
        ...

    @property
    def path(self) -> str:
        """Path of the innermost module that runs now."""
        ...

    def labels(self, x: Tensor) -> Tensor:
        """Unit labels of an activation, one an element, ``NO_LABEL`` where no unit computed it."""
        ...

    def is_weight(self, x: Any) -> bool:
        """Whether ``x`` is made from parameters alone, entry by entry."""
        ...

    def is_constant(self, x: Tensor) -> bool:
        """Whether ``x`` depends on neither the input nor on anything that trains."""
        ...

    def write(self, out: Tensor, labels: Tensor, *, live: bool = True) -> None:
        """Puts labels beside a result; ``live`` says whether the result depends on the network's input."""
        ...

    def use(self, x: Tensor | None, role: Role, target: Tensor, source: Tensor | None = None) -> None:
        """Notes what the entries of a parameter write to and read."""
        ...

    def mix(self, x: Tensor, dims: Sequence[int], operation: str, *, unknown: bool = False) -> Tensor:
        """Unites the units of ``x`` along dims, which keep size one, and notes the operation that did it."""
        ...

    def mix_later(self, x: Tensor, result: Tensor, dims: Sequence[int], operation: str, *, final: bool = False) -> None:
        """Unites them when a later operation reads ``result``; with ``final`` also where the network returns it."""
        ...

    def by_slices(self, shape: tuple[int, ...]) -> bool:
        """Whether a norm over slices of this shape takes each for one unit; asked where they are of different units."""
        ...

    def own(self, x: Tensor) -> None:
        """Gives a constant that is written to labels of its own."""
        ...

    def read(self, x: Tensor, operation: str) -> None:
        """Notes that a value became a number in Python, where what is done with it cannot be seen."""
        ...


Rule = Callable[[Any, Call], None]
