"""What surrounds a phase: generators that depend on the phase alone, the module on the device of its Trainers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from lightning_cf.lightning_api import LightningModule, isolate_rng
from lightning_cf.randomness import derive_seed, seed_torch


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Global generators that depend on the key alone; afterwards they are as they were."""
    seed = derive_seed(*key)
    with isolate_rng():
        seed_torch(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield


@contextmanager
def on_device(module: LightningModule, device: torch.device) -> Iterator[None]:
    """The module on a device; afterwards back where it was."""
    before = module.device
    module.to(device)
    try:
        yield
    finally:
        module.to(before)
