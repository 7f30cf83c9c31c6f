"""Features for an input of which nobody said what it is."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from lightning_cf.errors import ContinualError
from lightning_cf.task_inference.features.base import Features, Values, leaves_of
from lightning_cf.task_inference.features.ngrams import HashedNgrams
from lightning_cf.task_inference.features.patches import PatchBank
from lightning_cf.task_inference.features.random_layer import RandomFeatures
from lightning_cf.task_inference.features.units import FirstUnits
from lightning_cf.task_inference.readout import Readout

SMALLEST = 6
"""Images of fewer pixels on a side are seen as they are."""


PLAIN = 1024
"""Of grey images, more features than so many are a random layer's, behind twice as many of patches."""


def width_for(budget: int, classes: int) -> int:
    """How many features sums may have so that all that is kept stays within a budget of numbers.

    A symmetric matrix, and for each class its sums and its weights; mean and deviation of each feature.

    >>> width_for(150_000, 10)
    525

    Args:
        budget: numbers.
        classes: of all tasks.
    """
    linear = 2 * classes + 3
    return max(1, int((linear**2 + 2.0 * budget) ** 0.5 - linear))


UNITS, TOKENS, IMAGES, VALUES = range(4)
"""What an input may be."""


def medium_of(seen: Readout, budget: int) -> Int64[Tensor, "5"]:
    """What an input is, from some of the first task's data: kept, so that every later batch is seen in the same way.

    Its kind, how many features there are to be, an image's channels and smaller side, and the axis along which the
    length of samples varies from batch to batch (0: none).

    Args:
        seen: what the network shows of a few batches.
        budget: how many numbers may be kept.

    Raises:
        ContinualError: for values that vary in several sizes.
    """
    width = width_for(budget, seen.outputs.shape[1])
    if seen.x is None:
        return torch.tensor([UNITS, width, 0, 0, 0])
    leaves = leaves_of(seen)
    x = leaves[0]
    whole = not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool
    if len(leaves) == 1 and whole and x.ndim == 2:
        return torch.tensor([TOKENS, width, 0, 0, 0])
    if len(leaves) == 1 and x.is_floating_point() and x.ndim == 4 and min(x.shape[2:]) >= SMALLEST:
        return torch.tensor([IMAGES, width, x.shape[1], min(x.shape[2:]), 0])
    if len(seen.ragged) > 1:
        raise ContinualError(
            f"task_inference: samples of one batch have other sizes than those of another, along axes {seen.ragged}."
        )
    return torch.tensor([VALUES, width, 0, 0, *(seen.ragged or (0,))])


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
        return HashedNgrams((max(1, width // 9), max(1, width * 4 // 9), max(1, width * 4 // 9)))
    if kind == VALUES:
        return RandomFeatures(width, Values(axis) if axis else None)
    layered = channels == 1 and width > PLAIN
    bank = _patches(channels, side, 2 * PLAIN if layered else width)
    return RandomFeatures(width, bank) if layered else bank


def _patches(channels: int, side: int, width: int) -> PatchBank:
    """A bank whose patches are about a quarter of an image wide; colours on a coarser grid, and mirrored."""
    grid = 2 if channels > 1 else 4 if side >= 20 else 3
    size = min(max(side // 4, 3), 7 if channels == 1 else 6)
    return PatchBank(max(1, width // (2 * grid**2)), size=size, grid=grid, mirrored=channels > 1)
