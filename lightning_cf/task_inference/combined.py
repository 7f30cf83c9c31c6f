"""Strategies that are sums of others' scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_cf.task_inference.readout import View
from lightning_cf.task_inference.strategies import (
    Fitted,
    Strategy,
    TaskScores,
)


class Sum(Strategy):
    """The sum of several scores, each brought to mean 0 and deviation 1 over held-out data of the task.

    Args:
        name: what to call it.
        parts: the strategies.
    """

    def __init__(self, name: str, parts: Sequence[Strategy]) -> None:
        self.name = name  # type: ignore[misc]
        self.parts = list(parts)
        self.needs = next((part.needs for part in parts if part.needs), "")  # type: ignore[misc]
        self.beside = any(part.beside for part in parts)  # type: ignore[misc]
        self.variants = tuple(dict.fromkeys(name for part in parts for name in part.variants))

    def keep(
        self,
        view: View,
        labels: Int64[Tensor, "samples"],
        classes: int,
        held_out: View,
        trained: Mapping[str, Fitted],
    ) -> dict[str, Tensor]:
        """What each part keeps, and the mean and deviation of its score."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            fitted = part.keep(view, labels, classes, held_out, trained)
            score = part.score(fitted, held_out)
            scale = torch.stack([score.mean(), score.std(correction=0).clamp_min(1e-6)])
            found |= {f"{part.name}.{key}": value for key, value in {**fitted, "calibration": scale}.items()}
        return found

    def score(self, fitted: Fitted, view: View) -> Float[Tensor, "batch"]:
        """The sum of the parts' scores, each calibrated on held-out data of the task."""
        total = view.logits.new_zeros(len(view.logits))
        for part in self.parts:
            total = total + self.calibrated(part, fitted, view)
        return total

    def own(self, part: Strategy, fitted: Fitted) -> dict[str, Tensor]:
        """Of what a sum keeps of a task, what is the part's, by the part's own names."""
        prefix = f"{part.name}."
        return {key.removeprefix(prefix): value for key, value in fitted.items() if key.startswith(prefix)}

    def calibrated(self, part: Strategy, fitted: Fitted, view: View) -> Float[Tensor, "batch"]:
        """A part's score, brought to mean 0 and deviation 1."""
        own = self.own(part, fitted)
        mean, spread = own["calibration"]
        scaled: Tensor = (part.score(own, view) - mean) / spread
        return scaled


class Aided(Sum):
    """A raw score, whose unit all tasks share, and a little of another one, calibrated as in :class:`Sum`.

    Args:
        name: what to call it.
        leading: has the raw score.
        aid: has the other one.
        share: how much of it.
    """

    raw = True

    def __init__(self, name: str, leading: Strategy, aid: Strategy, share: float) -> None:
        super().__init__(name, [leading, aid])
        self.leading, self.aid, self.share = leading, aid, share

    def score(self, fitted: Fitted, view: View) -> Float[Tensor, "batch"]:
        """The leading score as it is, plus ``share`` times the calibrated aid."""
        leading: Tensor = self.leading.score(self.own(self.leading, fitted), view)
        return leading + self.share * self.calibrated(self.aid, fitted, view)

    def probabilities(
        self, scores: TaskScores, spread: Tensor, threshold: Tensor
    ) -> Float[Tensor, "batch tasks_and_none"]:
        """As the leading strategy makes them of its scores; the aid only shifts these a little."""
        return self.leading.probabilities(scores, spread, threshold)
