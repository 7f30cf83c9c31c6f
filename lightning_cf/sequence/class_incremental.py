"""Scores when nobody says which task an input belongs to: classes, tasks, and what is none of the known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from lightning_cf.learner.labels import Kept
from lightning_cf.lightning_api import LightningModule
from lightning_cf.network.forward import eval_mode
from lightning_cf.sequence.unknown import none_in_turn
from lightning_cf.task_inference import TaskInference
from lightning_cf.tasks.evaluation import predict
from lightning_cf.tasks.task import Batches, Task


@dataclass
class Scored:
    """What one strategy reached after a task.

    Attributes:
        accuracy: for each task the share of its test samples whose class was told rightly, whatever their task; with a
            class told for every one, though it may look like none of the known.
        task_accuracy: for each learned task the share whose task was told rightly.
        none_auroc: how well the probability of "none of the known" parts test samples of tasks never seen from those
            of learned ones: the area under the ROC curve; None once all tasks are learned.
        named_accuracy: for each learned task the share whose class was told rightly where the task is named: not by
            its outputs alone, as in ``accuracy_matrix`` of the result, but with what the strategy says of its classes.
    """

    accuracy: list[float]
    task_accuracy: list[float]
    none_auroc: float | None
    named_accuracy: list[float] = field(default_factory=list)


@dataclass
class StrategyScores:
    """A strategy's scores after each task, what it keeps, and how it tells each task had it never been learned."""

    rows: list[Scored] = field(default_factory=list)
    stored_floats: int = 0
    none_in_turn: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The scores with their averages after the last task, as ``result.json`` shows them."""
        named = self.rows[-1].named_accuracy if self.rows else []
        return {
            "accuracy_matrix": [row.accuracy for row in self.rows],
            "average_accuracy": _mean(self.rows[-1].accuracy) if self.rows else None,
            "task_inference_accuracy": _mean(self.rows[-1].task_accuracy) if self.rows else None,
            "task_accuracy_matrix": [row.task_accuracy for row in self.rows],
            "task_incremental_accuracy": _mean(named) if named else None,
            "task_incremental_matrix": [row.named_accuracy for row in self.rows],
            "none_auroc": [row.none_auroc for row in self.rows],
            "none_auroc_in_turn": self.none_in_turn,
            "none_auroc_mean": _mean(self.none_in_turn) if self.none_in_turn else None,
            "stored_floats": self.stored_floats,
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> StrategyScores:
        """Makes the scores again that ``dataclasses.asdict`` described, as a stored run keeps them."""
        return cls([Scored(**row) for row in state["rows"]], state["stored_floats"], state.get("none_in_turn", []))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _share(right: Tensor) -> float:
    return float(right.double().mean())


@torch.no_grad()
def score_strategies(
    module: LightningModule, inference: TaskInference, tasks: Sequence[tuple[Task, Batches]], scores: dict[str, Any]
) -> None:
    """Adds a row to the scores of every strategy that was fitted; nothing where no task can be inferred.

    Only tasks with classes count whose targets are labels, one a sample.

    Args:
        module: as it stands.
        inference: what is kept of the tasks that it learned.
        tasks: all of the sequence, each with its test data.
        scores: by strategy, as ``dataclasses.asdict`` gives :class:`StrategyScores`; in place.
    """
    if not inference.tasks:
        return
    names = [known.name for known in inference.tasks]
    found: dict[str, list[_Outcome]] = {name: [] for name in inference.strategies}
    scored = []
    with eval_mode(module):
        for task, batches in tasks:
            seen = _over(module, inference, task, batches)
            if seen is None:
                return
            if any(outcome.target.shape != outcome.classes.shape for outcome in seen.values()):
                continue
            scored.append(task)
            for name in inference.strategies:
                found[name].append(seen[name])
    if not any(task.name in names for task in scored):
        return
    for name, outcomes in found.items():
        pairs = list(zip(scored, outcomes, strict=True))
        learned = [(names.index(task.name), outcome) for task, outcome in pairs if task.name in names]
        accuracy = [_share(o.classes == o.target) for o in outcomes]
        told = [_share(o.tasks == number) for number, o in learned]
        named = [_share(o.by_task[:, number] == o.target) for number, o in learned]
        known = torch.cat([o.none for _, o in learned])
        strange = [o.none for task, o in pairs if task.name not in names]
        auroc = None
        if strange:
            values = torch.cat([known, *strange])
            auroc = float(binary_auroc(values, (torch.arange(len(values), device=values.device) >= len(known)).long()))
        kept = StrategyScores.from_dict(scores[name]) if name in scores else StrategyScores()
        kept.rows.append(Scored(accuracy, told, auroc, named))
        kept.stored_floats = inference.stored_floats(name)
        scores.pop(name, None)
        scores[name] = asdict(kept)  # the one that predicts comes first
    for name, areas in none_in_turn(module, inference, tasks).items():
        scores[name]["none_in_turn"] = areas


@dataclass(frozen=True)
class _Outcome:
    classes: Tensor
    tasks: Tensor
    none: Tensor
    by_task: Tensor
    target: Tensor


def _over(
    module: LightningModule, inference: TaskInference, task: Task, batches: Batches
) -> dict[str, _Outcome] | None:
    """What each strategy says of a task's test data; None where not all outputs are computed, which tells the task."""
    parts: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in inference.strategies}
    for batch in batches:
        forward = Kept(partial(predict, module, task))
        readout = inference.read(module, forward, batch)
        if readout.missing:
            return None
        for name in inference.strategies:
            inferred = inference.infer(readout, name)
            best = inferred.scores.argmax(dim=1)
            classes = inferred.classes.gather(1, best[:, None])[:, 0]
            none = inferred.probabilities[:, -1]
            parts[name].append((classes, best, none, inferred.classes, forward.found[1]))
    return {
        name: _Outcome(*(torch.cat(column) for column in zip(*found, strict=True))) for name, found in parts.items()
    }
