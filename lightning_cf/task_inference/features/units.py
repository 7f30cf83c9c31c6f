"""Units of the first task, which no later task changes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cf.errors import ContinualError, check_count, check_flag
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
    """

    beside, maps = False, True

    def __init__(self, grid: int = 2, *, mirrored: bool = False) -> None:
        self.grid = check_count("FirstUnits", "grid", grid)
        self.variants = (MIRRORED,) if check_flag("FirstUnits", "mirrored", mirrored) else ()

    def of(self, fixed: Fixed, seen: Readout, sites: Sites) -> Rows:
        """The units' means in each cell, layer after layer."""
        found = self._all(seen, sites)
        return (found + self._all(seen.others[MIRRORED], sites)) / 2 if self.variants else found

    def _all(self, seen: Readout, sites: Sites) -> Rows:
        parts = [_pooled(seen.maps[site.weight], site, self.grid) for site in sites.hidden if site.weight in seen.maps]
        parts = [part for part in parts if part.shape[1]]
        if not parts:
            raise ContinualError("task_inference: the first task owns no hidden unit that a layer reads by itself.")
        return torch.cat(parts, dim=1)


def _pooled(values: Tensor, site: Site, grid: int) -> Rows:
    """The first task's own units of a layer, averaged within cells; positions lie between samples and units."""
    own = site.columns[site.own].to(values.device)
    values = values[..., own].float().nan_to_num(0.0, 0.0, 0.0)
    positions = values.ndim - 2
    if positions == 0:
        return values
    values = values.movedim(-1, 1)
    for axis in range(2, values.ndim):
        values = averaged(values, axis, grid)
    return values.flatten(1)
