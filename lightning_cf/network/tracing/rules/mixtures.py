"""Operations by which elements along some dims decide each other: reductions, windows, sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_cf.network.tracing.labels import NO_LABEL
from lightning_cf.network.tracing.rules.call import Call, Rule, Tracer
from lightning_cf.network.tracing.rules.elementwise import joined_origins
from lightning_cf.network.tracing.rules.unknown import unite
from lightning_cf.network.tracing.shadows import Shadow, laid_out_like


def along(argument: str = "dim", *, keeps: bool = False) -> Rule:
    """Reductions, sorting and the like: elements along some dims decide each other.

    Args:
        argument: names the dims; all dims where it is empty or missing.
        keeps: whether each element stays what it was, so that the end of a network may show it.
    """

    def rule(tracer: Tracer, call: Call) -> None:
        x = call.given.get("self", call.tensors[0])
        dims = call.given.get(argument)
        dims = [dims] if isinstance(dims, int) else (list(dims) if dims else list(range(x.ndim)))
        dims = sorted({dim % max(x.ndim, 1) for dim in dims}) if x.ndim else []
        if tracer.is_weight(x):
            return _couple(tracer, call, x, dims)
        labels = tracer.labels(x)
        resolved = tracer.units.resolve(labels)
        mixes = resolved.numel() > 0 and any(
            bool(((resolved != resolved.amax(dim, keepdim=True)) & (resolved != NO_LABEL)).any()) for dim in dims
        )
        if not mixes:  # positions, or one unit
            for dim in dims:
                labels = labels.amax(dim, keepdim=True) if labels.shape[dim] else labels
        elif not keeps:
            labels = tracer.mix(x, dims, call.name) if tracer.apart else labels
            for dim in dims:
                labels = labels.amax(dim, keepdim=True)
        for result in call.results:
            tracer.write(result, labels.expand(result.shape) if result.ndim == x.ndim else labels.reshape(result.shape))
            if mixes:
                # A number made from several units is none of them, not even at the end of the network.
                tracer.mix_later(x, result, dims, call.name, final=not keeps and result.is_floating_point())
        return None

    return rule


def _couple(tracer: Tracer, call: Call, x: Tensor, dims: Sequence[int]) -> None:
    """A number made from many entries of a parameter couples all that it will scale."""
    kept = tuple(1 if dim in dims else n for dim, n in enumerate(x.shape))
    labels = torch.zeros(kept, dtype=torch.int64)
    if not tracer.apart:
        labels = tracer.units.new(labels.numel()).reshape(kept)
        tracer.use(x, "scale", labels.expand(x.shape))
    for result in call.results:
        own = labels.expand(result.shape) if result.ndim == x.ndim else labels.reshape(result.shape)
        tracer.shadows[result] = Shadow(result, laid_out_like(result, own))


def weight_norm(tracer: Tracer, call: Call) -> None:
    """``v * g / norm of v``, the norm over all dims but one."""
    v, g, dim = call.given["v"], call.given["g"], call.given["dim"]
    if not tracer.is_weight(v) or not tracer.is_weight(g):
        return unite(tracer, call)
    kept = tuple(n if at == dim % v.ndim else 1 for at, n in enumerate(v.shape))
    labels = torch.zeros(kept, dtype=torch.int64)
    if not tracer.apart:
        labels = tracer.units.new(labels.numel()).reshape(kept)
        for x in (v, g):
            tracer.units.unite(labels, tracer.shadows[x].labels)
    weight, *norms = call.results
    origins = joined_origins(tracer, [v, g], tuple(v.shape))
    tracer.shadows[weight] = Shadow(weight, laid_out_like(weight, labels), origins)
    for norm in norms:
        tracer.shadows[norm] = Shadow(norm, laid_out_like(norm, labels.reshape(norm.shape)))
    return None


def windows(spatial: int) -> Rule:
    """Pooling, resizing: the last dims are positions, which mix; the others stay."""

    def rule(tracer: Tracer, call: Call) -> None:
        x = call.given["self"] if "self" in call.given else call.given["input"]
        labels = tracer.mix(x, range(x.ndim - spatial, x.ndim), call.name)
        for result in call.results:
            tracer.write(result, labels.expand(result.shape))

    return rule


def unpool(spatial: int) -> Rule:
    """Each value goes to the place that an index of its own channel says."""

    def rule(tracer: Tracer, call: Call) -> None:
        found = [
            tracer.mix(x, range(x.ndim - spatial, x.ndim), call.name)
            for x in (call.given["self"], call.given["indices"])
        ]
        tracer.write(call.results[0], tracer.units.unite(*found))

    return rule


def sample(tracer: Tracer, call: Call) -> None:
    """Values of an image at places that a grid gives, one pair or triple of coordinates an output position."""
    x, grid = call.given["input"], call.given["grid"]
    channels = tracer.mix(x, range(2, x.ndim), call.name)
    places = tracer.mix(grid, [grid.ndim - 1], call.name).movedim(-1, 1)
    tracer.write(call.results[0], tracer.units.unite(channels, places))


def col2im(tracer: Tracer, call: Call) -> None:
    """Columns of patches, added up where they overlap."""
    x, kernel = call.given["self"], call.given["kernel_size"]
    labels = tracer.labels(x)
    *batch, rows, _ = labels.shape
    size = kernel[0] * kernel[1]
    channels = tracer.units.unite_along(labels.reshape(*batch, rows // size, size, -1), [-1, -2])
    tracer.write(call.results[0], channels.expand(call.results[0].shape))


def scatter(tracer: Tracer, call: Call) -> None:
    """Values of a source meet those that stand at the places that an index gives along a dim."""
    given = call.given
    x, index, source = given["self"], given["index"], given["source" if "source" in given else "src"]
    before, added = tracer.labels(x), tracer.labels(source)
    if bool(tracer.labels(index).any()) or x.ndim == 0:
        return unite(tracer, call)
    dim = given["dim"] % x.ndim
    if index.ndim < x.ndim or source.ndim == 1:  # one place for each slice
        index = index.reshape([-1 if at == dim else 1 for at in range(x.ndim)]).expand(source.shape)
    added = added[tuple(slice(n) for n in index.shape)]
    labels = before.clone(memory_format=torch.contiguous_format).scatter_reduce(dim, index, added, "amax")
    tracer.units.unite(labels.gather(dim, index), added)
    labels = tracer.units.unite(labels, before)
    for result in call.results:
        tracer.write(result, labels)
    return None
