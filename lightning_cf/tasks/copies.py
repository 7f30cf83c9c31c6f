"""A copy of what gives batches: a pass over it leaves the user's own as it was."""

from __future__ import annotations

import copy
import queue
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset


def twin_of(loader: Any) -> Any:
    """A loader over a copy of its stream, or a copy of what is no DataLoader; None where there is no copying it.

    The processes that read for a loader have copies already, and a data set that is no stream keeps no place in it.
    """
    if not isinstance(loader, DataLoader):
        return copied(loader)
    if not isinstance(loader.dataset, IterableDataset) or loader.num_workers:
        return loader
    dataset = copied(loader.dataset)
    if dataset is None:
        return None
    twin = copy.copy(loader)
    twin.__dict__.update(dataset=dataset, _iterator=None)
    return twin


def copied(source: Any) -> Any:
    """A copy, with what is in its queues, that shares what passes only read, such as arrays; None if there is none."""
    held = _held(source)
    memo: dict[int, Any] = {id(x): x for x in held if _is_read_only(x)}
    try:
        for each in held:
            if isinstance(each, queue.Queue) and not each.empty():
                memo[id(each)] = of = type(each)(each.maxsize)
                of.queue = copy.deepcopy(each.queue, memo)
        return copy.deepcopy(source, memo)
    except Exception:  # files, sockets and generators
        return None


def _held(source: Any, depth: int = 4) -> list[Any]:
    """What an object, and each stream that it holds, keeps."""
    values = tree_leaves(getattr(source, "__dict__", {}))
    streams = [x for x in values if isinstance(x, IterableDataset)] if depth else []
    return [*values, *(x for stream in streams for x in _held(stream, depth - 1))]


def _is_read_only(value: Any) -> bool:
    """Whether it is something that passes only read; of a stream they may change something."""
    data = isinstance(value, Dataset) and hasattr(value, "__getitem__") and not isinstance(value, IterableDataset)
    return data or isinstance(value, (Tensor, np.ndarray, nn.Module))
