"""Reads a user's data: as much as the Trainer would, on loaders of its own, so that no pass of it is disturbed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_cf.errors import DataWarning, warn
from lightning_cf.lightning_api import CombinedLoader, Trainer, _set_sampler_epoch, sized_len
from lightning_cf.network.forward import tensors_of
from lightning_cf.tasks.copies import twin_of

WITHOUT_LENGTH = 50_000
"""How many samples are read at most of a loader that has no length, and for which the Trainer has no limit; and of one
of which ``max_steps`` takes no more."""


@dataclass(frozen=True)
class Limits:
    """How much of its data a Trainer reads.

    Attributes:
        train: as ``limit_train_batches``: a number of batches, or a share of them.
        val: as ``limit_val_batches``.
        test: as ``limit_test_batches``.
        batches: how many training batches all epochs read together at most; infinite where ``max_steps`` is none.
        overfits: whether it trains and validates on the same few samples, in order.
        processes: over how many it distributes samples by itself.
        check: as ``val_check_interval``, where that counts batches of an epoch; else 0.
    """

    train: float = 1.0
    val: float = 1.0
    test: float = 1.0
    batches: float = math.inf
    overfits: bool = False
    processes: int = 1
    check: int = 0

    @classmethod
    def of(cls, trainer: Trainer) -> Limits:
        """How much of its loaders a Trainer reads, from the Trainer's options."""
        steps = trainer.max_steps
        distributes = trainer._accelerator_connector.use_distributed_sampler
        check = trainer.val_check_interval
        in_epoch = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches > 0
        return cls(
            train=trainer.limit_train_batches,
            val=trainer.limit_val_batches,
            test=trainer.limit_test_batches,
            batches=math.inf if steps < 0 else float(steps * trainer.accumulate_grad_batches),
            overfits=trainer.overfit_batches > 0,  # type: ignore[attr-defined]
            processes=trainer.world_size if distributes else 1,
            check=check if isinstance(check, int) and in_epoch else 0,
        )

    def suffice(self, batches: int) -> bool:
        """Whether a Trainer takes so many training batches: a share of them is one at least, and it validates."""
        taken = min(batches, self.train) if isinstance(self.train, int) else int(batches * self.train)
        return self.train == 0 or (taken >= 1 and taken >= self.check)

    def batches_of(self, loader: Any, *stages: str) -> float:
        """How many batches of a loader are read: what the limits of these stages allow, one at least."""
        length = _length(loader)
        count = math.inf if length is None else length
        for stage in stages:
            limit = getattr(self, stage)
            if limit == 0 and stage != "train":
                continue  # nothing is validated or tested in a fit; a partition is to be judged nevertheless
            if isinstance(limit, int):
                count = min(count, limit)
            elif length is not None:
                count = min(count, int(length * limit))
            if stage == "train" and length is None:
                count = min(count, self.batches)  # what has a length is there, however few steps are taken
        return max(1, count)


@dataclass(frozen=True)
class Reading:
    """Batches of some loaders, one loader after another, as often as it is asked for them.

    Attributes:
        loaders: each with its place among the Trainer's loaders of that stage.
        limits: of the Trainer.
        stages: whose limits hold.
        what: how a warning calls it.
        began: is told a loader's place before its batches come.
        parts: what of a batch is given, if not the batch itself.
        apart: whether streams are read in copies, as a look at them changes what the next pass gives.
        epoch: of the Trainer, which it tells samplers before a pass over them.
        told: of what a warning said already that it is not read to its end.
    """

    loaders: Sequence[tuple[int, Any]]
    limits: Limits = Limits()
    stages: Sequence[str] = ()
    what: str = ""
    began: Callable[[int], None] | None = None
    parts: Callable[[Any], Iterable[Any]] | None = None
    apart: bool = False
    epoch: int = 0
    told: set[str] = field(default_factory=set)

    @property
    def loader(self) -> Any:
        """The first loader, as the user made it."""
        return self.loaders[0][1]

    def of(self, *places: int) -> Reading:
        """A reading of the loaders at these places only, as the Trainer numbers them."""
        return replace(self, loaders=[(place, loader) for place, loader in self.loaders if place in places])

    def __iter__(self) -> Iterator[Any]:
        for place, loader in self.loaders:
            count = self.limits.batches_of(loader, *self.stages)
            with _undisturbed(loader), self._pass(loader) as batches:
                seen, trained = 0, self.limits.batches if "train" in self.stages else math.inf
                for number, batch in enumerate(batches if math.isinf(count) else islice(batches, int(count)), 1):
                    if self.began is not None:
                        self.began(place)
                    given = [batch] if self.parts is None else self.parts(batch)
                    yield from (part for part in given if not empty(part))
                    seen += max(1, samples_in(batch))
                    if seen >= WITHOUT_LENGTH and (math.isinf(count) or number >= trained):
                        if math.isinf(count):
                            self._stopped(seen)
                        break

    @contextmanager
    def _pass(self, loader: Any) -> Iterator[Iterator[Any]]:
        """Another pass over a loader, beside one that a Trainer may be in the middle of."""
        if not several(loader):
            yield iter(self._another(loader))
            return
        combined = copy.copy(loader) if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
        combined._iterator = combined._limits = None
        combined.flattened = [self._another(each) for each in combined.flattened]
        yield (batch for batch, _, _ in combined)

    def _another(self, loader: Any) -> Any:
        """The same loader with iterators and workers of its own, which end with it."""
        _set_sampler_epoch(loader, self.epoch)
        twin = twin_of(loader) if self.apart else None
        loader = loader if twin is None else twin
        if not isinstance(loader, DataLoader):
            return loader
        twin = copy.copy(loader)
        twin.__dict__.update(_iterator=None, persistent_workers=False)
        ordered = self.limits.overfits and not isinstance(loader.dataset, IterableDataset)
        if ordered and loader.batch_size is not None:
            resample(twin, SequentialSampler(loader.dataset))  # type: ignore[arg-type]
        return twin

    def _stopped(self, seen: int) -> None:
        """Warns, once for each kind of data, that reading stopped though a loader without a length may give more."""
        if self.what in self.told:
            return
        self.told.add(self.what)
        stage = self.stages[0] if self.stages else "val"
        warn(
            f"{self.what} has no length and may have no end: read up to {seen} samples. Give the Trainer"
            f" limit_{stage}_batches=N, or the loader's data set a length.",
            DataWarning,
        )


def epoch_of(trainer: Trainer | None) -> int:
    """The epoch that a Trainer tells its samplers."""
    return 0 if trainer is None else trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]


def samples_in(batch: Any) -> int:
    """How many samples a batch has: the length of its longest tensor."""
    return max((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim), default=1)


def empty(batch: Any) -> bool:
    """Whether a batch holds no sample, as where a ``collate_fn`` leaves out what it cannot read: it counts nothing.

    >>> empty((torch.zeros(0, 3), torch.zeros(0))), empty((torch.zeros(2, 3), torch.zeros(2))), empty(None)
    (True, False, True)
    """
    tensors = tensors_of(batch)
    return batch is None or (bool(tensors) and not any(x.numel() for x in tensors))


def several(loader: Any) -> bool:
    """Whether these are several loaders, whose batches come side by side, rather than one or a list of batches."""
    if isinstance(loader, (CombinedLoader, Mapping)):
        return True
    return isinstance(loader, (list, tuple)) and _holds_loaders(loader)


def flat(loader: Any) -> list[Any]:
    """All of several loaders, or the only one; none for None."""
    if loader is None or (isinstance(loader, Mapping) and not loader):
        return []
    if isinstance(loader, CombinedLoader):
        return list(loader.flattened)
    return list(CombinedLoader(loader, "sequential").flattened) if several(loader) else [loader]


def side_by_side(loader: Any) -> bool:
    """Whether a batch holds batches of several loaders."""
    return several(loader) and not (isinstance(loader, CombinedLoader) and loader._mode == "sequential")


def _holds_loaders(value: Any) -> bool:
    """Whether these are loaders, or lists and mappings of them, rather than batches."""
    if isinstance(value, Mapping):
        return any(map(_holds_loaders, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_loaders, value))
    batch = isinstance(value, (np.ndarray, str, bytes)) or hasattr(value, "to")
    return isinstance(value, Iterable) and not batch


def _length(loader: Any) -> int | None:
    """How many batches a pass gives; None where nobody knows."""
    if not several(loader):
        return sized_len(loader)
    lengths = [sized_len(each) for each in flat(loader)]
    known = [length for length in lengths if length is not None]
    mode = loader._mode if isinstance(loader, CombinedLoader) else "max_size_cycle"
    if mode == "min_size":
        return min(known, default=None)
    return None if len(known) < len(lengths) else sum(known) if mode == "sequential" else max(known, default=0)


def resample(loader: DataLoader[Any], sampler: Any, *, drop_last: bool | None = None) -> None:
    """Gives a copy of a loader another sampler, in place."""
    assert loader.batch_size is not None
    drop_last = loader.drop_last if drop_last is None else drop_last
    batch_sampler = BatchSampler(sampler, loader.batch_size, drop_last)
    loader.__dict__.update(sampler=sampler, batch_sampler=batch_sampler, drop_last=drop_last)


@contextmanager
def _undisturbed(loader: Any) -> Iterator[None]:
    """Puts the loader's own generators back afterwards, so that a Trainer draws what it would have drawn."""
    kept: dict[int, tuple[torch.Generator, Tensor]] = {}
    for each in flat(loader):
        batch_sampler = getattr(each, "batch_sampler", None)
        for owner in (each, getattr(each, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                kept.setdefault(id(generator), (generator, generator.get_state()))
    try:
        yield
    finally:
        for generator, state in kept.values():
            generator.set_state(state)
