"""How far a run has come, and what it found on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RunProgress:
    """What a run found so far.

    Attributes:
        finished: names of the phases that are over.
        rows: scores of all tasks, at initialisation and after each task.
        capacity: free share of each layer after each task.
        stages: each task's score once learned, partitioned and retrained.
        strategies: by strategy of task inference, its scores after each task.
        seconds: time spent in finished phases.
        warnings: texts of what we warned of so far.
        files: SHA-256 of the files that phases left in the tasks' folders, by their path in the run's folder.
        initial_weights: SHA-256 of the weights that the run began with.
        allowed: in what later starts differed from the first one, as ``allow`` let them.
        attributes: the module's plain attributes that are not what they were at the start (see ``attributes.py``).
    """

    finished: list[str] = field(default_factory=list)
    rows: list[list[float]] = field(default_factory=list)
    capacity: dict[str, list[float]] = field(default_factory=dict)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    strategies: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    initial_weights: str = ""
    allowed: list[str] = field(default_factory=list)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def note_capacity(self, free: Mapping[str, float]) -> None:
        """Keeps the share of units that are free after a task, by layer."""
        for layer, share in free.items():
            self.capacity.setdefault(layer, []).append(share)
