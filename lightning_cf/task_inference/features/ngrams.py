"""Counts of short runs of tokens or bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_cf.errors import ContinualError, check_count, check_list
from lightning_cf.task_inference.features.base import Features, Fixed, Rows, leaves_of
from lightning_cf.task_inference.readout import Readout
from lightning_cf.task_inference.sites import Sites

_BASE, _PRIME, _MIXER = 257, 2**31 - 1, 2_654_435_761


class HashedNgrams(Features):
    """How often runs of one, two and three tokens occur, in bins chosen by a hash; logarithms, of unit length.

    Nothing is kept of any data (Weinberger et al. 2009, feature hashing).

    Args:
        bins: for runs of one token, of two, and so on.
        padding: a token that does not count, if there is one.
    """

    shrinkage = 0.3

    def __init__(self, bins: Sequence[int] = (256, 1024, 1024), *, padding: int | None = None) -> None:
        listed = check_list("HashedNgrams", "bins", bins, "whole numbers")
        if not listed:
            raise ContinualError("HashedNgrams: bins must be at least one number, got none.")
        self.bins = [check_count("HashedNgrams", "bins", each) for each in listed]
        self.padding = None if padding is None else check_count("HashedNgrams", "padding", padding, least=0)

    def of(self, fixed: Fixed, seen: Readout, sites: Sites) -> Rows:
        """The logarithms of one more than each count, divided by their length as a vector."""
        leaves = [leaf for leaf in leaves_of(seen) if not leaf.is_floating_point()]
        if not leaves or leaves[0].ndim < 2:
            raise ContinualError("task_inference: runs of tokens are counted in whole numbers, one row a sample.")
        tokens = leaves[0].flatten(1).long()
        known = torch.ones_like(tokens, dtype=torch.bool) if self.padding is None else tokens != self.padding
        parts = [_counts(tokens, known, length, bins) for length, bins in enumerate(self.bins, 1)]
        rows: Tensor = torch.cat(parts, dim=1).log1p()
        return torch.nn.functional.normalize(rows, eps=1e-6)


def _counts(tokens: Tensor, known: Tensor, length: int, bins: int) -> Rows:
    """How often runs of a length occur, none of whose tokens is padding."""
    runs = max(tokens.shape[1] - length + 1, 0)
    key = torch.zeros(len(tokens), runs, dtype=torch.long, device=tokens.device)
    whole = torch.ones_like(key, dtype=torch.float32)
    for place in range(length):
        key = (key * _BASE + tokens[:, place : place + runs] + 1) % _PRIME
        whole = whole * known[:, place : place + runs]
    key = (key * _MIXER + length) % 2**32 * bins // 2**32
    counts: Tensor = whole.new_zeros(len(tokens), bins).scatter_add_(1, key, whole)
    return counts
