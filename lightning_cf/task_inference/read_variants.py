"""One batch, and the same with its input changed, as the strategies of task inference look at it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path, tree_map, tree_map_only

from lightning_cf.network.forward import eval_mode, fresh, same_state
from lightning_cf.task_inference.readout import Readout, read
from lightning_cf.task_inference.registry import STRATEGIES
from lightning_cf.task_inference.sites import Sites
from lightning_cf.task_inference.variants import changed
from lightning_cf.utilities.randomness import isolated_generators, seed_all


def variants_of(names: Sequence[str]) -> tuple[str, ...]:
    """The changes of the input that some strategies look at; names that there are not have none."""
    known = [STRATEGIES[name] for name in names if name in STRATEGIES]
    return tuple(dict.fromkeys(variant for strategy in known for variant in strategy.variants))


def read_all(
    module: nn.Module,
    tasks: Sequence[Sites],
    run: Callable[[Any], Any],
    batch: Any,
    variants: Sequence[str],
    *,
    alone: bool = False,
) -> Readout:
    """What a network shows of a batch, and of the batch with its input changed.

    Args:
        module: the network.
        tasks: what to look at.
        run: runs the network on a batch.
        batch: an input, or a tuple whose first is the input.
        variants: names of the changes.
        alone: whether the batch is the input and nothing else, though it may be a tuple of several.
    """
    others = {name: _read(module, tasks, run, changed(batch, name), alone) for name in variants}
    others = {name: replace(other, inputs=None) for name, other in others.items()}
    return replace(_read(module, tasks, run, batch, alone), others=others)


def _read(module: nn.Module, tasks: Sequence[Sites], run: Callable[[Any], Any], batch: Any, alone: bool) -> Readout:
    calls: list[Any] = []
    with module.register_forward_pre_hook(lambda _, *given: calls.append(given), with_kwargs=True):
        found = read(module, tasks, partial(run, fresh(batch)))
    device, count = found.outputs.device, len(found.outputs)
    x = _given(module, *calls[-1]) if calls else batch if alone else input_of(module, batch)
    x = _without(tasks[0].unread, tree_map_only(Tensor, lambda leaf: leaf.detach().to(device), x))
    whole = not any(sites.turned for sites in tasks) and all(_by_rows(leaf, count) for leaf in tree_leaves(x))
    return replace(found, x=x if whole else None, padding=_padding_of(module))


def _padding_of(module: nn.Module) -> int | None:
    """The token that all embeddings take for padding which know one."""
    known = {
        layer.padding_idx
        for layer in module.modules()
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.padding_idx is not None
    }
    return known.pop() if len(known) == 1 else None


def _without(places: Collection[str], x: Any) -> Any:
    """An input without the tensors at some places."""
    leaves = tree_leaves_with_path(x)
    kept = tuple(leaf for path, leaf in leaves if keystr(path) not in places)
    return x if len(kept) == len(leaves) else kept[0] if len(kept) == 1 else kept or None


def _by_rows(leaf: Any, count: int) -> bool:
    """Whether a part of an input is a plain tensor with one row a sample."""
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.ndim > 0 and len(leaf) == count


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a forward pass was given, but for arguments without a tensor: the same however arguments were named.

    So batches whose input an ``evaluate=`` or the module's hooks prepare are seen as predictions will see theirs.
    """
    try:
        if _one_by_name(module, args, kwargs):
            return _sorted(args[0]) if any(isinstance(leaf, Tensor) for leaf in tree_leaves(args[0])) else None
        signature = inspect.signature(module.forward)
        given = signature.bind(*args, **kwargs).arguments
        last = next((name for name, x in signature.parameters.items() if x.kind is x.VAR_KEYWORD), "")
        values = [*(x for name, x in given.items() if name != last), *_sorted(given.get(last, {})).values()]
    except (TypeError, ValueError):  # as where it is no function of Python's
        values = [*args, *_sorted(kwargs).values()]
    values = [_sorted(x) for x in values if any(isinstance(leaf, Tensor) for leaf in tree_leaves(x))]
    return values[0] if len(values) == 1 else tuple(values) or None


def _one_by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a forward pass was given one argument that has a name: its signature, slow to ask for, says no more."""
    function = type(module).forward
    code = (
        None if "forward" in vars(module) or hasattr(function, "__wrapped__") else getattr(function, "__code__", None)
    )
    return code is not None and code.co_argcount > 1 and len(args) == 1 and not kwargs


def _sorted(x: Any) -> Any:
    """A dictionary in the order of its names, whoever made it; else what it is."""
    plain = type(x) is dict and all(isinstance(name, str) for name in x)
    return {name: x[name] for name in sorted(x)} if plain else x


@torch.no_grad()
def unread(module: nn.Module, run: Callable[[Any], Tensor], batch: Any) -> frozenset[str]:
    """Places of the tensors, among those that the forward pass is given, on which no prediction hangs.

    Labels for a loss of its own are such, in whatever form they come. Each is tried with other numbers in its place.

    Args:
        module: the network.
        run: gives predictions for a batch, by the module's forward pass.
        batch: of the task's data.
    """
    places: list[str] = []

    def found(place: str | None = None) -> Tensor:
        def swap(_: nn.Module, *given: Any) -> Any:
            leaves = {keystr(path): leaf for path, leaf in tree_leaves_with_path(_given(module, *given))}
            if place is None:
                places[:] = leaves
                return None
            return tree_map(lambda leaf: (leaf == 0).to(leaf.dtype) if leaf is leaves[place] else leaf, given)

        seed_all(0)
        with module.register_forward_pre_hook(swap, with_kwargs=True):
            return run(fresh(batch))

    def hangs(place: str) -> bool:
        try:
            return not torch.equal(found(place), plain)
        except Exception:  # whatever a forward pass raises for such numbers, such as samples of length 0
            return True

    with isolated_generators(), eval_mode(module), same_state(module):
        plain = found()
        return frozenset(place for place in places if len(places) > 1 and not hangs(place))


def input_of(module: nn.Module, batch: Any, *, nested: bool = False) -> Any:
    """The input in a batch, the first of a pair; see :func:`as_called`."""
    return as_called(module, batch[0] if isinstance(batch, (tuple, list)) else batch, nested=nested)


def as_called(module: nn.Module, x: Any, *, nested: bool) -> Any:
    """An input as ``call`` hands it on: several arguments in a tuple, or a forward pass' only one.

    Args:
        module: its signature decides, where it takes either one argument or as many as the input has parts.
        x: one input, which may be a list or a tuple, or several in such.
        nested: whether forward passes were given a list or a tuple as one argument before.
    """
    if not isinstance(x, (tuple, list)) or (isinstance(x, tuple) and len(x) == 1):
        return x
    parts_nested = any(isinstance(part, (tuple, list)) for part in x)
    if _takes(module, 1) and (not _takes(module, len(x)) or (nested and not parts_nested)):
        return x if isinstance(x, list) else (x,)
    return tuple(x)


def _takes(module: nn.Module, count: int) -> bool:
    """Whether a forward pass can do with so many arguments."""
    try:
        inspect.signature(module.forward).bind(*[None] * count)
    except (TypeError, ValueError):
        return False
    return True
