"""Operations that put elements in other places and change none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_cf.network.tracing.rules.call import Call, Rule, Tracer
from lightning_cf.network.tracing.rules.unknown import unite
from lightning_cf.network.tracing.shadows import Origin, Shadow


def move(index: str | None = None) -> Rule:
    """Elements go to other places, none is changed.

    Args:
        index: the argument that says where to, and carries no units itself.
    """

    def rule(tracer: Tracer, call: Call) -> None:
        fixed = [] if index is None else [x for x in tree_leaves(call.given.get(index)) if isinstance(x, Tensor)]
        if call.given.get("accumulate") or any(bool(tracer.labels(x).any()) for x in fixed):
            return unite(tracer, call)
        moved = [x for x in call.tensors if all(x is not place for place in fixed)]
        written = any(call.in_place(x) and not call.func.is_view for x in call.results)
        alone = not written and all(tracer.is_weight(x) or tracer.is_constant(x) for x in moved)
        if written:
            for x in call.results:
                tracer.own(x)
        # Beside activations, entries of parameters are units.
        values = {id(x): tracer.shadows[x].labels if alone else tracer.labels(x) for x in moved}
        shadows = [tracer.shadows[x] for x in moved]
        try:
            labels = _run(call, lambda x: values[id(x)], fixed)
        except (RuntimeError, NotImplementedError):  # it cannot move labels
            return unite(tracer, call)
        live = any(shadow.live for shadow in shadows)
        for at, (result, label) in enumerate(zip(call.results, labels, strict=True)):
            if call.in_place(result):
                tracer.shadows[result].live |= live
            else:
                origins = _moved_origins(tracer, call, fixed, shadows, at) if alone else {}
                tracer.shadows[result] = Shadow(result, label, origins, live)
        return None

    return rule


def pack(tracer: Tracer, call: Call) -> None:
    """Sequences of a batch, one step of all of them after the other; how many there are in each is a shape."""
    move(index="lengths")(tracer, call)
    for sizes in call.results[1:]:
        tracer.shadows[sizes] = Shadow(sizes, torch.zeros(sizes.shape, dtype=torch.int64))


def _run(call: Call, values: Callable[[Tensor], Tensor], fixed: Sequence[Tensor]) -> list[Tensor]:
    try:
        return call.run(values, fixed)
    except (RuntimeError, NotImplementedError):  # no kernel for integers
        return [x.long() for x in call.run(lambda x: values(x).double(), fixed)]


def _moved_origins(
    tracer: Tracer, call: Call, fixed: Sequence[Tensor], shadows: Sequence[Shadow], at: int
) -> dict[str, Origin]:
    """What result number ``at`` is made from."""
    if len(shadows) == 1:
        (shadow,) = shadows
        shape = tuple(shadow.tensor.shape)
        return {
            name: origin.moved(shape, lambda x: _run(call, lambda _: x, fixed)[at])
            for name, origin in shadow.origins.items()
        }
    found = {}
    for name, origin in {name: origin for s in shadows if s.weight for name, origin in s.origins.items()}.items():

        def numbers(x: Tensor, name: str = name) -> Tensor:
            own = tracer.shadows[x].origins.get(name)
            return torch.full(x.shape, -1) if own is None else own.of(tuple(x.shape))

        found[name] = Origin(origin.shape, numbers=_run(call, numbers, fixed)[at], trained=origin.trained)
    return found
