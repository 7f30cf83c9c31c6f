"""One file with a run's state: what it must hold, and what shows that it is damaged or of another version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cf.errors import ContinualError
from lightning_cf.network.finite import described, not_finite
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.sequence.run_progress import RunProgress
from lightning_cf.utilities.content import content_sha256
from lightning_cf.utilities.files import load_tensors

FORMAT = 2
"""Of ``state.pt``: 1 had neither checksum nor settings."""

_CONTENT = ("format", "settings", "module", "progress", "start")
_EXTRA_STATE = nn.modules.module._EXTRA_STATE_KEY_SUFFIX


class DamagedError(ValueError):
    """A state that cannot be gone on from; says what is wrong with it."""


@dataclass(frozen=True)
class FoundState:
    """A state to go on from.

    Attributes:
        name: of its file.
        kept: what the file holds.
        allowed: in what its run differs from the one that is started now, as ``allow`` lets it.
    """

    name: str
    kept: dict[str, Any]
    allowed: list[str]

    @property
    def progress(self) -> RunProgress:
        """How far the run had come."""
        return RunProgress(**self.kept["progress"])


def load_state(path: Path) -> dict[str, Any]:
    """What a file of a run's state holds.

    Raises:
        DamagedError: if it is missing or damaged.
        ContinualError: if a later version of the package wrote it.
    """
    if not path.exists():
        raise DamagedError("is missing")
    try:
        kept = load_tensors(path, "is damaged")
    except ContinualError as error:
        raise DamagedError("is damaged") from error
    if not isinstance(kept, dict) or not {"module", "progress", "start"} <= kept.keys():
        raise DamagedError("is damaged: it holds no state of a run")
    if kept.keys() == {"module", "progress", "start"}:  # format 1
        kept["format"] = 1
    form = kept.get("format", FORMAT)
    if not isinstance(form, int) or form > FORMAT:
        raise ContinualError(
            f"{path} has format {form}; this lightning_cf reads up to {FORMAT}. Update lightning_cf, or choose"
            " another folder."
        )
    if form >= 2 or len(kept) > 4:
        if not set(_CONTENT) <= kept.keys() or "checksum" not in kept:
            raise DamagedError("is damaged: parts of it are missing")
        if kept["checksum"] != content_sha256({name: kept[name] for name in _CONTENT}):
            raise DamagedError("is damaged: what it holds does not match its checksum")
    known = {each.name for each in fields(RunProgress)}
    progress = kept["progress"]
    if not isinstance(progress, dict) or "finished" not in progress or not progress.keys() <= known:
        strange = sorted(set(progress) - known) if isinstance(progress, dict) else []
        raise ContinualError(
            f"{path} was written by another version of lightning_cf: it tells of {strange or 'no progress'}. Go on"
            f" with that version, or remove the folder {path.parent} to start anew."
        )
    return kept


def check_finite_state(path: Path, kept: Mapping[str, Any], module: nn.Module) -> None:
    """Raises ContinualError for a state that an earlier version stored after training diverged.

    Args:
        path: of the state's file.
        kept: what it holds.
        module: that the state is to be loaded into; what is not finite in it may be so in the state.
    """
    infinite = not_finite({n: x for n, x in module.state_dict().items() if isinstance(x, Tensor)})
    found = {n: x for n, x in kept["module"].items() if isinstance(x, Tensor) and n not in infinite}
    names = not_finite(found)
    scores = torch.tensor(kept["progress"]["rows"], dtype=torch.float64)
    if names or bool(scores.isnan().any()):
        what = described(names, found) if names else "the scores"
        phase = kept["progress"]["finished"][-1] if kept["progress"]["finished"] else "the first"
        raise ContinualError(
            f"{path} holds numbers that are not finite, first in {what}: training diverged in phase"
            f" '{phase}' or before. Choose another folder, or remove {path.parent} to start anew."
        )


def unsound(kept: Mapping[str, Any]) -> str:
    """What shows, without a checksum, that a state is not what a run left; empty if nothing does."""
    weights = {name: value for name, value in kept["module"].items() if isinstance(value, torch.Tensor)}
    for name, value in weights.items():
        if value.is_floating_point() and bool(value.isnan().any()):
            return f"'{name}' is not finite"
    try:
        ledger = NeuronLedger.from_state_dict(kept["module"][_EXTRA_STATE])
        learned = [name[6:] for name in kept["progress"]["finished"] if name.startswith("learn ")]
        if [task.name for task in ledger.tasks] != learned and ledger.tasks:
            return f"its ledger knows other tasks than {learned}"
        for record in ledger.records:
            owner = ledger.owners[record["layer"]]
            if int((owner == ledger.index(record["task"])).sum()) != record["claimed"]:
                return f"its ledger has other owners of '{record['layer']}' than task '{record['task']}' claimed"
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        return f"its ledger cannot be read ({error!r})"
    return ""
