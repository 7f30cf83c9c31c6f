"""The partition of one task on a live network: which units to claim, judged on the task's own metric."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from lightning_cf.errors import ContinualError, DivergenceWarning, warn
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.kept_entries import KeptEntries
from lightning_cf.network.structure import Structure, UnitGroup, layer_of
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE
from lightning_cf.ownership.owner_aware_norms import make_owner_aware
from lightning_cf.ownership.phases import Phase
from lightning_cf.partition.clusters import Partition
from lightning_cf.partition.comparing import compare
from lightning_cf.partition.folding import Passes, consumer_moments, cut_claimed, fold_claimed
from lightning_cf.partition.options import PartitionOptions
from lightning_cf.partition.outcome import GroupOutcome, Outcome, records_with
from lightning_cf.partition.proposals import Proposals
from lightning_cf.partition.regression import Seen

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Claimer:
    """Partitions the current task's units and claims the non-redundant ones.

    In LEARN the free units are partitioned; once a task has a provisional claim, that claim is, and only shrinks.

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
        seed: what randomly chosen representatives depend on.
        keep: whether the outcome holds the units' vectors and similarities, which takes as much memory as they do.
        earlier: what the task's partitions before this one found, together.
    """

    module: nn.Module
    structure: Structure
    ledger: NeuronLedger
    options: PartitionOptions
    score: Callable[[], float]
    passes: Passes
    higher_is_better: bool = True
    start: Mapping[str, Tensor] | None = None
    tasks_left: int = 1
    seed: int = 0
    keep: bool = True
    earlier: Outcome | None = None

    def __post_init__(self) -> None:
        self.options = self.options.of_task(len(self.ledger.tasks) - 1)
        self._changed: list[KeptEntries] = []
        self._before: tuple[dict[str, Tensor], Phase, list[dict[str, Any]]] | None = None

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Where something fails meanwhile, nothing is claimed: weights and ledger are what they were before."""
        ledger = self.ledger
        if self._before is None:
            owners = {name: owner.clone() for name, owner in ledger.owners.items()}
            self._before = owners, ledger.tasks[-1].phase, list(ledger.records)
        try:
            yield
        except BaseException:
            owners, phase, ledger.records = self._before
            for name, owner in owners.items():
                ledger.owners[name].copy_(owner)
            ledger.tasks[-1].phase = phase
            ledger.revision += 1
            self._restore()
            make_owner_aware(self.module, ledger.norm_owners())
            raise

    def claim(self) -> Outcome:
        """Partitions every group, claims, and records what was found.

        Under ``exact`` the claimed units take over from the redundant ones by regression, and the weights from
        redundant into claimed units and outputs are zero afterwards. Under ``perturb`` the network's function stays as
        it was; a claim is judged by the score without the redundant units.
        """
        self._way = self.structure.way_of(self.ledger.tasks[-1].name)
        self._ran = {group.name: group for group in self.structure.groups_on(self._way)}
        chosen = [g for g in self.options.partitioned(self.structure) if g.name not in self.ledger.whole]
        self._groups = [self._ran[g.name] for g in chosen if g.name in self._ran]
        self._needed = self.ledger.needed(self.structure, dict(self.module.named_parameters()))
        self._again = self.ledger.phase == "invariance"
        exact = self.ledger.exact
        before = self._reference(self._finite(self.score(), "before its partition"))
        candidates = self._candidates()
        vectors = self._vectors()
        self._similarities = compare(
            self.module,
            self.structure,
            self._groups,
            candidates,
            self.options,
            passes=self.passes,
            way=self._way,
            start=self.start,
            copied=self.keep,
        )
        self._moments: Mapping[str, Seen] = (
            consumer_moments(self.module, self.structure, self.passes, self._way) if self.options.fold and exact else {}
        )
        self._tell_left_out()
        budgets = self._budgets(candidates)
        partitions, after, within = self._search(candidates, budgets, before)
        if not exact:
            self._restore()
        found = self._outcomes(candidates, partitions, vectors, budgets)
        task = self.ledger.tasks[-1].name
        self.ledger.records = records_with(self.ledger.records, task, found, before, after, within)
        outcome = Outcome(before, after, found)
        return outcome.after(self.earlier) if self._again and self.earlier is not None else outcome

    def _search(
        self, candidates: Mapping[str, Tensor], budgets: Mapping[str, int], before: float
    ) -> tuple[dict[str, Partition], float, bool]:
        """The first proposal that costs no more than is allowed, claimed; its score, and whether there is one."""
        after, within = before, True
        task, units = self.ledger.tasks[-1].name, sum(len(candidates[group.name]) for group in self._groups)
        proposals = Proposals(self._similarities, self.options, self.seed, task)
        for proposed in proposals.of(self._groups, budgets, undo=self._restore):
            partitions = self._with_needed(candidates, proposed)
            self._apply(candidates, partitions)
            after = self.score()
            tried = sum(int(partition.non_redundant.sum()) for partition in partitions.values())
            _log.info(
                "Task '%s': a claim of %d of %d units scores %.4g (%.4g before)", task, tried, units, after, before
            )
            if math.isfinite(after) and self._loss(before, after) <= self.options.tolerance:
                break
        else:
            self._finite(after, "after the partition")
            if self._again and self.options.threshold == "auto":
                self._restore()
            elif self.options.threshold == "auto" and self.ledger.exact:
                within = False  # INVARIANCE may win it back: see ``warn_of_cost``
        return partitions, after, within

    def _outcomes(
        self,
        candidates: Mapping[str, Tensor],
        partitions: Mapping[str, Partition],
        vectors: Mapping[str, tuple[Tensor | None, Tensor | None]],
        budgets: Mapping[str, int],
    ) -> tuple[GroupOutcome, ...]:
        return tuple(
            GroupOutcome(
                group,
                candidates[group.name],
                partitions[group.name],
                self._similarities[group.name] if self.keep else None,
                *vectors[group.name],
                budgets[group.name],
            )
            for group in self._groups
        )

    def _finite(self, score: float, when: str) -> float:
        """The same score; raises ContinualError for one that no claim can be judged by."""
        if not math.isfinite(score):
            raise ContinualError(
                f"Task '{self.ledger.tasks[-1].name}' scores {score} {when}, by which no claim can be judged. Look at"
                " the data and the metric it is scored by: a Task's validation data (or what is held out of what it"
                " trains on), metric= and evaluate=, or the score= of claim(...)."
            )
        return score

    def _tell_left_out(self) -> None:
        """Warns of training inputs that are not finite, and raises ContinualError where all are."""
        for name, moments in self._moments.items():
            if moments.left_out:
                text = (
                    f"Task '{self.ledger.tasks[-1].name}': of its training data, {moments.left_out} of"
                    f" {moments.left_out + moments.count} inputs of layer '{layer_of(name)}' are not finite"
                )
                if moments.count == 0:
                    raise ContinualError(
                        f"{text}, so nothing can be folded on them. Look at the data, or use fold=False."
                    )
                warn(f"{text}; the partition leaves them out.", DivergenceWarning)
                return

    # What may be claimed, and how alike it is

    def _vectors(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        tensors = named_tensors(self.module)
        return {
            group.name: (group.weights(tensors), group.biases(tensors)) if self.keep else (None, None)
            for group in self._groups
        }

    def _reference(self, score: float) -> float:
        """What a claim is measured by: the task's score now, or before an earlier partition if that was better."""
        earlier: list[float] = [r["accuracy"] for r in self.ledger.records if r["task"] == self.ledger.tasks[-1].name]
        return max([score, *earlier]) if self.higher_is_better else min([score, *earlier])

    def _candidates(self) -> dict[str, Int64[Tensor, "_"]]:
        """For each group the units to partition: the task's provisional claim, else all free units."""
        task = len(self.ledger.tasks) - 1
        wanted = task if self._again else FREE
        return {name: (owner == wanted).nonzero().flatten() for name, owner in self.ledger.owners.items()}

    def _budgets(self, candidates: Mapping[str, Tensor]) -> dict[str, int]:
        if self._again:
            return {group.name: len(candidates[group.name]) for group in self._groups}
        return {
            group.name: self.options.budget(group.size, len(candidates[group.name]), self._tasks_left(group))
            for group in self._groups
        }

    def _tasks_left(self, group: UnitGroup) -> int:
        """How many tasks still to come, this one counted, run a group as far as known: no other needs its units."""
        if self.structure.ways == 1:
            return self.tasks_left
        begun = {task.name for task in self.ledger.tasks}
        ways = [way for task, way in self.structure.rides.items() if task not in begun]
        others = sum(any(g.name == group.name for g in self.structure.groups_on(way)) for way in ways)
        return min(self.tasks_left, 1 + others) if ways else self.tasks_left

    # Trying a claim

    def _apply(self, candidates: Mapping[str, Tensor], partitions: Mapping[str, Partition]) -> None:
        """Claims, folds, and cuts the weights from redundant into claimed units."""
        claimed = {}
        for group in self.structure.groups:
            mask = torch.zeros(group.size, dtype=torch.bool)
            claimed[group.name] = mask
            if group.name not in self._ran:
                continue  # another task's way runs it, this one's does not
            units = candidates[group.name]
            mask[units[partitions[group.name].non_redundant] if group.name in partitions else units] = True
        self.ledger.claim(claimed)
        make_owner_aware(self.module, self.ledger.norm_owners())
        self._remember()
        fold_claimed(self.module, self.structure, self.ledger, self._moments)
        cut_claimed(self.module, self.structure, self.ledger)

    def _with_needed(
        self, candidates: Mapping[str, Tensor], partitions: Mapping[str, Partition]
    ) -> dict[str, Partition]:
        """Partitions by which units are claimed too without which claimed ones cannot be cut off (``needed``)."""
        found = dict(partitions)
        for group in self._groups:
            units = candidates[group.name]
            needed = self._needed[group.units][units]
            if bool(needed.any()):
                own = torch.arange(len(units))
                representative = torch.where(needed, own, found[group.name].representative)
                found[group.name] = replace(found[group.name], representative=representative)
        return found

    def _remember(self) -> None:
        """Keeps what folding and cutting will change: the entries of the task's units and outputs.

        Under ``perturb`` those of earlier tasks too, which still read what is redundant.
        """
        levels = self.ledger.levels(self.structure)
        parameters = dict(self.module.named_parameters())
        first = len(self.ledger.tasks) - 1 if self.ledger.exact else 0
        for name, uses in self.structure.entries.items():
            mask = torch.zeros((), dtype=torch.bool)
            for use in uses:
                mask = mask | (levels.owners(use) >= first)
            if name in parameters and bool(mask.any()):
                self._changed.append(KeptEntries(parameters[name], mask))
                self._changed[-1].save()

    def _restore(self) -> None:
        """Puts back what an earlier proposal changed."""
        while self._changed:
            self._changed.pop().restore()

    def _loss(self, before: float, after: float) -> float:
        return before - after if self.higher_is_better else after - before
