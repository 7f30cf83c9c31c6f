"""Data that can be read once only: found before anything is read of it, as far as one can tell."""

from __future__ import annotations

import copy
import dis
import io
import itertools
import operator
import random
import types
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_cf.tasks.reading import flat, several
from lightning_cf.utilities.randomness import isolated_generators, seed_torch

_ENDLESS = (itertools.count, itertools.cycle, itertools.repeat)
_NOTHING = "a second pass over it gives nothing"
_LOOKED_AT = 256
"""How many batches of a copy are read at most to see whether another pass comes after them."""


def reads_once(loader: Any, most: int = _LOOKED_AT) -> str:
    """Why a loader gives its batches once only; empty if it gives them again, as far as one can tell.

    Nothing is taken from the loader itself: iterators that its passes would share are looked for, and what can be
    copied is tried on a copy.

    >>> reads_once(iter([1, 2])), reads_once([1, 2])
    ('it is a list_iterator', '')

    Args:
        loader: a DataLoader or any iterable of batches, or several in a list, a mapping or a CombinedLoader.
        most: how many batches of a copy to read at most.
    """
    if several(loader):
        return next((why for why in map(reads_once, flat(loader)) if why), "")
    if isinstance(loader, (list, tuple)):
        return ""
    if not isinstance(loader, DataLoader):
        return _shared(loader) or _tried(loader, loader, most)
    for sampler in (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)):
        why = "" if sampler is None else _shared(sampler)
        if why:
            return f"of its {type(loader).__name__}'s sampler {why}"
    if not isinstance(loader.dataset, IterableDataset) or loader.num_workers:
        return ""  # processes of their own get the data set as it was before any pass
    return _shared(loader.dataset) or _tried(loader, loader.dataset, most)


def _shared(source: Any) -> str:
    """An iterator that all passes over an object would go on with."""
    kind = type(source).__name__
    if _is_iterator(source):
        return f"it is a {kind}"
    used, stored = _names(type(source))
    for name, value in {**_closure(type(source)), **getattr(source, "__dict__", {})}.items():
        if name not in used or name in stored:
            continue
        values = [value, *(value if isinstance(value, (list, tuple)) and len(value) < 100 else ())]
        live = next((x for x in values if _is_live(x)), None)
        if live is not None and not (isinstance(live, io.IOBase) and "seek" in used):
            return f"{kind}.{name} is a {type(live).__name__}, which all passes go on with"
    return ""


def _is_iterator(value: Any) -> bool:
    """Whether it is an iterator that is not made in Python, such as a generator: these never start again."""
    python = isinstance(getattr(type(value), "__iter__", None), types.FunctionType)
    return isinstance(value, Iterator) and not isinstance(value, _ENDLESS) and not python


def _gives_itself(kind: type) -> bool:
    """Whether ``__iter__`` says ``return self`` and nothing else: no pass over such an object begins anew."""
    function = getattr(kind, "__iter__", None)
    if not isinstance(function, types.FunctionType) or not hasattr(kind, "__next__"):
        return False
    steps = [step for step in dis.get_instructions(function.__code__) if step.opname not in ("RESUME", "NOP")]
    given = [step.argval for step in steps if step.opname.startswith("LOAD_FAST")]
    return len(steps) == 2 and given == list(function.__code__.co_varnames[:1])


def _is_live(value: Any) -> bool:
    if not _is_iterator(value):
        return False
    if isinstance(value, types.GeneratorType):
        return value.gi_frame is not None  # else it came to its end, and nothing can wait for more of it
    return operator.length_hint(value, 1) > 0


def _names(kind: type) -> tuple[set[str], set[str]]:
    """The names that a class' passes read, and the attributes that they set."""
    said = [_said(function.__code__) for function in _functions(kind)]
    return {name for used, _ in said for name in used}, {name for _, stored in said for name in stored}


@lru_cache(maxsize=256)
def _said(code: types.CodeType) -> tuple[set[str], set[str]]:
    """The names that code reads, and the attributes that it sets."""
    steps = list(dis.get_instructions(code))
    stored = {step.argval for step in steps if step.opname == "STORE_ATTR"}
    return {s.argval for s in steps if s.opname != "STORE_ATTR" and isinstance(s.argval, str)}, stored


def _functions(kind: type) -> list[types.FunctionType]:
    """What a pass runs, as far as it is of the class itself."""
    found: dict[str, types.FunctionType] = {}
    waiting = ["__iter__", "__next__"]
    while waiting:
        function = getattr(kind, waiting.pop(), None)
        if isinstance(function, types.FunctionType) and function.__qualname__ not in found:
            found[function.__qualname__] = function
            waiting += [name for name in function.__code__.co_names if not name.startswith("__")]
    return list(found.values())


def _closure(kind: type) -> dict[str, Any]:
    """What the passes of a class see around it."""
    found = {}
    for function in _functions(kind):
        for name in function.__code__.co_names:
            if name in function.__globals__:
                found[name] = function.__globals__[name]
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            found[name] = cell.cell_contents if cell != types.CellType() else None
    return found


def _tried(loader: Any, source: Any, most: int) -> str:
    """Tries on a copy whether a second pass comes; empty where there is no copying it."""
    try:
        twin, fresh = _twin(loader, source), _twin(loader, source)
        if twin is None:
            kind = type(source)
            return f"{kind.__name__}.__iter__ gives the object as it stands" if _gives_itself(kind) else ""
        with isolated_generators():
            of_twin = twin if loader is source else twin.dataset
            before = _state(of_twin)
            first = _begun(twin)
            if first is None:
                return ""
            why = "" if before == _state(of_twin) else _broken_off(twin, fresh, most)
            second = _begun(twin)
            if why or second is None:
                return why or _NOTHING
            if _alike(first, second):
                return ""
            nothing = _count(twin, most) <= most and next(iter(twin), None) is None
    except Exception:  # whatever the user's data raises on a copy
        return ""
    return _NOTHING if nothing else ""


def _broken_off(begun: Any, fresh: Any, most: int) -> str:
    """Tries whether a pass that is broken off after one batch leaves less to the next one.

    Args:
        begun: a copy, a pass over which was broken off.
        fresh: one that is as it was.
        most: how many batches are counted as such; more are all the same.
    """
    whole, left = _count(fresh, most), _count(begun, most)
    if left == 0:
        return _NOTHING
    if left < whole == _count(fresh, most):
        return (
            f"after a pass that is broken off, such as a look at its first batch, the next one gives {left} of {whole}"
        )
    return ""


def _begun(loader: Iterable[Any]) -> Any:
    """The first batch of a pass, with the same random numbers for each."""
    return next(_started(loader), None)


def _count(loader: Iterable[Any], most: int) -> int:
    """How many batches a pass gives, with the same random numbers for each."""
    return sum(1 for _ in itertools.islice(_started(loader), most + 1))  # to the end, which may set it back


def _started(loader: Iterable[Any]) -> Iterator[Any]:
    seed_torch(0)
    np.random.seed(0)
    random.seed(0)
    return iter(loader)


def _state(source: Any, depth: int = 3) -> list[Any]:
    """What an object and those that it holds keep, as far as a pass could change it: to be compared later."""
    found = list[Any]()
    for leaf in tree_leaves(getattr(source, "__dict__", {})):
        held = depth and not isinstance(leaf, (Tensor, nn.Module, type, types.FunctionType))
        inner = _state(leaf, depth - 1) if held and hasattr(leaf, "__dict__") else []
        found += [*inner, leaf if isinstance(leaf, (int, float, str, bool)) else _Same(leaf)]
    return found


class _Same:
    """Equal to what is the same object, unless that is an iterator, which says nothing of where it stands."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value and not isinstance(self.value, Iterator)

    __hash__ = None  # type: ignore[assignment]


def _twin(loader: Any, source: Any) -> Any:
    """The loader over a copy of its source; None where there is no copying it."""
    twin = _copied(source)
    if twin is None or loader is source:
        return twin
    loader = copy.copy(loader)
    loader.__dict__["dataset"], loader.__dict__["_iterator"] = twin, None
    return loader


def _copied(source: Any) -> Any:
    """A copy that shares what passes only read, such as arrays; None where there is no copying it."""
    values = list(getattr(source, "__dict__", {}).values())
    values += [x for value in values if isinstance(value, (list, tuple)) for x in value]
    values += [x for value in values if isinstance(value, dict) for x in value.values()]
    kept = (Tensor, np.ndarray, nn.Module)
    plain = [x for x in values if isinstance(x, kept) or (isinstance(x, Dataset) and hasattr(x, "__getitem__"))]
    try:
        return copy.deepcopy(source, {id(x): x for x in plain})
    except Exception:  # files, sockets and generators
        return None


def _alike(one: Any, other: Any) -> bool:
    """Whether two batches are the same."""
    if isinstance(one, Sequence) and isinstance(other, Sequence) and len(one) != len(other):
        return False
    a, b = tree_leaves(one), tree_leaves(other)
    return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.shape == y.shape and bool((x == y).all())
    return bool(np.all(x == y))
