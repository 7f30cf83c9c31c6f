"""A layer with random weights, of which only the seed is kept."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_cf.errors import check_count
from lightning_cf.task_inference.features.base import Features, Fixed, Rows, Values, inner, moments
from lightning_cf.task_inference.readout import Readout
from lightning_cf.task_inference.sites import Sites
from lightning_cf.utilities.randomness import keyed_generator

LEVELS = 127
"""Weights are whole numbers up to this, divided: drawn alike on every machine."""

READ = 16_384
"""So many values are read at most: a layer over those of a film or a minute of sound would not fit into memory."""


class RandomFeatures(Features):
    """A layer of rectified units with random weights, behind the input or other features.

    What is not linear in the input becomes so in enough of them (Prabhu et al. 2024, RanDumb; McDonnell et al. 2023,
    RanPAC, put them behind a pretrained network).

    Args:
        width: how many units.
        behind: what they read; default the input's values.
        seed: what the weights depend on, with their number.
    """

    def __init__(self, width: int, behind: Features | None = None, *, seed: int = 0) -> None:
        self.width = check_count("RandomFeatures", "width", width)
        self.behind = Values() if behind is None else behind
        self.seed = check_count("RandomFeatures", "seed", seed, least=0)
        self.variants, self.beside, self.maps = self.behind.variants, self.behind.beside, self.behind.maps

    def begin(self, seen: Readout, sites: Sites, generator: torch.Generator) -> dict[str, Tensor]:
        """The mean of each value that is read, and the deviation of all of them."""
        kept = self.behind.begin(seen, sites, generator)
        rows = folded(self.behind.of(kept, seen, sites), self.seed)
        fine = rows.isfinite()
        scale = (rows if bool(fine.all()) else rows[fine]).std().nan_to_num(1.0).clamp_min(1e-6)
        return {"centre": moments(rows)[0], "scale": scale, **{f"behind.{name}": v for name, v in kept.items()}}

    def of(self, fixed: Fixed, seen: Readout, sites: Sites) -> Rows:
        """The units' values, one row a sample."""
        rows = folded(self.behind.of(inner(fixed, "behind"), seen, sites), self.seed)
        rows = ((rows - fixed["centre"]) / fixed["scale"]).nan_to_num(0.0, 0.0, 0.0)
        weight, bias = (part.to(rows) for part in _drawn(self.seed, rows.shape[1], self.width))
        return (rows @ weight + bias).relu_()


def folded(rows: Float[Tensor, "batch values"], seed: int) -> Float[Tensor, "batch _"]:
    """Values of which there are no more than :data:`READ`: else many lie upon one another, with random signs.

    Args:
        rows: one a sample.
        seed: what the signs depend on.
    """
    layers = -(-rows.shape[1] // READ)
    if layers == 1:
        return rows
    signs = _signs(seed, layers).to(rows)
    padded = torch.nn.functional.pad(rows, (0, layers * READ - rows.shape[1]))
    found: Tensor = (padded.unflatten(1, (layers, READ)) * signs).sum(dim=1) / layers**0.5
    return found


@lru_cache(maxsize=4)
def _signs(seed: int, layers: int) -> Float[Tensor, "layers values"]:
    return torch.randint(2, (layers, READ), generator=keyed_generator("random signs", seed, layers)) * 2.0 - 1


@lru_cache(maxsize=4)
def _drawn(seed: int, values: int, width: int) -> tuple[Float[Tensor, "values width"], Float[Tensor, "width"]]:
    """Weights and biases; a unit's sum has a deviation of 1 where the values have, its bias one of 0.1."""
    generator = keyed_generator("random features", seed, values, width)
    found = torch.randint(-LEVELS, LEVELS + 1, (values + 1, width), generator=generator) / (LEVELS / 3**0.5)
    return found[:-1] / values**0.5, found[-1] / 10
