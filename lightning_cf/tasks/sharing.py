"""Whether several processes read the same samples in the same order, so that each may look at a part of them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_cf.tasks.contexts import seeded
from lightning_cf.tasks.task import Task


def order_of(task: Task) -> str | None:
    """What tells the order of a task's training samples from another; None where it is not known.

    Data sets are not compared sample by sample: how many there are, which are drawn, and what the first one holds must
    do. A process that reads a part of its own of the data is told by that.
    """
    if task.task_loaders.side_by_side:
        return None
    plain = task.task_loaders.training(ordered=True).loader
    if plain is task.task_loaders.training().loader:
        return None
    drawn = list(plain.sampler)
    with seeded("the first sample"):  # which may be changed at random
        first = plain.collate_fn([plain.dataset[index] for index in drawn[:1]]) if drawn else ()
    found = hashlib.sha256(repr((len(plain.dataset), plain.batch_size, drawn)).encode())
    for leaf in tree_leaves(first):
        found.update(_bytes_of(leaf))
    return found.hexdigest()


def _bytes_of(leaf: Any) -> bytes:
    if isinstance(leaf, Tensor):
        leaf = leaf.detach().cpu().double().numpy()
    return np.ascontiguousarray(leaf).tobytes() if isinstance(leaf, np.ndarray) else repr(leaf).encode()
