"""Operations of which nothing is known, and numbers that leave the tensors."""

from __future__ import annotations

import torch

from lightning_cf.network.tracing.labels import NO_LABEL
from lightning_cf.network.tracing.rules.call import Call, Tracer
from lightning_cf.network.tracing.rules.elementwise import constant
from lightning_cf.network.tracing.shadows import Shadow, laid_out_like


def unite(tracer: Tracer, call: Call) -> None:
    """Nothing is known of the operation: whatever it meets shares one fate."""
    if all(tracer.is_constant(x) for x in call.tensors):
        return constant(tracer, call)
    weights = [x for x in call.tensors if tracer.is_weight(x)]
    others = [x for x in call.tensors if not tracer.is_weight(x)]
    if weights and call.results and not any(tracer.shadows[x].live for x in others):
        one = torch.zeros((), dtype=torch.int64)
        if not tracer.apart:
            one = tracer.units.new(1)[0]  # couples all that it will scale
            for x in weights:
                tracer.use(x, "scale", one.expand(x.shape))
            for x in others:
                tracer.units.unite(one, tracer.shadows[x].labels)
        for result in call.results:
            tracer.shadows[result] = Shadow(result, laid_out_like(result, one))
        return None
    if not call.results:
        for x in call.tensors:
            tracer.read(x, call.name)
        return None
    one = torch.zeros((), dtype=torch.int64)
    for x in others:
        if x.numel():
            found = tracer.mix(x, range(x.ndim), call.name, unknown=True).reshape(())
            one = one if tracer.apart else tracer.units.unite(one, found)
    if one == NO_LABEL and weights:
        one = tracer.units.new(1)[0]
    for x in weights:
        tracer.use(x, "scale", one.expand(x.shape))
    live = any(tracer.shadows[x].live for x in call.tensors)
    for result in [*call.results, *call.written]:
        tracer.write(result, one.expand(result.shape), live=live)
    return None


def read(tracer: Tracer, call: Call) -> None:
    """A number leaves the tensors, and what is done with it cannot be seen."""
    for x in call.tensors:
        tracer.read(x, call.name)
