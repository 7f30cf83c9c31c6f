"""Classes times rotations: a head that tells how far an input was turned knows what is to be turned."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from lightning_cf.task_inference.readout import View
from lightning_cf.task_inference.strategies import Fitted
from lightning_cf.task_inference.trained import LinearHead
from lightning_cf.task_inference.variants import ROTATIONS


class Rotations(LinearHead):
    """How surely the task tells the class and the rotation of the input (Golan and El-Yaniv 2018; Kim et al. 2022).

    A linear layer over the task's own hidden units has an output for each class in each of four rotations, and is
    trained on all four of each batch. The score is the highest, over the task's classes, of the mean over the four
    rotations of the input of the log-probability of (class, that rotation). Four forward passes at test time.

    Args:
        name: what to call it.
        ensemble: whether all four rotations are looked at; else the input as it stands is, in one forward pass.
        share: how much its loss counts beside that of other heads.
    """

    head, needs, changes = "rotations", "square", tuple(ROTATIONS)

    def __init__(self, name: str = "rotations", *, ensemble: bool = True, share: float = 0.3) -> None:
        self.name, self.share = name, share  # type: ignore[misc]
        self.variants = tuple(ROTATIONS) if ensemble else ()

    def columns(self, classes: int) -> int:
        """An output for each class in each of the four rotations."""
        return classes * (1 + len(ROTATIONS))

    def loss(self, fitted: Fitted, view: View, labels: Int64[Tensor, "samples"]) -> Float[Tensor, ""]:
        """Mean cross-entropy over the four rotations."""
        views = [view, *(view.others[name] for name in ROTATIONS)]
        logits = torch.cat([self.outputs(fitted, turned) for turned in views])
        targets = torch.cat([labels * len(views) + number for number in range(len(views))])
        return F.cross_entropy(logits, targets)

    def score(self, fitted: Fitted, view: View) -> Float[Tensor, "batch"]:
        """The mean log-probability of the likeliest class."""
        views = [view, *(view.others[name] for name in self.variants)]
        total = view.logits.new_zeros(view.logits.shape)
        for number, turned in enumerate(views):
            logits = self.outputs(fitted, turned).log_softmax(dim=1)
            total = total + logits[:, number :: 1 + len(ROTATIONS)] / len(views)
        return total.amax(dim=1)
