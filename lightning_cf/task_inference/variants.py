"""Changes of a network's input, made from the input alone: none knows whether it is an image, a sequence or tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

Inputs = Shaped[Tensor, "batch ..."]


def rotated(x: Inputs, quarters: int) -> Inputs:
    """The last two dimensions turned by some quarters of a circle.

    >>> rotated(torch.tensor([[[1, 2], [3, 4]]]), 1).tolist()
    [[[2, 4], [1, 3]]]
    """
    return x.rot90(quarters, (-2, -1))


def flipped(x: Inputs) -> Inputs:
    """The last dimension in the opposite order: an image's mirror image.

    >>> flipped(torch.tensor([[[1, 2], [3, 4]]])).tolist()
    [[[2, 1], [4, 3]]]
    """
    return x.flip(-1)


ROTATIONS: Mapping[str, Callable[[Inputs], Inputs]] = {
    f"rotated_{90 * quarters}": partial(rotated, quarters=quarters) for quarters in (1, 2, 3)
}
"""Quarters of a circle, by name."""

VARIANTS: Mapping[str, Callable[[Inputs], Inputs]] = {**ROTATIONS, "mirrored": flipped}
"""Changes that a strategy may want to see at test time too, by name: the same at each call."""


def changed(batch: Any, name: str) -> Any:
    """A batch with its input changed: it is a tensor, or the first of several, which may be nested."""
    if not isinstance(batch, (tuple, list)):
        return VARIANTS[name](batch)
    parts = (changed(batch[0], name), *batch[1:])
    return list(parts) if isinstance(batch, list) else parts


def strange(x: Inputs, generator: torch.Generator) -> Inputs:
    """Samples whose values are the batch's and whose structure is not: what a task's data never looks like.

    Half of them, as drawn, have the order in a block reversed; four in ten have their blocks in another order; one in
    ten holds a block of another sample. Nothing is computed with values, so integers work too. One that comes out as it
    was is the sample itself: see ``differs``.

    Args:
        x: at least one dimension beside the batch.
        generator: on the CPU.
    """
    draw = torch.rand(len(x), generator=generator)
    found = torch.where(_along(draw < 0.1, x), exchanged(x, generator), permuted(x, generator))
    return torch.where(_along(draw < 0.5, x), found, mirrored(x, generator))


def differs(x: Inputs, others: Inputs) -> Bool[Tensor, "batch"]:
    """Which samples are not the same in both."""
    return (x != others).flatten(1).any(dim=1)


def exchanged(x: Inputs, generator: torch.Generator) -> Inputs:
    """Each sample with a block of another one: 0.3 to 0.7 of the size along each dimension that is cut."""
    order = torch.randperm(len(x), generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    inside = _along(torch.ones(len(x), dtype=torch.bool), x).cpu()
    for dim, cut in _cuts(x, generator):
        first, last = _block(x, dim, 0.3, 0.7, generator)
        place = torch.arange(x.shape[dim])
        inside = inside & _across((place >= first) & (place <= last) | ~cut[:, None], x, dim)
    return torch.where(inside.to(x.device), x[partner.to(x.device)], x)


def mirrored(x: Inputs, generator: torch.Generator) -> Inputs:
    """Each sample with the order of a block, along each dimension that is cut, reversed: 0.3 of its size to all."""
    for dim, cut in _cuts(x, generator):
        first, last = _block(x, dim, 0.3, 1.0, generator)
        place = torch.arange(x.shape[dim])
        inside = (place >= first) & (place <= last) & cut[:, None]
        place = torch.where(inside, first + last - place, place)
        x = x.gather(dim, _across(place, x, dim).to(x.device).expand(x.shape))
    return x


def permuted(x: Inputs, generator: torch.Generator) -> Inputs:
    """Each sample with two to four blocks, along each dimension that is cut, in another order."""
    for dim, cut in _cuts(x, generator):
        size = x.shape[dim]
        count = min(size, int(torch.randint(2, 5, (), generator=generator)))
        rank = torch.rand(len(x), count, generator=generator).argsort(dim=1)
        as_it_was = (rank == torch.arange(count)).all(dim=1)
        rank[as_it_was] = rank[as_it_was].flip(1)
        rank[~cut] = torch.arange(count)
        block = torch.arange(size) * count // size
        place = rank[:, block].argsort(dim=1, stable=True)
        x = x.gather(dim, _across(place, x, dim).to(x.device).expand(x.shape))
    return x


def _cuts(x: Inputs, generator: torch.Generator) -> list[tuple[int, Bool[Tensor, "batch"]]]:
    """The dimensions that can be cut, and in which samples they are: at least one in each."""
    dims = [dim for dim in range(1, x.ndim) if x.shape[dim] > 1]
    cut = torch.rand(len(x), len(dims), generator=generator) < 0.5
    one = torch.randint(len(dims), (len(x),), generator=generator)
    cut[torch.arange(len(x)), one] = True
    return [(dim, cut[:, number]) for number, dim in enumerate(dims)]


def _block(
    x: Inputs, dim: int, least: float, most: float, generator: torch.Generator
) -> tuple[Int64[Tensor, "batch 1"], Int64[Tensor, "batch 1"]]:
    """First and last place of a block along a dimension of each sample, of some share of its size."""
    size = x.shape[dim]
    share = least + (most - least) * torch.rand(len(x), 1, generator=generator)
    length = (size * share).round().long().clamp(1 if most < 1 else 2, size - 1 if most < 1 else size)
    first = (torch.rand(len(x), 1, generator=generator) * (size - length + 1)).long()
    return first, first + length - 1


def _along(values: Shaped[Tensor, "batch"], x: Inputs) -> Shaped[Tensor, "batch ..."]:
    """One value a sample, to be broadcast over it."""
    return values.reshape(-1, *[1] * (x.ndim - 1)).to(x.device)


def _across(values: Shaped[Tensor, "batch size"], x: Inputs, dim: int) -> Shaped[Tensor, "batch ..."]:
    """One value a place along a dimension of each sample, to be broadcast over the others."""
    return values.reshape(len(x), *(x.shape[d] if d == dim else 1 for d in range(1, x.ndim)))
