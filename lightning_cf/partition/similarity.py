"""How alike two units are: cosine of their weights less the squared distance of their biases, or a measure given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from lightning_cf.errors import ContinualError

Vectors = Float[Tensor, "units inputs"]
Biases = Float[Tensor, "units"]
Units = Int64[Tensor, "some"]

PairMeasure = Callable[
    [Float64[Tensor, "a inputs"], Float64[Tensor, "a"], Float64[Tensor, "b inputs"], Float64[Tensor, "b"]],
    Any,  # Float[Tensor, "a b"], which jsonargparse would take for the class that a function named here must return
]
"""Similarities (a x b) of the units ``a`` with the units ``b``, from the vectors and biases of ``a``, then of ``b``.

Finite, larger for more alike units, and the same whichever unit of a pair comes first; the scale is free.
"""

ASYMMETRY = 1e-6
"""How far a measure may depend on the order of a pair, as a share of its largest value: rounding does."""


@dataclass(frozen=True)
class Similarity:
    """Similarity of the units of a group, computed tile by tile and never held whole.

    ``s_ij = cos(w_i, w_j) - bias_weight * (b_i - b_j) ** 2`` (US 12387107, paragraphs 15 and 48), in double
    precision. Two zero vectors have cosine 1, a zero vector and another one cosine 0. ``measure`` takes the place of
    the formula ("or any other measure", paragraphs 42 and 48).

    >>> s = Similarity(torch.tensor([[1., 0.], [2., 0.], [0., 1.]]), torch.tensor([0., 0.5, 0.]))
    >>> s.tile(slice(0, 3), slice(0, 3)).tolist()
    [[1.0, 0.75, 0.0], [0.75, 1.0, -0.25], [0.0, -0.25, 1.0]]
    >>> near = Similarity(s.vectors, s.biases, measure=lambda v, b, w, c: -torch.cdist(v, w))
    >>> near.tile(slice(0, 2), slice(0, 2)).tolist()
    [[-0.0, -1.0], [-1.0, -0.0]]

    Attributes:
        vectors: what is compared, one row a unit.
        biases: bias of each unit.
        bias_weight: weight of the bias term, dimensionless; the patent's regulariser. Not used with ``measure``.
        precision: of the vectors' products; all else is in double precision.
        units: compares these rows of ``vectors`` and ``biases`` only, without a copy of them.
        measure: compares the units instead, one tile of them at a time.
    """

    vectors: Vectors
    biases: Biases
    bias_weight: float = 1.0
    measure: PairMeasure | None = None
    precision: torch.dtype = torch.float64
    units: Int64[Tensor, "some"] | None = None

    def __post_init__(self) -> None:
        norms = torch.cat([self._vectors(block).double().norm(dim=1) for block in torch.arange(len(self)).split(1024)])
        if not bool(torch.isfinite(norms).all() & torch.isfinite(self._biases(slice(None))).all()):
            raise ContinualError("similarity: the weights are not all finite; the training diverged before.")
        object.__setattr__(self, "norms", norms)

    norms: Float64[Tensor, "compared"] = None  # type: ignore[assignment]
    """Euclidean norm of each vector compared: the patent's magnitude."""

    matrix: Float64[Tensor, "compared compared"] | None = None
    """All similarities, where they are kept."""

    def __len__(self) -> int:
        return len(self.vectors) if self.units is None else len(self.units)

    def _vectors(self, rows: slice | Tensor) -> Float[Tensor, "some inputs"]:
        return self.vectors[rows if self.units is None else self.units[rows]].cpu().to(self.precision)

    def _biases(self, rows: slice | Tensor) -> Float64[Tensor, "some"]:
        return self.biases[rows if self.units is None else self.units[rows]].cpu().double()

    def kept(self) -> Similarity:
        """The same similarities, computed once: for units that are compared again and again, and few enough."""
        matrix = torch.empty(len(self), len(self), dtype=torch.float64)
        for rows, columns, values in self.tiles(1024):
            a, b = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
            matrix[a, b], matrix[b, a] = values, values.T
        return replace(self, matrix=matrix)

    def tile(self, rows: slice | Tensor, columns: slice | Tensor) -> Float64[Tensor, "rows columns"]:
        """Similarities of the units ``rows`` with the units ``columns``.

        Raises:
            ContinualError: if ``measure`` gives anything but finite similarities, one for each pair, or if it is
                seen to depend on a pair's order (where ``rows`` and ``columns`` are the same units).
        """
        if self.matrix is not None:
            return self.matrix[rows][:, columns]
        if self.measure is not None:
            return self._measured(self.measure, rows, columns)
        products = (self._vectors(rows) @ self._vectors(columns).T).double()
        scale = self.norms[rows][:, None] * self.norms[columns][None, :]
        cosine = torch.where(scale > 0, products / scale.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        both_zero = (self.norms[rows] == 0)[:, None] & (self.norms[columns] == 0)[None, :]
        cosine = torch.where(both_zero, 1.0, cosine.clamp(-1, 1))
        distance = self._biases(rows)[:, None] - self._biases(columns)[None, :]
        return cosine - self.bias_weight * distance.square()

    def tiles(self, size: int) -> Iterator[tuple[Units, Units, Float64[Tensor, "rows columns"]]]:
        """Rows, columns and similarities of tiles of ``size`` units a side that cover the upper triangle."""
        blocks = torch.arange(len(self)).split(size)
        for first, rows in enumerate(blocks):
            for columns in blocks[first:]:
                yield rows, columns, self.tile(rows, columns)

    def quantiles(self, points: tuple[float, ...] = (0.5, 0.9, 0.99, 1.0), sample: int = 2048) -> list[float]:
        """Quantiles of the similarities of distinct pairs, over all units or an even sample of them."""
        chosen = torch.linspace(0, len(self) - 1, min(sample, len(self))).long()
        tile = self.tile(chosen, chosen)
        pairs = tile[torch.triu(torch.ones_like(tile, dtype=torch.bool), diagonal=1)]
        if len(pairs) == 0:
            return [float("nan")] * len(points)
        ordered = pairs.sort().values
        return [float(ordered[round(point * (len(ordered) - 1))]) for point in points]

    def _measured(
        self, measure: PairMeasure, rows: slice | Tensor, columns: slice | Tensor
    ) -> Float64[Tensor, "rows columns"]:
        a, biases_a = self._vectors(rows).double(), self._biases(rows)
        b, biases_b = self._vectors(columns).double(), self._biases(columns)
        try:
            tile = measure(a, biases_a, b, biases_b)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            name = getattr(measure, "__qualname__", repr(measure))
            raise ContinualError(
                f"similarity: measure {name} failed with {error!r}; it is called with vectors (a, inputs) and biases"
                " (a) of some units, then with those of others, and gives a Tensor (a, b)."
            ) from error
        fault = _fault(tile, len(a), len(b), same=torch.equal(a, b) and torch.equal(biases_a, biases_b))
        if fault:
            name = getattr(measure, "__qualname__", repr(measure))
            raise ContinualError(
                f"similarity: measure {name} returned {fault}; it must return a Tensor of shape ({len(a)}, {len(b)}),"
                f" the finite similarity of each of {len(a)} units with each of {len(b)}, larger for more alike units"
                " and the same whichever unit of a pair comes first."
            )
        found: Tensor = tile.detach().double()
        return found


def _fault(tile: object, a: int, b: int, *, same: bool) -> str | None:
    """What is wrong with the outcome of a measure for ``a`` by ``b`` units, which may be the ``same`` ones."""
    if not isinstance(tile, Tensor):
        return f"an object of type {type(tile).__name__}"
    if tile.shape != (a, b) or tile.is_complex():
        return f"a tensor of shape {tuple(tile.shape)} and type {tile.dtype}"
    finite = torch.isfinite(tile)
    if not bool(finite.all()):
        return f"{float(tile[~finite][0])} for a pair"
    if same:
        values = tile.detach().double()
        apart = (values - values.T).abs()
        if bool(apart.max() > ASYMMETRY * values.abs().max()):
            i, j = divmod(int(apart.argmax()), b)
            return f"{float(values[i, j])} for a pair and {float(values[j, i])} for the same pair the other way round"
    return None
