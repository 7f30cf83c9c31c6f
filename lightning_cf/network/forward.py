"""How a network is run without a trace of it being left: in eval mode, on a few samples, its tensors by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

Forward = Callable[[nn.Module, Any], Any]
"""Runs a network on an example."""


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tensor that is shared appears once, under its first name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module into eval mode, and afterwards every submodule back into its own mode.

    Meanwhile nothing runs compiled: compiled code does not look whether hooks came or went. Nothing is logged, and
    ``torch.distributions`` do not look at their arguments, which would be numbers read into Python.
    """
    modes = {child: child.training for child in module.modules()}
    if any(modes.values()):
        module.eval()
    try:
        with torch.compiler.set_stance("force_eager"), _unlogged(modes), _unvalidated():
            yield
    finally:
        for child, training in modes.items():
            if child.training != training:
                child.training = training


@contextmanager
def _unlogged(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Meanwhile ``self.log`` of Lightning's modules does nothing: a pass of ours is none of the user's loop."""
    logs = {child: child.__dict__.get("log") for child in modules if "_current_fx_name" in child.__dict__}
    for child in logs:
        child.__dict__["log"] = _nothing
    try:
        yield
    finally:
        for child, own in logs.items():
            child.__dict__.pop("log", None)
            if own is not None:
                child.__dict__["log"] = own


@contextmanager
def _unvalidated() -> Iterator[None]:
    """Meanwhile ``torch.distributions`` check arguments only where they are told to."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _nothing(*_: Any, **__: Any) -> None:
    pass


class Derived:
    """What the class of a module has beside its own where we derived it from the user's: it computes otherwise."""

    plain: type[nn.Module]
    """The class that it was derived from."""


@contextmanager
def plain_forms(module: nn.Module) -> Iterator[None]:
    """Meanwhile every module computes as the user wrote it, whatever class we derived from its own."""
    derived = {child: type(child) for child in module.modules() if isinstance(child, Derived)}
    for child, ours in derived.items():
        object.__setattr__(child, "__class__", ours.plain)
    try:
        yield
    finally:
        for child, ours in derived.items():
            object.__setattr__(child, "__class__", ours)


@contextmanager
def same_state(module: nn.Module) -> Iterator[None]:
    """Puts back afterwards what forward passes meanwhile wrote: buffers, and plain attributes that go with them.

    A flag, a count or a size may say that a buffer was built (``if not self.ready: ...``); one without the other would
    leave a network that never builds it.
    """
    plain = {child: plain_attributes(child) for child in module.modules()}
    kept = {child: dict(child._buffers.items()) for child in module.modules()}
    values = [
        (x, x.detach().clone()) for own in kept.values() for x in own.values() if x is not None and not is_lazy(x)
    ]
    try:
        yield
    finally:
        for child, own in kept.items():
            for name in dict(child._buffers.items()).keys() - own.keys():
                del child._buffers[name]
            for name, x in own.items():
                if x is None or not is_lazy(x):
                    child._buffers[name] = x
        for x, old in values:
            if not torch.equal(x, old):
                x.detach().copy_(old)
        for child, before in plain.items():
            for name in plain_attributes(child).keys() - before.keys():
                del child.__dict__[name]
            child.__dict__.update(before)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module's own that are numbers, texts or nothing."""
    return {name: x for name, x in vars(module).items() if x is None or isinstance(x, (bool, int, float, str))}


def fresh(batch: Any, own: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    """A batch in containers and tensors of its own: what runs on it may pop from the ones and write into the others.

    >>> batch = {"x": torch.zeros(2), "labels": torch.ones(2)}
    >>> run = fresh(batch)
    >>> run.pop("labels").add_(1), batch["labels"]
    (tensor([2., 2.]), tensor([1., 1.]))

    Args:
        batch: any nesting of lists, tuples and mappings, such as dicts, those of other libraries and graphs, and of
            objects, such as dataclasses, whose attributes are copied.
        own: gives what stands in a tensor's place.
    """
    seen: dict[int, tuple[Any, Any]] = {}  # objects, with what stands in their place: one may lead back to itself

    def apart(x: Any) -> Any:
        if isinstance(x, Tensor):
            return own(x)
        if id(x) in seen:
            return seen[id(x)][1]
        named = callable(getattr(x, "keys", None)) and hasattr(x, "__setitem__")
        has = [] if named or hasattr(x, "__copy__") else attributes(x)
        twin = _copied(x) if has else copy.copy(x) if named or isinstance(x, list) or hasattr(x, "__copy__") else x
        if named or (has and twin is not x):
            seen[id(x)] = x, twin
        for key in list(x.keys()) if named else range(len(x)) if isinstance(x, list) else ():
            twin[key] = tree_map(apart, x[key])
        for name in has if twin is not x else ():
            object.__setattr__(twin, name, tree_map(apart, getattr(x, name)))
        return twin

    return tree_map(apart, batch)


def _copied(x: Any) -> Any:
    """A copy of an object, or the object itself where it takes none, as one that holds a lock or a file may not."""
    try:
        return copy.copy(x)
    except Exception:
        return x


def attributes(x: Any) -> list[str]:
    """The names of what an object keeps that is a batch or a part of one: of a dataclass, and of what has ``to``."""
    if is_dataclass(x) and not isinstance(x, type):
        return [field.name for field in fields(x) if hasattr(x, field.name)]
    moves = callable(getattr(x, "to", None)) and not isinstance(x, (Tensor, nn.Module, type))
    return list(vars(x)) if type(x) is SimpleNamespace or (moves and hasattr(x, "__dict__")) else []


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors of a batch, in order, also those that its objects keep."""
    found = list[Tensor]()

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    fresh(batch, note)
    return found


def call(module: nn.Module, example: Any) -> Any:
    """``module(example)``, or ``module(*example)`` for a tuple."""
    return module(*example) if isinstance(example, tuple) else module(example)


@dataclass(frozen=True)
class Example:
    """How many inputs the example had that a network was traced with, and how they were nested.

    Attributes:
        inputs: a tuple of these where there are several; else "one", or "any" for a list, whose length may vary.
        called: whether the network was called with it, not run by a function that says how.
    """

    inputs: tuple[Any, ...] | str
    called: bool

    @classmethod
    def of(cls, example: Any, forward: Forward) -> Example:
        """What is to be remembered of an example, which ``forward`` runs the network on."""
        inputs, called = _nesting(example), forward is call
        alone = called and isinstance(inputs, tuple) and len(inputs) == 1
        return cls(inputs[0] if alone else inputs, called)

    @property
    def count(self) -> int:
        """How many inputs there are."""
        return len(self.inputs) if isinstance(self.inputs, tuple) else 1

    def like(self, x: Any) -> Any:
        """``x``, nested as the example was though a loader made lists of its tuples; None where it is not so nested."""
        return _nested(x, self.inputs) if _fits(x, self.inputs) else None


def _nesting(x: Any) -> tuple[Any, ...] | str:
    if isinstance(x, tuple):
        return tuple(_nesting(part) for part in x)
    return "any" if isinstance(x, list) else "one"


def _fits(x: Any, inputs: tuple[Any, ...] | str) -> bool:
    several = isinstance(x, (tuple, list))
    if isinstance(inputs, tuple):
        return several and len(x) == len(inputs) and all(map(_fits, x, inputs))
    return inputs == "any" or not several


def _nested(x: Any, inputs: tuple[Any, ...] | str) -> Any:
    plain = isinstance(inputs, tuple) and type(x) in (tuple, list)
    return tuple(map(_nested, x, inputs)) if plain else x


def in_precision_of(module: nn.Module, batch: Any) -> Any:
    """A batch with its floating-point tensors in the precision of the module's parameters."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)

    def convert(x: Tensor) -> Tensor:
        return x.to(dtype) if dtype is not None and x.is_floating_point() else x

    return fresh(batch, convert)


def samples(module: nn.Module, example: Any, count: int, start: int = 0) -> Any:
    """Some samples of a batch, on the module's device; tensors of another length than the first stay whole.

    So do objects, whose tensors may be of nodes and edges.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    example = in_precision_of(module, example)
    batch = next((len(x) for x in tree_leaves(example) if isinstance(x, Tensor) and x.ndim), None)

    def cut(x: Tensor) -> Tensor:
        if x.ndim and len(x) == batch:
            some = torch.arange(start, min(start + count, len(x)), device=x.device)
            x = x.index_select(0, some) if x.is_sparse else x[start : start + count]
        return x.detach().to(device)

    return tree_map_only(Tensor, cut, example)
