"""Reductions over units, restricted to the units that an owner may read: what norms written by hand consist of.

A sum, or a norm, over some of the units stands for one over all of them: it is scaled up to their number, so that
``x.square().sum(-1) / width`` and ``x.norm(dim=-1) * width**-0.5`` are means over what may be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional as F

_PLAIN = ("input", "dim", "keepdim")
_SPREAD = ("input", "dim", "unbiased", "keepdim")
_NAMES: dict[Any, Sequence[str]] = {
    **{f: _PLAIN for name in ("mean", "sum", "amax", "amin") for f in (getattr(torch, name), getattr(Tensor, name))},
    **dict.fromkeys((torch.var, Tensor.var, torch.std, Tensor.std, torch.var_mean, torch.std_mean), _SPREAD),
    **dict.fromkeys((torch.norm, Tensor.norm), ("input", "p", "dim", "keepdim")),
    torch.linalg.vector_norm: ("x", "ord", "dim", "keepdim"),
    torch.linalg.norm: ("A", "ord", "dim", "keepdim"),
    F.normalize: ("input", "p", "dim", "eps"),
}
_SUMS = (torch.sum, Tensor.sum)


@dataclass(frozen=True)
class Reduction:
    """A reduction as it was called.

    Attributes:
        func: the function.
        input: what it reduces.
        dims: along which dims, counted from the last one, -1.
        power: the power whose mean it is a root of; 0 for a maximum, None where it is a mean itself.
        given: its other arguments by name.
    """

    func: Callable[..., Any]
    input: Tensor
    dims: tuple[int, ...]
    power: float | None
    given: Mapping[str, Any]

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Reduction | None:
        """The reduction that a call is, or None where it is none of the known ones along chosen dims."""
        names = _NAMES.get(func)
        if names is None:
            return None
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x = given.pop(names[0], None)
        if "axis" in given:
            given["dim"] = given.pop("axis")
        dims = given.setdefault("dim", 1 if func is F.normalize else None)
        dims = [dims] if isinstance(dims, int) and not isinstance(dims, bool) else dims
        if not isinstance(x, Tensor) or not isinstance(dims, (list, tuple)) or not dims or given.get("out") is not None:
            return None
        power = _power(func, names, given)
        if power is not None and (math.isnan(power) or power < 0 or (func is torch.linalg.norm and len(dims) > 1)):
            return None
        return cls(func, x, tuple(dim % x.ndim - x.ndim for dim in dims), power, given)

    def among(self, axis: int, units: Int64[Tensor, "some"]) -> Any:
        """Its result where only some of the units along an axis are there."""
        return self._finish(self._statistic(axis, units))

    def for_each(self, axis: int, among: Sequence[Int64[Tensor, "_"]], level: Int64[Tensor, "units"]) -> Any:
        """Its result for each unit along an axis, which keeps its size: over the units in ``among[level]`` of each."""
        # With one more dim behind, so that it is not found, and taken by owners, in here again: compiled code of
        # debugging backends runs it where the module's own forward pass is looked at.
        behind = self._one_behind()
        found = [behind._statistic(axis - 1, units) for units in among]
        parts = zip(*found, strict=True) if isinstance(found[0], tuple) else [found]
        joined = [torch.cat(list(part), dim=axis - 1).index_select(axis - 1, level).squeeze(-1) for part in parts]
        return self._finish(joined[0] if len(joined) == 1 else tuple(joined))

    @property
    def keeps_dims(self) -> bool:
        """Whether its result has as many dims as what it reduces."""
        return self.func is F.normalize or bool(self.given.get("keepdim") or self.given.get("keepdims"))

    def _one_behind(self) -> Reduction:
        dims = tuple(dim - 1 for dim in self.dims)
        given = {**self.given, "dim": dims[0] if len(dims) == 1 else dims}
        return Reduction(self.func, self.input.unsqueeze(-1), dims, self.power, given)

    def _statistic(self, axis: int, units: Int64[Tensor, "some"]) -> Any:
        whole = len(units) == self.input.shape[axis]
        part = self.input if whole else self.input.index_select(axis, units)
        share = len(units) / self.input.shape[axis]
        scale = 1.0 if not self.power or math.isinf(self.power) else share ** (-1 / self.power)
        if self.func is F.normalize:
            return torch.linalg.vector_norm(part, self.power or 0, self.dims, keepdim=True) * scale
        if _NAMES[self.func] is _SPREAD and not whole and math.prod(part.shape[dim] for dim in self.dims) == 1:
            return self._of_one(part)
        out = self.func(part, **self.given)
        return out if scale == 1.0 else out * scale

    def _finish(self, statistic: Any) -> Any:
        """What is returned beyond the statistic itself: the input scaled by its length."""
        if self.func is F.normalize:
            return self.input / statistic.clamp_min(self.given.get("eps", 1e-12))
        return statistic

    def _of_one(self, part: Tensor) -> Any:
        """A single number spreads by nothing, also where the formula would divide by zero."""
        mean = part.mean(self.dims, keepdim=bool(self.given.get("keepdim") or self.given.get("keepdims")))
        spread = torch.zeros_like(mean)
        return (spread, mean) if self.func in (torch.var_mean, torch.std_mean) else spread


def _power(func: Any, names: Sequence[str], given: Mapping[str, Any]) -> float | None:
    """The power whose mean a reduction is a root of."""
    if func in _SUMS:
        return 1.0
    if len(names) < 4 or names is _SPREAD:
        return None
    power = given.get(names[1], 2)
    power = 2 if power is None or power == "fro" else power
    return float(power) if isinstance(power, (int, float)) else math.nan
