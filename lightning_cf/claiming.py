"""The partition of one task on a live network: which units to claim, folded and judged on the task's own metric."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lightning_cf.errors import ContinualError, check_choice, check_count, check_share
from lightning_cf.folding import Features, InputRecorder, Inputs, Moments, fold, input_moments
from lightning_cf.ledger import FREE, NeuronLedger
from lightning_cf.partition import Partition, partition, partition_into
from lightning_cf.similarity import Similarity
from lightning_cf.structure import NO_UNIT, Entries, Structure, UnitGroup, lookup, named_tensors

Measure = Literal["weight", "update", "activation"]
MEASURES = ("weight", "update", "activation")


class PartitionWarning(UserWarning):
    """A partition that works, but not as its options suggest."""


@dataclass(frozen=True, kw_only=True)
class PartitionOptions:
    """How units are compared and how many a task may claim.

    Attributes:
        measure: what is compared: ``"weight"`` (incoming weights, the patent's), ``"update"`` (weights less their
            value at the task's start) or ``"activation"`` (outputs on the task's data; no bias term).
        threshold: the similarity at which units form a cluster, or ``"auto"``: the smallest share of units whose
            cost in the task's metric stays within ``tolerance``.
        tolerance: how much of the metric ``"auto"`` may cost right after the partition, in the metric's unit.
        min_claim: the smallest share of a layer that ``"auto"`` tries, in (0, 1].
        max_claim: the largest share of a layer that one task may claim, in (0, 1]; default the free units divided by
            the tasks still to come, this one counted, or by ``reserve_tasks`` if that is more.
        reserve_tasks: for how many tasks, this one counted, room is kept at least.
        fold: whether the claimed units take over by regression what the redundant ones contributed.
        layers: the only layers to partition, by name; default all.
        exclude: layers that are not partitioned: the first task claims them whole.
    """

    measure: Measure = "weight"
    threshold: float | Literal["auto"] = "auto"
    tolerance: float = 0.005
    min_claim: float = 0.05
    max_claim: float | None = None
    reserve_tasks: int = 2
    fold: bool = True
    layers: Sequence[str] | None = None
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_choice("partition", "measure", self.measure, MEASURES)
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if self.threshold != "auto" and not (number and -1 <= self.threshold <= 1):
            raise ContinualError(f"partition: threshold must be a number in [-1, 1] or 'auto', got {self.threshold!r}.")
        check_share("partition", "tolerance", self.tolerance)
        check_share("partition", "min_claim", self.min_claim, above_zero=True)
        if self.max_claim is not None:
            check_share("partition", "max_claim", self.max_claim, above_zero=True)
            if self.max_claim < self.min_claim:
                raise ContinualError(
                    f"partition: max_claim ({self.max_claim}) must not be below min_claim ({self.min_claim})."
                )
        check_count("partition", "reserve_tasks", self.reserve_tasks)

    def partitioned(self, structure: Structure) -> list[UnitGroup]:
        """The groups to partition.

        Raises:
            ContinualError: if ``layers`` or ``exclude`` names a layer that the network does not have.
        """
        known = {layer for group in structure.groups for layer in group.layers}
        for name, wanted in (("layers", self.layers or ()), ("exclude", self.exclude)):
            for layer in wanted:
                if layer not in known:
                    raise ContinualError(
                        f"partition: {name} names '{layer}', but the network has no such layer of hidden units;"
                        f" it has {', '.join(sorted(known))}."
                    )
        chosen = [
            group
            for group in structure.groups
            if (self.layers is None or set(group.layers) & set(self.layers))
            and not set(group.layers) & set(self.exclude)
        ]
        if not chosen:
            raise ContinualError("partition: layers and exclude leave no layer to partition.")
        return chosen

    def budget(self, size: int, free: int, tasks_left: int) -> int:
        """How many of a layer's units a task may claim.

        Args:
            size: units of the layer.
            free: its free units.
            tasks_left: tasks still to come, this one counted.
        """
        if self.max_claim is None:
            return max(1, free // max(tasks_left, self.reserve_tasks))
        return max(1, min(math.floor(self.max_claim * size), free - (tasks_left - 1)))


@dataclass(kw_only=True)
class Claimer:
    """Partitions the current task's units and claims the non-redundant ones.

    Args:
        module: the network, in place.
        structure: its structure.
        ledger: takes the claim and the records.
        options: how to partition.
        score: the task's metric on judging data, of the module as it stands.
        higher_is_better: the metric's direction.
        passes: gives forward passes over the task's training data, one a batch.
        start: parameters at the task's start, for ``measure="update"``.
        tasks_left: tasks still to come, this one counted.
    """

    module: nn.Module
    structure: Structure
    ledger: NeuronLedger
    options: PartitionOptions
    score: Callable[[], float]
    passes: Callable[[], Iterator[Callable[[], Any]]]
    higher_is_better: bool = True
    start: Mapping[str, Tensor] | None = None
    tasks_left: int = 1

    def claim(self) -> None:
        """Partitions every group, folds and cuts (``exact``), claims, and records what was found.

        Under ``exact`` the weights from redundant into claimed units and outputs are zero afterwards; under
        ``perturb`` the network's function stays as it was, and folding serves only to judge.
        """
        self._groups = self.options.partitioned(self.structure)
        before = self.score()
        snapshot = {name: tensor.detach().clone() for name, tensor in dict(self.module.named_parameters()).items()}
        candidates = self._candidates()
        self._similarities = self._compare(candidates)
        self._moments = self._input_moments() if self.options.fold else {}
        after = before
        for partitions in self._proposals(candidates):
            self._restore(snapshot)
            self._apply(candidates, partitions)
            after = self.score()
            if self._loss(before, after) <= self.options.tolerance:
                break
        else:
            if self.options.threshold == "auto":
                warnings.warn(
                    f"Task '{self.ledger.tasks[-1].name}': no claim within the budget keeps the metric within"
                    f" tolerance={self.options.tolerance} ({before:.4f} before, {after:.4f} after the partition);"
                    " the whole budget is claimed. Raise max_claim, or lower reserve_tasks.",
                    PartitionWarning,
                    stacklevel=2,
                )
        if self.ledger.isolation == "perturb":
            self._restore(snapshot)
        self._record(candidates, partitions, before, after)

    # What may be claimed, and how alike it is

    def _candidates(self) -> dict[str, Int64[Tensor, "some"]]:
        """For each group the units to partition: the task's provisional claim, else all free units."""
        task = len(self.ledger.tasks) - 1
        wanted = FREE if self.ledger.tasks[-1].phase == "learn" else task
        return {name: (owner == wanted).nonzero().flatten() for name, owner in self.ledger.owners.items()}

    def _compare(self, candidates: Mapping[str, Tensor]) -> dict[str, Similarity]:
        tensors = named_tensors(self.module)
        outputs = self._unit_outputs() if self.options.measure == "activation" else {}
        similarities = {}
        for group in self._groups:
            units = candidates[group.name]
            if self.options.measure == "activation":
                vectors = outputs[group.name][units]
                biases = vectors.new_zeros(len(units))
            else:
                vectors, biases = group.weights(tensors), group.biases(tensors)
                if self.options.measure == "update":
                    assert self.start is not None
                    vectors, biases = vectors - group.weights(self.start), biases - group.biases(self.start)
                vectors, biases = vectors[units.to(vectors.device)], biases[units.to(vectors.device)]
            similarities[group.name] = Similarity(vectors.cpu(), biases.cpu())
        return similarities

    def _unit_outputs(self, rows: int = 2048) -> dict[str, Float[Tensor, "units samples"]]:
        """Outputs of each group's units on the task's data, as the first layer behind them reads them."""
        readers: dict[str, tuple[str, Int64[Tensor, "units features"]]] = {}
        for group in self._groups:
            for name, use in self._consumers():
                source = _input_units(use)
                inside = ((source >= group.first) & (source < group.first + group.size)).nonzero().flatten()
                if len(inside) and len(inside) % group.size == 0:
                    by_unit = inside[source[inside].argsort(stable=True)].reshape(group.size, -1)
                    readers[group.name] = (name, by_unit)
                    break
            else:
                raise ContinualError(
                    f"measure='activation' cannot see the outputs of '{group.name}': no linear layer or convolution"
                    " reads them directly. Use measure='weight'."
                )
        inputs: dict[str, list[Inputs]] = {}

        def record(name: str, x: Inputs, patches: Features) -> None:
            taken = sum(len(block) for block in inputs.setdefault(name, []))
            inputs[name].append(x[: max(0, rows - taken)].cpu())

        weights = {name: dict(self.module.named_parameters())[name] for name, _ in readers.values()}
        with torch.no_grad(), InputRecorder(weights, record):
            for forward in islice(self.passes(), 32):
                forward()
        result = {}
        for group_name, (name, by_unit) in readers.items():
            features = torch.cat(inputs[name]).T[by_unit.flatten()]
            result[group_name] = features.reshape(len(by_unit), -1)
        return result

    # Which claims to try

    def _proposals(self, candidates: Mapping[str, Tensor]) -> Iterator[dict[str, Partition]]:
        """Partitions of every group, from the smallest claim up; just one for a fixed threshold."""
        budgets = {
            group.name: self.options.budget(group.size, len(candidates[group.name]), self.tasks_left)
            for group in self._groups
        }
        if self.options.threshold != "auto":
            yield self._fixed(budgets, self.options.threshold)
            return
        share, counts = self.options.min_claim, None
        while counts != budgets:
            counts = {
                group.name: min(budgets[group.name], max(1, math.ceil(share * group.size - 1e-9)))
                for group in self._groups
            }
            yield {name: partition_into(self._similarities[name], count) for name, count in counts.items()}
            share *= 1.25

    def _fixed(self, budgets: Mapping[str, int], threshold: float) -> dict[str, Partition]:
        partitions, capped = {}, []
        for name, similarity in self._similarities.items():
            partitions[name] = partition(similarity, threshold)
            found = int(partitions[name].non_redundant.sum())
            if found > budgets[name]:
                partitions[name] = partition(similarity, threshold, limit=budgets[name])
                median, ninety, ninety_nine, most = similarity.quantiles()
                capped.append(
                    f"'{name}': {found} of {len(similarity)} units non-redundant, capped to {budgets[name]}"
                    f" (similarities: median {median:.2f}, 90% {ninety:.2f}, 99% {ninety_nine:.2f}, largest {most:.2f})"
                )
        if capped:
            warnings.warn(
                f"Task '{self.ledger.tasks[-1].name}': threshold={threshold} finds too little redundancy with"
                f" measure='{self.options.measure}'; max_claim caps the claim, the units of highest magnitude stay. "
                + "; ".join(capped)
                + ". Choose a threshold below the largest similarity, or threshold='auto'.",
                PartitionWarning,
                stacklevel=2,
            )
        return partitions

    # Trying a claim

    def _apply(self, candidates: Mapping[str, Tensor], partitions: Mapping[str, Partition]) -> None:
        """Claims, folds, and cuts the weights from redundant into claimed units."""
        claimed = {}
        for group in self.structure.groups:
            mask = torch.zeros(group.size, dtype=torch.bool)
            units = candidates[group.name]
            mask[units[partitions[group.name].non_redundant] if group.name in partitions else units] = True
            claimed[group.name] = mask
        self.ledger.claim(claimed)
        if self.options.fold:
            self._fold()
        parameters = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, uses in self.structure.entries.items():
                if name in parameters:
                    mask = self.ledger.cut(self.structure, uses).to(parameters[name].device)
                    parameters[name].masked_fill_(mask, 0)

    def _fold(self) -> None:
        owner = self.ledger.owner_of_units(self.structure)
        task = len(self.ledger.tasks) - 1
        parameters = dict(self.module.named_parameters())
        for name, use in self._consumers():
            if name not in self._moments:
                continue
            weight, bias = parameters[name].detach(), self._bias(parameters, name)
            rows = (lookup(use.target.flatten(), owner, none=FREE) == task).nonzero().flatten().to(weight.device)
            source = lookup(_input_units(use), owner, none=0)
            kept = (source != FREE).repeat_interleave(weight[0].numel() // len(source)).to(weight.device)
            if len(rows) == 0 or bool(kept.all()):
                continue
            flat, solved = fold(
                weight[rows].flatten(1), None if bias is None else bias[rows], self._moments[name], kept
            )
            weight[rows] = flat.reshape(weight[rows].shape)
            if bias is not None and solved is not None:
                bias[rows] = solved

    def _bias(self, parameters: Mapping[str, Tensor], weight: str) -> Tensor | None:
        """The bias of the same layer, if its units are the weight's."""
        path, _, _ = weight.rpartition(".")
        bias = parameters.get(f"{path}.bias" if path else "bias")
        return None if bias is None or len(bias) != len(parameters[weight]) else bias.detach()

    def _consumers(self) -> list[tuple[str, Entries]]:
        """Weights used once, whose rows are units and whose columns read units; with their use."""
        found = []
        parameters = dict(self.module.named_parameters())
        for name, uses in self.structure.entries.items():
            use = uses[0]
            rows_are_units = name in parameters and len(uses) == 1 and use.role == "weight"
            along_rows = use.target.numel() == use.target.shape[0] and use.source.shape[0] == 1
            if rows_are_units and along_rows and bool((use.source != NO_UNIT).any()):
                found.append((name, use))
        return found

    def _input_moments(self) -> dict[str, Moments]:
        parameters = dict(self.module.named_parameters())
        return input_moments({name: parameters[name] for name, _ in self._consumers()}, self.passes())

    def _restore(self, snapshot: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(snapshot[name])

    def _loss(self, before: float, after: float) -> float:
        return before - after if self.higher_is_better else after - before

    def _record(
        self, candidates: Mapping[str, Tensor], partitions: Mapping[str, Partition], before: float, after: float
    ) -> None:
        task = self.ledger.tasks[-1].name
        self.ledger.records = [record for record in self.ledger.records if record["task"] != task]
        for group in self._groups:
            found = partitions[group.name]
            self.ledger.records.append(
                {
                    "task": task,
                    "layer": group.name,
                    "units": len(candidates[group.name]),
                    "claimed": int(found.non_redundant.sum()),
                    "redundant": int(found.redundant.sum()),
                    "threshold": found.threshold,
                    "accuracy": before,
                    "ablation_accuracy": after,
                }
            )


def _input_units(use: Entries) -> Int64[Tensor, "inputs"]:
    """The unit that each input column (Linear) or input channel (convolution) of a weight reads."""
    return use.source.flatten()
