"""Of which layers one can see what they read, sample by sample: found out by running the network, not by their kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import product
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_cf.network.finite import sample_axis
from lightning_cf.network.forward import eval_mode, fresh, same_state
from lightning_cf.network.structure import layer_of
from lightning_cf.task_inference.readout import Recorder
from lightning_cf.task_inference.sites import Watched


@torch.no_grad()
def watch(
    module: nn.Module,
    weights: Iterable[str],
    heads: Mapping[str, Int64[Tensor, "_"]],
    run: Callable[[Any], Any],
    batch: Any,
    count: int | None = None,
    like: Watched | None = None,
) -> Watched:
    """Runs a network on a batch, and on one of another size, and sees which axis of what the layers read follows.

    Args:
        module: the network.
        weights: names of parameters whose layers to look at.
        heads: path of each output layer, with the output columns that it computes.
        run: runs the network on a batch.
        batch: whose tensors have the samples along their first axis, or along the second, behind tokens.
        count: how many samples there are, where that is known: output layers may compute them behind tokens too.
        like: what a trial on the same batch showed; without one, ``run`` gives predictions and targets where samples
            are counted.
    """
    names = list(weights)
    with eval_mode(module), same_state(module):
        found, hooked = _trial(module, names, heads, run, batch)
        if not found.columns:
            return Watched(frozenset(), whole=False)
        shape = found.columns[next(iter(found.columns))].shape
        places = [place for place in range(min(2, len(shape) - 1)) if count == shape[place]] or [0]
        again, turned, behind = found, False, places == [1]
        known = (False, 0) if like is None else (like.turned, int(like.behind))
        for axis, place in sorted(product((0, 1), places), key=known.__ne__):
            with suppress(Exception):  # whatever a user's forward pass raises for a batch of another size
                other = shape[place] - 1 if shape[place] > 2 else shape[place] + 1
                resized = _resized(batch, shape[place], other, axis)
                tried = _trial(module, names, heads, run, resized)[0]
                follows = bool(tried.columns) and _count(tried, place) == other
                if like is None and count == shape[place]:
                    follows = follows and len(run(fresh(resized))[0]) == other
                if follows or (place == places[0] and axis == 0):
                    again, turned, behind = tried, axis == 1, place == 1
                if follows:
                    break
    axes = {name: _axis(found, again, name, int(behind)) for name in found.found}
    seen = frozenset(name for name, axis in axes.items() if axis is not None)
    second = frozenset(name for name in seen if axes[name] == 1)
    whole = found.columns.keys() >= set(heads)
    return Watched(seen, second, hooked & seen, whole=whole, turned=turned, behind=behind)


def _trial(
    module: nn.Module, names: list[str], heads: Mapping[str, Tensor], run: Callable[[Any], Any], batch: Any
) -> tuple[Recorder, frozenset[str]]:
    recorder = Recorder(module, names, heads)
    layers, parameters = dict(module.named_modules()), dict(module.named_parameters())
    called: set[str] = set()
    handles = []
    for name in names:
        layer = layers.get(layer_of(name))
        if isinstance(layer, _LAYERS) and layer.weight is parameters[name]:

            def see(*_: Any, name: str = name) -> None:
                called.add(name)

            handles.append(layer.register_forward_pre_hook(see))
    try:
        with recorder.watching():
            run(fresh(batch))
    finally:
        for handle in handles:
            handle.remove()
    return recorder, frozenset(called)


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _count(recorder: Recorder, place: int) -> int:
    """How many samples a batch had, by what the first output layer computed, along one of its axes."""
    return next(iter(recorder.columns.values())).shape[place]


def _resized(batch: Any, count: int, other: int, axis: int) -> Any:
    """A batch of another size, made of its samples, which lie along an axis."""
    rows = torch.arange(other) % count

    def cut(x: Tensor) -> Tensor:
        along = sample_axis(x, count, turned=axis == 1)
        return x if along is None else x.index_select(along, rows.to(x.device))

    return tree_map_only(Tensor, cut, batch)


def _axis(one: Recorder, other: Recorder, name: str, place: int) -> int | None:
    """The axis along which the samples lie in what a layer reads; None where none follows the size of the batch."""
    shape, samples = one.found[name].shape, _count(one, place)
    if len(shape) < 2:
        return None
    if other is one or not other.columns or _count(other, place) == samples:  # no telling but by size
        return 0 if shape[0] % samples == 0 else (1 if len(shape) > 2 and shape[1] == samples else None)
    if name not in other.found or other.found[name].ndim != len(shape):
        return None
    changed = [axis for axis, (a, b) in enumerate(zip(shape, other.found[name].shape, strict=True)) if a != b]
    if changed == [0] and shape[0] % samples == 0:
        return 0 if other.found[name].shape[0] * samples == shape[0] * _count(other, place) else None
    if changed == [1] and len(shape) > 2 and shape[1] == samples and other.found[name].shape[1] == _count(other, place):
        return 1
    return None
