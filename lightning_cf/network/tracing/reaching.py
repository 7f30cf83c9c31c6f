"""Which operations of a forward pass reach what it returns: what else it computes, such as metrics, binds no units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from lightning_cf.network.ways import running_way

WHOLE = (torch.nn.functional.rms_norm, torch.rms_norm)
"""Functions that a trace takes for one operation, though they consist of several."""


class Reaching(TorchDispatchMode):
    """Records, while a forward pass runs, what each operation reads and writes, by the memory in which it lies."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self._flows: list[tuple[list[int], list[int]]] = []
        self._kept: list[Tensor] = []
        self.functions = _Functions(self)

    def operations(self, outputs: Sequence[Tensor]) -> list[tuple[str, bool]]:
        """Each operation in turn, and whether its results reach the outputs.

        One without results, such as a number read into Python, is looked at for itself: what it reads need not reach.
        """
        live, found = {_place(x) for x in outputs}, []
        for name, (read, written) in zip(reversed(self.names), reversed(self._flows), strict=True):
            reaches = not written or not live.isdisjoint(written)
            if reaches and written:
                live.update(read)
            found.append((name, reaches))
        return found[::-1]

    def note(self, func: Any, arguments: Any, written: Any) -> None:
        """Takes in an operation that ran: what memory it read, and what memory it wrote or returned."""
        read, results = ([x for x in tree_leaves(tensors) if isinstance(x, Tensor)] for tensors in (arguments, written))
        self.names.append(str(func))
        self._flows.append(([_place(x) for x in read], [_place(x) for x in results]))
        self._kept += [*read, *results]  # so that no memory is used twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        changed = [
            given.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write
        ]
        self.note(func, (args, kwargs), (out, changed))
        return out


class IdleCalls:
    """Which calls of layers reach nothing that the network returns.

    Attributes:
        found: path of the layer, number of the way through the network, and which call it was there, from 0 on.
    """

    def __init__(self) -> None:
        self.found: set[tuple[str, int, int]] = set()
        self._aside: dict[int, bool] = {}
        self._calls: Counter[tuple[str, int]] = Counter()

    def note(self, results: Sequence[Tensor], aside: bool) -> None:
        """Keeps in mind whether the results of an operation reach nothing that the network returns."""
        self._aside |= {id(x): aside for x in results}

    def left(self, path: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        """Counts a call of a layer, as its forward hook; a call is idle if all that it returns is."""
        way, results = running_way(), [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if results and all(self._aside.get(id(x), False) for x in results):
            self.found.add((path, way, self._calls[path, way]))
        self._calls[path, way] += 1


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: Reaching) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in WHOLE:
            return func(*args, **kwargs)
        with _disable_current_modes():
            out = func(*args, **kwargs)
        self.recorder.note(func, (args, kwargs), out)
        return out


def _place(x: Tensor) -> int:
    try:
        return x.untyped_storage().data_ptr() or id(x)
    except (NotImplementedError, RuntimeError):  # no memory of its own: sparse
        return id(x)
