"""Data that can be read once only: found before anything is read of it, as far as one can tell."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from lightning_cf.errors import ContinualError, DataWarning, warn
from lightning_cf.network.forward import attributes, tensors_of
from lightning_cf.tasks.copies import copied, twin_of
from lightning_cf.tasks.reading import flat, several
from lightning_cf.tasks.shared_iterators import gives_back, gives_itself, queue_of, read_by, shared, sought
from lightning_cf.utilities.randomness import isolated_generators, seed_all

_NOTHING = "a second pass over it gives nothing"
_LOOKED_AT = 256
"""How many batches of a copy are read at most to see whether another pass comes after them."""


@dataclass(frozen=True)
class Passes:
    """What is known of the passes over a loader.

    Attributes:
        once: why they give its batches once only; empty if they give them again, as far as one can tell.
        moves: whether a look at its first batch changes what it keeps, or what the next pass gives.
        differ: whether that cannot be told, as it cannot be copied, and two looks gave different batches.
    """

    once: str = ""
    moves: bool = False
    differ: bool = False


def check_passes(loader: Any, what: str, most: int = _LOOKED_AT) -> bool:
    """Whether a loader is to be read in copies, since a look at it changes what the next pass gives.

    Args:
        loader: as for ``reads_once``.
        what: how messages call it.
        most: how many batches of a copy to read at most.

    Raises:
        ContinualError: if it gives its batches once only.
    """
    found = _all_passes(loader, most)
    why = next((each.once for each in found if each.once), "")
    if why:
        raise ContinualError(
            f"{what} gives batches that can be read once only ({why}). They are read again to judge and fold a"
            " partition, and to infer tasks. Give a data set, or an iterable whose every iter() begins anew."
        )
    if any(each.differ for each in found):
        warn(
            f"{what} gives a stream that cannot be copied, and two looks at its first batch gave different ones. If it"
            " goes on where it stood, what is read to trace, judge and fold is not trained on: let every iter() begin"
            " anew. If it draws, draw from torch's or NumPy's own generator.",
            DataWarning,
        )
    return any(each.moves for each in found)


def reads_once(loader: Any, most: int = _LOOKED_AT) -> str:
    """Why a loader gives its batches once only; empty if it gives them again, as far as one can tell.

    Nothing is taken from the loader itself, unless there is no copying it: iterators that its passes would share are
    looked for, and what can be copied is tried on a copy.

    >>> reads_once(iter([1, 2])), reads_once([1, 2])
    ('it is a list_iterator', '')

    Args:
        loader: a DataLoader or any iterable of batches, or several in a list, a mapping or a CombinedLoader.
        most: how many batches of a copy to read at most.
    """
    return next((each.once for each in _all_passes(loader, most) if each.once), "")


def _all_passes(loader: Any, most: int) -> list[Passes]:
    return [_passes(each, most) for each in (flat(loader) if several(loader) else [loader])]


def _passes(loader: Any, most: int) -> Passes:
    if isinstance(loader, (list, tuple)):
        return Passes()
    if not isinstance(loader, DataLoader):
        why = shared(loader)
        return Passes(why) if why else _tried(loader, loader, most)
    for sampler in (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)):
        why = "" if sampler is None else shared(sampler)
        if why:
            return Passes(f"of its {type(loader).__name__}'s sampler {why}")
    if not isinstance(loader.dataset, IterableDataset):
        return Passes()
    if loader.num_workers:  # processes of their own get the data set as it was before any pass, but share queues
        return Passes(queue_of(loader.dataset, processes=True))
    why = shared(loader.dataset)
    return Passes(why) if why else _tried(loader, loader.dataset, most)


def _tried(loader: Any, source: Any, most: int) -> Passes:
    """Tries on a copy whether a second pass comes, and whether a pass that is broken off leaves less to the next."""
    if gives_back(source):
        return Passes(moves=True)
    try:
        twin, fresh = twin_of(loader), twin_of(loader)
        if twin is None:
            return _looked_at(loader, source)
        with isolated_generators():
            of_twin = twin if loader is source else twin.dataset
            before = _state(of_twin)
            first = _begun(twin)
            if first is None:
                return Passes()
            moves = before != _state(of_twin)
            why = _broken_off(twin, fresh, most) if moves else ""
            second = _begun(twin)
            if why or second is None:
                return Passes(why or _NOTHING)
            if _alike(first, second):
                return Passes(moves=moves)
            nothing = _count(twin, most) <= most and next(iter(twin), None) is None
    except Exception:  # whatever the user's data raises on a copy
        return Passes()
    return Passes(_NOTHING) if nothing else Passes(moves=True)


def _looked_at(loader: Any, source: Any) -> Passes:
    """What is known of passes over what cannot be copied: by its class, else by two looks at its first batch."""
    kind = type(source)
    if gives_itself(kind):
        return Passes(f"{kind.__name__}.__iter__ gives the object as it stands")
    for name, value in read_by(source):
        if gives_itself(type(value)) and copied(value) is None and not sought(source, value):
            return Passes(f"{kind.__name__}.{name} is a {type(value).__name__}, which all passes go on with")
    with isolated_generators():
        first, second = _begun(loader), _begun(loader)
    return Passes(_NOTHING if second is None is not first else "", differ=not _alike(first, second))


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
    seed_all(0)
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


def _alike(one: Any, other: Any) -> bool:
    """Whether two batches are the same."""
    if isinstance(one, Sequence) and isinstance(other, Sequence) and len(one) != len(other):
        return False
    a, b = _parts(one), _parts(other)
    return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))


def _parts(batch: Any) -> list[Any]:
    """What is in a batch, of its objects the tensors."""
    return [*tensors_of(batch), *(x for x in tree_leaves(batch) if not isinstance(x, Tensor) and not attributes(x))]


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.shape == y.shape and bool((x == y).all())
    return bool(np.all(x == y))
