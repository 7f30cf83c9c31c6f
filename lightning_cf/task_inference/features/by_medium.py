"""Features for an input of which nobody said what it is."""

from __future__ import annotations

import torch

from lightning_cf.task_inference.features.base import Features, leaves_of
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


def by_medium(seen: Readout, budget: int) -> Features:
    """What suits an input's kind: the same for every batch of it.

    Whole numbers are tokens, whose runs are counted; images are seen by their patches; other values by a random layer;
    and where the input is not made of tensors, the first task's units are, by one.

    Args:
        seen: what the network shows of a batch.
        budget: how many numbers may be kept.
    """
    width = width_for(budget, seen.outputs.shape[1])
    if seen.x is None:
        return RandomFeatures(width, FirstUnits())
    leaves = leaves_of(seen)
    x = leaves[0]
    if len(leaves) == 1 and not x.is_floating_point() and x.dtype != torch.bool and x.ndim == 2:
        return HashedNgrams((max(1, width // 9), max(1, width * 4 // 9), max(1, width * 4 // 9)))
    if len(leaves) == 1 and x.is_floating_point() and x.ndim == 4 and min(x.shape[2:]) >= SMALLEST:
        grey = x.shape[1] == 1
        bank = _patches(x.shape[1], min(x.shape[2:]), 2 * PLAIN if grey and width > PLAIN else width)
        return RandomFeatures(width, bank) if grey and width > PLAIN else bank
    return RandomFeatures(width)


def _patches(channels: int, side: int, width: int) -> PatchBank:
    """A bank whose patches are about a quarter of an image wide; colours on a coarser grid, and mirrored."""
    grid = 2 if channels > 1 else 4 if side >= 20 else 3
    size = min(max(side // 4, 3), 7 if channels == 1 else 6)
    return PatchBank(max(1, width // (2 * grid**2)), size=size, grid=grid, mirrored=channels > 1)
