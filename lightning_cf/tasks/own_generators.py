"""Random generators of the user's own, such as a loader's: like the global ones, they begin anew with each phase."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_cf.utilities.randomness import derive_seed

DEPTH = 8
"""How far from a task's data generators are looked for: module, loader, sampler, data set, transform, list of these."""

FEW = 64
"""A longer list holds samples, not parts of a pipeline."""

MOST = 10_000
"""So many objects are looked at, at most."""

_NONE = (str, bytes, int, float, type, ModuleType, Tensor, np.ndarray)
"""What holds no generator that data are drawn from."""

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


class OwnGenerators:
    """The generators that some objects hold; the global ones are none of them.

    A run that goes on after a kill makes its data anew, so a generator that went on from phase to phase would draw
    otherwise than in a run that was not stopped.

    Args:
        holders: such as tasks and the network.
    """

    def __init__(self, holders: Iterable[Any]) -> None:
        self.holders = list(holders)
        self.keys: dict[int, tuple[Generator, str]] = {}

    @contextmanager
    def seeded(self, *key: int | str) -> Iterator[None]:
        """Each draws what depends on its own seed and the key alone; afterwards it is as it was."""
        with ExitStack() as stack:
            for generator in _found(self.holders):
                with suppress(Exception):  # what has no state, or none that can be set, such as the system's
                    _, own = self.keys.setdefault(id(generator), (generator, _seed_of(generator)))
                    stack.callback(_reseeded(generator, derive_seed(own, *key)))
            yield


def _found(holders: list[Any]) -> list[Generator]:
    """Every generator that can be reached from some objects."""
    found, seen = list[Generator](), dict[int, Any]()

    def look(x: Any, depth: int) -> None:
        with suppress(Exception):  # whatever an object raises that is looked at, such as a weak reference to nothing
            if id(x) in seen or depth > DEPTH or len(seen) > MOST or isinstance(x, _NONE):
                return
            seen[id(x)] = x  # held, so that no other object gets its number
            if isinstance(x, Generator):
                if not _is_global(x):
                    found.append(x)
                return
            for part in _parts(x):
                look(part, depth + 1)

    for holder in holders:
        look(holder, 0)
    return found


def _parts(x: Any) -> list[Any]:
    """What an object consists of, as far as it may lead to a generator and costs nothing to look at."""
    if isinstance(x, dict):
        return list(x.values()) if type(x).values is dict.values and len(x) <= FEW else []
    for kind in (list, tuple, set, frozenset):
        if isinstance(x, kind):
            return list(x) if type(x).__iter__ is kind.__iter__ and len(x) <= FEW else []
    if isinstance(x, partial):
        return [x.func, *x.args, *x.keywords.values()]
    if isinstance(x, MethodType):
        return [x.__self__]
    if isinstance(x, FunctionType):
        return [*map(_within, x.__closure__ or ()), *(x.__defaults__ or ())]
    if isinstance(x, nn.Module):
        return [value for part in x.modules() for name, value in vars(part).items() if name not in _OF_MODULES]
    return [part for name, part in getattr(x, "__dict__", {}).items() if name not in ("trainer", "_trainer")]


_OF_MODULES = {*vars(nn.Module()), "_trainer", "_fabric"}
"""What every module has."""


def _within(cell: CellType) -> Any:
    """What a closure's cell holds; nothing where it is still empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _is_global(x: Generator) -> bool:
    """Whether a generator is one of those that whole programs share."""
    shared = (torch.default_generator, np.random.mtrand._rand, getattr(random, "_inst", None))
    return any(x is each for each in shared)


def _seed_of(generator: Generator) -> str:
    """What a generator was seeded with, whatever was drawn since; its state, where that is not kept."""
    if isinstance(generator, torch.Generator):
        return f"torch {generator.initial_seed()}"
    if isinstance(generator, np.random.Generator):
        sequence: Any = getattr(generator.bit_generator, "seed_seq", None)
        if hasattr(sequence, "generate_state"):
            return f"numpy {sequence.generate_state(4).tolist()}"
    state = generator.get_state() if isinstance(generator, np.random.RandomState) else _state(generator)
    return hashlib.sha256(repr(state).encode()).hexdigest()


def _state(generator: np.random.Generator | random.Random) -> Any:
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def _reseeded(generator: Generator, seed: int) -> Callable[[], Any]:
    """Seeds a generator; gives what puts it back."""
    if isinstance(generator, torch.Generator):
        before = generator.get_state()
        generator.manual_seed(seed)
        return lambda: generator.set_state(before)
    if isinstance(generator, np.random.RandomState):
        legacy = generator.get_state()
        generator.seed(seed % 2**32)
        return lambda: generator.set_state(legacy)
    state = _state(generator)
    if isinstance(generator, random.Random):
        generator.seed(seed)
        return lambda: generator.setstate(state)
    fresh = type(generator.bit_generator)(seed)
    generator.bit_generator.state = fresh.state
    return lambda: setattr(generator.bit_generator, "state", state)
