"""Operations element by element, and those whose outcome no element decides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_cf.network.structure import Role
from lightning_cf.network.tracing.rules.call import Call, Tracer
from lightning_cf.network.tracing.shadows import Origin, Shadow, laid_out_like

aten = torch.ops.aten


def pointwise(tracer: Tracer, call: Call) -> None:
    """Element by element, broadcast: what meets shares one fate."""
    weights = [x for x in call.tensors if tracer.is_weight(x)]
    others = [x for x in call.tensors if not tracer.is_weight(x)]
    shape = call.results[0].shape
    joined = torch.zeros(shape, dtype=torch.int64)
    if weights and not any(tracer.shadows[x].live for x in others):
        for x in call.tensors:
            joined = tracer.units.unite(joined, tracer.shadows[x].labels)
        origins = joined_origins(tracer, weights, tuple(shape))
        for result in call.results:
            if call.in_place(result):
                tracer.own(result)
            tracer.shadows[result] = Shadow(result, laid_out_like(result, joined), origins)
        return
    for x in others:
        joined = tracer.units.unite(joined, tracer.labels(x))
    role: Role = "shift" if call.func.overloadpacket in _SUMS else "scale"
    for x in weights:
        tracer.use(x, role, joined)
        joined = tracer.units.unite(joined, tracer.shadows[x].labels)
    live = any(tracer.shadows[x].live for x in others)
    for result in call.results:
        if result.shape == shape:  # else a buffer for the backward pass
            tracer.write(result, joined, live=live)


_SUMS = (aten.add, aten.add_, aten.sub, aten.sub_, aten.rsub)


def joined_origins(tracer: Tracer, weights: Sequence[Tensor], shape: tuple[int, ...]) -> dict[str, Origin]:
    """What an elementwise function of several weights is made from, entry by entry."""
    found: dict[str, Origin] = {}
    for x in weights:
        for name, origin in tracer.shadows[x].origins.items():
            if tuple(x.shape) == shape:
                new = origin
            else:
                numbers = origin.of(tuple(x.shape)).expand(shape)
                new = Origin(origin.shape, numbers=numbers, trained=origin.trained)
            if name not in found or new.distinct:
                found[name] = new
    return found


def glu(tracer: Tracer, call: Call) -> None:
    """The first half times the sigmoid of the second."""
    first, second = tracer.labels(call.given["self"]).chunk(2, call.given["dim"])
    tracer.write(call.results[0], tracer.units.unite(first, second))


def as_real(tracer: Tracer, call: Call) -> None:
    """``view_as_real``: both parts of a complex number keep its label, along a new last axis."""
    labels = tracer.labels(call.given["self"])
    tracer.write(call.results[0], labels[..., None].expand(call.results[0].shape))


def as_complex(tracer: Tracer, call: Call) -> None:
    """``view_as_complex``: the two parts, along the last axis, become one number, so their units are united."""
    x = call.given["self"]
    tracer.write(call.results[0], tracer.mix(x, [x.ndim - 1], call.name)[..., 0])


def constant(tracer: Tracer, call: Call) -> None:
    """The result depends on the shape of its arguments alone, or on chance."""
    for result in call.results:
        tracer.write(result, torch.zeros(result.shape, dtype=torch.int64), live=False)


def fill(tracer: Tracer, call: Call) -> None:
    """Another value takes the place of every element."""
    value = call.given.get("value")
    labels = tracer.labels(value) if isinstance(value, Tensor) else torch.zeros((), dtype=torch.int64)
    for result in call.results:
        tracer.own(result)
        tracer.write(result, labels.expand(result.shape), live=isinstance(value, Tensor))


def state(tracer: Tracer, call: Call) -> None:
    """The result is about the tensor's shape or memory, or nothing at all."""
