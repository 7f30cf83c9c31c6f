"""What is said of a batch when nobody says which task it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from lightning_cf.network.finite import rows_finite


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
        within: the probabilities of each task's classes, given the task; those of one behind those of another.
    """

    scores: Float[Tensor, "batch tasks"]
    probabilities: Float[Tensor, "batch tasks_and_none"]
    classes: Int64[Tensor, "batch tasks"]
    within: Float[Tensor, "batch outputs"]

    def among(self, chosen: Sequence[int]) -> Inferred:
        """The same where it is known to be one of some tasks, or none of the known ones.

        Args:
            chosen: positions of these tasks.
        """
        count = self.scores.shape[1]
        other = torch.ones(count + 1, dtype=torch.bool, device=self.scores.device)
        other[[*chosen, count]] = False
        scores = self.scores.masked_fill(other[:-1], -torch.inf)
        found = self.probabilities.masked_fill(other, 0)
        total = found.sum(dim=1, keepdim=True)
        # Probabilities of tasks that are far from likely may all be rounded to 0; then the likeliest has all of it.
        likeliest = F.one_hot(scores.argmax(dim=1), count + 1).to(found)
        return replace(self, scores=scores, probabilities=torch.where(total > 0, found / total, likeliest))

    def without(self, given: Sequence[Float[Tensor, "batch _"]], none: Bool[Tensor, "batch"] | None) -> Inferred:
        """The same scores; what is not finite has a probability of one for none, and no other.

        Args:
            given: what must be finite beside the probabilities.
            none: samples that are none of the known, whatever they look like.
        """
        strange = ~rows_finite([*given, self.probabilities])
        strange = strange if none is None else strange | none.to(strange.device)
        if not bool(strange.any()):
            return self
        certain = torch.zeros_like(self.probabilities[0])
        certain[-1] = 1
        here = strange[:, None]
        return replace(
            self,
            scores=self.scores.masked_fill(here, -torch.inf),
            probabilities=torch.where(here, certain, self.probabilities),
            within=torch.where(here, 0, self.within),
        )
