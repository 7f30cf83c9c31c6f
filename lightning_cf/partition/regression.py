"""Folding by regression: what the redundant units contributed is computed anew from the units that are kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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
        change = z.T @ z
        self.matrix += change.sub_(self.matrix * len(z)).div_(total)  # in place: a wide layer's fill gigabytes
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


@dataclass
class Samples:
    """All of a layer's inputs themselves, a constant one behind each: less than their moments while they are few.

    Attributes:
        blocks: the inputs, one tensor a batch.
        count: how many there are.
        left_out: how many were not finite, and are not among them.
    """

    blocks: list[Float[Tensor, "_ inputs"]] = field(default_factory=list)
    count: int = 0
    left_out: int = 0

    @property
    def rows(self) -> Float[Tensor, "samples inputs"]:
        """The inputs, a row each."""
        if len(self.blocks) > 1:
            self.blocks = [torch.cat(self.blocks)]
        return self.blocks[0]

    def update(self, features: Features) -> None:
        """Takes in more samples, those that are finite."""
        finite = _finite_rows(features)
        self.left_out += len(features) - len(finite)
        self.blocks.append(torch.cat([finite, finite.new_ones(len(finite), 1)], dim=1))
        self.count += len(finite)

    def moments(self) -> Moments:
        """The second moments of the inputs so far."""
        found = _no_moments(self.rows.shape[1], self.rows.device)
        found.update(self.rows[:, :-1])
        found.left_out = self.left_out
        return found


def _no_moments(size: int, device: torch.device) -> Moments:
    return Moments(torch.zeros(size, size, dtype=torch.float64, device=device))


def _finite_rows(features: Features) -> Float[Tensor, "_ features"]:
    return features if bool(features.isfinite().all()) else features[rows_finite([features])]


WIDE = 12_288
"""Layers with more inputs are folded on a sample of them: second moments of so many take 1.2 GB."""

SAMPLED = 1024
"""How many inputs such a sample holds."""

NARROW = 2048
"""Layers with more inputs are folded on their samples while those are fewer than the inputs."""

QUIET = 5.0
"""For how many seconds nothing is told of a pass over the data."""

_log = logging.getLogger(__name__)

Seen = Moments | Samples | Sample
"""What was seen of a layer's inputs."""


def input_moments(weights: Mapping[str, Tensor], passes: Iterable[Callable[[], Any]]) -> dict[str, Seen]:
    """Moments of the inputs of the layers with these weights, over some forward passes.

    Of wide layers these are the samples themselves, where they are few; of very wide ones some of them.

    Args:
        weights: weights of linear layers and convolutions, by name; grouped convolutions are left out.
        passes: each call runs the network forward once.
    """
    seen: dict[str, Seen] = {}

    def record(name: str, x: Inputs, patches: Features) -> None:
        size = patches.shape[1] + 1
        if name not in seen:
            seen[name] = _nothing_seen(size, patches)
        now = seen[name]
        now.update(patches)
        if isinstance(now, Samples) and now.count >= size:
            seen[name] = now.moments()

    told = time.monotonic()
    with torch.no_grad(), InputRecorder(weights, record):
        for number, forward in enumerate(passes, 1):
            forward()
            if time.monotonic() - told >= QUIET:
                told = time.monotonic()
                _log.info("%d batches read, to fold %d layers on what they read", number, len(weights))
    return seen


def _nothing_seen(size: int, first: Features) -> Seen:
    """What takes in the inputs of a layer, a constant one behind each counted in their size, by the first of them."""
    if size > WIDE:
        return Sample(first.new_empty(SAMPLED, size))
    return Samples() if size > NARROW and len(first) < size else _no_moments(size, first.device)


def fold(
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, "outputs"] | None,
    moments: Seen,
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
        moments: of the layer's inputs, or such inputs themselves.
        kept: inputs that stay.
        ridge: r, relative to the mean square of a kept input, dimensionless.
    """
    columns = kept.nonzero().flatten()
    if bias is not None:
        columns = torch.cat([columns, columns.new_tensor([len(kept)])])
    rest = (~kept).nonzero().flatten()
    if not isinstance(moments, Moments):
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
    """The same least squares, with as many equations as there are columns or, in their dual form, samples."""
    penalty = ridge * sum(float(rows[:, block].double().square().sum()) for block in columns.split(4096)) / len(columns)
    lost = _products(rows, weight, rest)
    if len(columns) < len(rows):
        kept = rows[:, columns].double()
        change: Tensor = torch.linalg.solve(_raised(kept.T @ kept, penalty), kept.T @ lost)
        return change.T
    solved = torch.linalg.solve(_raised(_products(rows, rows, columns), penalty), lost)
    return torch.cat([solved.T @ rows[:, block].double() for block in columns.split(4096)], dim=1)


def _raised(matrix: Tensor, penalty: float) -> Tensor:
    return matrix + max(penalty, 1e-12) * torch.eye(len(matrix)).to(matrix)


def _products(a: Tensor, b: Tensor, columns: Tensor) -> Tensor:
    """``a @ b.T`` over some columns, in double precision, some at a time."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for block in columns.split(4096):
        left = a[:, block].double()
        total += left @ (left if a is b else b[:, block].double()).T
    return total
