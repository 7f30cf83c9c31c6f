"""Files that a user names or a run leaves: written whole or not at all, and checked when they are read back."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import disk_usage
from typing import Any
from uuid import uuid4

import torch

from lightning_cf.errors import ContinualError

CHECKSUM = "checksum"
"""Where a JSON file that is read back holds the SHA-256 of all the rest."""


def load_tensors(path: str | Path, problem: str) -> Any:
    """What ``torch.save`` wrote, on the CPU; raises ContinualError with ``problem`` where it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever damaged bytes lead to
        raise ContinualError(problem) from error


def make_folder(path: Path) -> Path:
    """The folder, made if need be, with those above it; raises ContinualError where that cannot be."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_atomically(path: Path, text: str) -> None:
    """Writes a text that is there whole or not at all, whoever else writes it at the same time."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Writes a file that is there whole or not at all, also after a power cut.

    Raises:
        ContinualError: if it cannot be written; names the file, and what it needs of what is free.
    """
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    with writing(path, len(content)):
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a document with a checksum that :func:`read_json` checks."""
    write_atomically(path, json.dumps(with_checksum(document), indent=2))


def read_json(path: Path) -> Any:
    """What a file that :func:`write_json` wrote holds; raises ContinualError if it is damaged."""
    try:
        return without_checksum(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ContinualError(f"{path} is damaged; remove the folder {path.parent} to start anew.") from error


def with_checksum(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document as JSON has it, with its checksum at the end."""
    plain = json.loads(json.dumps(document))
    return {**plain, CHECKSUM: _checksum(plain)}


def without_checksum(document: Any) -> Any:
    """The document; ValueError if it is another one than was written. One without a checksum is an older version's."""
    if isinstance(document, dict) and CHECKSUM in document:
        found = document.pop(CHECKSUM)
        if found != _checksum(document):
            raise ValueError("what it holds does not match its checksum")
    return document


def file_sha256(path: Path) -> str | None:
    """SHA-256 of a file's bytes; None where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


@contextmanager
def writing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns what the system says of a file or folder that cannot be written into a ContinualError that helps.

    Args:
        path: of the file or folder.
        needed: its size in bytes, as far as known.
    """
    try:
        yield
    except OSError as error:
        raise ContinualError(_why(path, needed, error)) from error
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise ContinualError(_why(path, needed, OSError(errno.EIO, "the file ended early"))) from error


def readable_size(size: float) -> str:
    """A number of bytes as people read it.

    >>> readable_size(3_200_000)
    '3.2 MB'
    """
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, max(0, len(str(int(size))) - 1) // 3)
    return f"{size / 1000**power:.{min(power, 1)}f} {units[power]}"


def nearest_folder(path: Path) -> Path:
    """The folder, or the first one above it that is there."""
    return next((each for each in (path, *path.absolute().parents) if os.path.isdir(each)), path)


def _why(path: Path, needed: int | None, error: OSError) -> str:
    folder = nearest_folder(path.parent)
    wanted = "" if needed is None else f" It needs {readable_size(needed)};"
    free = ""
    with suppress(OSError):
        free = f" {folder} has {readable_size(disk_usage(folder).free)} free."
    above = (path, *path.absolute().parents)
    in_the_way = next((each for each in above if os.path.exists(each) and not os.path.isdir(each)), None)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        reason = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or "the file ended early")
        return f"{path} cannot be written: {reason}.{wanted}{free} Make room, or choose another folder."
    if error.errno in (errno.ENOTDIR, errno.EEXIST) and in_the_way is not None:
        return f"{path} cannot be made: {in_the_way} is a file, where a folder is needed. Move it, or choose another."
    if error.errno == errno.EISDIR or (os.path.isdir(path) and error.errno in (errno.EEXIST, errno.ENOTEMPTY)):
        return f"{path} cannot be written: a folder of that name is in the way. Move it, or choose another folder."
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return (
            f"{path} cannot be written: {folder} is read-only for this user ({error.strerror}). Make it writable, or"
            " choose another folder."
        )
    if error.errno == errno.ENAMETOOLONG:
        return f"{path} cannot be made: the name is too long for the file system. Choose a shorter folder or name."
    return f"{path} cannot be written: {error.strerror or error}.{wanted}{free}"


def _checksum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _sync(folder: Path) -> None:
    """Makes the names in a folder last; where a system cannot, they last as long as it runs."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
