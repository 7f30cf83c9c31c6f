"""What the data of a run are: how each loader draws, and a few of its samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate

from lightning_cf.tasks.contexts import seeded
from lightning_cf.tasks.loaders import STAGES
from lightning_cf.tasks.task import Task
from lightning_cf.utilities.content import content_sha256
from lightning_cf.utilities.describing import UNKNOWN, constructor_names, describe, made_from, sketch

_PLAIN = (bool, int, float, str, Tensor, np.ndarray)

_TRANSFORMS = ("on_before_batch_transfer", "on_after_batch_transfer")
"""Hooks of the data that change batches."""


def data_identity(task: Task, *, test: bool) -> dict[str, Any]:
    """Of each loader of a task the batch size, how it draws, its labels, the number of samples and a few of them.

    What reads differently twice in a row, such as an augmentation with a generator of its own, is not known; of a
    random part of a data set the whole is looked at. A stream is not read.
    """
    with seeded("identity", task.name):
        given = task.task_loaders.given(*(stage for stage in STAGES if test or stage != "test"))
        return {stage: _loaders(task, loader) for stage, loader in given.items()}


def _loaders(task: Task, loaders: Any) -> Any:
    if isinstance(loaders, Mapping):
        return {str(name): _loaders(task, loader) for name, loader in loaders.items()}
    if isinstance(loaders, DataLoader):
        dataset: Any = loaders.dataset
        found: dict[str, Any] = {"batch_size": loaders.batch_size, "drop_last": loaders.drop_last}
        if not isinstance(dataset, IterableDataset):
            found |= {"sampler": _drawing(loaders), **_samples(dataset)}
            changed = loaders.collate_fn is not default_collate or any(hook in vars(task) for hook in _TRANSFORMS)
            found["batch"] = _batch(task, loaders) if changed and loaders.batch_size is not None else "as collated"
        return found
    if isinstance(loaders, (list, tuple)):
        if loaders and all(isinstance(loader, DataLoader) for loader in loaders):
            return {str(i): _loaders(task, loader) for i, loader in enumerate(loaders)}
        return _samples(loaders)
    return UNKNOWN


def _samples(dataset: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = {"samples": len(dataset)}
    except Exception:  # a data set without a length
        return {"samples": UNKNOWN}
    while isinstance(dataset, Subset) and list(dataset.indices) != sorted(dataset.indices):
        dataset = dataset.dataset  # a random part may be another one at each start
    labels = _labels(dataset)
    if labels is not None:
        found["labels"] = labels
    try:
        places = sorted({0, len(dataset) // 2, len(dataset) - 1} - {-1})
        found["items"] = {str(i): _known(partial(dataset.__getitem__, i), i) for i in places}
    except Exception:  # whatever reading a sample here leads to
        found["items"] = UNKNOWN
    return found


def _labels(dataset: Any) -> str | None:
    """All labels of a data set that holds them as one array, as those of torchvision do; None of another."""
    for name in ("targets", "labels", "tensors"):
        value = vars(dataset).get(name) if hasattr(dataset, "__dict__") else None
        value = value[-1] if isinstance(value, tuple) and value else value
        if isinstance(value, np.ndarray) or (isinstance(value, list) and value and isinstance(value[0], int)):
            value = torch.as_tensor(value) if np.asarray(value).dtype.kind in "iu" else None
        if isinstance(value, Tensor) and not value.is_floating_point() and value.shape[:1] == (len(dataset),):
            return content_sha256(value.long().cpu())[:12]
    return None


def _drawing(loader: DataLoader[Any]) -> dict[str, Any]:
    """How a loader draws its samples: its samplers by class, with plain options and weights; no indices."""
    found = {}
    for name in ("batch_sampler", "sampler"):
        sampler = getattr(loader, name)
        if name == "batch_sampler" and (sampler is None or loader.batch_size is not None):
            continue  # made by torch of what else is known
        given = {k: v for k, v in made_from(sampler).items() if k in constructor_names(sampler) | {"weights"}}
        plain = {k: v for k, v in given.items() if isinstance(v, _PLAIN) and k not in ("num_samples", "indices")}
        found[name] = {"class": type(sampler).__qualname__, **describe(plain)}
    return found


def _batch(task: Task, loader: DataLoader[Any]) -> Any:
    """A few samples as the loader collates them and the data's hooks change them."""

    def read() -> Any:
        dataset: Any = loader.dataset
        batch = loader.collate_fn([dataset[i] for i in sorted({0, len(dataset) // 2, len(dataset) - 1})])
        for hook in _TRANSFORMS:
            if hook in vars(task):
                batch = getattr(task, hook)(batch, 0)
        return batch

    try:
        return _known(read, 0)
    except Exception:  # whatever the user's functions raise where no fit is under way
        return UNKNOWN


def _known(read: Callable[[], Any], place: int) -> Any:
    """A sample, less what is another one when it is read again."""
    found = []
    for _ in range(2):
        with seeded("identity", place):
            found.append(_leaves(read()))
    first, second = found
    return {name: value if second.get(name) == value else UNKNOWN for name, value in first.items()}


def _leaves(sample: Any, name: str = "") -> dict[str, Any]:
    if isinstance(sample, Mapping):
        return {k: v for key, item in sample.items() for k, v in _leaves(item, f"{name}{key}.").items()}
    if isinstance(sample, (list, tuple)) and len(sample) <= 32:
        return {k: v for i, item in enumerate(sample) for k, v in _leaves(item, f"{name}{i}.").items()}
    if hasattr(sample, "__array_interface__") and not hasattr(sample, "dtype"):  # an image of PIL
        sample = np.asarray(sample)
    if isinstance(sample, (list, tuple)):
        numbers = all(isinstance(each, (bool, int, float)) for each in sample)
        sample = np.asarray(sample) if numbers else sample
    plain = isinstance(sample, (bool, int, float, str)) or hasattr(sample, "dtype")
    value = (sketch(sample) if hasattr(sample, "shape") else describe(sample)) if plain else type(sample).__qualname__
    return {name.rstrip(".") or "value": value}
