"""Owner-aware normalisation: what a task owns is normalised without what is free or owned by later tasks.

LayerNorm, RMSNorm and GroupNorm mix the units that they normalise together. Under exact isolation an element owned by
task k is normalised by statistics over the elements with an owner of at most k; a free one over all of them. What no
unit computes, such as the network's input, counts for every task and is normalised by itself.

A norm that a module's forward pass writes out, ``x * rsqrt(mean(x**2) + eps)``, stays as it is written: the pass runs
once for each owner, with its means and sums over what that owner may read, and each element is taken from its owner's
run. In a module that holds layers of its own the pass runs once, and every mean becomes one for each element.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_unflatten
from torch.utils._pytree import tree_structure as structure_of_tree

from lightning_cf.network.forward import Derived
from lightning_cf.network.tracing.reductions import Reduction
from lightning_cf.ownership.nested_norms import Nesting, nested_group_norm, nested_layer_norm, nested_rms_norm
from lightning_cf.utilities.hooks import takes_hooks

_PLAN = "_nesting"


def make_owner_aware(module: nn.Module, owners: Mapping[str, Int64[Tensor, "..."]]) -> None:
    """Makes norms owner-aware, in place, and those plain again that are not named or of which nobody owns anything.

    Parameters, buffers and their names stay as they are: the module gets a class derived from its own.

    Args:
        module: the network.
        owners: for norms by path, the owner of each element: of ``normalized_shape`` for LayerNorm and RMSNorm,
            ``(channels,)`` for GroupNorm; tasks from 0 on, FREE, or NO_OWNER for what no unit computes. A path may
            also name a module that calls ``F.layer_norm`` and the like itself, once or on elements of one shape; or one
            that writes its norm out, with owners of shape ``(1, width)`` for units along the last axis, and
            ``(1, width, 1, 1)`` for those along the third last; two ones in front for a module that is to run once.
    """
    wanted = {path: owner for path, owner in owners.items() if bool((owner >= 0).any())}
    for path, child in list(module.named_modules()):
        if path in wanted:
            if not isinstance(child, OwnerAware):
                object.__setattr__(child, "__class__", _derived(type(child)))
            known = child.__dict__.get(_PLAN)
            if known is None or not torch.equal(known.owners, wanted[path].cpu()):
                child.__dict__[_PLAN] = Nesting(wanted[path].cpu())
        elif isinstance(child, OwnerAware):
            object.__setattr__(child, "__class__", child.plain)
            del child.__dict__[_PLAN]
    for child in module.modules():
        if isinstance(child, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            _keep_off_the_fast_path(child, any(isinstance(norm, OwnerAware) for norm in child.modules()))


class OwnerAware(Derived):
    """What the class of an owner-aware norm has beside its own."""

    _nesting: Nesting

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain class, with owner-aware statistics."""
        assert isinstance(self, nn.Module)
        forward = self.plain.forward
        if forward is nn.LayerNorm.forward:
            return nested_layer_norm(_input(args, kwargs), self._nesting, self.weight, self.bias, self.eps)  # type: ignore[arg-type]
        if forward is nn.RMSNorm.forward:
            return nested_rms_norm(_input(args, kwargs), self._nesting, self.weight, self.eps)  # type: ignore[arg-type]
        if forward is nn.GroupNorm.forward:
            x, groups = _input(args, kwargs), self.num_groups
            return nested_group_norm(x, groups, self._nesting, self.weight, self.bias, self.eps)  # type: ignore[arg-type]
        if self._nesting.by_hand and not self._nesting.inline:
            return _run_by_owners(self, forward, self._nesting, args, kwargs)
        return _run(self, forward, _Calls(self._nesting), args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles by the plain class, since the derived one has no place in a file."""
        return _rebuilt, (self.plain,), self.__dict__


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else kwargs.get("input", kwargs.get("x"))
    return found


_DERIVED: dict[Any, Any] = {}


def _derived(base: Any) -> Any:
    if base not in _DERIVED:
        _DERIVED[base] = _derive(base)
    return _DERIVED[base]


def _derive(base: Any) -> Any:
    return type(f"OwnerAware{base.__name__}", (OwnerAware, base), {"plain": base, "__module__": base.__module__})


def _rebuilt(plain: type[nn.Module]) -> nn.Module:
    derived = _derived(plain)
    module: nn.Module = derived.__new__(derived)
    return module


def _run(module: nn.Module, forward: Any, calls: _Calls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    with _outside_children(module, calls), calls:
        return forward(module, *args, **kwargs)


def _run_by_owners(
    module: nn.Module, forward: Any, nesting: Nesting, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """A forward pass for each owner, and of each the elements that are its own."""
    runs = [_run(module, forward, _Calls(nesting, count), args, kwargs) for count in accumulate(nesting.sizes)]
    leaves = zip(*map(tree_leaves, runs), strict=True)
    return tree_unflatten([_own_elements(nesting, of_each) for of_each in leaves], structure_of_tree(runs[-1]))


def _own_elements(nesting: Nesting, of_each: Sequence[Any]) -> Any:
    if not isinstance(of_each[-1], Tensor):
        return of_each[-1]
    nesting.to(of_each[-1].device)
    places = nesting.order.split(nesting.sizes)
    parts = [x.index_select(nesting.axis, own) for x, own in zip(of_each, places, strict=True)]
    return torch.cat(parts, dim=nesting.axis).index_select(nesting.axis, nesting.inverse)


class _Calls(TorchFunctionMode):
    """Normalisations that a module calls as functions, or writes out, in a forward pass of its own.

    Args:
        nesting: who owns which element.
        count: of a norm that is written out: how many elements count, the first in the order of ``nesting``.
    """

    def __init__(self, nesting: Nesting, count: int | None = None) -> None:
        super().__init__()
        self.nesting = nesting
        self.count = count
        self.inside = 0
        """How many of the module's children run now: theirs are not its calls."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        if self.nesting.by_hand:
            found = Reduction.of(func, args, kwargs)
            if found is not None and self._over_units(found):
                return self._by_owners(found)
        names = _FUNCTIONS.get(func)
        if names is None:
            return func(*args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, weight, owners = given["input"], given.get("weight"), self.nesting.owners
        if "num_groups" in names:
            if owners.shape == x.shape[1:2]:
                return nested_group_norm(
                    x, given["num_groups"], self.nesting, weight, given.get("bias"), given.get("eps", 1e-5)
                )
        elif tuple(given["normalized_shape"]) == tuple(owners.shape):
            if "bias" in names:
                return nested_layer_norm(x, self.nesting, weight, given.get("bias"), given.get("eps", 1e-5))
            return nested_rms_norm(x, self.nesting, weight, given.get("eps"))
        return func(*args, **kwargs)

    def _over_units(self, found: Reduction) -> bool:
        width = self.nesting.owners.numel()
        if self.count == width or (self.count is None and not found.keeps_dims):
            return False
        return self.nesting.axis in found.dims and found.input.shape[self.nesting.axis] == width

    def _by_owners(self, found: Reduction) -> Any:
        nesting = self.nesting.to(found.input.device)
        if self.count is not None:
            return found.among(nesting.axis, nesting.order[: self.count])
        among = [nesting.order[:count] for count in accumulate(nesting.sizes)]
        return found.for_each(nesting.axis, among, nesting.level)


_LAYER = ("input", "normalized_shape", "weight", "bias", "eps")
_RMS = ("input", "normalized_shape", "weight", "eps")
_GROUP = ("input", "num_groups", "weight", "bias", "eps")
_FUNCTIONS: dict[Any, Sequence[str]] = {
    F.layer_norm: _LAYER,
    torch.layer_norm: _LAYER,
    F.rms_norm: _RMS,
    torch.rms_norm: _RMS,
    F.group_norm: _GROUP,
    torch.group_norm: _GROUP,
}


@contextmanager
def _outside_children(module: nn.Module, calls: _Calls) -> Iterator[None]:
    """Meanwhile ``calls`` knows whether a child of the module runs, whose operations are not the module's own."""

    def enter(*_: Any) -> None:
        calls.inside += 1

    def leave(*_: Any) -> None:
        calls.inside -= 1

    handles = [
        handle
        for child in filter(takes_hooks, module.children())
        for handle in (
            child.register_forward_pre_hook(enter, prepend=True),
            child.register_forward_hook(leave, always_call=True),
        )
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep_off_the_fast_path(layer: nn.Module, off: bool) -> None:
    """PyTorch's fused Transformer layer reads the norms' weights past their forward pass, in eval mode."""
    name = "use_nested_tensor" if isinstance(layer, nn.TransformerEncoder) else "activation_relu_or_gelu"
    kept = f"_{name}_before"
    if off and kept not in layer.__dict__:
        layer.__dict__[kept] = getattr(layer, name)
        setattr(layer, name, 0)
    elif not off and kept in layer.__dict__:
        setattr(layer, name, layer.__dict__.pop(kept))
