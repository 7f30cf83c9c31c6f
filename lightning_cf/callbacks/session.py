"""What all three callbacks do at the start of a fit: find the task, check what cannot work, begin the phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_cf.callbacks.averaging import check_averaging
from lightning_cf.callbacks.divergence import WatchingCallback
from lightning_cf.callbacks.loading import LoadGuard, check_resumed, check_weights, end_evaluation, warn_of_traces
from lightning_cf.callbacks.precision import check_inputs
from lightning_cf.callbacks.strategies import check_callbacks, check_strategy
from lightning_cf.errors import ContinualError, DivergenceWarning, warn
from lightning_cf.learner.keeping import keep_ledger, ledger_of, state_for, state_of
from lightning_cf.learner.meeting import make_place, meet_task
from lightning_cf.learner.state import ContinualState
from lightning_cf.lightning_api import (
    LightningModule,
    Trainer,
    TrainerFn,
    check_same_lightning,
    is_overridden,
)
from lightning_cf.network.finite import described, not_finite, watched
from lightning_cf.ownership.fingerprints import keep_fingerprints
from lightning_cf.ownership.ledger import Isolation, NeuronLedger
from lightning_cf.ownership.ledger_state import CHECKPOINT_KEY
from lightning_cf.ownership.mending import mend_free
from lightning_cf.partition.cost import PartitionWarning
from lightning_cf.records.folders import TaskFolders
from lightning_cf.tasks.task import Task


class ContinualCallback(WatchingCallback):
    """Base of the callbacks: they share one ledger, kept beside the module and in every checkpoint."""

    partitions = False
    """Whether the callback partitions tasks."""

    holds = False
    """Whether the callback holds still what earlier tasks own."""

    ledger: str | Path | None = None
    """A checkpoint whose ledger is taken up where the module has none."""

    seed: int = 0
    """What its random numbers depend on."""

    _guard: LoadGuard | None = None

    def join_run(self, *, seed: int, isolation: Isolation, folders: TaskFolders) -> None:
        """Takes over what a run decides for all of its callbacks.

        Args:
            seed: what everything random depends on.
            isolation: how tasks are isolated.
            folders: where records of partitions go.
        """
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work, before anything runs; sets the task's outputs aside."""
        for thing in (trainer, pl_module):
            check_same_lightning(type(self).__name__, thing)
        if self._leads(trainer):
            take_up_ledgers(trainer, pl_module)
            known = ledger_of(pl_module)
            if known is not None and known.tasks:
                self._guard = LoadGuard(pl_module, known)
        if stage != "fit":
            return
        check_strategy(trainer)
        check_averaging(trainer, pl_module)
        check_callbacks(trainer)
        task = task_of(trainer, type(self).__name__)
        task.task_loaders.check()
        if not is_overridden("configure_model", pl_module, parent=LightningModule):
            reserve_outputs(pl_module, task)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the task, or goes on with it, in the shared ledger."""
        task = task_of(trainer, type(self).__name__)
        if self._leads(trainer):
            self._check_weights(trainer, pl_module, task)
        reserve_outputs(pl_module, task)
        state = state_for(pl_module, task)
        state.begin_fit(task)
        ledger = state.ledger
        before = ledger.current
        if before is not None and before.name != task.name and before.phase == "learn" and not _partitions(trainer):
            warn(
                f"Task '{before.name}' was never partitioned, so nothing protects it from task '{task.name}'; add a"
                " PartitionCallback where it should be.",
                PartitionWarning,
            )
            ledger.seal()
        state.untrained = state.untrained if ledger.knows(task.name) else task.name
        ledger.begin(task.name, task.classes or [], state.structure)
        mend(pl_module, task)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mends what the validation before training, or a callback since the fit's start, left; begins to watch."""
        if self._leads(trainer):
            mend(pl_module, task_of(trainer, type(self).__name__))
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Refuses inputs that the first training step would not take, and labels that are none of the task's."""
        if self._leads(trainer) and trainer.fit_loop.total_batch_idx == 0:
            check_inputs(trainer, pl_module, task_of(trainer, type(self).__name__).name, batch)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """From its first batch on the task is more than a name."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        state = state_of(pl_module)
        if state is not None:
            state.untrained = ""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the ledger into the checkpoint, and perturbed units back, which its weights share."""
        state = state_of(pl_module)
        if state is not None:
            state.undisturb()
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        ledger = ledger_of(pl_module)
        if ledger is not None:
            checkpoint[CHECKPOINT_KEY] = ledger.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes the ledger out of the checkpoint."""
        if CHECKPOINT_KEY in checkpoint:
            ledger = NeuronLedger.from_state_dict(checkpoint[CHECKPOINT_KEY])
            ledger.origin = str(trainer.ckpt_path or "")
            keep_ledger(pl_module, ledger)
        if trainer.state.fn == TrainerFn.FITTING:
            check_resumed(self._guard, trainer.ckpt_path, task_of(trainer, type(self).__name__).name)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes what the weights of each task are after a fit; puts back what an evaluation took back."""
        super().teardown(trainer, pl_module, stage)
        state = state_of(pl_module)
        if stage == "fit" and state is not None and self._leads(trainer):
            for callback in _ours(trainer):
                callback.end_fit(trainer, pl_module)
            keep_fingerprints(pl_module, state.structure, state.ledger)
            state.ledger.origin = ""  # it is another one than was read
        self._release_guard(trainer, evaluated=stage != "fit")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As ``teardown``, which does not run after an exception."""
        super().on_exception(trainer, pl_module, exception)
        self._release_guard(trainer, evaluated=trainer.state.fn != TrainerFn.FITTING)

    def _leads(self, trainer: Trainer) -> bool:
        """Whether this is the first of our callbacks in the list: it does what is to be done once."""
        return self is next(iter(_ours(trainer)), None)

    def _check_weights(self, trainer: Trainer, module: LightningModule, task: Task) -> None:
        """Checks that weights and ledger belong together, once they are loaded and before a fit changes them."""
        ledger = ledger_of(module)
        if ledger is not None and ledger.tasks:
            check_weights(module, ledger, self._guard, trainer.ckpt_path)
            held = any(getattr(callback, "holds", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
            for name in [*ledger.fingerprints]:
                if not held or (ledger.current is not None and name == ledger.current.name == task.name):
                    del ledger.fingerprints[name]  # it moves until the fit ends
        else:
            warn_of_traces(module, state_for(module, task).structure)
        self._release_guard(trainer, evaluated=False)

    def _release_guard(self, trainer: Trainer, *, evaluated: bool) -> None:
        if self._guard is not None:
            guard, self._guard = self._guard, None
            try:
                if evaluated:
                    end_evaluation(guard, trainer.ckpt_path)
            finally:
                guard.release()


def _ours(trainer: Trainer) -> list[ContinualCallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, ContinualCallback)]  # type: ignore[attr-defined]


def take_up_ledgers(trainer: Trainer, module: LightningModule) -> None:
    """Takes up the ledger that a callback was given, where the module has none that knows tasks.

    Raises:
        ContinualError: where the module has one that knows less.
    """
    for callback in _ours(trainer):
        if callback.ledger is not None:
            found, known = NeuronLedger.from_checkpoint(callback.ledger), ledger_of(module)
            if known is None or not known.tasks:
                keep_ledger(module, found)
            elif found.undone_by(known):
                raise ContinualError(
                    f"{type(callback).__name__}(ledger={str(callback.ledger)!r}) knows more of task"
                    f" '{found.undone_by(known)[0]}' than the ledger that {type(module).__name__} has. Load the weights"
                    " of that checkpoint too, into a new module, or leave ledger= out."
                )


def _partitions(trainer: Trainer) -> bool:
    return any(getattr(callback, "partitions", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def isolate(trainer: Trainer, module: LightningModule, state: ContinualState) -> None:
    """Sets the isolation that the Trainer's partition wants, whichever callback begins first."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if getattr(callback, "partitions", False):
            state.set_isolation(module, callback.isolation)


def task_of(trainer: Trainer, owner: str) -> Task:
    """The task that a Trainer fits.

    Raises:
        ContinualError: if its data is no Task.
    """
    task = getattr(trainer, "datamodule", None)
    if not isinstance(task, Task):
        found = "no datamodule" if task is None else f"a {type(task).__name__}"
        raise ContinualError(
            f"{owner}: the Trainer got {found}; wrap the data in a Task that says its name and classes:"
            " trainer.fit(module, datamodule=Task('zero-one', data, classes=[0, 1]))."
        )
    return task


def reserve_outputs(module: LightningModule, task: Task) -> ContinualState:
    """Sets the task's outputs aside; a ContinualModule adds columns for classes that return.

    Raises:
        ContinualError: for outputs that another task has, or that the head does not have.
    """
    make_place(module, task.name)
    meet_task(module, task)
    state = state_for(module, task)
    state.check_met()
    return state


def mend(module: LightningModule, task: Task) -> None:
    """Before a task's first step, draws anew what is not finite in free units of a network that was loaded so.

    Raises:
        DivergenceError: if other numbers are not finite, which cannot be had again.
    """
    state = state_for(module, task)
    tensors = watched(module, state.structure)
    names = not_finite(tensors)
    if names:
        found = described(names, tensors)
        mend_free(module, state.structure, state.ledger, names, "not finite", task.name)
        warn(
            f"Task '{task.name}': free units are not finite before the first step, first in {found}; they were drawn"
            " anew. What earlier tasks own is as it was.",
            DivergenceWarning,
        )
