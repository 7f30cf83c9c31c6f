"""Scores that say whose task an input is, from the outputs of each task's sub-network alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_cf.task_inference.readout import View

Fitted = Mapping[str, Tensor]
"""What a strategy keeps of a task: statistics, never data."""

CHOICES = ("auto", "statistics", "unchanged", "all")
"""What may stand for a strategy's name."""

Keep = Literal["beside", "within"]
KEPT: tuple[Keep, ...] = ("beside", "within")
"""What may be kept: also what looks at the input beside the network, or of its own units and outputs alone."""

NEEDS = {
    "chain": "a first layer that is linear and reads the input itself",
    "first": "a first layer that is linear, reads the input itself and alone computes its units",
    "frozen": "hidden units that stay what they are, as under isolation='exact', and that a linear layer or convolution"
    " reads",
    "hidden": "hidden units that a linear layer or convolution reads",
    "inputs": "a linear layer or convolution that reads the input itself",
    "samples": "(input, label) pairs, the input one tensor of several values a sample, and hidden units that a linear"
    " layer or convolution reads",
    "square": "(input, label) pairs, the input one tensor whose last two dimensions are equal, and hidden units that a"
    " linear layer or convolution reads",
}
"""What a strategy may need of the network and of the batches."""

REJECTED = 0.01
"""Share of a task's own held-out inputs that its threshold takes for none of the known ones."""

ON_TRIAL: ContextVar[bool] = ContextVar("on_trial", default=False)
"""Whether what is fitted is thrown away again, as in ``learner.rehearsal``: one step of training shows it works."""

TaskScores = Float[Tensor, "batch tasks"]


class Strategy(ABC):
    """One way to score whether an input belongs to a task; higher means more likely.

    Attributes:
        name: what configurations and results call it.
        raw: whether the scores of all tasks share a unit, so that they are compared as they are; else each task's are
            brought to mean 0 and deviation 1 over held-out data of its own.
        needs: "", or what of the network and the data the strategy cannot do without: "inputs", "hidden", "frozen",
            "first", "chain", "samples" or "square" (``NEEDS`` says what each means).
        beside: whether it looks at the input beside the network.
        variants: names of the changes of the input (``variants.VARIANTS``) that its score looks at, beside the input
            as it stands; each is a further forward pass at test time.
        parts: the strategies that it consists of.
    """

    name: ClassVar[str]
    raw: ClassVar[bool] = False
    needs: ClassVar[str] = ""
    beside: ClassVar[bool] = False
    variants: tuple[str, ...] = ()
    parts: Sequence[Strategy] = ()

    def fit(self, view: View, labels: Int64[Tensor, "samples"], classes: int, held_out: View) -> dict[str, Tensor]:
        """What to keep of a task, found on its data once it is sealed.

        Args:
            view: the task's view of its training data.
            labels: of each sample, from 0 to ``classes - 1``.
            classes: how many the task has.
            held_out: its view of data that it was not trained on.
        """
        return {}

    def keep(
        self,
        view: View,
        labels: Int64[Tensor, "samples"],
        classes: int,
        held_out: View,
        trained: Mapping[str, Fitted],
    ) -> dict[str, Tensor]:
        """What to keep of a task: what is fitted, with what was trained, by head (see ``trained``)."""
        return self.fit(view, labels, classes, held_out)

    @abstractmethod
    def score(self, fitted: Fitted, view: View) -> Float[Tensor, "batch"]:
        """The task's score of each sample; higher means more likely the task's.

        Args:
            fitted: what :meth:`keep` kept of the task, on the view's device.
            view: what the task's sub-network shows of a batch.
        """

    def probabilities(
        self, scores: TaskScores, spread: Tensor, threshold: Tensor
    ) -> Float[Tensor, "batch tasks_and_none"]:
        """One distribution over the known tasks and, last, none of them.

        The task with the highest score speaks for all: how far it lies above its threshold, in its own deviations, says
        whether the input is known at all; a softmax over the scores says whose it then is.

        Args:
            scores: of each task, comparable with one another.
            spread: standard deviation of each task's score over held-out data of its own.
            threshold: scores below which an input is none of the task's.
        """
        best = scores.argmax(dim=1)
        known = ((scores.amax(dim=1) - threshold[best]) / spread[best]).sigmoid()
        tasks = (scores / spread.mean()).softmax(dim=1)
        return torch.cat([known[:, None] * tasks, 1 - known[:, None]], dim=1)


class Plain(Strategy):
    """The patent's form (paragraph 44): one element a task, a softmax over them and "neither"; a sigmoid for one task.

    A task's element is its highest output; "neither" stands at 0.
    """

    name, raw = "plain", True

    def score(self, fitted: Fitted, view: View) -> Float[Tensor, "batch"]:
        """The task's highest output for each sample."""
        return view.logits.amax(dim=1)

    def probabilities(
        self, scores: TaskScores, spread: Tensor, threshold: Tensor
    ) -> Float[Tensor, "batch tasks_and_none"]:
        """A softmax over the elements and 0."""
        return torch.cat([scores, torch.zeros_like(scores[:, :1])], dim=1).softmax(dim=1)


class Joint(Strategy):
    """The softmax over all outputs of all tasks, whose highest one decides."""

    name, raw = "joint", True

    def score(self, fitted: Fitted, view: View) -> Float[Tensor, "batch"]:
        """The task's highest output for each sample; over all tasks, the highest of all outputs decides."""
        return view.logits.amax(dim=1)


class Energy(Strategy):
    """Free energy of a task's outputs (Liu et al. 2020): their log-sum-exp."""

    name = "energy"

    def score(self, fitted: Fitted, view: View) -> Float[Tensor, "batch"]:
        """The log-sum-exp of the task's outputs for each sample."""
        energy: Tensor = view.logits.logsumexp(dim=1)
        return energy


class MaxSoftmax(Strategy):
    """The highest probability within the task (Hendrycks and Gimpel 2017), as a log-odds ratio."""

    name = "max_softmax"

    def score(self, fitted: Fitted, view: View) -> Float[Tensor, "batch"]:
        """``log p - log(1 - p)`` of the likeliest class; the output itself where there is one class."""
        if view.logits.shape[1] == 1:
            return view.logits[:, 0]
        top, rest = view.logits.sort(dim=1, descending=True).values.split([1, view.logits.shape[1] - 1], dim=1)
        odds: Tensor = top[:, 0] - rest.logsumexp(dim=1)
        return odds
