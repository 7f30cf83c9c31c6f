"""What is said of a batch when nobody says which task it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor


class Prediction(NamedTuple):
    """What is said of a batch when nobody says which task it belongs to.

    Attributes:
        classes: the class of each sample, -1 for none of the known ones.
        probabilities: of each class by its number and, last, of none of the known ones; rows sum to 1.
        tasks: position of the inferred task in the sequence, -1 for none.
        scores: of the likeliest task; what it means depends on the strategy, higher is likelier.
    """

    classes: Int64[Tensor, "batch"]
    probabilities: Float[Tensor, "batch classes_and_none"]
    tasks: Int64[Tensor, "batch"]
    scores: Float[Tensor, "batch"]


@dataclass(frozen=True)
class Inferred:
    """Scores of the known tasks for a batch.

    Attributes:
        scores: of each task, higher is likelier.
        probabilities: of each task and, last, of none.
        classes: the class that each task sees in each sample.
        within: for each task the probabilities of its classes.
    """

    scores: Float[Tensor, "batch tasks"]
    probabilities: Float[Tensor, "batch tasks_and_none"]
    classes: Int64[Tensor, "batch tasks"]
    within: tuple[Float[Tensor, "batch _"], ...]
