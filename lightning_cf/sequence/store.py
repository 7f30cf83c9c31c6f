"""The store of a run: on disk, after every phase, the network and what was found; and which state to go on from."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from lightning_cf.errors import ContinualError, RunWarning, warn
from lightning_cf.learner.state import ContinualState
from lightning_cf.records.manifest import MANIFEST
from lightning_cf.records.record import record_sha256
from lightning_cf.sequence.comparison import check_same, differences
from lightning_cf.sequence.run_progress import RunProgress
from lightning_cf.sequence.stored_state import (
    FORMAT,
    DamagedError,
    FoundState,
    check_finite_state,
    load_state,
    unsound,
)
from lightning_cf.utilities.content import content_sha256
from lightning_cf.utilities.files import file_sha256, make_folder, read_json, write_bytes, write_json, writing


@dataclass(frozen=True)
class RunStore:
    """The folder of a run: its settings and, after each phase, the module with what was found so far.

    ``state.pt`` is what the last phase left, ``state.previous.pt`` what the one before it left: where the first cannot
    be used, the run goes on from the second and repeats one phase. Both hold a checksum of all that they hold and the
    settings of their run; ``settings.json`` is for people to read.
    """

    root: Path

    # Taking up

    def find(self, settings: Mapping[str, Any], allow: Sequence[str] = ()) -> FoundState | None:
        """The state to go on from; None where no phase was finished yet.

        Raises:
            ContinualError: if the folder holds a run with other settings, or no state of it can be used.
        """
        make_folder(self.root)
        wanted = json.loads(json.dumps(settings))
        self._clear()
        newest, older = self._states
        if not newest.exists() and not older.exists():
            if any(path.is_file() for path in (self.root / "tasks").glob("*/*")):
                self._warn(f"{newest} is missing, though tasks were learned in {self.root}; everything starts anew.")
            return None
        try:
            found = self._read(newest, wanted, allow)
        except DamagedError as problem:
            if not older.exists():
                raise ContinualError(f"{newest} {problem}; remove the folder {self.root} to start anew.") from problem
            found = self._read_older(problem, wanted, allow)
            self._warn(
                f"{newest} {problem}. The run goes on from {older}, which is one phase behind; it ends as it would have"
                " ended."
            )
        return self._with_its_files(found, wanted, allow)

    def take_up(self, found: FoundState | str, module: nn.Module, state: ContinualState) -> RunProgress:
        """Loads a state that :meth:`find` chose, on another process by its name.

        Raises:
            ContinualError: if it does not fit the module.
        """
        name = found if isinstance(found, str) else found.name
        try:
            kept = load_state(self.root / found) if isinstance(found, str) else found.kept
            check_finite_state(self.root / name, kept, module)
            module.load_state_dict(kept["module"])
        except ContinualError:
            raise
        except Exception as error:  # whatever another network's weights or another version's ledger lead to
            raise ContinualError(
                f"{self.root / name} does not fit the module: {error} Choose another folder, or remove this one."
            ) from error
        state.start, state.outcome = kept["start"], None
        return RunProgress(**kept["progress"])

    # Storing

    def note(self, settings: Mapping[str, Any]) -> None:
        """Writes the settings for people to read."""
        stored = self.root / "settings.json"
        wanted = json.loads(json.dumps(settings))
        found = None
        if stored.exists():
            try:
                found = read_json(stored)
            except ContinualError:
                if any(path.exists() for path in self._states):
                    self._warn(f"{stored} is damaged; it is written anew.")
        if found != wanted:
            write_json(stored, wanted)

    def save(
        self, module: nn.Module, progress: RunProgress, state: ContinualState, settings: Mapping[str, Any]
    ) -> None:
        """Stores the module and the progress; a kill at any moment leaves the old or the new state whole."""
        content = {
            "format": FORMAT,
            "settings": json.loads(json.dumps(settings)),
            "module": module.state_dict(),
            "progress": asdict(progress),
            "start": state.start,
        }
        buffer = io.BytesIO()
        torch.save({**content, "checksum": content_sha256(content)}, buffer)
        newest, older = self._states
        if newest.exists():
            aside = older.with_name(f"{older.name}.{uuid4().hex}.partial")
            with writing(aside):
                try:
                    os.link(newest, aside)
                except OSError:  # a file system without hard links
                    shutil.copyfile(newest, aside)
                os.replace(aside, older)
        write_bytes(newest, buffer.getbuffer())

    def clear(self) -> None:
        """Removes the states, so that the next run in the folder starts anew."""
        for path in self._states:
            with writing(path):
                path.unlink(missing_ok=True)

    # What was found damaged

    def damaged(self, progress: RunProgress) -> dict[str, str]:
        """Of the files that finished phases left, those that are not as they left them, with what is wrong."""
        found = {}
        for name, digest in progress.files.items():
            if not (self.root / name).exists():
                found[name] = "is missing"
            elif self.digest_of(name) != digest:
                found[name] = "is damaged, or another run's"
        return found

    def digest_of(self, name: str) -> str | None:
        """SHA-256 of a file that a phase left; None where it is not there, or damaged.

        INVARIANCE completes the record of a partition, and may be killed meanwhile: it counts without that.
        """
        path = self.root / name
        return record_sha256(path.parent) if path.name == MANIFEST else file_sha256(path)

    @property
    def _states(self) -> tuple[Path, Path]:
        return self.root / "state.pt", self.root / "state.previous.pt"

    def _clear(self) -> None:
        """Removes what a kill in the middle of writing left."""
        for path in (*self.root.glob("*.partial"), *self.root.glob("tasks/*/*.partial")):
            with suppress(OSError):
                path.unlink()

    def _warn(self, text: str) -> None:
        warn(text, RunWarning)

    def _read(self, path: Path, wanted: Mapping[str, Any], allow: Sequence[str]) -> FoundState:
        """A state, if it is one of the wanted run; raises ContinualError for another run's."""
        kept = load_state(path)
        if kept["format"] < 2:
            self._check_older_format(path, kept, wanted)
            return FoundState(path.name, kept, [])
        try:
            return FoundState(path.name, kept, check_same(self.root, kept["settings"], wanted, allow))
        except ContinualError as error:
            if self._says_it_is(wanted):
                raise ContinualError(
                    f"{path} is another run's than {self.root / 'settings.json'} is about: {error} Or put this run's"
                    f" own {path.name} back; without {path.name}, the run goes on from {self._states[1].name}."
                ) from error
            raise

    def _says_it_is(self, wanted: Mapping[str, Any]) -> bool:
        """Whether ``settings.json`` says that the folder holds just the wanted run."""
        with suppress(ContinualError):
            return not differences(read_json(self.root / "settings.json"), wanted)
        return False

    def _read_older(self, problem: DamagedError, wanted: Mapping[str, Any], allow: Sequence[str]) -> FoundState:
        newest, older = self._states
        try:
            return self._read(older, wanted, allow)
        except DamagedError as too:
            raise ContinualError(
                f"{newest} {problem}, and {older} {too}; remove the folder {self.root} to start anew."
            ) from too

    def _with_its_files(self, found: FoundState, wanted: Mapping[str, Any], allow: Sequence[str]) -> FoundState:
        """The state; or the one before, where the last phase left a file that is damaged: repeated, it writes it."""
        progress, (newest, older) = found.progress, self._states
        damaged = self.damaged(progress)
        if damaged and found.name == newest.name and older.exists():
            with suppress(DamagedError, ContinualError):
                before = self._read(older, wanted, allow)
                new = [name for name in damaged if before.progress.files.get(name) != progress.files[name]]
                if new and progress.finished[:-1] == before.progress.finished:
                    self._warn(
                        f"{self.root / new[0]} {damaged[new[0]]}. The phase '{progress.finished[-1]}' is repeated,"
                        " which writes it anew."
                    )
                    return before
        return found

    def _check_older_format(self, path: Path, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """A state without checksum and settings is taken where all that can be told of it is in order."""
        if path == self._states[1]:
            raise DamagedError("was written by an older version")
        found = read_json(self.root / "settings.json")
        names = ("method", "isolation", "epochs", "invariance_epochs", "seed", "score_on", "processes")
        outputs = {name: task["outputs"] for name, task in wanted["tasks"].items()}
        known = {"order": list(found.get("tasks", {})), "outputs": found.get("tasks", {})}
        check_same(
            self.root,
            {**{name: found.get(name) for name in names}, **known},
            {**{name: wanted[name] for name in names}, "order": wanted["order"], "outputs": outputs},
            (),
        )
        problem = unsound(kept)
        if problem:
            raise ContinualError(f"{path} is damaged: {problem}; remove the folder {self.root} to start anew.")
        self._warn(
            f"{path} was written by an older version of lightning_cf, without a checksum and with few of its run's"
            " settings: whether network, data and optimiser are the same is not known."
        )
