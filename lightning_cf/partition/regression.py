"""Folding by regression: what the redundant units contributed is computed anew from the units that are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from lightning_cf.network.finite import rows_finite
from lightning_cf.network.layer_inputs import Features, InputRecorder, Inputs


@dataclass
class Moments:
    """Second moments of a layer's inputs, a constant one behind them.

    Attributes:
        matrix: mean of ``z zᵀ`` with ``z = (x, 1)``, where ``x`` is a sample (Linear) or a patch (convolution).
        count: number of samples.
        left_out: how many were not finite, and are not in it.
    """

    matrix: Float64[Tensor, "inputs inputs"]
    count: int = 0
    left_out: int = 0

    def update(self, features: Features) -> None:
        """Adds the moments of more samples to the sums."""
        given = len(features)
        features = _finite_rows(features)
        self.left_out += given - len(features)
        if len(features) == 0:
            return
        z = torch.cat([features, features.new_ones(len(features), 1)], dim=1).double()
        total = self.count + len(z)
        self.matrix += (z.T @ z - self.matrix * len(z)) / total
        self.count = total


@dataclass
class Sample:
    """Some of a layer's inputs themselves, a constant one behind each, where their moments would be too many.

    Attributes:
        room: where the inputs are put, evenly many from each batch.
        count: how many there are.
        left_out: how many were not finite, and are not among them.
    """

    room: Float[Tensor, "room inputs"]
    count: int = 0
    left_out: int = 0

    @property
    def rows(self) -> Float[Tensor, "samples inputs"]:
        """The inputs that were kept so far, a row each."""
        return self.room[: self.count]

    def update(self, features: Features) -> None:
        """Takes in some of more samples, while there is room."""
        given = len(features)
        features = _finite_rows(features)
        self.left_out += given - len(features)
        wanted = min(len(self.room) // 8, len(self.room) - self.count, len(features))
        chosen = torch.linspace(0, len(features) - 1, wanted).long()
        self.room[self.count : self.count + wanted, :-1] = features[chosen.to(features.device)]
        self.room[self.count : self.count + wanted, -1] = 1
        self.count += wanted


def _finite_rows(features: Features) -> Float[Tensor, "_ features"]:
    return features if bool(features.isfinite().all()) else features[rows_finite([features])]


WIDE = 12_288
"""Layers with more inputs are folded on a sample of them: second moments of so many take 1.2 GB."""

SAMPLED = 1024
"""How many inputs such a sample holds."""


def input_moments(weights: Mapping[str, Tensor], passes: Iterable[Callable[[], Any]]) -> dict[str, Moments | Sample]:
    """Moments of the inputs of the layers with these weights, over some forward passes; a sample of wide ones.

    Args:
        weights: weights of linear layers and convolutions, by name; grouped convolutions are left out.
        passes: each call runs the network forward once.
    """
    moments: dict[str, Moments | Sample] = {}

    def record(name: str, x: Inputs, patches: Features) -> None:
        size = patches.shape[1] + 1
        if name not in moments:
            wide = size > WIDE
            moments[name] = (
                Sample(patches.new_empty(SAMPLED, size))
                if wide
                else Moments(torch.zeros(size, size, dtype=torch.float64, device=patches.device))
            )
        moments[name].update(patches)

    with torch.no_grad(), InputRecorder(weights, record):
        for forward in passes:
            forward()
    return moments


def fold(
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, "outputs"] | None,
    moments: Moments | Sample,
    kept: Bool[Tensor, "inputs"],
    *,
    ridge: float = 1e-4,
) -> tuple[Float[Tensor, "outputs inputs"], Float[Tensor, "outputs"] | None]:
    """Weights that compute from the kept inputs what ``weight`` and ``bias`` computed from all.

    Least squares in closed form: ``W_kept + argmin over D of |X_rest W_rest - X_kept D|² + r |D|²``; the bias takes
    part where there is one. The rest's columns come back as zero.

    Args:
        weight: rows to solve again, convolution kernels flattened.
        bias: their biases, or None.
        moments: of the layer's inputs, or a sample of them.
        kept: inputs that stay.
        ridge: r, relative to the mean square of a kept input, dimensionless.
    """
    columns = kept.nonzero().flatten()
    if bias is not None:
        columns = torch.cat([columns, columns.new_tensor([len(kept)])])
    rest = (~kept).nonzero().flatten()
    if isinstance(moments, Sample):
        change = _solve_sampled(moments.rows, columns, rest, weight, ridge)
    else:
        matrix = moments.matrix
        left = matrix[columns][:, columns]
        left = left + ridge * left.diagonal().mean().clamp_min(1e-12) * torch.eye(len(columns)).to(left)
        right = matrix[columns][:, rest] @ weight[:, rest].double().T
        change = torch.linalg.solve(left, right).T
    folded = weight.double().clone()
    folded[:, rest] = 0
    folded[:, columns[columns < len(kept)]] += change[:, : int(kept.sum())]
    return folded.to(weight), None if bias is None else (bias.double() + change[:, -1]).to(bias)


def _solve_sampled(rows: Tensor, columns: Tensor, rest: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """The same least squares in their dual form: as many equations as there are samples, not inputs."""
    penalty = ridge * sum(float(rows[:, block].double().square().sum()) for block in columns.split(4096)) / len(columns)
    left = _products(rows, rows, columns)
    left = left + max(penalty, 1e-12) * torch.eye(len(rows)).to(left)
    solved = torch.linalg.solve(left, _products(rows, weight, rest))
    return torch.cat([solved.T @ rows[:, block].double() for block in columns.split(4096)], dim=1)


def _products(a: Tensor, b: Tensor, columns: Tensor) -> Tensor:
    """``a @ b.T`` over some columns, in double precision, some at a time."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for block in columns.split(4096):
        total += a[:, block].double() @ b[:, block].double().T
    return total
