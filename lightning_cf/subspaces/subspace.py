"""Sub-spaces that hold perturbations and training steps of weight vectors (US 12387107, paragraphs 21 and 24)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_cf.errors import ContinualError, check_count, check_kind
from lightning_cf.utilities.describing import described_as
from lightning_cf.utilities.files import load_tensors
from lightning_cf.utilities.randomness import keyed_generator

Basis = Float[Tensor, "inputs dimensions"]
Bases = Mapping[str, Tensor]


@runtime_checkable
class Subspace(Protocol):
    """Says in which directions the weight vectors of a layer may move."""

    def basis(self, layer: str, inputs: int, directions: Bases) -> Basis | None:
        """Orthonormal basis for one layer, or None where its vectors may move in every direction.

        Args:
            layer: name of the layer's unit group.
            inputs: length of a weight vector there.
            directions: what was learned in training so far, for each layer (``NeuronLedger.directions``).
        """
        ...


@dataclass(frozen=True, repr=False, eq=False)
class GivenSubspace:
    """Sub-spaces that the user names: for each layer a matrix whose columns span it.

    Attributes:
        bases: matrices of shape (inputs, any) by layer, or a file of such a mapping that ``torch.load`` reads. A layer
            that is not named moves in every direction.
    """

    bases: Mapping[str, Tensor] | str | Path
    _digest: str = field(init=False)

    def __post_init__(self) -> None:
        bases = self.bases
        if isinstance(bases, (str, Path)):
            if not Path(bases).is_file():
                raise ContinualError(f"subspace: there is no file {bases}; give one that torch.save wrote.")
            bases = load_tensors(bases, f"subspace: {bases} is no file that torch.load reads.")
        if not isinstance(bases, Mapping) or not all(map(_is_matrix, bases.values())):
            raise ContinualError(
                "subspace: bases must map each layer to a matrix (inputs, dimensions), for instance"
                " {'network.1': torch.eye(64)[:, :8]}."
            )
        # Of what was given: decompositions differ in their last bits from one machine to the next.
        bases = {str(layer): basis for layer, basis in bases.items()}
        object.__setattr__(self, "_digest", _digest(bases))
        object.__setattr__(self, "bases", {layer: _orthonormal(layer, basis) for layer, basis in bases.items()})

    def basis(self, layer: str, inputs: int, directions: Bases) -> Basis | None:
        """The given one.

        Raises:
            ContinualError: if it was made for vectors of another length.
        """
        assert isinstance(self.bases, Mapping)
        basis = self.bases.get(layer)
        if basis is not None and len(basis) != inputs:
            raise ContinualError(
                f"subspace: the basis of '{layer}' has {len(basis)} rows, but weight vectors there have {inputs}"
                " entries."
            )
        return basis

    def check_layers(self, known: Iterable[str]) -> None:
        """Raises ContinualError for a layer that the network does not have."""
        assert isinstance(self.bases, Mapping)
        strange = sorted(set(self.bases) - set(known))
        if strange:
            raise ContinualError(
                f"subspace: there is a basis for '{strange[0]}', but the network has no such layer of hidden units; it"
                f" has {', '.join(sorted(known))}."
            )

    def __repr__(self) -> str:
        assert isinstance(self.bases, Mapping)
        return f"GivenSubspace(layers={sorted(self.bases)}, sha256={self._digest})"


@described_as.register(GivenSubspace)
def _(value: GivenSubspace, depth: int) -> str:
    return repr(value)  # of what was given: decompositions differ in their last bits from one machine to the next


@dataclass(frozen=True)
class RandomSubspace:
    """A random sub-space for each layer, drawn once.

    >>> RandomSubspace(dimensions=0.25).basis("hidden", 8, {}).shape
    torch.Size([8, 2])

    Attributes:
        dimensions: a share of the vectors' length in (0, 1], or a whole number.
        seed: what it depends on, with the layer's name.
    """

    dimensions: float | int = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        _check_dimensions(self.dimensions)
        check_count("subspace", "seed", self.seed, least=0)

    def basis(self, layer: str, inputs: int, directions: Bases) -> Basis | None:
        """The span of standard normal vectors: every sub-space of that size is equally likely."""
        generator = keyed_generator(self.seed, "subspace", layer, inputs)
        drawn = torch.randn(inputs, count_of(self.dimensions, inputs), generator=generator, dtype=torch.float64)
        basis: Tensor = torch.linalg.qr(drawn).Q.float()
        return basis


@dataclass(frozen=True)
class LearnedSubspace:
    """The directions in which training moved the redundant units while its loss fell.

    The leading right singular vectors of the redundant units' gradients in recent steps. They are found in LEARN and
    refreshed in INVARIANCE, every ``steps`` steps, as long as the mean loss over these steps falls; then they stand
    still, so that the next task trains in the very directions in which the units were perturbed. Until something was
    learned, perturbations are not held.

    Attributes:
        dimensions: a share of the vectors' length in (0, 1], or a whole number; fewer where the gradients span less.
        steps: how many recent training batches count.
        seed: of the random projections by which gradients are remembered.
    """

    dimensions: float | int = 0.1
    steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        _check_dimensions(self.dimensions)
        check_count("subspace", "steps", self.steps)
        check_count("subspace", "seed", self.seed, least=0)

    def basis(self, layer: str, inputs: int, directions: Bases) -> Basis | None:
        """The directions learned so far for a layer; None before there are any, so that nothing is held."""
        return directions.get(layer)


def check_subspace(owner: str, subspace: object) -> None:
    """Raises ContinualError for what is no sub-space, such as a class of them that was not called."""
    if subspace is not None:
        check_kind(owner, "subspace", subspace, Subspace, "a sub-space, such as RandomSubspace(dimensions=0.5)")


def count_of(dimensions: float | int, inputs: int) -> int:
    """How many dimensions of ``inputs`` a share or a whole number means."""
    wanted = dimensions if isinstance(dimensions, int) else math.ceil(dimensions * inputs - 1e-9)
    return min(inputs, max(1, wanted))


def exact_dtype(device: torch.device) -> torch.dtype:
    """Double precision, whose products neither autocast nor TF32 shortens; single where a device has no double."""
    return torch.float32 if device.type == "mps" else torch.float64


def _is_matrix(basis: object) -> bool:
    return isinstance(basis, Tensor) and basis.ndim == 2 and not basis.is_complex()


def _check_dimensions(dimensions: float | int) -> None:
    whole = isinstance(dimensions, int) and not isinstance(dimensions, bool) and dimensions >= 1
    share = isinstance(dimensions, float) and 0 < dimensions <= 1
    if not (whole or share):
        raise ContinualError(
            "subspace: dimensions must be a share in (0, 1] such as 0.5, or a whole number of at least 1,"
            f" got {dimensions!r}."
        )


def _orthonormal(layer: str, spanning: Tensor) -> Basis:
    """An orthonormal basis of the span of a matrix's columns, up to the rounding of its type."""
    wide = spanning.detach().cpu().double()
    if not bool(wide.any()) or not bool(torch.isfinite(wide).all()):
        raise ContinualError(f"subspace: the basis of '{layer}' spans no direction, or is not finite.")
    u, s, _ = torch.linalg.svd(wide, full_matrices=False)
    rounding = torch.finfo(spanning.dtype).eps if spanning.is_floating_point() else 0.0
    rank = int((s > max(1e-10, 10 * rounding) * s[0]).sum())
    basis: Tensor = u[:, :rank].float().contiguous()
    return basis


def _digest(bases: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for layer, basis in sorted(bases.items()):
        wide = basis.detach().cpu().double().contiguous()
        digest.update(f"{layer} {tuple(basis.shape)}".encode() + wide.numpy().tobytes())
    return digest.hexdigest()[:16]
