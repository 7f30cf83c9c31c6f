"""One more output of each task, "neither of mine", which learns from samples whose structure was broken."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from lightning_cf.task_inference.readout import View
from lightning_cf.task_inference.strategies import Fitted
from lightning_cf.task_inference.trained import LinearHead


class Neither(LinearHead):
    """The log-odds that an input is one of the task's classes rather than neither of them.

    The output reads the task's own hidden units and stands in one softmax with the task's class outputs. It is trained
    on the task's batches, and on samples made of them whose structure is broken (``variants.strange``); the gradient
    reaches the hidden units, which so learn what an input of theirs looks like.

    Args:
        share: how much its loss counts beside that of other heads.
    """

    name, head, needs = "neither", "neither", "samples"
    changes = ("strange",)

    def __init__(self, share: float = 0.3) -> None:
        self.share = share

    def columns(self, classes: int) -> int:
        """One output, "neither", however many classes the task has."""
        return 1

    def loss(self, fitted: Fitted, view: View, labels: Int64[Tensor, "samples"]) -> Float[Tensor, ""]:
        """Mean cross-entropy of the samples and of the strange ones; both count alike."""
        loss = F.cross_entropy(self._logits(fitted, view), labels)
        strange = self._logits(fitted, view.others["strange"])
        if len(strange) == 0:
            return loss
        neither = torch.full((len(strange),), strange.shape[1] - 1, device=strange.device)
        return (loss + F.cross_entropy(strange, neither)) / 2

    def score(self, fitted: Fitted, view: View) -> Float[Tensor, "batch"]:
        """Log-sum-exp of the task's outputs less "neither"."""
        odds: Tensor = view.logits.logsumexp(dim=1) - self.outputs(fitted, view)[:, 0]
        return odds

    def _logits(self, fitted: Fitted, view: View) -> Float[Tensor, "batch classes_and_neither"]:
        return torch.cat([view.logits, self.outputs(fitted, view)], dim=1)
