"""Whether several processes read the same samples in the same order, so that each may look at a part of them."""

from __future__ import annotations

from torch.utils._pytree import tree_leaves

from lightning_cf.tasks.contexts import seeded
from lightning_cf.tasks.task import Task
from lightning_cf.utilities.content import content_sha256


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
    return content_sha256([len(plain.dataset), plain.batch_size, drawn, *tree_leaves(first)])
