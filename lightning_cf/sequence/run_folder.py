"""What a run asks of its folder before it trains, and what it tells of what it found there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from shutil import disk_usage
from uuid import uuid4

from torch import nn

from lightning_cf.errors import ContinualError, RunWarning, warn
from lightning_cf.sequence.run_lock import RunLock
from lightning_cf.sequence.run_progress import RunProgress
from lightning_cf.sequence.store import RunStore
from lightning_cf.utilities.files import load_tensors, make_folder, readable_size, write_bytes


def take_folder(lock: RunLock, store: RunStore, phases: Sequence[str], folders: Sequence[Path]) -> None:
    """Makes the folder, if need be, and locks it; nothing stands where the tasks' folders are to be.

    Raises:
        ContinualError: if another run holds it, or nothing can be written there; a run that is over needs not write.
    """
    try:
        make_folder(store.root)
        lock.acquire()
        probe = store.root / f"{uuid4().hex}.partial"
        write_bytes(probe, b"")
        probe.unlink()
        for folder in folders:
            for path in (folder.parent, folder):
                if path.exists() and not path.is_dir():
                    make_folder(path)  # says why it cannot be made
    except ContinualError:
        lock_taken = os.path.exists(lock.path)
        lock.release()
        if lock_taken or not _is_over(store, phases):
            raise


def _is_over(store: RunStore, phases: Sequence[str]) -> bool:
    with suppress(ContinualError, KeyError, TypeError):
        kept = load_tensors(store.root / "state.pt", "")
        return list(kept["progress"]["finished"]) == list(phases)
    return False


def check_room(root: Path, module: nn.Module, *, checkpoints: int) -> None:
    """Raises ContinualError if the folder's disk has no room for what the run will certainly write.

    Args:
        root: of the run.
        module: the network, whose size each of them has at least.
        checkpoints: of tasks, that are still to be written; beside them the state comes three times.
    """
    needed = (checkpoints + 3) * size_of(module)
    with suppress(OSError):
        disk = disk_usage(root)
        there = sum(path.stat().st_size for path in root.glob("state*.pt"))
        if disk.total and disk.free + there < needed:
            raise ContinualError(
                f"runner: {root} has {readable_size(disk.free)} free, but the run needs {readable_size(needed)}: the"
                f" network's state three times and {checkpoints} checkpoints. Make room, or choose another folder."
            )


def size_of(module: nn.Module) -> int:
    """Bytes of a network's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def tell_differences(root: Path, progress: RunProgress, allowed: Sequence[str], initial_weights: str) -> None:
    """Warns of what this start does otherwise than the run so far, and keeps it with the run."""
    new = [each for each in allowed if each not in progress.allowed]
    if new:
        progress.allowed.extend(new)
        warn(f"The run in {root} goes on with what allow= lets differ: {'; '.join(new)}.", RunWarning)
    if progress.initial_weights and progress.initial_weights != initial_weights:
        warn(
            f"The module came with other weights than the run in {root} began with; the run's own are used. Choose"
            " another folder where a run from these weights was meant.",
            RunWarning,
        )


def tell_damage(root: Path, damaged: Mapping[str, str]) -> None:
    """Warns of files that finished phases left and the rest of the run does not need."""
    if damaged:
        files = "; ".join(f"{name} {problem}" for name, problem in damaged.items())
        warn(
            f"In {root} files of finished tasks are not as the run left them: {files}. The run does not need them, but"
            " nobody should use them.",
            RunWarning,
        )
