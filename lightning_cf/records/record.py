"""What a task's partition found, kept as JSON and ``.npy`` files that numpy reads without this package."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from lightning_cf.errors import ContinualError, check_path
from lightning_cf.ownership.ledger import Isolation
from lightning_cf.partition.clusters import Partition
from lightning_cf.partition.similarity import Similarity
from lightning_cf.records.manifest import MANIFEST, MEANING, VERSION, as_json, read_manifest, within, write_manifest
from lightning_cf.records.similarity_tiles import StoredSimilarity, damaged, read_array, write_array, write_tiles
from lightning_cf.utilities.files import make_folder, writing

_PLAIN = ("task", "position", "isolation", "constraints", "accuracy", "ablation_accuracy")
_ARRAYS = ("candidates", "representative", "owner", "magnitude", "direction", "bias")
_AFTER = ("magnitude_after", "direction_after", "bias_after")


@dataclass(frozen=True)
class LayerRecord:
    """What the partition found in one group of units, numbered within the group.

    Attributes:
        name: of the group.
        layers: paths of its layers.
        threshold: the similarity at which units formed a cluster.
        candidates: this and the arrays that follow are what ``MEANING`` says.
        magnitude_after: this and the two that follow are None until INVARIANCE is over.
        similarity: of the candidates, in their order; None where none is stored.
    """

    name: str
    layers: tuple[str, ...]
    threshold: float
    candidates: Int64[Tensor, "some"]
    representative: Int64[Tensor, "units"]
    owner: Int64[Tensor, "units"]
    magnitude: Float[Tensor, "units"]
    direction: Float[Tensor, "units inputs"]
    bias: Float[Tensor, "units"]
    magnitude_after: Float[Tensor, "units"] | None = None
    direction_after: Float[Tensor, "units inputs"] | None = None
    bias_after: Float[Tensor, "units"] | None = None
    similarity: StoredSimilarity | None = None

    @classmethod
    def of(
        cls,
        name: str,
        layers: tuple[str, ...],
        candidates: Int64[Tensor, "some"],
        found: Partition,
        vectors: Float[Tensor, "units inputs"],
        biases: Float[Tensor, "units"],
        owner: Int64[Tensor, "units"],
    ) -> LayerRecord:
        """The record of a group: ``found`` is about its ``candidates``, in their order, the rest about all its units.

        >>> found = Partition(torch.tensor([0, 0]), threshold=0.9)
        >>> weights, owner = torch.tensor([[3., 4.], [1., 0.], [0., 0.]]), torch.tensor([1, 0, -1])
        >>> layer = LayerRecord.of("fc", ("fc",), torch.tensor([0, 2]), found, weights, torch.zeros(3), owner)
        >>> layer.representative.tolist(), layer.redundant.tolist(), layer.magnitude.tolist()
        ([0, -1, 0], [2], [5.0, 1.0, 0.0])
        """
        representative = torch.full((len(vectors),), -1)
        representative[candidates] = candidates[found.representative]
        polar = _polar(vectors, biases)
        return cls(name, layers, found.threshold, candidates.clone(), representative, owner.clone(), *polar)

    @property
    def non_redundant(self) -> Int64[Tensor, "claimed"]:
        """Numbers of the unclustered units and of the representative of each cluster (US 12387107, paragraph 16)."""
        return self.candidates[self.representative[self.candidates] == self.candidates]

    @property
    def redundant(self) -> Int64[Tensor, "others"]:
        """Numbers of the other members of the clusters."""
        return self.candidates[self.representative[self.candidates] != self.candidates]

    @property
    def cluster(self) -> Int64[Tensor, "units"]:
        """Number of each unit's cluster, from 0 by falling magnitude of the representative; -1 for no part."""
        leaders = self.non_redundant[self.magnitude[self.non_redundant].argsort(descending=True, stable=True)]
        number = torch.full((len(self.representative) + 1,), -1)
        number[leaders] = torch.arange(len(leaders))
        return number[self.representative]


@dataclass(frozen=True)
class PartitionRecord:
    """What the partition of a task found (US 12387107, paragraph 39).

    Attributes:
        task: its name.
        position: its number in the sequence.
        isolation: "exact" or "perturb".
        constraints: every option of the partition and the budget of each layer, as JSON has them (lists, no tuples).
        accuracy: the task's metric before the partition.
        ablation_accuracy: the task's metric without the redundant units.
        layers: one record a group.
    """

    task: str
    position: int
    isolation: Isolation
    constraints: Mapping[str, Any]
    accuracy: float
    ablation_accuracy: float
    layers: tuple[LayerRecord, ...]

    def write(
        self, folder: str | Path, similarities: Mapping[str, Similarity | StoredSimilarity] | None = None
    ) -> None:
        """Writes ``partition.json`` and the folder ``partition-N``, in place of an older record.

        A kill at any moment leaves the older record whole, or none that loads, or this one.

        Args:
            folder: takes both; made if need be.
            similarities: of the candidates of each layer, by its name; computed and written tile by tile, in single
                precision. A layer without one keeps the matrix that it was loaded with.
        """
        folder = make_folder(Path(folder))
        older = {int(path.name[10:]): path for path in folder.glob("partition-*") if path.name[10:].isdecimal()}
        # Never a number that was there, lest an older record in memory reads tiles of this one.
        arrays = f"partition-{max(older, default=-1) + 1}"
        layers = [
            _write_layer(folder, f"{arrays}/{number}", layer, (similarities or {}).get(layer.name, layer.similarity))
            for number, layer in enumerate(self.layers)
        ]
        plain = {name: getattr(self, name) for name in _PLAIN}
        write_manifest(folder, {"version": VERSION, "meaning": MEANING, **plain, "layers": layers})
        for path in older.values():
            shutil.rmtree(path)

    @classmethod
    def load(cls, folder: str | Path) -> PartitionRecord:
        """Reads a record; similarities stay on disk until their tiles are asked for.

        Raises:
            ContinualError: if there is no record, one of a newer format, or one whose files are missing or damaged.
        """
        folder = check_path("PartitionRecord", "folder", folder)
        manifest = read_manifest(folder)
        try:
            layers = tuple(_read_layer(Path(folder), entry) for entry in manifest["layers"])
            return cls(**{name: manifest[name] for name in _PLAIN}, layers=layers)
        except (KeyError, TypeError, AttributeError) as error:
            raise damaged(Path(folder) / MANIFEST, error) from error


def complete_record(folder: str | Path, after: Mapping[str, tuple[Float[Tensor, "_ _"], Float[Tensor, "_"]]]) -> None:
    """Adds to a record what the units are after INVARIANCE, in place of an earlier completion; the rest stays.

    Args:
        folder: of the record.
        after: incoming weights, one row a unit, and biases of all units of each layer, by its name.

    Raises:
        ContinualError: as :meth:`PartitionRecord.load`, and for a layer that the record does not have in that shape.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    try:
        files = {entry["name"]: entry["arrays"] for entry in manifest["layers"]}
        for arrays in files.values():
            for array in arrays.values():
                within(folder, array["file"])
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(folder / MANIFEST, error) from error
    for name, (vectors, _) in after.items():
        known = files[name]["direction"]["shape"] if name in files else "none"
        if known != list(vectors.shape):
            raise ContinualError(
                f"{folder / MANIFEST} is about another network: the weights of '{name}' have the shape"
                f" {list(vectors.shape)} here and {known} there. Give the folder of this network's record."
            )
    for arrays in files.values():
        for name in _AFTER:
            arrays.pop(name, None)
    write_manifest(folder, manifest)  # a kill below then leaves no mixture of two completions
    for name, polar in after.items():
        place = files[name]["direction"]["file"].rpartition("/")[0]
        files[name] |= _write_arrays(folder, place, dict(zip(_AFTER, _polar(*polar), strict=True)))
    write_manifest(folder, manifest)


def record_sha256(folder: Path) -> str | None:
    """SHA-256 of what a record says of the partition, whether or not it is completed; None where it is damaged."""
    try:
        manifest = read_manifest(folder)
        for entry in manifest["layers"]:
            for name in _AFTER:
                entry["arrays"].pop(name, None)
        return hashlib.sha256(json.dumps(as_json(manifest), sort_keys=True).encode()).hexdigest()
    except (ContinualError, KeyError, TypeError, AttributeError):
        return None


def _polar(vectors: Float[Tensor, "units inputs"], biases: Float[Tensor, "units"]) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitude in double precision; direction and bias in single unless they came in double."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    blocks = vectors.detach().split(4096)  # in double precision a large layer may not fit as a whole
    magnitude = torch.cat([block.double().norm(dim=1) for block in blocks]).cpu()
    direction = torch.cat([normalize(block.double(), dim=1, eps=1e-300).to("cpu", dtype) for block in blocks])
    return magnitude, direction, biases.detach().to("cpu", dtype, copy=True)


def _write_layer(
    folder: Path, place: str, layer: LayerRecord, similarity: Similarity | StoredSimilarity | None
) -> dict[str, Any]:
    place = f"{place}_{re.sub('[^A-Za-z0-9._-]', '_', layer.name)[:60]}".rstrip(".")  # the number keeps them apart
    with writing(folder / place):
        (folder / place).mkdir(parents=True)
    arrays = {name: getattr(layer, name) for name in _ARRAYS + _AFTER if getattr(layer, name) is not None}
    return {
        "name": layer.name,
        "layers": layer.layers,
        "threshold": layer.threshold,
        "arrays": _write_arrays(folder, place, arrays),
        "similarity": None if similarity is None else write_tiles(folder, f"{place}/similarity", similarity),
    }


def _write_arrays(folder: Path, place: str, arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    entries = {}
    for name, array in arrays.items():
        digest = write_array(folder / place / f"{name}.npy", array.numpy())
        entries[name] = {"file": f"{place}/{name}.npy", "shape": list(array.shape), "sha256": digest}
    return entries


def _read_layer(folder: Path, entry: Mapping[str, Any]) -> LayerRecord:
    arrays = {
        name: torch.from_numpy(read_array(within(folder, x["file"]), x["shape"], x.get("sha256")))
        for name, x in entry["arrays"].items()
    }
    stored = entry["similarity"]
    similarity = stored and StoredSimilarity(
        within(folder, stored["folder"]), stored["units"], stored["tile"], stored.get("sha256")
    )
    return LayerRecord(entry["name"], tuple(entry["layers"]), entry["threshold"], **arrays, similarity=similarity)
