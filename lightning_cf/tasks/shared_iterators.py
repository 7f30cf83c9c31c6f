"""What all passes over an object go on with, found by a look at its class and at what it holds: nothing is read."""

from __future__ import annotations

import csv
import dis
import gc
import io
import itertools
import operator
import types
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

_ENDLESS = (itertools.count, itertools.cycle, itertools.repeat)

_FOLLOWS = (type(csv.reader([])), csv.DictReader, map, zip, enumerate, filter)
"""What goes through another iterator and, after its end, on with what that gives then."""

_TAKES, _PUTS = ("get", "get_nowait"), ("put", "put_nowait")

_FILLS = frozenset((*_PUTS, "send", "sendall", "connect"))
"""What a pass calls that fills a queue, or asks for what it reads, by itself."""

_LOADS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_DEREF", "LOAD_CONST")


def shared(source: Any, depth: int = 4) -> str:
    """An iterator or a queue that all passes over an object, or over a stream that it holds, would go on with."""
    kind = type(source).__name__
    if _is_iterator(source):
        return f"it is a {kind}"
    for name, value in read_by(source):
        live = next((x for x in _and_items(value) if _is_live(x)), None)
        cursor = hasattr(live, "execute") and _asks(type(source), name, "execute")
        if live is not None and not cursor and not sought(source, live):
            return f"{kind}.{name} is a {type(live).__name__}, which all passes go on with"
        held = [x.dataset if isinstance(x, DataLoader) and not x.num_workers else x for x in _and_items(value)]
        within = [x for x in held if isinstance(x, IterableDataset) and x is not source] if depth else []
        why = next((why for why in (shared(x, depth - 1) for x in within) if why), "")
        if why:
            return why
    return queue_of(source)


def queue_of(source: Any, *, processes: bool = False) -> str:
    """A queue or a connection that the passes over an object empty, and do not fill by themselves; empty for none.

    Args:
        source: a data set or another iterable.
        processes: whether other processes read it, which have queues of this one as copies.
    """
    used = _names(type(source))[0]
    for name, value in () if used & _FILLS else read_by(source):
        own = processes and type(value).__module__ in ("queue", "_queue")
        queue = not own and _asks(type(source), name, *_TAKES) and _holds_samples(value)
        if queue or (_asks(type(source), name, "recv") and hasattr(value, "recv")):
            kind = type(value).__name__
            return f"{type(source).__name__}.{name} is a {kind}, whose samples are gone once they are read"
    return ""


def gives_back(source: Any, depth: int = 4) -> bool:
    """Whether passes take from a queue and put back what they took, such as buffers, at the next step only.

    One that is broken off keeps what it took; where nothing is left, the next one would wait for ever.
    """
    for name, value in read_by(source):
        if _asks(type(source), name, *_TAKES) and _asks(type(source), name, *_PUTS) and _holds_samples(value):
            return True
        held = [x.dataset if isinstance(x, DataLoader) else x for x in _and_items(value)]
        if depth and any(gives_back(x, depth - 1) for x in held if isinstance(x, IterableDataset) and x is not source):
            return True
    return False


def _holds_samples(value: Any) -> bool:
    """Whether something is a queue, of threads, processes or another library, in which there is something."""
    try:
        return all(hasattr(value, method) for method in ("get", "put", "empty")) and not value.empty()
    except Exception:  # as of one that is closed
        return False


def read_by(source: Any) -> Iterator[tuple[str, Any]]:
    """What the passes over an object find in it or around its class, and do not set anew."""
    used, stored = _names(type(source))
    for name, value in {**_closure(type(source)), **getattr(source, "__dict__", {})}.items():
        if name in used and name not in stored:
            yield name, value


def _and_items(value: Any) -> list[Any]:
    return [value, *(value if isinstance(value, (list, tuple)) and len(value) < 100 else ())]


def _is_iterator(value: Any) -> bool:
    """Whether it is an iterator that is not made in Python, such as a generator: these never start again."""
    python = isinstance(getattr(type(value), "__iter__", None), types.FunctionType)
    return isinstance(value, Iterator) and not isinstance(value, _ENDLESS) and not python


def sought(source: Any, value: Any) -> bool:
    """Whether a value is or reads a file that the passes over an object that holds it set to another place."""
    return "seek" in _names(type(source))[0] and _reads_file(value)


def _reads_file(value: Any) -> bool:
    if isinstance(value, io.IOBase):
        return True
    parts = vars(value).values() if isinstance(value, csv.DictReader) else gc.get_referents(value)
    return isinstance(value, (tuple, *_FOLLOWS)) and any(map(_reads_file, parts))


def gives_itself(kind: type) -> bool:
    """Whether a class' ``__iter__`` says ``return self`` and nothing else: no pass over such an object begins anew."""
    function = getattr(kind, "__iter__", None)
    if not isinstance(function, types.FunctionType) or not hasattr(kind, "__next__"):
        return False
    steps = [step for step in dis.get_instructions(function.__code__) if step.opname not in ("RESUME", "NOP")]
    given = [step.argval for step in steps if step.opname.startswith("LOAD_FAST")]
    return len(steps) == 2 and given == list(function.__code__.co_varnames[:1])


def _is_live(value: Any) -> bool:
    if not _is_iterator(value):
        return False
    if isinstance(value, types.GeneratorType):  # one at its end has no frame, and nothing can wait for more of it
        return value.gi_frame is not None and not _is_endless(value)
    return operator.length_hint(value, 1) > 0


def _is_endless(value: Any) -> bool:
    """Whether a generator has no end: its code never returns or takes from others, or goes through what is endless."""
    if isinstance(value, _ENDLESS):
        return True
    if not isinstance(value, types.GeneratorType):
        return False
    code = value.gi_code
    ends = any(step.opname in ("RETURN_VALUE", "RETURN_CONST") for step in dis.get_instructions(code))
    through = value.gi_frame.f_locals.get(".0") if value.gi_frame else None
    return not (ends or {*_TAKES, "recv", "next"} & set(code.co_names)) or _is_endless(through)


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


def _asks(kind: type, name: str, *methods: str) -> bool:
    """Whether a class' passes use one of some methods of what has a name, or of what it may have been handed on as."""
    asked = {pair for function in _functions(kind) for pair in _asked(function.__code__)}
    owners = {name, *(("", *_names(kind)[1]) if (name, "") in asked else ())}
    return any((owner, method) in asked for owner in owners for method in methods)


@lru_cache(maxsize=256)
def _asked(code: types.CodeType) -> set[tuple[str, str]]:
    """Names, and what code asks of them: an attribute, or none where they are handed on; no name for what has none."""
    found = set()
    for before, step in itertools.pairwise(dis.get_instructions(code)):
        named = before.opname in _LOADS and isinstance(before.argval, str)
        attribute = step.argval if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR") else ""
        if attribute or (named and not step.opname.startswith("POP_JUMP")):
            found.add((before.argval if named else "", attribute))
    return found


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
