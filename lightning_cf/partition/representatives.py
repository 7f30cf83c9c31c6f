"""Which unit of a cluster stands for it."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from lightning_cf.errors import ContinualError

Representative = Literal["magnitude", "random"]


REPRESENTATIVES = ("magnitude", "random")


def check_generator(representative: Representative, generator: torch.Generator | None) -> None:
    """Raises ContinualError if representatives are to be drawn without a generator."""
    if representative == "random" and generator is None:
        raise ContinualError(
            "partition: representative='random' draws from a generator, got generator=None; give it"
            " torch.Generator().manual_seed(...)."
        )


def represented(
    members: Int64[Tensor, "units"], representative: Representative, generator: torch.Generator | None
) -> Int64[Tensor, "units"]:
    """Each unit's representative, where so far it is its cluster's largest unit."""
    if representative == "magnitude":
        return members
    return first_members(members, torch.randperm(len(members), generator=generator))


def first_members(clusters: Int64[Tensor, "units"], order: Int64[Tensor, "units"]) -> Int64[Tensor, "units"]:
    """For each unit the member of its cluster that comes first in ``order``; clusters go by any number below units."""
    first = torch.full_like(order, len(order)).scatter_reduce(0, clusters, order.argsort(), "amin")
    return order[first[clusters]]
