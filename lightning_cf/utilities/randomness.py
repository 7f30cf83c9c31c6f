"""Random numbers that depend on what they are for, never on what was drawn before."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed from a key such as ``(seed, task, phase, step)``; the same on every machine and process."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`.

    >>> a, b = keyed_generator(0, "noise", 3), keyed_generator(0, "noise", 3)
    >>> bool(torch.rand((), generator=a) == torch.rand((), generator=b))
    True
    """
    return torch.Generator().manual_seed(derive_seed(*key))


def seed_torch(seed: int) -> None:
    """``torch.manual_seed``, which on a machine without an accelerator would note the seed for each kind of it.

    Each such note holds where it was made, takes a millisecond, and is kept until the process ends.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def seed_all(seed: int) -> None:
    """Seeds the global generators of torch, numpy and Python."""
    seed_torch(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def isolated_generators() -> Iterator[None]:
    """Whatever is drawn meanwhile, the global generators of torch, numpy and Python are as before afterwards.

    >>> torch.manual_seed(0) and None
    >>> with isolated_generators():
    ...     _ = torch.rand(3)
    >>> bool(torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(0)))
    True
    """
    of_numpy, of_python = np.random.get_state(), random.getstate()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)
