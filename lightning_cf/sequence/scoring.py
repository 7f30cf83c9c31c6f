"""What a task is scored on, and its score on its own outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from lightning_cf.errors import ContinualError
from lightning_cf.learner.state import ContinualState
from lightning_cf.lightning_api import LightningModule
from lightning_cf.tasks.evaluation import constant_predictor, evaluate
from lightning_cf.tasks.task import Batches, Task

ScoreOn = Literal["test", "validation"]
SCORED: tuple[ScoreOn, ...] = ("test", "validation")


def scoring_batches(task: Task, score_on: ScoreOn) -> Batches:
    """The data that a task is scored on: its test data, or what judges its partitions where it has none.

    Args:
        task: the task.
        score_on: "validation" for what judges its partitions in any case.
    """
    tests = task.task_loaders.testing() if score_on == "test" else None
    return task.judging_batches() if tests is None else tests


def score_of(module: LightningModule, state: ContinualState, task: Task, score_on: ScoreOn) -> float:
    """The task's score on its own outputs; higher is better, so that a metric to be low comes with its sign turned.

    Raises:
        ContinualError: if the score is not a number.
    """
    with state.showing(module, [task]):
        score = evaluate(module, task, scoring_batches(task, score_on))
    if math.isnan(score):
        raise ContinualError(
            f"runner: task '{task.name}' scores {score}. Look at the data that it is scored on, its metric and its"
            " evaluate=."
        )
    return -score if task.metric is not None and task.metric.higher_is_better is False else score


def constant_scores(
    module: LightningModule, state: ContinualState, tasks: Sequence[Task], score_on: ScoreOn
) -> list[float | None]:
    """For each task the best score of one and the same class for all samples; None for one without classes."""
    return [
        constant_predictor(module, task, scoring_batches(task, score_on), shown=state.showing(module, [task]))
        for task in tasks
    ]
