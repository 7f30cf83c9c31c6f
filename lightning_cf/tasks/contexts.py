"""What surrounds a phase: generators that depend on the phase alone, the module on the device of its Trainers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from lightning_cf.lightning_api import LightningModule
from lightning_cf.utilities.randomness import derive_seed, isolated_generators, seed_all


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Global generators that depend on the key alone; afterwards they are as they were."""
    with isolated_generators():
        seed_all(derive_seed(*key))
        yield


class Draws:
    """Global generators that stand each time as they stood the first time: what was drawn is drawn again."""

    def __init__(self) -> None:
        self._first: Any = None

    @contextmanager
    def repeated(self) -> Iterator[list[bool]]:
        """The first time nothing but a look at the generators; afterwards they are as they were.

        The list says in the end whether anything was drawn again.
        """
        again = list[bool]()
        if self._first is None:
            self._first = (torch.get_rng_state(), np.random.get_state(), random.getstate())
            yield again
            return
        with isolated_generators():
            self._rewind()
            untouched = _next_draws()
            self._rewind()
            yield again
            again.append(_next_draws() != untouched)

    def _rewind(self) -> None:
        of_torch, of_numpy, of_python = self._first
        torch.set_rng_state(of_torch)
        np.random.set_state(of_numpy)
        random.setstate(of_python)


def _next_draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


@contextmanager
def placed_on(module: LightningModule, device: torch.device) -> Iterator[None]:
    """The module on a device; afterwards back where it was."""
    before = module.device
    module.to(device)
    try:
        yield
    finally:
        module.to(before)
