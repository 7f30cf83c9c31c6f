"""A run that goes phase by phase, stores each, and started again on its folder goes on after the last one."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from lightning_cf.callbacks.precision import check_inputs
from lightning_cf.callbacks.strategies import check_launch, check_strategy
from lightning_cf.errors import ContinualError
from lightning_cf.learner.meeting import unless_refused
from lightning_cf.learner.state import ContinualState
from lightning_cf.learner.steps import synchronise
from lightning_cf.lightning_api import Trainer
from lightning_cf.module import ContinualModule
from lightning_cf.network.finite import check_finite
from lightning_cf.records.folders import TaskFolders
from lightning_cf.records.manifest import MANIFEST
from lightning_cf.sequence.attributes import attributes_of, changed, put
from lightning_cf.sequence.comparison import check_allow
from lightning_cf.sequence.preflight import check_root, check_tasks
from lightning_cf.sequence.run_folder import check_room, size_of, take_folder, tell_damage, tell_differences
from lightning_cf.sequence.run_lock import RunLock
from lightning_cf.sequence.run_progress import RunProgress
from lightning_cf.sequence.store import RunStore
from lightning_cf.sequence.stored_state import FoundState
from lightning_cf.sequence.trainers import Trainers, check_trains, end_processes, ended_at_once
from lightning_cf.tasks.contexts import placed_on, seeded
from lightning_cf.tasks.evaluation import transferred
from lightning_cf.tasks.own_generators import OwnGenerators
from lightning_cf.tasks.task import Task
from lightning_cf.utilities.files import make_folder, writing
from lightning_cf.utilities.noting import noting

CHECKPOINT = "checkpoint.ckpt"
"""The network as it is after a task, in the task's folder."""


class StoredRun(ABC):
    """What :class:`SequentialTaskRunner` is beside the method: how it starts, and what it keeps of each phase.

    Attributes:
        module: the network.
        tasks: in their order.
        trainers: make a Trainer for each phase.
        seed: what everything random depends on.
        store: the network and the progress on disk, after each phase.
        lock: so that one run at a time has the folder.
        folders: of the tasks: records and checkpoints.
        allow: names of what may differ from the folder's run.
        progress: what the run found so far.
        notes: texts of what the package warned of.
        state: of the module; once :meth:`start` has run.
    """

    state: ContinualState

    def __init__(
        self,
        module: ContinualModule,
        tasks: Sequence[Task],
        trainers: Trainers,
        *,
        root: Path,
        seed: int,
        similarity_matrix: bool,
        allow: Sequence[str],
    ) -> None:
        self.module, self.tasks, self.trainers, self.seed = module, list(tasks), trainers, seed
        self.own = OwnGenerators([*self.tasks, module])
        self.store = RunStore(root)
        self.lock = RunLock(root)
        self.folders = TaskFolders(root / "tasks", similarity_matrix)
        self.allow = check_allow(allow)
        self.progress = RunProgress()
        self.notes: list[str] = []
        self._host: Trainer | None = None
        self._attributes: dict[str, dict[str, Any]] = {}
        self._initial = ""
        """SHA-256 of the weights that the module came with; :meth:`prepare_module` finds it."""

    @property
    @abstractmethod
    def phases(self) -> list[str]:
        """Names of all phases, in order."""

    @abstractmethod
    def prepare_module(self) -> ContinualState:
        """Checks the network and makes it ready for every task; raises ContinualError if it cannot be."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What must be the same when a run is taken up again."""

    @property
    def host(self) -> Trainer:
        """A Trainer that never fits: knows the device and speaks with the other processes between phases."""
        assert self._host is not None, "start() makes it"
        return self._host

    @contextmanager
    def held(self) -> Iterator[None]:
        """Starts the run if need be, and holds its folder meanwhile; what is raised ends the other processes too."""
        try:
            if self._host is None:
                self.start()
            self.lock.busy = True
            yield
        except BaseException as error:
            if self._host is not None and not isinstance(error, Exception):
                end_processes(self._host)
            if isinstance(error, Exception) and self.lock.busy:
                self._start_anew()
            self._host = None  # so that another call takes up what was stored, not a phase half done
            raise
        finally:
            self.lock.release()

    def _start_anew(self) -> None:
        """A run that failed before it took a step binds nobody: a corrected one may have the folder."""
        if len(self.progress.finished) > 1 or self.module.trainer.global_step:
            return
        with suppress(ContinualError):  # as where another run has taken the folder over
            self.lock.check()
            if self.lock.held:
                self.store.clear()

    # The start

    def start(self) -> None:
        """Checks everything that can be checked before training, and takes up an earlier run's state.

        From here to the end of :meth:`run` nobody else can run in the folder.
        """
        with noting(self.notes), self.own.seeded("start"):
            self._start()

    def _start(self) -> None:
        check_root(self.store.root)
        self._host = self.trainers.make(max_epochs=self.trainers.epochs, callbacks=[], root=self.store.root)
        check_launch(self._host)
        check_trains(self._host)
        batches = check_tasks(self.tasks, self._host, self.seed)
        strategy = self._host.strategy
        if strategy.launcher is not None:
            with ended_at_once() if self._host.num_nodes > 1 else nullcontext():
                strategy.launcher.launch(strategy.setup_environment, trainer=self._host)
        check_strategy(self._host)
        self.module.trainer = self._host
        self._host.precision_plugin.convert_module(self.module)
        folders = [self.folder_of(task) for task in self.tasks]
        self.first_only(partial(take_folder, self.lock, self.store, self.phases, folders))
        installs = self.module.installs_callbacks
        try:
            with unless_refused(self.module):
                with seeded(self.seed, "outputs"):
                    self.state = self.prepare_module()
                for task, batch in zip(self.tasks, batches, strict=True):
                    given = self._host.precision_plugin.convert_input(batch)
                    with (
                        placed_on(self.module, self._host.strategy.root_device),
                        self.state.showing(self.module, [task]),
                    ):
                        check_inputs(self._host, self.module, task.name, transferred(self.module, task, given))
                self.take_up()
        except BaseException:
            self.module.installs_callbacks = installs
            self.lock.release()
            raise
        self.notes[:] = dict.fromkeys([*self.progress.warnings, *self.notes])
        self.progress.warnings = list(self.notes)
        if self.host.world_size > 1:
            self.host.strategy.barrier()

    def take_up(self) -> None:
        """Goes on from what the folder holds of this run, if it holds something."""
        settings = self.settings()
        found = self.first_only(lambda: self.store.find(settings, self.allow))
        self.progress, self._attributes = RunProgress(initial_weights=self._initial), attributes_of(self.module)
        if found is not None:
            self.progress = self.store.take_up(found, self.module, self.state)
            put(self.module, self.progress.attributes)
        self.first_only(partial(self.check_folder, found, settings))
        self.mend_files()

    def check_folder(self, found: FoundState | str | None, settings: dict[str, Any]) -> None:
        """Tells of what differs; raises ContinualError where the disk has no room for what is left of the run."""
        if isinstance(found, FoundState):
            tell_differences(self.store.root, self.progress, found.allowed, self._initial)
        left = [name for name in self.phases if name not in self.progress.finished]
        if left:
            check_room(self.store.root, self.module, checkpoints=sum(n.startswith("invariance ") for n in left))
        if self.lock.held:  # a run that is over may be read where nothing can be written
            self.store.note(settings)

    def mend_files(self) -> None:
        """Tells of damaged files of finished tasks; writes the latest checkpoint anew, if it is one of them."""
        damaged = self.store.damaged(self.progress) if self.host.is_global_zero else {}
        if self.host.world_size > 1:
            damaged = self.host.strategy.broadcast(damaged)
        last = self.progress.finished[-1] if self.progress.finished else ""
        for task in self.tasks:
            name = self.name_of(self.folder_of(task) / CHECKPOINT)
            if name in damaged and last in (f"invariance {task.name}", f"score {task.name}"):
                self.keep(task)
                damaged[name] += "; it is written anew"
        if self.host.is_global_zero:
            tell_damage(self.store.root, damaged)

    def first_only(self, step: Callable[[], Any]) -> Any:
        """What a step gives on the first process; the others get its error, or the name of the state that it found."""
        if self.host.world_size == 1:
            return step()
        found: Any = None
        told: Any = None
        if self.host.is_global_zero:
            try:
                found = step()
                told = found.name if isinstance(found, FoundState) else None
            except ContinualError as error:
                told = error
        told = self.host.strategy.broadcast(told)
        if isinstance(told, ContinualError):
            raise told
        return found if self.host.is_global_zero else told

    # Each phase

    def phase(self, name: str, step: Callable[[], None]) -> None:
        """Runs a phase unless an earlier run finished it, and stores what it left."""
        if name in self.progress.finished:
            return
        began = time.monotonic()
        with seeded(self.seed, name), self.own.seeded(name), noting(self.notes):
            step()
            synchronise(self.host, self.module)
        check_finite(self.module, self.state.structure, f"runner: phase '{name}' is not stored")
        self.progress.warnings = list(self.notes)
        self.progress.attributes = changed(self.module, self._attributes)
        self.progress.seconds += time.monotonic() - began
        self.progress.finished.append(name)
        self.first_only(partial(self.save, name))
        if self.host.world_size > 1:
            self.host.strategy.barrier()

    def save(self, phase: str) -> None:
        """Stores what a phase left, unless another run has taken the folder over."""
        self.lock.check()
        self.note_files(phase)
        self.store.save(self.module, self.progress, self.state, self.settings())

    def note_files(self, phase: str) -> None:
        """Keeps the checksums of the files that a phase left for its task."""
        for task in self.tasks:
            if phase.partition(" ")[2] == task.name:
                for file in (MANIFEST, CHECKPOINT):
                    name = self.name_of(self.folder_of(task) / file)
                    digest = self.store.digest_of(name)
                    if digest is not None:
                        self.progress.files[name] = digest

    def name_of(self, path: Path) -> str:
        """A file's path in the run's folder."""
        return path.relative_to(self.store.root).as_posix()

    def folder_of(self, task: Task) -> Path:
        """The folder of a task's record and checkpoint."""
        return self.folders.of(self.tasks.index(task), task.name)

    def keep(self, task: Task) -> None:
        """Writes the network as it is after a task, next to the record of its partition."""
        folder = self.folder_of(task)
        self.host.strategy.connect(self.module)
        make_folder(folder)
        with writing(folder / CHECKPOINT, size_of(self.module)):
            self.host.save_checkpoint(folder / CHECKPOINT, weights_only=True)
