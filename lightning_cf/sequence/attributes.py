"""Numbers and texts in a module's plain attributes: no checkpoint holds them, and training may hang on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_cf.network.forward import plain_attributes

Attributes = Mapping[str, Mapping[str, Any]]
"""By path of each submodule, the values of its attributes by name."""


def attributes_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    """What each submodule holds in plain attributes of the user's: numbers, texts, flags and None."""
    return {
        path: {
            name: x
            for name, x in plain_attributes(part).items()
            if (x is None or type(x) in (bool, int, float, str)) and name != "training" and not name.startswith("_")
        }
        for path, part in module.named_modules()
    }


def changed(module: nn.Module, before: Attributes) -> dict[str, dict[str, Any]]:
    """Those that are new or not what they were.

    Args:
        module: as it is now.
        before: what :func:`attributes_of` gave.
    """
    found = {}
    for path, own in attributes_of(module).items():
        old = before.get(path, {})
        found[path] = {name: x for name, x in own.items() if name not in old or not _same(old[name], x)}
    return {path: own for path, own in found.items() if own}


def put(module: nn.Module, attributes: Attributes) -> None:
    """Gives each submodule that is there the attributes that it had."""
    parts = dict(module.named_modules())
    for path, own in attributes.items():
        if path in parts:
            parts[path].__dict__.update(own)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a == b or (a != a and b != b))
