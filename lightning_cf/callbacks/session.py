"""What all three callbacks do at the start of a fit: find the task, check what cannot work, begin the phase."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_cf.averaging import check_averaging
from lightning_cf.callbacks.divergence import WatchingCallback
from lightning_cf.claiming import PartitionWarning
from lightning_cf.errors import ContinualError, DivergenceWarning
from lightning_cf.finite import described, mend_free, not_finite
from lightning_cf.ledger import CHECKPOINT_KEY, NeuronLedger
from lightning_cf.module import ContinualModule
from lightning_cf.state import ContinualState, keep_ledger, ledger_of, state_for, state_of
from lightning_cf.tasks import Task


class ContinualCallback(WatchingCallback):
    """Base of the callbacks: they share one ledger, kept beside the module and in every checkpoint."""

    partitions = False
    """Whether the callback partitions tasks."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work, before anything runs; sets the task's outputs aside."""
        if stage != "fit":
            return
        check_strategy(trainer)
        check_averaging(trainer, pl_module)
        check_callbacks(trainer)
        task = task_of(trainer, type(self).__name__)
        if not is_overridden("configure_model", pl_module, parent=LightningModule):
            reserve_outputs(pl_module, task)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the task, or goes on with it, in the shared ledger."""
        task = task_of(trainer, type(self).__name__)
        reserve_outputs(pl_module, task)
        ledger = state_for(pl_module, task).ledger
        before = ledger.current
        if before is not None and before.name != task.name and before.phase == "learn" and not _partitions(trainer):
            warnings.warn(
                f"Task '{before.name}' was never partitioned, so nothing protects it from task '{task.name}'; add a"
                " PartitionCallback where it should be.",
                PartitionWarning,
                stacklevel=2,
            )
            ledger.seal()
        ledger.begin(task.name, task.classes or [])
        mend(pl_module, task)

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
            keep_ledger(pl_module, NeuronLedger.from_state_dict(checkpoint[CHECKPOINT_KEY]))


def _partitions(trainer: Trainer) -> bool:
    return any(getattr(callback, "partitions", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]


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
    state = state_for(module, task)
    if isinstance(module, ContinualModule):
        module.add_task(task)
    else:
        columns = state.meet(module, task)
        if task.name not in state.ledger.reserved:
            state.ledger.reserve(task.name, columns)
    return state


def mend(module: LightningModule, task: Task) -> None:
    """Before a task's first step, draws anew what is not finite in free units of a network that was loaded so.

    Raises:
        DivergenceError: if other numbers are not finite, which cannot be had again.
    """
    state = state_for(module, task)
    tensors = state.watched(module)
    names = not_finite(tensors)
    if names:
        found = described(names, tensors)
        mend_free(module, state.structure, state.ledger, names, "not finite", task.name)
        warnings.warn(
            f"Task '{task.name}': free units are not finite before the first step, first in {found}; they were drawn"
            " anew. What earlier tasks own is as it was.",
            DivergenceWarning,
            stacklevel=2,
        )


def check_strategy(trainer: Trainer) -> None:
    """Raises ContinualError for strategies that would lose the ledger or shard what it guards."""
    strategy = trainer.strategy
    name = type(strategy).__name__
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ContinualError(
            "strategy='ddp_spawn' and its relatives run the fit in processes whose callback state and ledger are lost"
            " at its end. Use strategy='ddp'."
        )
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ContinualError(f"strategy {name} shards or moves the weights that the ledger guards. Use 'ddp'.")
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if processes != trainer.world_size:
        raise ContinualError(
            f"The Trainer expects {trainer.world_size} processes, but {processes} are running: it would train on part"
            " of the data. Start each distributed job in a fresh process (unset LOCAL_RANK and WORLD_SIZE)."
        )


def check_callbacks(trainer: Trainer) -> None:
    """Raises ContinualError for callbacks of Lightning's that change what the ledger guards."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelPruning):
            raise ContinualError(
                f"{type(callback).__name__} sets weights to zero, those of owned units too, and renames parameters."
                " Take it out; what no task needs is free: NeuronLedger.capacity() says how much."
            )


def without_address(value: object) -> str:
    """``str(value)``, the same in every process: without the address of an object that has no text of its own."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))
