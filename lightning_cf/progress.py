"""How far a run has come, kept on disk after every phase."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from lightning_cf.errors import ContinualError
from lightning_cf.files import load_tensors
from lightning_cf.finite import described, not_finite
from lightning_cf.state import ContinualState


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
    """

    finished: list[str] = field(default_factory=list)
    rows: list[list[float]] = field(default_factory=list)
    capacity: dict[str, list[float]] = field(default_factory=dict)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    strategies: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class RunStore:
    """The folder of a run: its settings and, after each phase, the module with what was found so far."""

    root: Path

    def open(self, module: nn.Module, state: ContinualState, settings: Mapping[str, Any]) -> RunProgress:
        """Takes up the run that the folder holds, or starts one where no phase was finished yet.

        Raises:
            ContinualError: if the folder holds a run with other settings.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        stored = self.root / "settings.json"
        wanted = json.loads(json.dumps(settings))
        if not self._state.exists():  # nothing was learned yet, so nothing is lost
            write_atomically(stored, json.dumps(wanted, indent=2))
            return RunProgress()
        found = read_json(stored)
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ContinualError(
                    f"The folder {self.root} holds a run with {name}={found.get(name)!r}, not {value!r}; go on with the"
                    " same settings, or choose another folder."
                )
        kept = load_tensors(self._state, f"{self._state} is damaged; remove the folder {self.root} to start anew.")
        self._check_finite(kept, module)
        module.load_state_dict(kept["module"])
        state.start, state.outcome = kept["start"], None
        return RunProgress(**kept["progress"])

    def save(self, module: nn.Module, progress: RunProgress, state: ContinualState) -> None:
        """Stores the module and the progress; a kill at any moment leaves the old or the new state whole."""
        partial = self._state.with_suffix(".partial")
        torch.save({"module": module.state_dict(), "progress": asdict(progress), "start": state.start}, partial)
        os.replace(partial, self._state)

    def _check_finite(self, kept: Mapping[str, Any], module: nn.Module) -> None:
        """Raises ContinualError for a state that an earlier version stored after training diverged."""
        infinite = not_finite({n: x for n, x in module.state_dict().items() if isinstance(x, Tensor)})
        found = {n: x for n, x in kept["module"].items() if isinstance(x, Tensor) and n not in infinite}
        names = not_finite(found)
        scores = torch.tensor(kept["progress"]["rows"], dtype=torch.float64)
        if names or bool(scores.isnan().any()):
            what = described(names, found) if names else "the scores"
            phase = kept["progress"]["finished"][-1] if kept["progress"]["finished"] else "the first"
            raise ContinualError(
                f"{self._state} holds numbers that are not finite, first in {what}: training diverged in phase"
                f" '{phase}' or before. Choose another folder, or remove {self.root} to start anew."
            )

    @property
    def _state(self) -> Path:
        return self.root / "state.pt"


def read_json(path: Path) -> Any:
    """What a file that :func:`write_atomically` wrote holds; raises ContinualError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ContinualError(f"{path} is damaged; remove the folder {path.parent} to start anew.") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all, whoever else writes it at the same time."""
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    partial.write_text(text)
    os.replace(partial, path)
