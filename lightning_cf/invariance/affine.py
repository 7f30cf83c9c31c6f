"""Affine maps of weight vectors as a group, and the random ones that perturb units (US 12387107, paragraph 20).

Rotations, translations and shears change the direction of a unit's weight vector ``w``, whose length is ``|w|``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from lightning_cf.errors import ContinualError, check_number

Vectors = Float[Tensor, "units inputs"]
Rows = Float[Tensor, "units rank inputs"]
Matrix = Float[Tensor, "inputs inputs"]


@dataclass(frozen=True, eq=False)
class AffineMaps:
    """Unit ``u`` maps ``x`` to ``scale_u * M x + sum_k left_uk (right_uk . x) + shift_u``.

    The form is closed under ``@`` and :meth:`inverse`. A rotation or shear has rank 2 or 1, a translation rank 0, and
    only ``M``, which the units share, is dense: units * rank * inputs + inputs ** 2 numbers, no matrix a unit.

    >>> x = torch.tensor([[3., 4.]])
    >>> move = replace(AffineMaps.identity(x), shift=torch.tensor([[1., 0.]]))
    >>> double = replace(AffineMaps.identity(x), scale=torch.tensor([2.]))
    >>> (double @ move)(x).tolist(), (move @ double)(x).tolist()
    ([[8.0, 8.0]], [[7.0, 8.0]])
    >>> move.inverse()(move(x)).tolist()
    [[3.0, 4.0]]

    Attributes:
        scale: factor of each unit, dimensionless.
        left: vectors of the low-rank part that are put in.
        right: vectors of the low-rank part that are measured along.
        shift: added to each unit, in units of the weights.
        matrix: ``M``, shared by the units; None stands for the identity.
    """

    scale: Float[Tensor, "units"]
    left: Rows
    right: Rows
    shift: Vectors
    matrix: Matrix | None = None

    @staticmethod
    def identity(vectors: Vectors) -> AffineMaps:
        """The map of each row of ``vectors`` to itself, of their type and on their device."""
        units, inputs = vectors.shape
        none = vectors.new_zeros(units, 0, inputs)
        return AffineMaps(vectors.new_ones(units), none, none, vectors.new_zeros(()).expand_as(vectors))

    def __call__(self, vectors: Vectors) -> Vectors:
        """Each row mapped by its unit's map."""
        mapped: Tensor = self._linear(vectors[:, None])[:, 0] + self.shift
        return mapped

    def __matmul__(self, other: AffineMaps) -> AffineMaps:
        """First ``other``, then this; the ranks add up."""
        matrix, right = self.matrix, self.right
        if other.matrix is not None:
            matrix = other.matrix if matrix is None else matrix @ other.matrix
            right = right @ other.matrix
        return AffineMaps(
            scale=self.scale * other.scale,
            left=torch.cat([self._linear(other.left), self.left], dim=1),
            right=torch.cat([other.right, other.scale[:, None, None] * right], dim=1),
            shift=self(other.shift),
            matrix=matrix,
        )

    def inverse(self) -> AffineMaps:
        """The maps that undo these, of the same rank (Woodbury's identity).

        Raises:
            ContinualError: a scale is 0, or a map flattens some direction.
        """
        back, left, right = self.matrix, self.left, self.right
        if back is not None:
            if int(torch.linalg.matrix_rank(back)) < len(back):
                raise ContinualError("affine maps: the matrix is singular and has no inverse; keep the vectors.")
            back = torch.linalg.inv(back)
            left, right = left @ back.T, right @ back
        core = self.scale[:, None, None] * torch.eye(left.shape[1]).to(left) + right @ self.left.mT
        size = self.scale.abs() + left.flatten(1).norm(dim=1) * self.right.flatten(1).norm(dim=1)
        least = 8 * torch.finfo(size.dtype).eps * left.shape[2] ** 0.5 * size  # what rounding makes of 0
        flat = (self.scale == 0) | (torch.linalg.svdvals(core) <= least[:, None]).any(dim=1)
        if flat.any():
            raise ContinualError(
                f"affine maps: {int(flat.sum())} of {len(flat)} have no inverse, the first is that of unit "
                f"{int(flat.nonzero()[0])}; keep the vectors instead."
            )
        left = torch.linalg.solve(core.mT, left) / -self.scale[:, None, None]
        linear = AffineMaps(1 / self.scale, left, right, torch.zeros_like(self.shift), back)
        return replace(linear, shift=-linear(self.shift))

    def _linear(self, rows: Rows) -> Rows:
        """``rows``, some for each unit, mapped without the shift."""
        shared = rows if self.matrix is None else rows @ self.matrix.T
        mapped: Tensor = self.scale[:, None, None] * shared + (rows @ self.right.mT) @ self.left
        return mapped


class AffinePerturbation(ABC):
    """A perturbation that draws an affine map for each unit and applies it."""

    @abstractmethod
    def maps(self, vectors: Vectors, generator: Generator) -> AffineMaps:
        """The maps drawn for ``vectors``, of their type and on their device."""

    def __call__(self, vectors: Vectors, generator: Generator) -> Vectors:
        """Copies of the vectors, one row a unit, each mapped by a map of its own drawn from the generator."""
        wide = widened(vectors)
        return self.maps(wide, generator)(wide).to(vectors)


@dataclass(frozen=True)
class Rotation(AffinePerturbation):
    """``cos(a) w + sin(a) |w| e``: turned by ``a`` towards a random direction ``e`` orthogonal to ``w``; lengths stay.

    The map turns the plane of ``w`` and ``e`` and leaves all else in place, so that rotations drawn for the same base
    from the same generator compose as their angles add. Zero vectors and units of one input have no such plane and
    stay as they are.

    >>> w = torch.tensor([[3.0, 4.0]])
    >>> turned = Rotation(degrees=90.0)(w, torch.Generator().manual_seed(0))
    >>> round(float(turned.norm()), 5), round(abs(float((w * turned).sum())), 5)
    (5.0, 0.0)

    Attributes:
        degrees: angle between the vector and the disturbed one.
    """

    degrees: float = 90.0

    def __post_init__(self) -> None:
        check_number("Rotation", "degrees", self.degrees)

    def maps(self, vectors: Vectors, generator: Generator) -> AffineMaps:
        """For each unit a turn in a plane of its own, that of its vector and a random direction orthogonal to it."""
        plane = _plane(vectors, generator)
        angle = math.radians(self.degrees)
        less = -2 * math.sin(angle / 2) ** 2  # cos - 1, without cancellation for small angles
        turn = vectors.new_tensor([[less, math.sin(angle)], [-math.sin(angle), less]])
        return replace(AffineMaps.identity(vectors), left=turn @ plane, right=plane)


@dataclass(frozen=True)
class Translation(AffinePerturbation):
    """``w + length |w| u``: moved in a random direction ``u`` of its own, ``|u| = 1``. Zero vectors stay.

    Attributes:
        length: of the displacement relative to the vector's, dimensionless.
    """

    length: float = 1.0

    def __post_init__(self) -> None:
        check_number("Translation", "length", self.length, least=0.0)

    def maps(self, vectors: Vectors, generator: Generator) -> AffineMaps:
        """For each unit a displacement in a random direction, as long as ``length`` times its vector."""
        lengths = self.length * vectors.norm(dim=1, keepdim=True)
        return replace(AffineMaps.identity(vectors), shift=lengths * _directions(standard_normal(vectors, generator)))


@dataclass(frozen=True)
class Shear(AffinePerturbation):
    """``w + factor |w| e``, ``e`` a random direction orthogonal to ``w``: what lies along ``w`` is kept.

    The map is ``x + factor (x . w / |w|) e``. Zero vectors and units of one input stay as they are.

    Attributes:
        factor: tangent of the angle between the vector and the disturbed one, dimensionless.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        check_number("Shear", "factor", self.factor)

    def maps(self, vectors: Vectors, generator: Generator) -> AffineMaps:
        """For each unit a shear along a random direction orthogonal to its vector."""
        plane = _plane(vectors, generator)
        return replace(AffineMaps.identity(vectors), left=self.factor * plane[:, 1:], right=plane[:, :1])


@dataclass(frozen=True)
class Scaling(AffinePerturbation):
    """``s w``: each unit by a factor ``s`` of its own, log-uniform in ``[1 / factor, factor]``; directions stay.

    Attributes:
        factor: the largest, dimensionless, at least 1.
    """

    factor: float = 2.0

    def __post_init__(self) -> None:
        check_number("Scaling", "factor", self.factor, least=1.0)

    def maps(self, vectors: Vectors, generator: Generator) -> AffineMaps:
        """For each unit a factor of its own, log-uniform between ``1 / factor`` and ``factor``."""
        exponent = torch.rand(len(vectors), generator=generator).to(vectors) * 2 - 1
        return replace(AffineMaps.identity(vectors), scale=self.factor**exponent)


def standard_normal(vectors: Vectors, generator: Generator) -> Vectors:
    """Standard normal numbers in the shape of ``vectors``, drawn on the CPU so that every device gets the same."""
    return torch.randn(vectors.shape, generator=generator).to(vectors)


def widened(vectors: Vectors) -> Vectors:
    """In float32 at least: low precision would not keep lengths and angles."""
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))


def _directions(vectors: Vectors) -> Vectors:
    """Each vector at length 1; zero vectors stay zero."""
    peak = vectors.abs().amax(dim=1, keepdim=True)
    scaled = vectors / peak.where(peak > 0, 1)  # the squares of tiny numbers would be 0
    directions: Tensor = scaled / scaled.norm(dim=1, keepdim=True).clamp_min(1)
    return directions


def _plane(vectors: Vectors, generator: Generator) -> Float[Tensor, "units 2 inputs"]:
    """The direction of each vector, and a random one orthogonal to it; zeros where there is no such plane."""
    first, second = _directions(vectors), standard_normal(vectors, generator)
    for _ in range(2):  # once leaves a part along the first where the draw is nearly parallel to it
        second = second.addcmul(first, (first * second).sum(dim=1, keepdim=True), value=-1)
    length = second.norm(dim=1, keepdim=True)
    exists = (first.norm(dim=1, keepdim=True) > 0) & (length > 0)
    return torch.stack([first * exists, second * (exists / length.where(exists, 1))], dim=1)
