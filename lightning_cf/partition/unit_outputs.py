"""What the units of each group put out on a task's data, for ``measure="activation"``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lightning_cf.errors import ContinualError
from lightning_cf.network.consumers import consumers, input_units
from lightning_cf.network.finite import rows_finite
from lightning_cf.network.layer_inputs import Features, InputRecorder, Inputs
from lightning_cf.network.structure import Structure, UnitGroup
from lightning_cf.partition.folding import Passes


def unit_outputs(
    module: nn.Module,
    structure: Structure,
    groups: Sequence[UnitGroup],
    passes: Passes,
    *,
    rows: int = 2048,
    way: int = 0,
) -> dict[str, Float[Tensor, "_ _"]]:
    """Outputs of each group's units (units x samples), as the first layer behind them reads them.

    Args:
        module: the network.
        structure: its structure.
        groups: whose outputs to record.
        passes: over the task's data; at most 32 of them.
        rows: how many samples (tokens, positions) at most.
        way: in which the passes run the network.

    Raises:
        ContinualError: for a group that no linear layer or convolution reads directly.
    """
    readers: dict[str, tuple[str, Int64[Tensor, "_ _"]]] = {}
    for group in groups:
        for name, use in consumers(module, structure, way):
            source = input_units(use)
            inside = ((source >= group.first) & (source < group.first + group.size)).nonzero().flatten()
            if len(inside) and len(inside) % group.size == 0:
                readers[group.name] = (name, inside[source[inside].argsort(stable=True)].reshape(group.size, -1))
                break
        else:
            raise ContinualError(
                f"measure='activation' cannot see the outputs of '{group.name}': no linear layer or convolution"
                " reads them directly. Use measure='weight'."
            )
    inputs: dict[str, list[Inputs]] = {}

    def record(name: str, x: Inputs, patches: Features) -> None:
        x = x if bool(x.isfinite().all()) else x[rows_finite([x])]
        taken = sum(len(block) for block in inputs.setdefault(name, []))
        inputs[name].append(x[: max(0, rows - taken)].cpu())

    parameters = dict(module.named_parameters())
    with torch.no_grad(), InputRecorder({name: parameters[name] for name, _ in readers.values()}, record):
        for forward in islice(passes(), 32):
            forward()
    return {
        group: torch.cat(inputs[name]).T[by_unit.flatten()].reshape(len(by_unit), -1)
        for group, (name, by_unit) in readers.items()
    }
