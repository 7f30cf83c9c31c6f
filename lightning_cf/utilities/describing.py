"""Objects as plain values that are the same whenever the same script makes them, and others where it was changed."""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import inspect
import math
import os
import re
import sys
import types
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import partial, singledispatch
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_cf.utilities.content import content_sha256

UNKNOWN = "?"
"""Stands for what cannot be known to be the same, so that it is never taken for a difference."""

_PLAIN = (bool, int, float, str, type(None))
_DEEPEST = 8
_MOST = 1000
"""Objects that one description may go through; what comes after is not known. Data and networks know each other."""

_LEFT: ContextVar[list[int] | None] = ContextVar("objects left", default=None)


def describe(value: Any, depth: int = 0) -> Any:
    """An object as JSON has it: numbers and texts as they are, functions by their code, objects by what made them.

    Left out is whatever differs between two starts of one script: addresses, folders, generators, counters, times.

    >>> describe(partial(torch.optim.SGD, lr=0.1))
    {'partial': 'SGD', 'keywords': {'lr': 0.1}}
    """
    if isinstance(value, _PLAIN) and not isinstance(value, str):
        return described_as(value, depth)
    left = _LEFT.get()
    if left is None:
        token = _LEFT.set([_MOST])
        try:
            return describe(value, depth)
        finally:
            _LEFT.reset(token)
    left[0] -= 1
    return UNKNOWN if depth > _DEEPEST or left[0] < 0 else described_as(value, depth + 1)


@singledispatch
def described_as(value: Any, depth: int) -> Any:
    """An object as a plain value, by its class; a class whose arguments do not tell it registers a function here."""
    if isinstance(value, type):
        return value.__qualname__
    if dataclasses.is_dataclass(value):
        given = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value) if f.init}
    else:
        given = made_from(value)
    found: dict[str, Any] = {"class": type(value).__qualname__}
    call = inspect.getattr_static(type(value), "__call__", None)
    if isinstance(call, types.FunctionType) and not is_library(type(value).__module__):
        found["code"] = code_of(call)
    return found | {name: describe(item, depth) for name, item in given.items()}


@described_as.register(bool)
@described_as.register(int)
@described_as.register(type(None))
def _(value: Any, depth: int) -> Any:
    return value


@described_as.register(float)
def _(value: float, depth: int) -> Any:
    return float(value) if math.isfinite(value) else str(value)


@described_as.register(str)
def _(value: str, depth: int) -> Any:
    """A path by its last part; a text that looks like a time or a random name is not known."""
    if os.path.isabs(value):
        return os.path.basename(value)
    return UNKNOWN if re.search(r"\d{8}|\d{4}-\d\d-\d\d|[0-9a-f]{16}", value) else without_address(value)


@described_as.register(PurePath)
def _(value: PurePath, depth: int) -> Any:
    return value.name


@described_as.register(np.generic)
def _(value: Any, depth: int) -> Any:
    return describe(value.item(), depth)


@described_as.register(torch.dtype)
@described_as.register(torch.device)
@described_as.register(torch.Size)
def _(value: Any, depth: int) -> Any:
    return str(value)


@described_as.register(Tensor)
@described_as.register(np.ndarray)
def _(value: Any, depth: int) -> Any:
    return sketch(value)


@described_as.register(nn.Module)
def _(value: nn.Module, depth: int) -> Any:
    return {"class": type(value).__qualname__, "text": without_address(str(value))}


@described_as.register(Mapping)
def _(value: Mapping[Any, Any], depth: int) -> Any:
    return _short({str(key): describe(item, depth) for key, item in value.items()})


@described_as.register(list)
@described_as.register(tuple)
def _(value: Any, depth: int) -> Any:
    return _short([describe(item, depth) for item in value])


@described_as.register(set)
@described_as.register(frozenset)
def _(value: Any, depth: int) -> Any:
    return sorted((describe(item, depth) for item in value), key=repr)


@described_as.register(partial)
def _(value: Any, depth: int) -> Any:
    found: dict[str, Any] = {"partial": describe(value.func, depth)}
    if value.args:
        found["arguments"] = describe(value.args, depth)
    if value.keywords:
        found["keywords"] = describe(value.keywords, depth)
    return found


@described_as.register(types.BuiltinFunctionType)
@described_as.register(types.MethodDescriptorType)
@described_as.register(np.ufunc)
def _(value: Any, depth: int) -> Any:
    return getattr(value, "__qualname__", None) or getattr(value, "__name__", UNKNOWN)


@described_as.register(types.MethodType)
def _(value: types.MethodType, depth: int) -> Any:
    return {"method": describe(value.__func__, depth), "of": type(value.__self__).__qualname__}


@described_as.register(types.FunctionType)
def _(value: types.FunctionType, depth: int) -> Any:
    function: Any = inspect.unwrap(value)
    if not isinstance(function, types.FunctionType) or is_library(function.__module__):
        return f"{value.__module__}.{value.__qualname__}"
    found: dict[str, Any] = {"function": function.__qualname__, "code": code_of(function)}
    if function.__defaults__:
        found["defaults"] = describe(function.__defaults__, depth)
    if function.__kwdefaults__:
        found["keyword defaults"] = describe(function.__kwdefaults__, depth)
    inside = _inside(function, depth)
    if inside:
        found["uses"] = inside
    return found


@described_as.register(torch.Generator)
@described_as.register(np.random.Generator)
@described_as.register(np.random.RandomState)
@described_as.register(types.ModuleType)
def _(value: Any, depth: int) -> Any:
    return UNKNOWN  # where a generator stands depends on what was drawn before


def code_of(function: Callable[..., Any]) -> dict[str, str]:
    """What a function does, by the version of Python that compiled it; places, comments and docstrings do not count."""
    plain: Any = inspect.unwrap(function)
    digest = hashlib.sha256()
    _feed_code(digest.update, plain.__code__, plain.__doc__)
    return {f"{sys.implementation.name}-{sys.version_info[0]}.{sys.version_info[1]}": digest.hexdigest()[:12]}


def made_from(value: Any) -> dict[str, Any]:
    """The attributes that hold an object's constructor arguments; of one that renames them, all plain attributes."""
    try:
        attributes = dict(vars(value))
        names = [
            p.name
            for p in inspect.signature(type(value).__init__).parameters.values()
            if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
    except (TypeError, ValueError):
        return {}
    found = {}
    for name in names:
        for attribute in (name, f"_{name}"):
            if attribute in attributes:
                found[name] = attributes[attribute]
                break
    if len(found) < len(names) or not names:
        constant = (*_PLAIN, partial, types.FunctionType, type)
        found |= {k: v for k, v in attributes.items() if isinstance(v, constant) and k.lstrip("_") not in found}
    return found


def constructor_names(value: object) -> set[str]:
    """Names of what a user's class is made from, or the nearest class of a library that it derives from."""
    names: set[str] = set()
    for base in type(value).__mro__:
        init = vars(base).get("__init__")
        if isinstance(init, types.FunctionType) and not (is_library(base.__module__) and names):
            code = init.__code__
            names |= set(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])
    return names


def _short(described: Any) -> Any:
    return described if len(described) <= 64 else {"items": len(described), "sha256": content_sha256(described)[:12]}


def sketch(value: Any) -> Any:
    """An array so that other contents show, and the rounding of another machine does not: shape, type, two numbers."""
    array = value.detach().cpu() if isinstance(value, Tensor) else value
    try:
        if isinstance(array, Tensor):
            array = array.to_dense() if array.layout is not torch.strided else array
            array = (array.float() if array.dtype in (torch.bfloat16, torch.float16) else array).numpy()
        kind = str(value.dtype).removeprefix("torch.")
        if not np.issubdtype(array.dtype, np.number) and array.dtype != bool:
            return {"shape": list(array.shape), "type": kind, "sha256": content_sha256(array.tolist())[:12]}
        flat = np.abs(array.reshape(-1)) if np.iscomplexobj(array) else array.reshape(-1).astype(np.float64)
    except (TypeError, RuntimeError):
        return {"shape": list(getattr(value, "shape", [])), "type": str(getattr(value, "dtype", UNKNOWN))}
    if flat.size <= 16 and not np.issubdtype(array.dtype, np.floating):
        return {"shape": list(array.shape), "type": kind, "values": array.tolist()}
    flat = np.nan_to_num(flat, nan=0.1234, posinf=1.0, neginf=-1.0)
    waves = np.cos(np.arange(flat.size, dtype=np.float64) * 2.399963229728653)
    size = float(np.sqrt((flat**2).mean())) if flat.size else 0.0
    toward = float((flat * waves).mean()) / size if size else 0.0
    return {"shape": list(array.shape), "type": kind, "size": size, "toward": toward}


def without_address(value: object) -> str:
    """``str(value)``, the same in every process: without the address of an object that has no text of its own."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))


def is_library(module: str | None) -> bool:
    """Whether a module is an installed package's, or this one's, whose code is not the user's to change."""
    top = (module or "").partition(".")[0]
    if top in ("lightning_cf", "torch", "lightning", "pytorch_lightning", "torchmetrics", "numpy", "builtins"):
        return True
    if top in sys.stdlib_module_names and top != "__main__":
        return True
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return any(part in ("site-packages", "dist-packages") for part in Path(file).parts)


def _feed_code(update: Callable[[bytes], Any], code: types.CodeType, doc: str | None) -> None:
    update(code.co_code)
    update(repr((code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_argcount)).encode())
    for position, constant in enumerate(code.co_consts):
        if isinstance(constant, types.CodeType):
            first = constant.co_consts[0] if constant.co_consts and not constant.co_name.startswith("<") else None
            _feed_code(update, constant, first if isinstance(first, str) else None)
        elif position or constant != doc or doc is None:
            update(repr(describe(constant) if isinstance(constant, frozenset) else constant).encode())


def _inside(function: types.FunctionType, depth: int) -> dict[str, Any]:
    """Plain numbers and functions of the user's that a function takes from around it."""
    found = {}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in cells:
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    for name in function.__code__.co_names:
        if name in function.__globals__ and not hasattr(builtins, name):
            found[name] = function.__globals__[name]
    kept = {}
    for name, value in found.items():
        theirs = isinstance(value, types.FunctionType) and not is_library(value.__module__) and value is not function
        if isinstance(value, (bool, int, float)) or (theirs and depth < _DEEPEST - 1):
            kept[name] = describe(value, depth + 2)
    return kept
