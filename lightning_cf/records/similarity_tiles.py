"""A similarity matrix on disk, in square tiles that numpy reads without this package."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from lightning_cf.errors import ContinualError
from lightning_cf.partition.similarity import Similarity
from lightning_cf.utilities.files import file_sha256, writing

TILE = 1024


@dataclass(frozen=True)
class StoredSimilarity:
    """A similarity matrix on disk, of which no more is read than is asked for; serves where a ``Similarity`` does.

    Attributes:
        folder: holds tile (i, j), i <= j, in ``i_j.npy``.
        units: rows of the matrix.
        size: rows of a tile.
        sha256: of each tile's file, by its name; None in records of older versions.
    """

    folder: Path
    units: int
    size: int
    sha256: Mapping[str, str] | None = None

    def __len__(self) -> int:
        return self.units

    def tile(self, rows: slice | Tensor, columns: slice | Tensor) -> Float32[Tensor, "rows columns"]:
        """Similarities of the candidates at ``rows`` with those at ``columns``; ``slice(None)`` stands for all.

        Raises:
            ContinualError: if a file is missing or damaged.
        """
        rows, columns = torch.arange(self.units)[rows], torch.arange(self.units)[columns]
        tile = torch.empty(len(rows), len(columns))
        for i in (rows // self.size).unique().tolist():
            here = (rows // self.size == i).nonzero().flatten()
            for j in (columns // self.size).unique().tolist():
                there = (columns // self.size == j).nonzero().flatten()
                within = np.ix_((rows[here] % self.size).numpy(), (columns[there] % self.size).numpy())
                tile[here[:, None], there] = torch.from_numpy(self._stored(i, j)[within])
        return tile

    def _stored(self, i: int, j: int) -> Any:
        if i > j:
            return self._stored(j, i).T
        shape = [min(self.size, self.units - k * self.size) for k in (i, j)]
        name = f"{i}_{j}.npy"
        digest = None if self.sha256 is None else self.sha256.get(name, "")
        return read_array(self.folder / name, shape, digest, mmap_mode="r")


def write_tiles(folder: Path, place: str, similarity: Similarity | StoredSimilarity) -> dict[str, Any]:
    """Writes the tiles on and above the diagonal one by one; returns what their description in JSON needs."""
    (folder / place).mkdir()
    digests = {}
    parts = [slice(start, start + TILE) for start in range(0, len(similarity), TILE)]
    for i, rows in enumerate(parts):
        for j, columns in enumerate(parts[i:], start=i):
            name = f"{i}_{j}.npy"
            digests[name] = write_array(folder / place / name, similarity.tile(rows, columns).float().numpy())
    return {"folder": place, "units": len(similarity), "tile": TILE, "sha256": digests}


def write_array(path: Path, array: Any) -> str:
    """Writes an array; gives the SHA-256 of its file."""
    with writing(path, array.nbytes), path.open("wb") as file:
        hashing = _Hashing(file)
        np.save(hashing, array)
    return hashing.digest.hexdigest()


class _Hashing:
    """A file that hashes what is written, so that nothing is read again or held twice."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.file.write(content)


def read_array(path: Path, shape: list[int], sha256: str | None = None, mmap_mode: Literal["r"] | None = None) -> Any:
    """Reads an array; raises ContinualError if its file is missing, damaged or another one than was written."""
    try:
        if sha256 is not None and path.exists() and file_sha256(path) != sha256:
            raise ValueError("what it holds does not match its checksum")
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False).reshape(shape)
    except (OSError, ValueError, EOFError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> ContinualError:
    """The error for a file of a record that cannot be read."""
    return ContinualError(
        f"{path} is missing or damaged ({error!r}); copy the record's folder again as a whole, or partition again."
    )
