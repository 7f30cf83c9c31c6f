"""Products, convolutions and tables: they create units, and say what each weight entry writes to and reads."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cf.network.tracing.labels import NO_LABEL
from lightning_cf.network.tracing.rules.call import Call, Rule, Tracer
from lightning_cf.network.tracing.rules.unknown import unite


def contract(first: str, second: str, bias: str | None = None) -> Rule:
    """Matrix products ``[..., N, K] @ [..., K, M]``."""

    def rule(tracer: Tracer, call: Call) -> None:
        a, b, out = call.given[first], call.given[second], call.results[0]
        if 1 in (a.ndim, b.ndim) and not (tracer.shadows[a].live or tracer.shadows[b].live):
            return unite(tracer, call)  # a norm of parameters
        if b.ndim == 1 or a.ndim == 1:  # a vector is a matrix of one row or column
            labels = _product(tracer, call, a, b, torch.Size((1, 1)))
        else:
            labels = _product(tracer, call, a, b, out.shape)
        labels = labels.reshape(out.shape)
        added = None if bias is None else call.given[bias]
        if added is not None and tracer.is_weight(added):
            tracer.use(added, "bias", labels)
        elif added is not None:
            labels = tracer.units.unite(labels, tracer.labels(added))
        tracer.write(out, labels)
        return None

    return rule


def _product(tracer: Tracer, call: Call, a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    if tracer.is_weight(b) and a.ndim == b.ndim and a.ndim > 1:
        return _weighted(tracer, tracer.labels(a), b, shape)
    if tracer.is_weight(a) and a.ndim == b.ndim and a.ndim > 1:
        turned = torch.Size((*shape[:-2], shape[-1], shape[-2]))
        return _weighted(tracer, tracer.labels(b).mT, a, turned, transposed=True).mT
    x, y = tracer.labels(a), tracer.labels(b)
    x = x[None] if x.ndim == 1 else x
    y = y[:, None] if y.ndim == 1 else y
    rows, columns = tracer.units.unite_along(x, [-1]), tracer.units.unite_along(y, [-2])
    return tracer.units.unite(rows, columns).reshape(-1) if shape == (1, 1) else tracer.units.unite(rows, columns)


def _weighted(tracer: Tracer, x: Tensor, weight: Tensor, shape: torch.Size, *, transposed: bool = False) -> Tensor:
    """Activations times a weight.

    Args:
        tracer: the trace.
        x: labels of the activations, ``[..., N, K]``.
        weight: ``[..., K, M]``, or ``[..., M, K]`` where ``transposed``.
        shape: of the product, ``[..., N, M]``.
        transposed: whether the weight's last two dims are the other way round.
    """

    def as_weight(labels: Tensor) -> Tensor:
        return labels.mT if transposed else labels

    if x.numel() and _by_positions(
        tracer.units.resolve(x)
    ):  # each row is one unit, so the weight mixes positions within units
        units = tracer.units.unite_along(x, [-1])
        tracer.use(weight, "scale", units.movedim(-2, 0)[..., None])
        return units.expand(shape)
    batch = [] if x.ndim == 2 or not _repeated(tracer, weight) else [0]
    sources = tracer.units.unite_along(x, [-2, *batch])
    lead = (1,) * len(shape[:-2]) if batch else shape[:-2]
    units = tracer.units.new(torch.Size((*lead, shape[-1])).numel()).reshape(*lead, 1, shape[-1])
    tracer.use(weight, "weight", as_weight(units), as_weight(sources.mT))
    return units.expand(shape)


def _by_positions(resolved: Tensor) -> bool:
    """Whether each row is one unit, and not all are the same."""
    top = resolved.amax(-1, keepdim=True)
    return bool(((resolved == top) | (resolved == NO_LABEL)).all()) and bool((top != top.amax(-2, keepdim=True)).any())


def _repeated(tracer: Tracer, weight: Tensor) -> bool:
    return all(origin.repeats() for origin in tracer.shadows[weight].origins.values())


def convolution(tracer: Tracer, call: Call) -> None:
    """Channels of a kernel over channels of an input, in groups."""
    x, weight, bias, transposed, groups = (
        call.given[name] for name in ("input", "weight", "bias", "transposed", "groups")
    )
    out, kernel = call.results[0], (1,) * (weight.ndim - 2)
    channels = tracer.mix(x, [0, *range(2, x.ndim)], call.name).reshape(groups, -1)
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    if tracer.is_weight(weight):
        units = tracer.units.new(outputs)
        if transposed:
            per_input = units.reshape(groups, 1, -1).expand(groups, channels.shape[1], -1)
            target = per_input.reshape(weight.shape[0], weight.shape[1], *kernel)
            source = channels.reshape(-1, 1, *kernel)
        else:
            target = units.reshape(-1, 1, *kernel)
            source = channels.repeat_interleave(outputs // groups, dim=0).reshape(*weight.shape[:2], *kernel)
        tracer.use(weight, "weight", target, source)
    else:  # a kernel that is computed, or fixed
        read = tracer.mix(weight, [dim for dim in range(weight.ndim) if transposed or dim > 0], call.name).flatten()
        inputs = tracer.units.unite_along(channels, [1]).repeat_interleave(outputs // groups, dim=0).flatten()
        units = tracer.units.unite(inputs, read)
    if tracer.is_weight(bias):
        tracer.use(bias, "bias", units)
    elif bias is not None:
        units = tracer.units.unite(units, tracer.labels(bias))
    tracer.write(out, units.reshape(1, -1, *kernel).expand(out.shape))


def embedding(tracer: Tracer, call: Call) -> None:
    """Rows of a table, at places that the input gives; its columns are units."""
    weight, indices, out = call.given["weight"], call.given["indices"], call.results[0]
    if not tracer.is_weight(weight) or bool(tracer.labels(indices).any()):
        return unite(tracer, call)
    units = tracer.units.new(weight.shape[1])
    tracer.use(weight, "weight", units[None, :])
    tracer.write(out, units.expand(out.shape))
    for rest in call.results[1:]:
        tracer.write(rest, torch.zeros((), dtype=torch.int64))
    return None


def bilinear(tracer: Tracer, call: Call) -> None:
    """``out[n, o] = sum over i, j of a[n, i] weight[o, i, j] b[n, j]``: what stands beside the inputs shares a fate."""
    a, weight, b, out = call.given["i1"], call.given["i2"], call.given["i3"], call.results[0]
    if not (tracer.is_weight(weight) and weight.ndim == 3 and a.ndim == b.ndim == 2):
        return unite(tracer, call)
    left = tracer.units.unite_along(tracer.labels(a), [0])
    right = tracer.units.unite_along(tracer.labels(b), [0, 1] if bool(left.any()) else [0])
    if bool(left.any()) and bool(right.any()):
        left = tracer.units.unite_along(left, [1])
        tracer.units.unite(left, right)
    units = tracer.units.new(weight.shape[0])
    source = left[:, :, None] if bool(left.any()) else right[:, None, :]
    tracer.use(weight, "weight", units[:, None, None], source)
    tracer.write(out, units.expand(out.shape))
    return None
