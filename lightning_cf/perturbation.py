"""Ways to disturb the redundant units while the others train (US 12387107, paragraph 20)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from lightning_cf.errors import ContinualError

Vectors = Float[Tensor, "units inputs"]


@runtime_checkable
class Perturbation(Protocol):
    """Maps incoming weight vectors to disturbed ones, always from the undisturbed base."""

    def __call__(self, vectors: Vectors, generator: Generator) -> Vectors:
        """Returns disturbed copies of ``vectors``, one row a unit, drawn from ``generator`` alone."""
        ...


def _normal(vectors: Vectors, generator: Generator) -> Vectors:
    """Standard normal numbers in the shape of ``vectors``, drawn on the CPU so that every device gets the same."""
    return torch.randn(vectors.shape, generator=generator).to(vectors)


@dataclass(frozen=True)
class Resample:
    """A fresh random direction of the same length: ``|w| * z / |z|``, z standard normal.

    The strongest disturbance that keeps magnitudes: what the claimed units learn from such inputs is to ignore them.
    """

    def __call__(self, vectors: Vectors, generator: Generator) -> Vectors:
        """Fresh directions."""
        direction = _normal(vectors, generator)
        resampled: Tensor = direction * (vectors.norm(dim=1, keepdim=True) / direction.norm(dim=1, keepdim=True))
        return resampled


@dataclass(frozen=True)
class Noise:
    """``w + scale * |w| / sqrt(D) * z``, z standard normal: noise whose length is about ``scale`` times the vector's.

    Attributes:
        scale: length of the noise relative to the vector's, dimensionless.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise ContinualError(f"Noise: scale must be at least 0, got {self.scale!r}.")

    def __call__(self, vectors: Vectors, generator: Generator) -> Vectors:
        """Vectors with noise."""
        length = vectors.norm(dim=1, keepdim=True) / vectors.shape[1] ** 0.5
        noisy: Tensor = vectors + self.scale * length * _normal(vectors, generator)
        return noisy


@dataclass(frozen=True)
class Ablate:
    """Zero: the units are silent. Their biases, norm scales and norm shifts are zeroed with the vectors."""

    def __call__(self, vectors: Vectors, generator: Generator) -> Vectors:
        """Zeros."""
        return torch.zeros_like(vectors)
