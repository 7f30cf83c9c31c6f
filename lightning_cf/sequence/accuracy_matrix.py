"""Accuracy of every task after every task, and what follows from it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

Scores = Float[Tensor, "rows tasks"]
Row = Float[Tensor, "tasks"]


def average_accuracy(matrix: Scores) -> float:
    """Mean score over all tasks after the last: ``mean_j R[T, j]``.

    Args:
        matrix: R; row k holds the scores of all tasks after task k.
    """
    return float(matrix[-1].mean())


def forgetting(matrix: Scores) -> Row:
    """For each task its best score since it was learned, less its final one: ``max_{i >= j} R[i, j] - R[T, j]``.

    As in Chaudhry et al. 2018, but with the final row counted, so that no task has less than 0.

    >>> forgetting(torch.tensor([[1.0, 0.5], [0.75, 0.75]])).tolist()
    [0.25, 0.0]
    """
    since = torch.tril(torch.ones_like(matrix, dtype=torch.bool))
    return matrix.masked_fill(~since, -torch.inf).max(dim=0).values - matrix[-1]


def mean_forgetting(matrix: Scores) -> float:
    """Mean of :func:`forgetting` over all tasks but the last; 0 for a single task."""
    return float(forgetting(matrix)[:-1].mean()) if matrix.shape[1] > 1 else 0.0


def backward_transfer(matrix: Scores) -> float:
    """``mean_{j < T} R[T, j] - R[j, j]`` (Lopez-Paz and Ranzato 2017, GEM); 0 for a single task."""
    gained = matrix[-1] - matrix.diagonal()
    return float(gained[:-1].mean()) if len(gained) > 1 else 0.0


def forward_transfer(matrix: Scores, initial: Row) -> float:
    """``mean_{j > 0} R[j - 1, j] - b_j`` (GEM), b the scores at initialisation; 0 for a single task."""
    ahead = matrix.diagonal(offset=1) - initial[1:]
    return float(ahead.mean()) if len(ahead) else 0.0


class AccuracyMatrix(Metric):
    """The accuracy matrix R of a task sequence, row by row, in a torchmetrics Metric.

    Scores of a metric where lower is better enter with their sign turned, so that higher is better everywhere.

    >>> accuracy = AccuracyMatrix(2)
    >>> accuracy.update([0.5, 0.5]); accuracy.update([1.0, 0.5]); accuracy.update([0.75, 1.0])
    >>> accuracy.average, accuracy.forgetting, accuracy.backward_transfer, accuracy.forward_transfer
    (0.875, 0.25, -0.25, 0.0)

    Args:
        tasks: how many tasks the sequence has.
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, tasks: int) -> None:
        super().__init__(sync_on_compute=False)  # every process holds all rows
        self.tasks = tasks
        self.add_state("rows", default=[], dist_reduce_fx=None)

    def update(self, scores: list[float]) -> None:
        """Adds a row: first the scores of all tasks at initialisation, then those after each task."""
        if len(scores) != self.tasks:
            raise ValueError(f"AccuracyMatrix: a row holds {self.tasks} scores, got {len(scores)}.")
        self.rows.append(torch.tensor(scores, dtype=torch.float64))

    def compute(self) -> dict[str, float]:
        """Average accuracy, forgetting, backward and forward transfer, by the names that ``result.json`` has."""
        return {
            "average_accuracy": self.average,
            "forgetting": self.forgetting,
            "backward_transfer": self.backward_transfer,
            "forward_transfer": self.forward_transfer,
        }

    @property
    def initial(self) -> Row:
        """Scores of all tasks before anything was trained: b in forward transfer."""
        return self.rows[0]

    @property
    def matrix(self) -> Scores:
        """R; one row after each task so far, or a single one for joint training."""
        return torch.stack(self.rows[1:])

    @property
    def sequential(self) -> bool:
        """Whether there is a row after each task."""
        return len(self.rows) == self.tasks + 1

    @property
    def average(self) -> float:
        """Mean score over all tasks after the last one; see :func:`average_accuracy`."""
        return average_accuracy(self.matrix)

    @property
    def forgetting(self) -> float:
        """Mean forgetting over all tasks but the last, see :func:`mean_forgetting`; 0 for joint training."""
        return mean_forgetting(self.matrix) if self.sequential else 0.0

    @property
    def forgetting_per_task(self) -> list[float]:
        """What each task lost since its best score, see :func:`forgetting`; zeros for joint training."""
        return [float(x) for x in forgetting(self.matrix)] if self.sequential else [0.0] * self.tasks

    @property
    def backward_transfer(self) -> float:
        """What later tasks changed in earlier ones' scores, see :func:`backward_transfer`; 0 for joint training."""
        return backward_transfer(self.matrix) if self.sequential else 0.0

    @property
    def forward_transfer(self) -> float:
        """What earlier tasks changed in later ones' first scores; 0 for joint training."""
        return forward_transfer(self.matrix, self.initial) if self.sequential else 0.0
