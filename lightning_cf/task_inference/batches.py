"""What a network shows of several batches, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_cf.task_inference.readout import Readout


def joined(readouts: Sequence[Readout]) -> Readout:
    """What the network shows of several batches: its input and maps, not its other parts.

    Where samples of one batch are longer than those of another, only batches like the first are taken; where one has no
    input that is made of tensors, none has.
    """
    if any(readout.x is None for readout in readouts):
        readouts = [replace(readout, x=None) for readout in readouts]
    first, shapes = readouts[0], [_shapes(readout) for readout in readouts]
    ragged = sorted({axis for shape in shapes for axis in _apart(shape, shapes[0])})
    if ragged:
        alike = [readout for readout, shape in zip(readouts, shapes, strict=True) if shape == shapes[0]]
        return replace(joined(alike), ragged=tuple(ragged))
    others = {name: joined([readout.others[name] for readout in readouts]) for name in first.others}
    outputs = torch.cat([readout.outputs for readout in readouts])
    maps = {name: torch.cat([readout.maps[name] for readout in readouts]) for name in first.maps}
    x = first.x
    if x is not None:
        x = tree_map(lambda *parts: torch.cat(parts), x, *(readout.x for readout in readouts[1:]))
    return replace(first, inputs=None, read={}, given={}, outputs=outputs, others=others, x=x, maps=maps)


def numbers_in(readout: Readout) -> int:
    """How many numbers its input and maps hold."""
    own = sum(x.numel() for x in (*tree_leaves(readout.x), *readout.maps.values()) if isinstance(x, Tensor))
    return own + sum(numbers_in(other) for other in readout.others.values())


def _shapes(readout: Readout) -> list[torch.Size]:
    """The shapes of one sample, of the input's tensors or else of the maps."""
    return [x.shape[1:] for x in (readout.maps.values() if readout.x is None else tree_leaves(readout.x))]


def _apart(one: Sequence[torch.Size], other: Sequence[torch.Size]) -> set[int]:
    """Axes along which samples' shapes differ; of batches, so that the first is 1."""
    pairs = [pair for pair in zip(one, other, strict=True) if pair[0] != pair[1]]
    return {axis for a, b in pairs for axis, (m, n) in enumerate(zip_longest(a, b), 1) if m != n}
