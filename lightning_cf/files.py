"""Files that a user names or a run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_cf.errors import ContinualError


def load_tensors(path: str | Path, problem: str) -> Any:
    """What ``torch.save`` wrote, on the CPU; raises ContinualError with ``problem`` where it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever damaged bytes lead to
        raise ContinualError(problem) from error
