"""Features for an input of which nobody said what it is."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from lightning_cf.errors import ContinualError
from lightning_cf.task_inference.features.base import Features, Values, leaves_of
from lightning_cf.task_inference.features.ngrams import HashedNgrams
from lightning_cf.task_inference.features.patches import PatchBank
from lightning_cf.task_inference.features.random_layer import READ, RandomFeatures
from lightning_cf.task_inference.features.units import FirstUnits
from lightning_cf.task_inference.readout import Readout
from lightning_cf.task_inference.sites import Sites

SMALLEST = 6
"""Images of fewer pixels on a side are seen as they are."""


PLAIN = 1024
"""Of grey images, more features than so many are a random layer's, behind twice as many of patches."""


def width_for(budget: int, classes: int, fixed: int = 0, each: float = 0.0) -> int:
    """How many features sums may have so that all that is kept stays within a budget of numbers.

    A symmetric matrix, and for each class its sums and its weights; mean and deviation of each feature; what makes a
    sample familiar; and what the features keep themselves.

    >>> width_for(150_000, 10)
    525

    Args:
        budget: numbers.
        classes: of all tasks.
        fixed: numbers that the features keep, however many they are.
        each: and for each of them.
    """
    left, linear = budget - fixed - classes**2 - 7 * classes - 10, 2 * classes + 2.5 + each
    return max(1, int((linear**2 + 2.0 * max(left, 0)) ** 0.5 - linear))


UNITS, TOKENS, IMAGES, VALUES = range(4)
"""What an input may be."""


def medium_of(seen: Readout, budget: int, *, within: bool = False) -> Int64[Tensor, "5"]:
    """What an input is, from some of the first task's data: kept, so that every later batch is seen in the same way.

    Its kind, how many features there are to be, an image's channels and smaller side, and the axis along which the
    length of samples varies from batch to batch (0: none); for tokens, one more than that which is padding instead.

    Args:
        seen: what the network shows of a few batches.
        budget: how many numbers may be kept.
        within: whether to look at units alone, whatever the input is.

    Raises:
        ContinualError: for values that vary in several sizes.
    """
    classes = seen.outputs.shape[1]
    if within or seen.x is None:
        units = sum(values.shape[-1] * 2 ** (values.ndim - 2) for values in seen.maps.values())
        return torch.tensor([UNITS, width_for(budget, classes, min(units, READ)), 0, 0, 0])
    leaves = leaves_of(seen)
    x = leaves[0]
    whole = not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool
    if len(leaves) == 1 and whole and x.ndim == 2:
        return torch.tensor([TOKENS, width_for(budget, classes), 0, 0, 0 if seen.padding is None else seen.padding + 1])
    if len(leaves) == 1 and x.is_floating_point() and x.ndim == 4 and min(x.shape[2:]) >= SMALLEST:
        channels, side = x.shape[1], min(x.shape[2:])
        return torch.tensor([IMAGES, _width_of_patches(budget, classes, channels, side), channels, side, 0])
    if len(seen.ragged) > 1:
        raise ContinualError(
            f"task_inference: samples of one batch have other sizes than those of another, along axes {seen.ragged}."
        )
    axis = (seen.ragged or (0,))[0]
    values = Values(axis).of({}, seen.part(torch.arange(len(seen.outputs)) < 1), _NOWHERE).shape[1]
    return torch.tensor([VALUES, width_for(budget, classes, min(values, READ)), 0, 0, axis])


def by_medium(medium: Int64[Tensor, "5"]) -> Features:
    """What suits an input's kind.

    Whole numbers are tokens, whose runs are counted; images are seen by their patches; other values by a random layer;
    and where the input is not made of tensors, the first task's units are, by one.

    Args:
        medium: as :func:`medium_of` gave it.
    """
    kind, width, channels, side, axis = medium.tolist()
    if kind == UNITS:
        return RandomFeatures(width, FirstUnits())
    if kind == TOKENS:
        bins = max(1, width // 9), max(1, width * 4 // 9), max(1, width * 4 // 9)
        return HashedNgrams(bins, padding=axis - 1 if axis else None)
    if kind == VALUES:
        return RandomFeatures(width, Values(axis) if axis else None)
    layered = channels == 1 and width > PLAIN
    bank = _patches(channels, side, 2 * PLAIN if layered else width)
    return RandomFeatures(width, bank) if layered else bank


def _patches(channels: int, side: int, width: int) -> PatchBank:
    """A bank whose patches are about a quarter of an image wide; colours on a coarser grid, and mirrored."""
    grid, size = _cells(channels, side)
    return PatchBank(max(1, width // (2 * grid**2)), size=size, grid=grid, mirrored=channels > 1)


def _cells(channels: int, side: int) -> tuple[int, int]:
    """Into how many cells a side is divided, and how many pixels of it a patch takes."""
    return 2 if channels > 1 else 4 if side >= 20 else 3, min(max(side // 4, 3), 7 if channels == 1 else 6)


def _width_of_patches(budget: int, classes: int, channels: int, side: int) -> int:
    """How many features a bank may have, or a random layer behind it, whose filters are kept too."""
    grid, size = _cells(channels, side)
    each = (channels * size**2 + 1) / (2 * grid**2)
    layered = width_for(budget, classes, int(2 * PLAIN * (each + 1)))
    plain = width_for(budget, classes, each=each)
    return plain if channels > 1 else layered if layered > PLAIN else min(plain, PLAIN)


_NOWHERE = Sites(None, (), {}, torch.empty(0, dtype=torch.long))
