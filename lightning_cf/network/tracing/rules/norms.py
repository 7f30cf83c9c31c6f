"""Normalisations: by statistics of each channel, or over several units together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_cf.network.structure import OUTSIDE
from lightning_cf.network.tracing.labels import NO_LABEL, sole_along
from lightning_cf.network.tracing.rules.call import Call, Tracer
from lightning_cf.network.tracing.shadows import Shadow, laid_out_like


def batch_norm(tracer: Tracer, call: Call) -> None:
    """Each channel by statistics of its own."""
    x, scale, shift = call.given["input"], call.given["weight"], call.given["bias"]
    if tracer.is_weight(x):
        return _standardise(tracer, call, x)
    labels = tracer.labels(x)
    channels = tracer.units.unite_along(labels, [0, *range(2, x.ndim)]).flatten()
    tracer.use(scale, "scale", channels)
    tracer.use(shift, "shift", channels)
    for name in ("running_mean", "running_var"):
        tracer.use(call.given.get(name), "statistic", channels)
    tracer.write(call.results[0], labels)
    return None


def _standardise(tracer: Tracer, call: Call, weight: Tensor) -> None:
    """A weight whose rows are brought to a mean and a variance, which couples the entries of each."""
    rows = tracer.units.new(weight.shape[1]).reshape(1, -1, *[1] * (weight.ndim - 2))
    for x in (call.given["weight"], call.given["bias"]):
        if x is not None and not tracer.apart:
            tracer.use(x, "scale", rows.flatten())
    out, *statistics = call.results
    rows = torch.zeros_like(rows) if tracer.apart else rows
    tracer.shadows[out] = Shadow(out, laid_out_like(out, rows), dict(tracer.shadows[weight].origins))
    for statistic in statistics:
        tracer.write(statistic, torch.zeros((), dtype=torch.int64), live=False)


def layer_norm(tracer: Tracer, call: Call) -> None:
    """The last dims by statistics over all of them."""
    given = call.given
    normalise(tracer, given["input"], len(given["normalized_shape"]), given["weight"], given["bias"], call.results)


def normalise(
    tracer: Tracer, x: Tensor, dims: int, scale: Tensor | None, shift: Tensor | None, results: Sequence[Tensor]
) -> None:
    """LayerNorm and RMSNorm over the last ``dims`` dims; the module may normalise by owners instead."""
    labels = tracer.labels(x)
    over = list(range(x.ndim - dims, x.ndim))
    resolved = tracer.units.resolve(labels)
    differ = bool((resolved != sole_along(resolved, range(x.ndim - dims))).any())
    if differ and tracer.by_slices(tuple(x.shape[-dims:])):
        slices = tracer.mix(x, over, "a normalisation")
        tracer.use(scale, "scale", slices)
        tracer.use(shift, "shift", slices)
        return _write_normalised(tracer, x, labels, results)
    elements = tracer.units.unite_along(labels, range(x.ndim - dims)).reshape(x.shape[-dims:])
    tracer.use(scale, "scale", elements)
    tracer.use(shift, "shift", elements)
    resolved = tracer.units.resolve(elements)
    if int((resolved.unique() != NO_LABEL).sum()) > 1 and not by_owners(tracer, elements):
        tracer.mix(x, over, _told(tracer))
    _write_normalised(tracer, x, labels, results)
    return None


def group_norm(tracer: Tracer, call: Call) -> None:
    """Groups of channels, each by statistics over all of it."""
    x, groups = call.given["input"], call.given["group"]
    labels = tracer.labels(x)
    channels = tracer.units.unite_along(labels, [0, *range(2, x.ndim)]).flatten()
    tracer.use(call.given["weight"], "scale", channels)
    tracer.use(call.given["bias"], "shift", channels)
    grouped = tracer.units.resolve(channels).reshape(groups, -1)
    if bool((grouped != grouped[:, :1]).any()) and not by_owners(tracer, channels):
        tracer.mix(x, range(1, x.ndim), _told(tracer))
    _write_normalised(tracer, x, labels, call.results)


def by_owners(tracer: Tracer, elements: Tensor) -> bool:
    """Leaves a normalisation to its module, which normalises by owners; False if it does so with another shape.

    False too where no module runs: then whoever calls it computes a plain one.
    """
    path = tracer.path
    known = tracer.norms.get(path)
    if path == OUTSIDE or (known is not None and known.shape != elements.shape):
        return False
    tracer.norms[path] = elements if known is None else tracer.units.unite(known, elements)
    return True


def _told(tracer: Tracer) -> str:
    """What a normalisation that is not taken by owners is called."""
    return "a normalisation" if tracer.path == OUTSIDE else "a second normalisation of another shape"


def _write_normalised(tracer: Tracer, x: Tensor, labels: Tensor, results: Sequence[Tensor]) -> None:
    out, *statistics = results
    tracer.write(out, labels)
    for statistic in statistics:
        tracer.write(statistic, labels.amax().expand(statistic.shape))
        tracer.mix_later(x, statistic, range(x.ndim), "a statistic of a normalisation")
