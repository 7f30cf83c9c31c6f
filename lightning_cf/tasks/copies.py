"""A copy of what gives batches: a pass over it leaves the user's own as it was."""

from __future__ import annotations

import copy
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
    """A copy that shares what passes only read, such as arrays; None where there is no copying it."""
    kept = (Tensor, np.ndarray, nn.Module)
    values = tree_leaves(getattr(source, "__dict__", {}))
    plain = [x for x in values if isinstance(x, kept) or (isinstance(x, Dataset) and hasattr(x, "__getitem__"))]
    try:
        return copy.deepcopy(source, {id(x): x for x in plain})
    except Exception:  # files, sockets and generators
        return None
