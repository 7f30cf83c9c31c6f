"""Ways to disturb the redundant units while the others train (US 12387107, paragraph 20).

Paragraph 20 names random noise, and affine transformations that change the direction of a unit's weight vector; the
random ones are in :mod:`lightning_cf.invariance.affine`. In the formulas ``w`` is that vector, ``D`` its number of
inputs, ``|w|`` its length.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from lightning_cf.errors import ContinualError, check_function, check_kind, check_list, check_number
from lightning_cf.invariance.affine import AffineMaps, AffinePerturbation, Vectors, standard_normal, widened


@runtime_checkable
class Perturbation(Protocol):
    """Maps incoming weight vectors to disturbed ones, always from the undisturbed base."""

    # Vectors; jsonargparse, and so LightningCLI, would take a class that stands here for the class to make.
    def __call__(self, vectors: Vectors, generator: Generator) -> Any:
        """Returns disturbed copies of ``vectors``, one row a unit, drawn from ``generator`` alone."""
        ...


@dataclass(frozen=True)
class Resample:
    """A fresh random direction of the same length: ``|w| * z / |z|``, z standard normal.

    The strongest disturbance that keeps magnitudes: what the claimed units learn from such inputs is to ignore them.
    """

    def __call__(self, vectors: Vectors, generator: Generator) -> Vectors:
        """Vectors of the same lengths in fresh random directions, one row a unit."""
        direction = standard_normal(vectors, generator)
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
        check_number("Noise", "scale", self.scale, least=0.0)

    def __call__(self, vectors: Vectors, generator: Generator) -> Vectors:
        """The vectors with noise added whose length is about ``scale`` times theirs, one row a unit."""
        length = vectors.norm(dim=1, keepdim=True) / vectors.shape[1] ** 0.5
        noisy: Tensor = vectors + self.scale * length * standard_normal(vectors, generator)
        return noisy


@dataclass(frozen=True)
class Ablate:
    """Zero: the units are silent. Their biases, norm scales and norm shifts are zeroed with the vectors."""

    def __call__(self, vectors: Vectors, generator: Generator) -> Vectors:
        """Zeros in the shape of the vectors; nothing is drawn."""
        return torch.zeros_like(vectors)


Given = Tensor | Sequence[Any] | Callable[[int, Generator], Tensor]


@dataclass(frozen=True, eq=False)
class Affine(AffinePerturbation):
    """``A w + t``: any affine map, the same for all units of a call.

    >>> swap = Affine(matrix=[[0, 1], [1, 0]], shift=[10, 0])
    >>> swap(torch.tensor([[1.0, 2.0]]), torch.Generator()).tolist()
    [[12.0, 1.0]]

    Attributes:
        matrix: ``A``, D x D: numbers, or what makes them from D and the generator; None is the identity.
        shift: ``t``, D, likewise, in units of the weights; None is zero.
    """

    matrix: Given | None = None
    shift: Given | None = None

    def __post_init__(self) -> None:
        for name, axes in (("matrix", 2), ("shift", 1)):
            _check_given(f"Affine: {name}", getattr(self, name), axes)

    def maps(self, vectors: Vectors, generator: Generator) -> AffineMaps:
        """The same map for each unit.

        Raises:
            ContinualError: the matrix or the shift is not for vectors of this many inputs.
        """
        maps, inputs = AffineMaps.identity(vectors), vectors.shape[1]
        if self.matrix is not None:
            matrix = _given("Affine: matrix", self.matrix, (inputs, inputs), generator)
            maps = replace(maps, matrix=matrix.to(vectors))
        if self.shift is not None:
            shift = _given("Affine: shift", self.shift, (inputs,), generator)
            maps = replace(maps, shift=shift.to(vectors).expand_as(vectors))
        return maps

    def __repr__(self) -> str:
        return f"Affine(matrix={_label(self.matrix)}, shift={_label(self.shift)})"


@dataclass(frozen=True)
class Compose:
    """``Tn(... T2(T1(w)))``: one perturbation after another, the first first; each disturbs what the last one made.

    Attributes:
        perturbations: at least one.
    """

    perturbations: Sequence[Perturbation]

    def __post_init__(self) -> None:
        object.__setattr__(self, "perturbations", _some("Compose", self.perturbations))

    def __call__(self, vectors: Vectors, generator: Generator) -> Vectors:
        """The vectors after each perturbation in turn, all drawn from the same generator."""
        disturbed = widened(vectors)
        for perturbation in self.perturbations:
            disturbed = perturbation(disturbed, generator)
        return disturbed.to(vectors)


@dataclass(frozen=True)
class Mixture:
    """``Ti(w)``, ``i`` drawn for each unit: every unit is disturbed in one of several ways.

    Attributes:
        perturbations: at least one.
        weights: relative probability of each; default equal.
    """

    perturbations: Sequence[Perturbation]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "perturbations", _some("Mixture", self.perturbations))
        equal = (1.0,) * len(self.perturbations)
        given = self.weights.tolist() if isinstance(self.weights, Tensor) else self.weights
        weights = equal if given is None else tuple(check_list("Mixture", "weights", given, "numbers"))
        numbers = all(isinstance(weight, Real) and 0 <= float(weight) < math.inf for weight in weights)
        fine = len(weights) == len(self.perturbations) and numbers
        if not fine or sum(weights) == 0:
            raise ContinualError(
                f"Mixture: weights must be {len(self.perturbations)} numbers of at least 0, one for each perturbation "
                f"and not all 0, got {list(weights)!r}."
            )
        object.__setattr__(self, "weights", weights)

    def __call__(self, vectors: Vectors, generator: Generator) -> Vectors:
        """Vectors, each after the perturbation that it drew."""
        chosen = torch.multinomial(
            torch.tensor(self.weights, dtype=torch.float64), len(vectors), replacement=True, generator=generator
        )
        disturbed = vectors.clone()
        for index, perturbation in enumerate(self.perturbations):
            units = (chosen == index).nonzero().flatten().to(vectors.device)
            if len(units):
                disturbed[units] = perturbation(vectors[units], generator)
        return disturbed


@dataclass(frozen=True, eq=False)
class InSubspace:
    """``w + B (T(B^T w) - B^T w)``: a perturbation ``T`` of the coordinates in a sub-space; the rest of ``w`` stays.

    The patent holds perturbations in a sub-space where learning a new task is likelier (paragraph 21). What keeps
    lengths, as :class:`Rotation`, keeps them here.

    Attributes:
        perturbation: ``T``, which sees vectors of as many inputs as the sub-space has dimensions.
        basis: ``B``, inputs x dimensions; its columns must be orthonormal, which is not checked.
    """

    perturbation: Perturbation
    basis: Float[Tensor, "inputs dimensions"]

    def __post_init__(self) -> None:
        check_perturbation("InSubspace", self.perturbation)
        if not isinstance(self.basis, Tensor) or self.basis.ndim != 2 or not self.basis.is_floating_point():
            raise ContinualError(
                "InSubspace: basis must be a floating-point tensor (inputs, dimensions), such as torch.eye(64)[:, :8];"
                f" got {_kind(self.basis)}."
            )

    def __call__(self, vectors: Vectors, generator: Generator) -> Vectors:
        """Vectors disturbed in the sub-space.

        Raises:
            ContinualError: the basis is not for vectors of this many inputs.
        """
        if len(self.basis) != vectors.shape[1]:
            raise ContinualError(
                f"InSubspace: basis has {len(self.basis)} rows, the units have {vectors.shape[1]} inputs; "
                "give a basis with a row for each input."
            )
        wide = widened(vectors)
        basis = self.basis.to(wide)
        inside = wide @ basis
        disturbed: Tensor = wide + (self.perturbation(inside, generator) - inside) @ basis.T
        return disturbed.to(vectors)

    def __repr__(self) -> str:
        return f"InSubspace(perturbation={self.perturbation!r}, basis={_label(self.basis)})"


def check_perturbation(owner: str, perturbation: object) -> None:
    """Raises ContinualError for what is no perturbation, such as a class of them that was not called."""
    check_kind(owner, "perturbation", perturbation, Perturbation, "callable, such as Noise(scale=1.0)")
    check_function(owner, "perturbation", perturbation, "vectors, generator")


def _some(owner: str, perturbations: Sequence[Perturbation]) -> tuple[Perturbation, ...]:
    given = check_list(owner, "perturbations", perturbations, "perturbations")
    if not given:
        raise ContinualError(f"{owner}: perturbations must be at least one, got none.")
    for perturbation in given:
        if isinstance(perturbation, type):
            check_perturbation(owner, perturbation)
        if not callable(perturbation):  # Hydra makes a config of any dataclass in a list, unless told not to
            raise ContinualError(
                f"{owner}: perturbations must be callable, got {perturbation!r} of type {type(perturbation).__name__}; "
                "a config needs _convert_: all beside its _target_."
            )
    return tuple(given)


def _check_given(name: str, value: Given | None, axes: int) -> None:
    """Raises ContinualError for numbers that make no vector or matrix; what is callable is asked later."""
    if value is None or (callable(value) and not isinstance(value, (Tensor, type))):
        return
    try:
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):  # texts, rows of different lengths, anything else
        tensor = None
    if tensor is None or tensor.ndim != axes or not bool(torch.isfinite(tensor).all()):
        shape = "a square matrix" if axes == 2 else "a vector"
        raise ContinualError(
            f"{name} must be {shape} of finite numbers, or a callable (inputs, generator) -> Tensor;"
            f" got {_kind(value)}."
        )


def _kind(value: object) -> str:
    """In few words of what kind a given value is, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and type {value.dtype}"
    return repr(value)[:80]


def _given(name: str, value: Given, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """``value`` as a tensor of ``shape``, made if it is a callable."""
    made = value(shape[0], generator) if callable(value) else value
    tensor = made if isinstance(made, Tensor) else torch.tensor(made, dtype=torch.float64)
    if tensor.shape != shape:
        has, needs = (" x ".join(map(str, sizes)) for sizes in (tensor.shape, shape))
        raise ContinualError(
            f"{name} must be {needs} for units of {shape[0]} inputs, got {has}; give a callable (inputs, generator) "
            "-> Tensor that fits every layer, or hold it in a sub-space: InSubspace(Affine(...), basis)."
        )
    return tensor


def _label(value: Given | None) -> str:
    """Tells given values apart in a short text that is the same in every process."""
    if isinstance(value, Tensor):
        digest = hashlib.sha256(value.detach().double().cpu().contiguous().numpy().tobytes()).hexdigest()[:8]
        return f"<{' x '.join(map(str, value.shape))} #{digest}>"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
