"""What each tensor operation does to units: the tracer's table, one line an operation.

Operations that PyTorch tags as pointwise, and views, need no line. What has no line unites the units that it meets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_cf.labels import NONE, Units
from lightning_cf.shadows import Origin, Shadow, Shadows, laid_out_like
from lightning_cf.structure import Role

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """One operation that ran.

    Attributes:
        func: the operator.
        args: its positional arguments.
        kwargs: its keywords.
        given: all arguments by their names in the operator's schema, defaults included.
        tensors: every tensor among them.
        results: every tensor that it returned.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: Mapping[str, Any]
    tensors: list[Tensor]
    results: list[Tensor]

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Call:
        """Binds the arguments."""
        given = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        given |= dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        return cls(func, args, kwargs, given, tensors, [x for x in tree_leaves(out) if isinstance(x, Tensor)])

    @property
    def name(self) -> str:
        """The operator's name."""
        return str(self.func.overloadpacket)

    def in_place(self, x: Tensor) -> bool:
        """Whether a result is one of the arguments."""
        return any(x is tensor for tensor in self.tensors)

    def run(self, change: Callable[[Tensor], Tensor], fixed: Sequence[Tensor] = ()) -> list[Tensor]:
        """Runs the operation on changed tensors; those in ``fixed`` stay."""

        def value(x: Tensor) -> Tensor:
            return x if any(x is tensor for tensor in fixed) else change(x)

        args, kwargs = tree_map_only(Tensor, value, (self.args, self.kwargs))
        if self.func.overloadpacket is aten._to_copy:
            return [args[0].clone()]
        if self.func.overloadpacket is aten.constant_pad_nd:
            args = args[:2]
        return [x for x in tree_leaves(self.func(*args, **kwargs)) if isinstance(x, Tensor)]


@runtime_checkable
class Tracer(Protocol):
    """What a rule may ask of the tracer."""

    units: Units
    apart: bool
    shadows: Shadows
    norms: dict[str, Tensor]

    @property
    def path(self) -> str:
        """Path of the innermost module that runs now."""
        ...

    def labels(self, x: Tensor) -> Tensor:
        """Unit labels of an activation."""
        ...

    def is_weight(self, x: Any) -> bool:
        """Whether ``x`` is made from parameters alone, entry by entry."""
        ...

    def is_constant(self, x: Tensor) -> bool:
        """Whether ``x`` depends on neither the input nor on anything that trains."""
        ...

    def write(self, out: Tensor, labels: Tensor, *, live: bool = True) -> None:
        """Puts labels beside a result."""
        ...

    def use(self, x: Tensor | None, role: Role, target: Tensor, source: Tensor | None = None) -> None:
        """Notes what the entries of a parameter write to and read."""
        ...

    def mix(self, x: Tensor, dims: Sequence[int], operation: str, *, unknown: bool = False) -> Tensor:
        """Unites the units of ``x`` along dims."""
        ...

    def mix_later(self, x: Tensor, result: Tensor, dims: Sequence[int], operation: str) -> None:
        """Unites them when a later operation reads ``result``."""
        ...

    def own(self, x: Tensor) -> None:
        """Gives a constant that is written to labels of its own."""
        ...

    def read(self, x: Tensor, operation: str) -> None:
        """Notes that a value left the tensors."""
        ...


Rule = Callable[[Any, Call], None]


# Movements


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


# Elementwise operations


def pointwise(tracer: Tracer, call: Call) -> None:
    """Element by element, broadcast: what meets shares one fate."""
    weights = [x for x in call.tensors if tracer.is_weight(x)]
    others = [x for x in call.tensors if not tracer.is_weight(x)]
    shape = call.results[0].shape
    joined = torch.zeros(shape, dtype=torch.int64)
    if weights and not any(tracer.shadows[x].live for x in others):
        for x in call.tensors:
            joined = tracer.units.unite(joined, tracer.shadows[x].labels)
        origins = _joined_origins(tracer, weights, tuple(shape))
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


def _joined_origins(tracer: Tracer, weights: Sequence[Tensor], shape: tuple[int, ...]) -> dict[str, Origin]:
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
    """Complex numbers as pairs."""
    labels = tracer.labels(call.given["self"])
    tracer.write(call.results[0], labels[..., None].expand(call.results[0].shape))


def as_complex(tracer: Tracer, call: Call) -> None:
    """Pairs as complex numbers."""
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


# Mixtures along dims


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
        mixes = any(bool(((resolved != resolved.amax(dim, keepdim=True)) & (resolved != NONE)).any()) for dim in dims)
        if not mixes:  # positions, or one unit
            for dim in dims:
                labels = labels.amax(dim, keepdim=True) if labels.shape[dim] else labels
        elif keeps:
            pass
        else:
            labels = tracer.mix(x, dims, call.name) if tracer.apart else labels
            for dim in dims:
                labels = labels.amax(dim, keepdim=True)
        for result in call.results:
            tracer.write(result, labels.expand(result.shape) if result.ndim == x.ndim else labels.reshape(result.shape))
            if mixes:
                tracer.mix_later(x, result, dims, call.name)
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
    origins = _joined_origins(tracer, [v, g], tuple(v.shape))
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


# Contractions


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
        tracer.write(out, labels, live=any(tracer.shadows[x].live for x in call.tensors))
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

    resolved = tracer.units.resolve(x)
    top = resolved.amax(-1, keepdim=True)
    positions = bool(((resolved == top) | (resolved == NONE)).all()) and bool((top != top.amax(-2, keepdim=True)).any())
    if positions:  # each row is one unit, so the weight mixes positions within units
        units = tracer.units.unite_along(x, [-1])
        tracer.use(weight, "scale", units.movedim(-2, 0)[..., None])
        return units.expand(shape)
    batch = [] if x.ndim == 2 or not _repeated(tracer, weight) else [0]
    sources = tracer.units.unite_along(x, [-2, *batch])
    lead = (1,) * len(shape[:-2]) if batch else shape[:-2]
    units = tracer.units.new(torch.Size((*lead, shape[-1])).numel()).reshape(*lead, 1, shape[-1])
    tracer.use(weight, "weight", as_weight(units), as_weight(sources.mT))
    return units.expand(shape)


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


# Normalisations


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
    """LayerNorm and RMSNorm over the last ``dims`` dims; where they hold several units, see ``normalisation.py``."""
    labels = tracer.labels(x)
    over = list(range(x.ndim - dims, x.ndim))
    elements = tracer.units.unite_along(labels, range(x.ndim - dims)).reshape(x.shape[-dims:])
    tracer.use(scale, "scale", elements)
    tracer.use(shift, "shift", elements)
    resolved = tracer.units.resolve(elements)
    if int((resolved.unique() != NONE).sum()) > 1 and not _by_owners(tracer, elements):
        tracer.mix(x, over, "a second normalisation of another shape")
    _write_normalised(tracer, x, labels, results)


def group_norm(tracer: Tracer, call: Call) -> None:
    """Groups of channels, each by statistics over all of it."""
    x, groups = call.given["input"], call.given["group"]
    labels = tracer.labels(x)
    channels = tracer.units.unite_along(labels, [0, *range(2, x.ndim)]).flatten()
    tracer.use(call.given["weight"], "scale", channels)
    tracer.use(call.given["bias"], "shift", channels)
    grouped = tracer.units.resolve(channels).reshape(groups, -1)
    if bool((grouped != grouped[:, :1]).any()) and not _by_owners(tracer, channels):
        tracer.mix(x, range(1, x.ndim), "a second normalisation of another shape")
    _write_normalised(tracer, x, labels, call.results)


def _by_owners(tracer: Tracer, elements: Tensor) -> bool:
    """Leaves a normalisation to its module, which normalises by owners; False if it does so with another shape."""
    path = tracer.path
    known = tracer.norms.get(path)
    if known is not None and (known.shape != elements.shape):
        return False
    tracer.norms[path] = elements if known is None else tracer.units.unite(known, elements)
    return True


def _write_normalised(tracer: Tracer, x: Tensor, labels: Tensor, results: Sequence[Tensor]) -> None:
    out, *statistics = results
    tracer.write(out, labels)
    for statistic in statistics:
        tracer.write(statistic, labels.amax().expand(statistic.shape))
        tracer.mix_later(x, statistic, range(x.ndim), "a statistic of a normalisation")


# Everything else


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
    if one == NONE and weights:
        one = tracer.units.new(1)[0]
    for x in weights:
        tracer.use(x, "scale", one.expand(x.shape))
    written = [x for x, a in zip(call.args, call.func._schema.arguments, strict=False) if _is_written(a)]
    live = any(tracer.shadows[x].live for x in call.tensors)
    for result in [*call.results, *(x for x in written if isinstance(x, Tensor))]:
        tracer.write(result, one.expand(result.shape), live=live)
    return None


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def read(tracer: Tracer, call: Call) -> None:
    """A number leaves the tensors, and what is done with it cannot be seen."""
    for x in call.tensors:
        tracer.read(x, call.name)


TABLE: dict[Any, Rule] = {
    # movements
    aten._to_copy: move(),
    aten._unsafe_view: move(),
    aten.cat: move(),
    aten.channel_shuffle: move(),
    aten.clone: move(),
    aten.constant_pad_nd: move(),
    aten.contiguous: move(),
    aten.copy_: move(),
    aten.diag_embed: move(),
    aten.diagonal_copy: move(),
    aten.flip: move(),
    aten.gather: move(index="index"),
    aten.im2col: move(),
    aten.index: move(index="indices"),
    aten.index_put: move(index="indices"),
    aten.index_put_: move(index="indices"),
    aten.index_select: move(index="index"),
    aten.lift_fresh: move(),
    aten.lift_fresh_copy: move(),
    aten.masked_select: move(index="mask"),
    aten.native_channel_shuffle: move(),
    aten.pixel_shuffle: move(),
    aten.pixel_unshuffle: move(),
    aten.reflection_pad1d: move(),
    aten.reflection_pad2d: move(),
    aten.reflection_pad3d: move(),
    aten.repeat: move(),
    aten.replication_pad1d: move(),
    aten.replication_pad2d: move(),
    aten.replication_pad3d: move(),
    aten.roll: move(),
    aten.rot90: move(),
    aten.slice_scatter: move(),
    aten.select_scatter: move(),
    aten.stack: move(),
    aten.take: move(index="index"),
    aten.tril: move(),
    aten.triu: move(),
    aten.unfold_copy: move(),
    aten.unsafe_split: move(),
    aten.unsafe_split_with_sizes: move(),
    aten.upsample_nearest1d: move(),
    # elementwise, beside those that PyTorch tags
    aten._prelu_kernel: pointwise,
    aten.abs_: pointwise,
    aten.bernoulli: pointwise,
    aten.complex: pointwise,
    aten.view_as_complex: as_complex,
    aten.view_as_real: as_real,
    aten.fake_quantize_per_tensor_affine_cachemask: pointwise,
    aten.glu: glu,
    aten.hardsigmoid: pointwise,
    aten.hardsigmoid_: pointwise,
    aten.hardswish: pointwise,
    aten.hardswish_: pointwise,
    aten.hardtanh_: pointwise,
    aten.masked_fill: pointwise,
    aten.log_sigmoid_forward: pointwise,
    aten.masked_fill_: pointwise,
    aten.mish_: pointwise,
    aten.polar: pointwise,
    aten.rrelu_with_noise: pointwise,
    aten.rrelu_with_noise_: pointwise,
    # what depends on shapes or on chance alone
    aten.arange: constant,
    aten.bernoulli_: fill,
    aten.empty: constant,
    aten.empty_like: constant,
    aten.empty_permuted: constant,
    aten.empty_strided: constant,
    aten.exponential_: fill,
    aten.eye: constant,
    aten.fill_: fill,
    aten.full: constant,
    aten.full_like: constant,
    aten.linspace: constant,
    aten.new_empty: constant,
    aten.new_empty_strided: constant,
    aten.new_full: constant,
    aten.new_ones: constant,
    aten.new_zeros: constant,
    aten.normal_: fill,
    aten.ones: constant,
    aten.ones_like: constant,
    aten.rand: constant,
    aten.rand_like: constant,
    aten.randint: constant,
    aten.randint_like: constant,
    aten.randn: constant,
    aten.randn_like: constant,
    aten.random_: fill,
    aten.randperm: constant,
    aten.scalar_tensor: constant,
    aten.uniform_: fill,
    aten.zero_: fill,
    aten.zeros: constant,
    aten.zeros_like: constant,
    # along dims
    aten._fft_c2c: along(),
    aten._fft_c2r: along(),
    aten._fft_r2c: along(),
    aten._log_softmax: along(keeps=True),
    aten._safe_softmax: along(keeps=True),
    aten._softmax: along(keeps=True),
    aten.all: along(),
    aten.amax: along(),
    aten.amin: along(),
    aten.aminmax: along(),
    aten.any: along(),
    aten.argmax: along(),
    aten.argmin: along(),
    aten.count_nonzero: along(),
    aten.cummax: along(),
    aten.cummin: along(),
    aten.cumprod: along(),
    aten.cumsum: along(),
    aten.kthvalue: along(),
    aten.linalg_vector_norm: along(),
    aten.logcumsumexp: along(),
    aten.logsumexp: along(),
    aten.max: along(),
    aten.mean: along(),
    aten.median: along(),
    aten.min: along(),
    aten.mode: along(),
    aten.nansum: along(),
    aten.norm: along(),
    aten.prod: along(),
    aten.sort: along(),
    aten.std: along(),
    aten.std_mean: along(),
    aten.sum: along(),
    aten.topk: along(),
    aten.var: along(),
    aten.var_mean: along(),
    # windows of positions
    aten._adaptive_avg_pool2d: windows(2),
    aten._adaptive_avg_pool3d: windows(3),
    aten._upsample_bicubic2d_aa: windows(2),
    aten._upsample_bilinear2d_aa: windows(2),
    aten._upsample_nearest_exact1d: windows(1),
    aten._upsample_nearest_exact2d: windows(2),
    aten._upsample_nearest_exact3d: windows(3),
    aten.adaptive_max_pool2d: windows(2),
    aten.adaptive_max_pool3d: windows(3),
    aten.avg_pool2d: windows(2),
    aten.avg_pool3d: windows(3),
    aten.col2im: col2im,
    aten.fractional_max_pool2d: windows(2),
    aten.fractional_max_pool3d: windows(3),
    aten.grid_sampler_2d: sample,
    aten.grid_sampler_3d: sample,
    aten.max_pool2d_with_indices: windows(2),
    aten.max_pool3d_with_indices: windows(3),
    aten.max_unpool2d: unpool(2),
    aten.max_unpool3d: unpool(3),
    aten.upsample_bicubic2d: windows(2),
    aten.upsample_bilinear2d: windows(2),
    aten.upsample_linear1d: windows(1),
    aten.upsample_nearest2d: windows(2),
    aten.upsample_nearest3d: windows(3),
    aten.upsample_trilinear3d: windows(3),
    # contractions
    aten._trilinear: bilinear,
    aten.addbmm: unite,
    aten.addmm: contract("mat1", "mat2", "self"),
    aten.baddbmm: contract("batch1", "batch2", "self"),
    aten.bmm: contract("self", "mat2"),
    aten.convolution: convolution,
    aten.dot: contract("self", "tensor"),
    aten._embedding_bag: embedding,
    aten._embedding_bag_forward_only: embedding,
    aten.embedding: embedding,
    aten.mm: contract("self", "mat2"),
    aten.mv: contract("self", "vec"),
    aten.vdot: contract("self", "other"),
    # normalisations
    aten._native_batch_norm_legit: batch_norm,
    aten._native_batch_norm_legit_no_training: batch_norm,
    aten._weight_norm_interface: weight_norm,
    aten.cudnn_batch_norm: batch_norm,
    aten.native_batch_norm: batch_norm,
    aten.native_group_norm: group_norm,
    aten.native_layer_norm: layer_norm,
    # what leaves the tensors
    aten._assert_async: state,
    aten._assert_tensor_metadata: state,
    aten._local_scalar_dense: read,
    aten.equal: read,
    aten.is_nonzero: read,
    aten.sym_size: state,
}


def rule_of(func: Any) -> tuple[Rule, bool]:
    """The rule of an operator, and whether it treats each element on its own, wherever it goes."""
    operation = func.overloadpacket
    if func in _BINARY:
        return pointwise, False
    if operation in TABLE:
        rule = TABLE[operation]
        return rule, rule is pointwise or operation in _TRANSPARENT
    if func.is_view or torch.Tag.inplace_view in func.tags:
        return move(), True
    if torch.Tag.pointwise in func.tags:
        return pointwise, True
    return unite, False


_BINARY = {aten.max.other, aten.min.other}
_TRANSPARENT = {aten._to_copy, aten._unsafe_view, aten.clone, aten.flip, aten.roll}
