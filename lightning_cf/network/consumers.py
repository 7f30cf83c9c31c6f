"""Weights that read units: each row computes a unit, each column (or input channel) is a unit that it reads."""

from __future__ import annotations

from jaxtyping import Int64
from torch import Tensor, nn

from lightning_cf.network.structure import NO_UNIT, Entries, Structure


def consumers(
    module: nn.Module, structure: Structure, way: int = 0, *, trained: bool = True
) -> list[tuple[str, Entries]]:
    """Weights used once in a way through the network, whose rows are units and whose columns read units; with that use.

    Args:
        module: the network.
        structure: its structure.
        way: through the network.
        trained: whether to leave out weights that do not train.
    """
    found = []
    parameters = dict(module.named_parameters())
    for name in structure.entries:
        uses = structure.uses_on(name, way)
        if len(uses) != 1 or uses[0].used is not None:
            continue
        use = uses[0]
        rows_are_units = name in parameters and use.role == "weight" and use.target.ndim > 0
        if not rows_are_units or (trained and not parameters[name].requires_grad):
            continue
        along_rows = use.target.numel() == use.target.shape[0] and use.source.shape[0] == 1
        if along_rows and bool((use.source != NO_UNIT).any()):
            found.append((name, use))
    return found


def input_units(use: Entries) -> Int64[Tensor, "inputs"]:
    """The unit that each input column (Linear) or input channel (convolution) of a weight reads."""
    return use.source.flatten()
