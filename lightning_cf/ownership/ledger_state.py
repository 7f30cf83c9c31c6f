"""A ledger in a checkpoint: its fields as tensors and plain containers, and how they are read back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_cf.errors import ContinualError, check_path
from lightning_cf.ownership.phases import TaskEntry
from lightning_cf.utilities.files import load_tensors

CHECKPOINT_KEY = "lightning_cf"
"""Where a Lightning checkpoint holds the ledger."""


def packed(ledger: Mapping[str, Any]) -> dict[str, Any]:
    """A ledger's fields by name, copied into what ``torch.load(weights_only=True)`` reads."""
    return {
        "owners": {name: owner.clone() for name, owner in ledger["owners"].items()},
        "outputs": ledger["outputs"].clone(),
        "width": ledger["width"],
        "head": ledger["head"],
        "reserved": {name: list(outputs) for name, outputs in ledger["reserved"].items()},
        "positions": {name: list(positions) for name, positions in ledger["positions"].items()},
        "tasks": [asdict(task) for task in ledger["tasks"]],
        "isolation": ledger["isolation"],
        "whole": list(ledger["whole"]),
        "norms": {path: units.clone() for path, units in ledger["norms"].items()},
        "records": [dict(record) for record in ledger["records"]],
        "directions": {name: basis.clone() for name, basis in ledger["directions"].items()},
        "inference": ledger["inference"],
        "heads": {layer: list(columns) for layer, columns in ledger["heads"].items()},
        "fingerprints": copy.deepcopy(ledger["fingerprints"]),
        "ways": list(ledger["ways"]),
    }


def unpacked(state: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that :func:`packed` was given, on the CPU; of older versions' ledgers without what those did not know.

    Raises:
        ContinualError: for anything else.
    """
    try:
        return _unpacked(state)
    except (KeyError, TypeError, AttributeError) as error:
        raise ContinualError(
            f"This is no ledger that NeuronLedger.state_dict() gave: {type(error).__name__}: {error}. Read one with"
            " NeuronLedger.from_checkpoint(path)."
        ) from error


def _unpacked(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "owners": {name: owner.clone().cpu() for name, owner in state["owners"].items()},
        "outputs": state["outputs"].clone().cpu(),
        "width": state["width"],
        "head": state["head"],
        "reserved": {name: list(outputs) for name, outputs in state["reserved"].items()},
        "positions": {name: list(positions) for name, positions in state.get("positions", {}).items()},
        "tasks": [TaskEntry(**task) for task in state["tasks"]],
        "isolation": state["isolation"],
        "whole": list(state["whole"]),
        "norms": {path: units.clone().cpu() for path, units in state.get("norms", {}).items()},
        "records": [dict(record) for record in state["records"]],
        "directions": {name: basis.clone().cpu() for name, basis in state.get("directions", {}).items()},
        "inference": state.get("inference"),
        "heads": {layer: list(columns) for layer, columns in state.get("heads", {}).items()},
        "fingerprints": copy.deepcopy(state.get("fingerprints", {})),
        "ways": list(state.get("ways", [])),
    }


def read_checkpoint(path: str | Path) -> tuple[Path, Mapping[str, Any]]:
    """The file, and the packed ledger in it.

    Raises:
        ContinualError: if there is no such file, or it is no checkpoint that holds a ledger.
    """
    path = check_path("NeuronLedger", "path", path)
    if not path.is_file():
        raise ContinualError(f"NeuronLedger: {path} is no file; give a checkpoint of Lightning's.")
    checkpoint = load_tensors(
        path,
        f"{path} is no checkpoint that can be read safely: it is damaged, or holds more than tensors and plain values.",
    )
    if not isinstance(checkpoint, Mapping) or CHECKPOINT_KEY not in checkpoint:
        raise ContinualError(
            f"{path} holds no ledger: it was written without lightning_cf's callbacks, or with"
            " save_weights_only=True, which leaves out what callbacks add. What state_dict() gave of a ledger, saved by"
            " yourself, goes to NeuronLedger.from_state_dict(...)."
        )
    return path, checkpoint[CHECKPOINT_KEY]
