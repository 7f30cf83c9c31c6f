"""How alike the units of each group are, by the measure that the options name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Int64
from torch import Tensor, nn

from lightning_cf.errors import ContinualError
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.structure import Structure, UnitGroup
from lightning_cf.partition.folding import Passes
from lightning_cf.partition.options import PartitionOptions
from lightning_cf.partition.similarity import Similarity
from lightning_cf.partition.unit_outputs import unit_outputs


def compare(
    module: nn.Module,
    structure: Structure,
    groups: Sequence[UnitGroup],
    candidates: Mapping[str, Int64[Tensor, "_"]],
    options: PartitionOptions,
    *,
    passes: Passes,
    way: int,
    start: Mapping[str, Tensor] | None,
    copied: bool,
) -> dict[str, Similarity]:
    """The similarities of the units that may be claimed, for each group by name.

    Args:
        module: the network.
        structure: its structure.
        groups: those to compare.
        candidates: for each group by name, the units that may be claimed.
        options: say the measure.
        passes: gives forward passes over the task's training data, for ``measure="activation"``.
        way: the task's way through the network.
        start: parameters at the task's start, for ``measure="update"``.
        copied: whether vectors are copied, so that the similarities outlast a change of the weights.

    Raises:
        ContinualError: where nothing kept what ``measure="update"`` compares with.
    """
    tensors, measure = named_tensors(module), options.measure
    outputs = unit_outputs(module, structure, groups, passes, way=way) if measure == "activation" else {}
    similarities = {}
    for group in groups:
        units = candidates[group.name]
        if measure == "activation":
            vectors = outputs[group.name]
            biases = vectors.new_zeros(len(vectors))
        else:
            vectors, biases = group.vectors(tensors), group.biases(tensors)
            if measure == "update":
                if start is None:
                    raise ContinualError(
                        "partition: measure='update' compares with the weights at the task's start, which nothing"
                        " kept. Add PartitionCallback to the fit in which the task is learned; give claim(start=...)"
                        " clones of them by name, taken before the task was learned; or use measure='weight'."
                    )
                vectors, biases = vectors - group.weights(start), biases - group.biases(start)
        custom = measure if callable(measure) else None
        there = units.to(vectors.device)
        if copied:
            similarities[group.name] = Similarity(vectors[there].cpu(), biases[there].cpu(), measure=custom)
        else:
            similarities[group.name] = Similarity(vectors, biases, measure=custom, units=there)
    return similarities
