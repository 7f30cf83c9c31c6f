"""``partition.json``: what the record of a partition says of itself and of its arrays, with a checksum."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_cf.errors import ContinualError
from lightning_cf.records.similarity_tiles import damaged
from lightning_cf.utilities.files import with_checksum, without_checksum, write_atomically

MANIFEST = "partition.json"

VERSION = 1
"""Of the format; what a later version wrote is not read."""

MEANING = {
    "candidates": "numbers, within the layer, of the units that were partitioned",
    "representative": "number of the representative of each unit's cluster: its own number for a non-redundant unit,"
    " another one for a redundant unit, -1 for a unit that took no part, since an earlier task owns it"
    " or an earlier partition of this task gave it up",
    "owner": "number of the task that owns each unit after the claim, -1 for a free unit",
    "magnitude": "Euclidean norm of each unit's incoming weights",
    "direction": "incoming weights of each unit over their norm, one row a unit; zeros for a zero vector",
    "bias": "bias of each unit",
    "_after": "the same after INVARIANCE",
    "similarity": "degree of similarity of the candidates, in their order, in square tiles: ROW_COLUMN.npy starts at"
    " entry (ROW * tile, COLUMN * tile) of the matrix; tiles below the diagonal are left out, by symmetry",
    "float": "nan, inf or -inf, which JSON does not have",
}
"""Part of every ``partition.json``, so that whoever finds the files knows what they hold."""


def within(folder: Path, name: str) -> Path:
    """A file or folder that a record names, which can only be one of its own."""
    if re.fullmatch(r"partition-\d+(/[A-Za-z0-9._-]+)+", name) is None or ".." in name.split("/"):
        raise ContinualError(
            f"{folder / MANIFEST} names {name!r}, which is none of its own files; copy the record's folder again as a"
            " whole, or partition again."
        )
    return folder / name


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes ``partition.json`` into a record's folder, whole or not at all."""
    text = json.dumps(with_checksum(as_json(manifest)), indent=2, allow_nan=False)
    write_atomically(folder / MANIFEST, text)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``partition.json`` in a record's folder says.

    Raises:
        ContinualError: if there is none, it is damaged, or a later version of the package wrote it.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise ContinualError(f"{folder} holds no record of a partition; give a folder with a {MANIFEST}.")
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        newer = found["version"] > VERSION
        plain = found if newer else without_checksum(found)
        manifest: dict[str, Any] = json.loads(json.dumps(plain), object_hook=_from_json)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from error
    if newer:
        raise ContinualError(
            f"{path} has format {manifest['version']}; this lightning_cf reads up to {VERSION}. Update lightning_cf."
        )
    return manifest


def as_json(value: Any) -> Any:
    """A value as JSON holds it: tuples as lists, and numbers that are not finite as ``{"float": "nan"}``."""
    if isinstance(value, Mapping):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: dict[str, Any]) -> Any:
    return float(value["float"]) if value in [{"float": text} for text in ("nan", "inf", "-inf")] else value
