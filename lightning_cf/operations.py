"""What each tensor operation does to units: the tracer's table.

Operations that PyTorch tags as pointwise, and views, need no line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_cf.structure import Role

aten = torch.ops.aten


@runtime_checkable
class Units(Protocol):
    """Disjoint sets of labels."""

    def new(self, count: int) -> Tensor:
        """Fresh labels."""
        ...

    def unite_along(self, labels: Tensor, dims: Iterable[int]) -> Tensor:
        """Unites labels along dims, which keep size one."""
        ...


@runtime_checkable
class Tracer(Protocol):
    """What a rule may ask of the tracer."""

    units: Units
    mixed: dict[int, tuple[str, int]]

    def labels(self, x: Tensor) -> Tensor:
        """Unit labels of an activation."""
        ...

    def write(self, out: Tensor, labels: Tensor) -> None:
        """Puts labels beside a result."""
        ...

    def is_entries(self, x: Any) -> bool:
        """Whether ``x`` is a parameter or a view of one."""
        ...

    def use(self, x: Tensor | None, role: Role, target: Tensor, source: Tensor | None = None) -> None:
        """Notes what the entries of a parameter write to and read."""
        ...

    def refuse(self, operation: str) -> NoReturn:
        """Gives up."""
        ...


Rule = Callable[[Any, tuple[Any, ...], dict[str, Any], list[Tensor]], None]


def _linear(tracer: Tracer, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out[b, n] = sum over d of x[b, d] · weight[d, n] + bias[n]``."""
    if not tracer.is_entries(weight) or tracer.is_entries(x):
        tracer.refuse("a product of two activations")
    sources = tracer.units.unite_along(tracer.labels(x), [0])
    units = tracer.units.new(weight.shape[1])
    tracer.use(weight, "weight", units[None, :], sources.T)
    tracer.use(bias, "bias", units)
    tracer.write(out, units.expand(out.shape))


def _mm(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Tensor]) -> None:
    _linear(tracer, args[0], args[1], None, results[0])


def _addmm(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Tensor]) -> None:
    _linear(tracer, args[1], args[2], args[0], results[0])


def _convolution(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Tensor]) -> None:
    x, weight, bias, _, _, _, transposed, _, groups = args
    if not tracer.is_entries(weight):
        tracer.refuse("a convolution whose kernel is computed")
    inputs = tracer.labels(x)
    channels = tracer.units.unite_along(inputs, [0, *range(2, x.ndim)]).reshape(groups, -1)
    kernel = (1,) * (weight.ndim - 2)
    if transposed:
        units = tracer.units.new(groups * weight.shape[1])
        per_input = units.reshape(groups, 1, -1).expand(groups, channels.shape[1], -1)
        target = per_input.reshape(weight.shape[0], weight.shape[1], *kernel)
        source = channels.reshape(-1, 1, *kernel)
    else:
        units = tracer.units.new(weight.shape[0])
        target = units.reshape(-1, 1, *kernel)
        source = channels.repeat_interleave(weight.shape[0] // groups, dim=0).reshape(*weight.shape[:2], *kernel)
    tracer.use(weight, "weight", target, source)
    tracer.use(bias, "bias", units)
    tracer.write(results[0], units.reshape(1, -1, *kernel).expand(results[0].shape))


def _batch_norm(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Tensor]) -> None:
    x, scale, shift, *statistics = args[:5]
    labels = tracer.labels(x)
    channels = tracer.units.unite_along(labels, [0, *range(2, x.ndim)]).flatten()
    tracer.use(scale, "scale", channels)
    tracer.use(shift, "shift", channels)
    for statistic in statistics:
        if isinstance(statistic, Tensor):
            tracer.use(statistic, "statistic", channels)
    tracer.write(results[0], labels)


def _pool(spatial: int) -> Rule:
    def rule(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Tensor]) -> None:
        labels = tracer.units.unite_along(tracer.labels(args[0]), range(args[0].ndim - spatial, args[0].ndim))
        tracer.write(results[0], labels.expand(results[0].shape))

    return rule


def _reduce(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Tensor]) -> None:
    x, dims = args[0], args[1] if len(args) > 1 else None
    dims = [dims] if isinstance(dims, int) else (dims or range(x.ndim))
    labels = tracer.units.unite_along(tracer.labels(x), [d % x.ndim for d in dims])
    for result in results:
        tracer.write(result, labels.reshape(result.shape))


def _softmax(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Tensor]) -> None:
    tracer.write(results[0], tracer.labels(args[0]))
    tracer.mixed[id(results[0])] = ("softmax", args[1] % args[0].ndim)


RULES: dict[Any, Rule] = {
    aten.mm: _mm,
    aten.addmm: _addmm,
    aten.convolution: _convolution,
    aten.native_batch_norm: _batch_norm,
    aten._native_batch_norm_legit: _batch_norm,
    aten._native_batch_norm_legit_no_training: _batch_norm,
    aten.cudnn_batch_norm: _batch_norm,
    aten.max_pool2d_with_indices: _pool(2),
    aten.max_pool3d_with_indices: _pool(3),
    aten.avg_pool1d: _pool(1),
    aten.avg_pool2d: _pool(2),
    aten.avg_pool3d: _pool(3),
    aten._adaptive_avg_pool2d: _pool(2),
    aten._adaptive_avg_pool3d: _pool(3),
    aten.adaptive_max_pool2d: _pool(2),
    aten.mean: _reduce,
    aten.sum: _reduce,
    aten.amax: _reduce,
    aten.amin: _reduce,
    aten._softmax: _softmax,
    aten._log_softmax: _softmax,
}

MOVEMENT = {
    aten._to_copy,
    aten._unsafe_view,
    aten.cat,
    aten.clone,
    aten.constant_pad_nd,
    aten.copy_,
    aten.flip,
    aten.index,
    aten.index_select,
    aten.repeat,
    aten.roll,
    aten.stack,
}

INDEXED = {aten.index, aten.index_select}
"""Movements whose further tensors say where to, and carry no units themselves."""
