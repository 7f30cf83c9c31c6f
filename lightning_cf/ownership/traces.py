"""Traces that exact isolation leaves in weights: some rows are cut off from units that the others read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from lightning_cf.network.structure import Structure

FEWEST = 4
"""Zeros in a tensor that are no accident."""


def rows_cut_off(structure: Structure, tensors: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """The first weight of whose rows some are zero, bit for bit, where others are not, and how many these rows are.

    Rows of one task are zero at the same columns, and a later task's at some of them: sets that lie in one another,
    each shared by several rows. Zeros that lie otherwise have other reasons, such as pruning.
    """
    for name, uses in structure.entries.items():
        if name not in tensors or not any(use.role == "weight" and bool((use.source >= 0).any()) for use in uses):
            continue
        use = next(use for use in uses if use.role == "weight")
        rows = [axis for axis, size in enumerate(use.target.shape) if size > 1]
        columns = [axis for axis, size in enumerate(use.source.shape) if size > 1]
        if len(rows) == 1 and len(columns) == 1 and rows != columns:
            others = [axis for axis in range(tensors[name].ndim) if axis not in (*rows, *columns)]
            zero = (tensors[name].detach() == 0).all(dim=others) if others else tensors[name].detach() == 0
            cut = _cut(zero if rows < columns else zero.T)
            if cut:
                return name, cut
    return None


def _cut(zero: Bool[Tensor, "rows columns"]) -> int:
    """How many rows are cut off; 0 where zeros lie otherwise."""
    live = zero[~zero.all(dim=1)]
    if len(live) == 0:
        return 0
    live = live[:, ~live.all(dim=0)]
    cut = live[live.any(dim=1)]
    if int(cut.sum()) < FEWEST:
        return 0
    sets = torch.unique(cut, dim=0)
    sets = sets[sets.sum(dim=1).argsort()]
    nested = not bool((sets[:-1] & ~sets[1:]).any())
    return len(cut) if nested and (len(sets) == 1 or len(cut) >= 2 * len(sets)) else 0
