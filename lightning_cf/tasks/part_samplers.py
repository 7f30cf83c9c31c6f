"""Samplers of a part of a data set, whose length may change from one pass to the next."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler, SequentialSampler


class PartSampler(Sampler[int]):
    """Draws some of a data set's samples, as a sampler draws all of them.

    Lightning wraps it where it distributes samples over processes, and leaves their order to it.

    Args:
        indices: which samples.
        data_source: the whole data set, as samplers of torch keep it.
        shuffled: whether in another order in each pass.
        generator: what the order is drawn from; as for a ``RandomSampler``.
        seed: what the order depends on, with the epoch, where it must be the same on all processes.
    """

    def __init__(
        self,
        indices: Sequence[int],
        *,
        data_source: Any = None,
        shuffled: bool = False,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> None:
        self.data_source = data_source
        self.indices, self.shuffled, self.generator, self.seed, self.epoch = indices, shuffled, generator, seed, 0

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        places: Sampler[int] = SequentialSampler(self.indices)
        if self.shuffled:
            generator = self.generator if self.seed is None else torch.Generator().manual_seed(self.seed + self.epoch)
            places = RandomSampler(self.indices, generator=generator)
        return (self.indices[place] for place in places)

    def set_epoch(self, epoch: int) -> None:
        """Which pass comes, where the order depends on it."""
        self.epoch = epoch


class Part(Sequence[int]):
    """Numbers of a data set's samples, as many as it has now: its length may change from one pass to the next.

    Args:
        data: of a length.
        held: what is held out, in order.
    """

    def __init__(self, data: Any, held: list[int]) -> None:
        self.data, self.held = data, held

    def __getitem__(self, place: Any) -> Any:
        size = len(self)
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(size))]
        if not -size <= place < size:
            raise IndexError(place)
        return self.at(place % size)

    def __len__(self) -> int:
        return bisect_left(self.held, len(self.data))

    def at(self, place: int) -> int:
        """The number at a place from 0 on."""
        return self.held[place]


class Rest(Part):
    """All numbers below a data set's length but some, without a list of them: one that draws has any length.

    >>> list(Rest(range(6), [1, 2, 4]))
    [0, 3, 5]
    """

    def __init__(self, data: Any, held: list[int]) -> None:
        super().__init__(data, held)
        self.before = [index - place for place, index in enumerate(held)]

    def __len__(self) -> int:
        return len(self.data) - super().__len__()

    def at(self, place: int) -> int:
        """The number at a place from 0 on."""
        return place + bisect_right(self.before, place)
