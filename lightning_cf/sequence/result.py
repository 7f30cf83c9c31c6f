"""What a run found, and how it is written down."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from torch import nn

from lightning_cf.learner.state import ContinualState
from lightning_cf.learner.steps import weights_sha256
from lightning_cf.sequence.accuracy_matrix import AccuracyMatrix
from lightning_cf.sequence.class_incremental import StrategyScores
from lightning_cf.sequence.run_progress import RunProgress
from lightning_cf.tasks.task import Task


def scenario_of(tasks: Sequence[Task]) -> str:
    """What a sequence is called where nobody names the task (van de Ven et al. 2022).

    "class-incremental" where each task brings classes of its own, "domain-incremental" where classes return in another
    domain. Where the task is named, either is task-incremental.
    """
    classes = [label for task in tasks for label in task.classes or []]
    return "class-incremental" if len(set(classes)) == len(classes) else "domain-incremental"


@dataclass(frozen=True)
class Result:
    """Scores and partitions of a run.

    Attributes:
        tasks: their names, in order.
        scenario: what they are where nobody names the task: "class-incremental" or "domain-incremental".
        accuracy: the accuracy matrix with its averages.
        capacity: free share of each layer after each task; empty without partitions.
        partition: one entry for each task and layer.
        stages: each task's test score once learned, partitioned and retrained.
        strategies: by strategy of task inference, its scores after each task; the first one predicts.
        network_parameters: how many parameters the network has.
        constant_predictor: for each task the best score of one and the same class for all samples; None without
            classes.
        weights_sha256: of the final weights.
        seconds: time spent, all phases together.
        warnings: what the package warned of, each text once; also in the parts of a run that was taken up again.
    """

    tasks: list[str]
    scenario: str
    accuracy: AccuracyMatrix
    capacity: dict[str, list[float]]
    partition: list[dict[str, Any]]
    stages: dict[str, dict[str, float]]
    strategies: dict[str, StrategyScores]
    network_parameters: int
    constant_predictor: list[float | None]
    weights_sha256: str
    seconds: float
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        progress: RunProgress,
        module: nn.Module,
        state: ContinualState,
        tasks: Sequence[Task],
        constant_predictor: Sequence[float | None],
    ) -> Result:
        """Gathers what a run left: its progress, the ledger's records, and the network as it stands."""
        accuracy = AccuracyMatrix(len(tasks))
        for row in progress.rows:
            accuracy.update(row)
        return cls(
            tasks=[task.name for task in tasks],
            scenario=scenario_of(tasks),
            accuracy=accuracy,
            capacity=progress.capacity,
            partition=[dict(record) for record in state.ledger.records],
            stages=progress.stages,
            strategies={name: StrategyScores.from_dict(kept) for name, kept in progress.strategies.items()},
            network_parameters=sum(parameter.numel() for parameter in module.parameters()),
            constant_predictor=list(constant_predictor),
            weights_sha256=weights_sha256(module),
            seconds=progress.seconds,
            warnings=list(progress.warnings),
        )

    def averages(self) -> dict[str, float]:
        """Average accuracy, forgetting, backward and forward transfer by name, as plain numbers."""
        return {name: float(value) for name, value in self.accuracy.compute().items()}

    @property
    def class_incremental(self) -> dict[str, Any] | None:
        """What was reached when nobody said which task an input belongs to; None where no task can be inferred."""
        if not self.strategies:
            return None
        strategy, scores = next(iter(self.strategies.items()))
        return {
            "scenario": self.scenario,
            "strategy": strategy,
            **scores.as_dict(),
            "network_parameters": self.network_parameters,
        }

    def as_dict(
        self, *, compare: Mapping[str, Result] | None = None, seed: int, config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Everything, for ``result.json``.

        Args:
            compare: results of other methods by name.
            seed: of the run.
            config: the resolved configuration.
        """
        packages = ("lightning-cf", "lightning", "torch", "torchmetrics", "hydra-core", "omegaconf", "numpy")
        return {
            "tasks": self.tasks,
            "accuracy_matrix": self.accuracy.matrix.tolist(),
            "initial_accuracy": self.accuracy.initial.tolist(),
            **self.averages(),
            "forgetting_per_task": self.accuracy.forgetting_per_task,
            "capacity": self.capacity,
            "partition": self.partition,
            "stages": self.stages,
            "constant_predictor": self.constant_predictor,
            "class_incremental": self.class_incremental,
            "task_inference": {name: scores.as_dict() for name, scores in self.strategies.items()},
            "compare": {
                name: {
                    **other.averages(),
                    "accuracy_matrix": other.accuracy.matrix.tolist(),
                    "forgetting_per_task": other.accuracy.forgetting_per_task,
                    "stages": other.stages,
                    "class_incremental": other.class_incremental,
                    "seconds": other.seconds,
                    "warnings": other.warnings,
                }
                for name, other in (compare or {}).items()
            },
            "weights_sha256": self.weights_sha256,
            "seconds": self.seconds,
            "warnings": self.warnings,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "seed": seed,
            "config": dict(config),
        }
