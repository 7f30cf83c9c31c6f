"""Units of the first task, which no later task changes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_cf.errors import ContinualError, check_count, check_flag, check_number
from lightning_cf.task_inference.features.base import Features, Fixed, Rows, averaged
from lightning_cf.task_inference.readout import Readout
from lightning_cf.task_inference.sites import Site, Sites

MIRRORED = "mirrored"
"""The change of the input that shows its mirror image."""


class FirstUnits(Features):
    """The units that the first task owns, in every layer, averaged over the cells of a coarse grid.

    What a task owns stays as it is to the last bit under ``isolation="exact"``, and so do these features; nothing is
    kept of them.

    Args:
        grid: cells along each axis of positions, such as height and width; tokens and steps in time are averaged too.
        mirrored: whether to average over the input and its mirror image, another forward pass.
        power: to which the averages are raised, by their size; below 1, a few that are large count for less (Perronnin
            et al. 2010).
    """

    beside, maps = False, True
    missing: ClassVar[str] = "the first task owns no hidden unit that a layer reads by itself"

    def __init__(self, grid: int = 2, *, mirrored: bool = False, power: float = 1.0) -> None:
        owner = type(self).__name__
        self.grid = check_count(owner, "grid", grid)
        self.power = check_number(owner, "power", power, above=0.0)
        self.variants = (MIRRORED,) if check_flag(owner, "mirrored", mirrored) else ()

    def of(self, fixed: Fixed, seen: Readout, sites: Sites) -> Rows:
        """The units' means in each cell, layer after layer."""
        found = self._all(seen, sites)
        found = (found + self._all(seen.others[MIRRORED], sites)) / 2 if self.variants else found
        return found if self.power == 1 else found.abs().pow(self.power) * found.sign()

    def _all(self, seen: Readout, sites: Sites) -> Rows:
        there = [site for site in self._chosen(seen, sites) if site.weight in seen.maps]
        parts = [_pooled(seen.maps[site.weight], site, self.grid) for site in there]
        parts = [part for part in parts if part.shape[1]]
        if not parts:
            raise ContinualError(f"task_inference: {self.missing}.")
        return torch.cat(parts, dim=1)

    def _chosen(self, seen: Readout, sites: Sites) -> Iterable[Site]:
        """The layers whose units are looked at."""
        return sites.hidden


class Pretrained(FirstUnits):
    """Units of layers that the first task owns whole, at every depth: a pretrained part that is not partitioned.

    ``PartitionCallback(exclude=["backbone"])`` leaves such a part whole to the first task, which may train it on, and
    from its seal on it stays bitwise what it is (McDonnell et al. 2023, RanPAC, look at the last such layer).

    Args:
        grid: cells along each axis of positions, such as height and width.
        mirrored: whether to average over the input and its mirror image, another forward pass.
        power: to which the averages are raised, by their size.
    """

    missing: ClassVar[str] = (
        "the first task owns no layer whole whose units another layer reads by itself, such as a part that is left out"
        " of the partition: PartitionCallback(exclude=[...])"
    )

    def __init__(self, grid: int = 1, *, mirrored: bool = False, power: float = 1.0) -> None:
        super().__init__(grid, mirrored=mirrored, power=power)

    def _chosen(self, seen: Readout, sites: Sites) -> Iterable[Site]:
        for site in sites.hidden:
            there = site.weight in seen.maps and len(site.columns) == seen.maps[site.weight].shape[-1]
            if there and bool(site.own.all()):
                yield site


def _pooled(values: Tensor, site: Site, grid: int) -> Rows:
    """The first task's own units of a layer, averaged within cells; positions lie between samples and units."""
    own = site.own.to(values.device)
    values = values[..., site.columns.to(values.device)[own]].float().nan_to_num(0.0, 0.0, 0.0)
    if site.units is not None and values.ndim == 2:
        values = _laid_out(values, site.units.to(values.device)[own])
    values = values.movedim(-1, 1)
    for axis in range(2, values.ndim):
        values = averaged(values, axis, grid)
    return values.flatten(1)


def _laid_out(values: Float[Tensor, "batch columns"], units: Int64[Tensor, "columns"]) -> Float[Tensor, "batch ..."]:
    """Columns that hold one unit at several positions, with the positions between samples and units again.

    As many as a square has are taken for one, row after row; others for a sequence.

    >>> _laid_out(torch.arange(8.0)[None], torch.tensor([3, 3, 3, 3, 5, 5, 5, 5]))[0, :, :, 0].tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    counts = units.unique(return_counts=True)[1]
    count = int(counts[0]) if len(counts) else 1
    if count == 1 or bool((counts != count).any()):
        return values
    side = math.isqrt(count)
    shape = (side, side) if side**2 == count else (count,)
    return values[:, units.argsort(stable=True)].reshape(len(values), len(counts), *shape).movedim(1, -1)
