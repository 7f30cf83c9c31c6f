"""What is kept of one task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_cf.task_inference.sites import Sites

ADDED = ("gram", "totals", "counts")
"""What a task added to sums, in whole numbers, where that is kept apart."""


@dataclass
class Known:
    """What is kept of a task: statistics, never data.

    Attributes:
        name: of the task.
        classes: labels in its data, one an output.
        sites: where its scores look.
        fitted: by strategy, what :meth:`Strategy.fit` found.
        calibration: by strategy, mean, standard deviation and threshold of its score over held-out data of its own.
    """

    name: str
    classes: list[int]
    sites: Sites
    fitted: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    calibration: dict[str, Tensor] = field(default_factory=dict)

    def numbers(self, strategy: str) -> int:
        """How many numbers are kept of the task alone for a strategy; places of units are none."""
        fitted = self.fitted.get(strategy, {})
        counted = [x for key, x in fitted.items() if x.is_floating_point() or key in ADDED]
        return sum(value.numel() for value in (*counted, self.calibration[strategy]))

    def state_dict(self) -> dict[str, Any]:
        """Everything that is kept of the task, as tensors and plain containers for a checkpoint."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "sites": self.sites.state_dict(),
            "fitted": {name: dict(fitted) for name, fitted in self.fitted.items()},
            "calibration": dict(self.calibration),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Known:
        """Makes again, on the CPU, what :meth:`state_dict` described."""
        fitted = {name: {key: value.cpu() for key, value in kept.items()} for name, kept in state["fitted"].items()}
        calibration = {name: value.cpu() for name, value in state["calibration"].items()}
        return cls(state["name"], list(state["classes"]), Sites.from_state_dict(state["sites"]), fitted, calibration)
