"""How alike two units are: cosine of their weight vectors, less the squared distance of their biases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lightning_cf.errors import ContinualError

Vectors = Float[Tensor, "units inputs"]
Biases = Float[Tensor, "units"]


@dataclass(frozen=True)
class Similarity:
    """Similarity of the units of a group, computed tile by tile and never held whole.

    ``s_ij = cos(w_i, w_j) - bias_weight * (b_i - b_j) ** 2`` (US 12387107, paragraphs 15 and 48), in double
    precision. Two zero vectors have cosine 1, a zero vector and another one cosine 0.

    >>> s = Similarity(torch.tensor([[1., 0.], [2., 0.], [0., 1.]]), torch.tensor([0., 0.5, 0.]))
    >>> s.tile(slice(0, 3), slice(0, 3)).tolist()
    [[1.0, 0.75, 0.0], [0.75, 1.0, -0.25], [0.0, -0.25, 1.0]]

    Attributes:
        vectors: what is compared, one row a unit.
        biases: bias of each unit.
        bias_weight: weight of the bias term, dimensionless; the patent's regulariser.
    """

    vectors: Vectors
    biases: Biases
    bias_weight: float = 1.0

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.vectors).all() & torch.isfinite(self.biases).all()):
            raise ContinualError("similarity: the weights are not all finite; the training diverged before.")
        norms = torch.cat([block.double().norm(dim=1) for block in self.vectors.split(4096)])
        object.__setattr__(self, "norms", norms)

    norms: Float64[Tensor, "units"] = None  # type: ignore[assignment]
    """Euclidean norm of each vector: the patent's magnitude."""

    def __len__(self) -> int:
        return len(self.vectors)

    def tile(self, rows: slice | Tensor, columns: slice | Tensor) -> Float64[Tensor, "rows columns"]:
        """Similarities of the units ``rows`` with the units ``columns``."""
        products = self.vectors[rows].double() @ self.vectors[columns].double().T
        scale = self.norms[rows][:, None] * self.norms[columns][None, :]
        cosine = torch.where(scale > 0, products / scale.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        both_zero = (self.norms[rows] == 0)[:, None] & (self.norms[columns] == 0)[None, :]
        cosine = torch.where(both_zero, 1.0, cosine.clamp(-1, 1))
        distance = self.biases[rows].double()[:, None] - self.biases[columns].double()[None, :]
        return cosine - self.bias_weight * distance.square()

    def quantiles(self, points: tuple[float, ...] = (0.5, 0.9, 0.99, 1.0), sample: int = 2048) -> list[float]:
        """Quantiles of the similarities of distinct pairs, over all units or an even sample of them."""
        chosen = torch.linspace(0, len(self) - 1, min(sample, len(self))).long()
        tile = self.tile(chosen, chosen)
        pairs = tile[torch.triu(torch.ones_like(tile, dtype=torch.bool), diagonal=1)]
        if len(pairs) == 0:
            return [float("nan")] * len(points)
        ordered = pairs.sort().values
        return [float(ordered[round(point * (len(ordered) - 1))]) for point in points]
