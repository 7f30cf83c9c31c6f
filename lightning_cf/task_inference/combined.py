"""Sums of scores, and all strategies by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_cf.errors import ContinualError, check_choice
from lightning_cf.task_inference.autoencoder import InputAutoencoder
from lightning_cf.task_inference.neither import Neither
from lightning_cf.task_inference.readout import View
from lightning_cf.task_inference.reconstruction import Reconstruction
from lightning_cf.task_inference.rotations import Rotations
from lightning_cf.task_inference.statistics import (
    FirstLayer,
    InputGaussian,
    InputSubspaces,
    LocalSubspaces,
    Mahalanobis,
)
from lightning_cf.task_inference.strategies import (
    CHOICES,
    NEEDS,
    Energy,
    Fitted,
    Joint,
    MaxSoftmax,
    Plain,
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
        """The sum."""
        total = view.logits.new_zeros(len(view.logits))
        for part in self.parts:
            total = total + self.calibrated(part, fitted, view)
        return total

    def own(self, part: Strategy, fitted: Fitted) -> dict[str, Tensor]:
        """What a part keeps."""
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
        """The sum."""
        leading: Tensor = self.leading.score(self.own(self.leading, fitted), view)
        return leading + self.share * self.calibrated(self.aid, fitted, view)

    def probabilities(
        self, scores: TaskScores, spread: Tensor, threshold: Tensor
    ) -> Float[Tensor, "batch tasks_and_none"]:
        """As the raw score's."""
        return self.leading.probabilities(scores, spread, threshold)


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Plain(),
        Joint(),
        Energy(),
        MaxSoftmax(),
        Mahalanobis(),
        FirstLayer(),
        LocalSubspaces(),
        Sum("mahalanobis_energy", [Mahalanobis(), Energy()]),
        Sum("subspaces_energy", [LocalSubspaces(), Energy()]),
        Reconstruction(),
        Reconstruction("reconstruction_logits", 0.02),
        Aided("reconstruction_subspaces", Reconstruction("reconstruction_logits", 0.02), LocalSubspaces(), share=0.1),
        Neither(),
        Sum("neither_mahalanobis", [Neither(), Mahalanobis()]),
        Rotations(),
        Rotations("rotations_once", ensemble=False),
        InputGaussian(),
        InputSubspaces(),
        InputAutoencoder(),
    )
}
"""All strategies by name; the last three are models of the input beside the network. Registered ones follow."""

_OURS = frozenset(STRATEGIES)


def register(strategy: Strategy) -> Strategy:
    """Makes a strategy known by its name, in this process: to fit it, and to load what was fitted with it.

    Args:
        strategy: with a name of its own; takes the place of an earlier one of that name.

    Raises:
        ContinualError: for a name that one of this package's strategies has, or needs that there are not.
    """
    name = getattr(strategy, "name", None)
    if not isinstance(name, str) or not name or name in (*CHOICES, *_OURS):
        raise ContinualError(f"task_inference: {type(strategy).__name__} needs a name of its own, got {name!r}.")
    check_choice(f"task_inference: {name}", "needs", strategy.needs, ("", *NEEDS))
    STRATEGIES[name] = strategy
    return strategy
