"""When and how a task's units are partitioned (US 12387107, paragraphs 15 to 17 and 29)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from lightning_cf.callbacks.averaging import restart_averages, take_averages
from lightning_cf.callbacks.best import discount_scores
from lightning_cf.callbacks.divergence import look_at_outputs
from lightning_cf.callbacks.schedule import Schedule, counts_steps, last_batch, over, stops, trained
from lightning_cf.callbacks.session import ContinualCallback, task_of
from lightning_cf.errors import (
    ContinualError,
    check_choice,
    check_count,
    check_flag,
    check_path,
    warn,
)
from lightning_cf.functional.phases import check, select
from lightning_cf.learner.keeping import ledger_of, state_for, state_of
from lightning_cf.learner.state import ContinualState
from lightning_cf.learner.steps import decide_together, partition_task, remember_claim, seal_task
from lightning_cf.lightning_api import LightningModule, Trainer, TrainerFn
from lightning_cf.network.forward import named_tensors
from lightning_cf.ownership.ledger import ISOLATIONS, Isolation
from lightning_cf.partition.cost import PartitionWarning, warn_of_cost
from lightning_cf.partition.options import PartitionKeywords, options_from
from lightning_cf.records.folders import TaskFolders
from lightning_cf.tasks.scoring_check import check_scoring
from lightning_cf.tasks.task import Task
from lightning_cf.utilities.describing import describe

START_KEY = "lightning_cf_start"
"""Where a Lightning checkpoint holds the weights at the current task's start, if a partition needs them."""


class PartitionCallback(ContinualCallback):
    """Splits the current task's units during or at the end of its fit, and claims the non-redundant ones.

    Until then the fit is LEARN, from then on INVARIANCE; at the fit's end the claim is sealed. With ``after=1.0`` the
    partition comes at the end of the fit, and a second fit on the same task is its INVARIANCE. With ``after=0`` it
    comes before the first step: the module was trained on the task already (paragraph 28).

    With ``every_n_steps`` or ``every_n_epochs`` the task is partitioned again and again during training (paragraph 29):
    the first time starts INVARIANCE; later ones partition the provisional claim, which only shrinks, and with
    ``threshold="auto"`` only as long as the metric stays within ``tolerance`` of what it was before the first.

    Args:
        after: share of the fit's epochs after which to partition, in [0, 1]; of its steps where the Trainer has
            ``max_steps`` and no ``max_epochs``.
        every_n_steps: instead, partition after every so many optimiser steps.
        every_n_epochs: instead, partition after every so many epochs.
        when_below: wait with the first partition until a logged value is below this bound; checked as often as
            ``every_n_steps`` or ``every_n_epochs`` say, else after each epoch.
        monitor: the name of that value.
        isolation: ``"exact"`` sets the weights from redundant into claimed units to zero for good: earlier outputs
            never change. ``"perturb"`` leaves everything connected, as the patent's text does.
        records: folder in which every partition is recorded, in a folder a task (see
            :class:`~lightning_cf.records.record.PartitionRecord`); default none.
        similarity_matrix: whether the records hold the similarity of every two units.
        seed: what the re-initialised units and randomly chosen representatives depend on.
        ledger: a checkpoint whose ledger the module takes up where it has none, for a plain module whose weights were
            loaded from it (see ``keep_ledger``).
        options: how units are compared and how many are claimed, the fields of
            :class:`~lightning_cf.partition.PartitionOptions`: ``measure``, ``threshold``, ``tolerance``,
            ``min_claim``, ``max_claim``, ``reserve_tasks``, ``clusters``, ``representative``, ``fold``,
            ``reinitialise``, ``layers``, ``exclude``.
    """

    partitions = True

    tasks_left: int = 1
    """Tasks still to come, this one counted, as far as known; the runner knows."""

    def __init__(
        self,
        *,
        after: float = 1.0,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        when_below: float | None = None,
        monitor: str = "train_loss",
        isolation: Isolation = "exact",
        records: str | Path | None = None,
        similarity_matrix: bool = False,
        seed: int = 0,
        ledger: str | Path | None = None,
        **options: Unpack[PartitionKeywords],
    ) -> None:
        super().__init__()
        self.schedule = Schedule(
            after=after,
            every_n_steps=every_n_steps,
            every_n_epochs=every_n_epochs,
            when_below=when_below,
            monitor=monitor,
        )
        check_choice("partition", "isolation", isolation, ISOLATIONS)
        self.isolation: Isolation = isolation
        if after == 0 and options.get("measure") == "update":
            raise ContinualError(
                "partition: measure='update' compares with the weights before the task was learned, which after=0 does"
                " not have. Use measure='weight' or 'activation'."
            )
        check_flag("partition", "similarity_matrix", similarity_matrix)
        folder = None if records is None else check_path("partition", "records", records)
        self.folders = None if folder is None else TaskFolders(folder, similarity_matrix)
        self.similarity_matrix = similarity_matrix
        self.options = options_from(options)
        self.seed = check_count("partition", "seed", seed, least=0)
        self.ledger = None if ledger is None else check_path("partition", "ledger", ledger)
        self._step, self._stale_scores, self._ended = 0, False, False
        self._partitioned_at: tuple[int, int] | None = None
        self._start: dict[str, Tensor] | None = None

    def join_run(self, *, seed: int, isolation: Isolation, folders: TaskFolders) -> None:
        """Also takes over how tasks are isolated, and where records go."""
        super().join_run(seed=seed, isolation=isolation, folders=folders)
        self.isolation, self.folders = isolation, folders

    @property
    def during_training(self) -> bool:
        """Whether the time of the partition depends on steps, epochs or a logged value, not on a share of the fit."""
        return self.schedule.during_training

    @property
    def after(self) -> float:
        """The share of the fit after which it is due."""
        return self.schedule.after

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the task; keeps its starting weights where the measure needs them."""
        before = ledger_of(pl_module)
        task = task_of(trainer, type(self).__name__)
        if before is not None and before.phase == "invariance" and before.tasks[-1].name != task.name:
            warn_of_cost(before, self.options.tolerance)  # as nothing follows its partition
        super().on_fit_start(trainer, pl_module)
        state = state_for(pl_module, task)
        learns = state.ledger.phase == "learn"
        state.set_isolation(pl_module, self.isolation)
        self.select(pl_module, state)
        with state.showing(pl_module, [task]):
            check_scoring(pl_module, task)
        self._partitioned_at, self._ended = None, False
        if learns and 0 < self.after < 1 and not counts_steps(trainer):
            self.schedule.due_epoch(trainer)
        if self._start is not None or learns:
            self.remember_start(pl_module, state)

    def expect(self, tasks_left: int) -> None:
        """How many tasks are still to come, the current one counted: its claim leaves room for them."""
        self.tasks_left = tasks_left

    def remember_start(self, module: LightningModule, state: ContinualState) -> None:
        """Keeps the weights at the task's start, where the measure needs them and a checkpoint did not bring them."""
        if self.options.measure == "update":
            state.start = self._start or {n: t.detach().clone() for n, t in named_tensors(module).items()}
        self._start = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the ledger into the checkpoint, and the weights at the task's start where a partition needs them."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        state = state_of(pl_module)
        if state is not None and state.start is not None:
            checkpoint[START_KEY] = state.start

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes both out of the checkpoint; the weights at the start only for a fit that goes on from it."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if trainer.state.fn == TrainerFn.FITTING:
            self._start = checkpoint.get(START_KEY)

    def select(self, module: LightningModule, state: ContinualState) -> None:
        """Notes in the ledger which groups are not partitioned, and checks that isolation can hold on the others.

        Raises:
            ContinualError: for layers that the network does not have.
            StructureError: if ``exact`` cannot hold.
        """
        fresh = state.checked_ways < state.structure.ways  # a later task may bring a way of its own
        if len(state.ledger.tasks) < 2 or fresh:
            state.checked_ways = state.structure.ways
            check(
                module,
                state.structure,
                state.ledger,
                state.example,
                state.forward,
                options=self.options,
                said=state.said,
            )
        else:
            select(state.structure, state.ledger, self.options)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With ``after=0``, partitions what was trained before."""
        super().on_train_start(trainer, pl_module)
        if self.after == 0 and self._phase(pl_module) == "learn":
            self.partition_task(trainer, pl_module, task_of(trainer, type(self).__name__))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes where the optimisers stand, since some batches end without a step."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._step = trainer.global_step
        if self._stale_scores:
            self._discount(trainer, again=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Partitions when it is due by steps; not at the fit's last one, which ends the phase instead."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.schedule.due_by_steps(trainer, self._step) and not last_batch(trainer):
            self._partition_if_due(trainer, pl_module, epochs=trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Partitions when it is due; at the fit's last epoch, before checkpoints are written, ends the phase."""
        super().on_train_epoch_end(trainer, pl_module)
        if over(trainer) or stops(trainer):
            self._end_phase(trainer, pl_module)
        elif self._phase(pl_module) is not None and self.schedule.due_at_epoch_end(trainer):
            self._partition_if_due(trainer, pl_module, epochs=trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the phase where the fit stopped in another way than by its number of epochs."""
        super().on_train_end(trainer, pl_module)
        if not self._ended:
            self._end_phase(trainer, pl_module)

    def settings(self) -> dict[str, Any]:
        """Its options as plain values, to tell runs apart."""
        names = ("every_n_steps", "every_n_epochs", "when_below", "monitor")
        when = {name: getattr(self.schedule, name) for name in names}
        measured = {"measured": describe(self.options.measure)} if callable(self.options.measure) else {}
        return {**when, **self.options.as_dict(), **measured}

    def partition_task(self, trainer: Trainer, module: LightningModule, task: Task) -> None:
        """Partitions now: on the first process, which tells the others."""
        self._partitioned_at = trained(trainer)
        take_averages(trainer, module)
        look_at_outputs(trainer)

        def step(**_: object) -> None:
            left, seed, folders = self.tasks_left, self.seed, self.folders
            partition_task(module, task, self.options, tasks_left=left, seed=seed, folders=folders)

        decide_together(trainer, module, task, step)
        restart_averages(trainer, module)
        self._discount(trainer, again=True)

    def _discount(self, trainer: Trainer, *, again: bool) -> None:
        """The best checkpoint is one from the partition on; what is logged until the next batch is from before it."""
        discount_scores(trainer)
        self._stale_scores = again

    def _partition_if_due(self, trainer: Trainer, module: LightningModule, *, epochs: int) -> None:
        """The first partition waits for the monitored value; later ones come only where they were asked for."""
        phase = self._phase(module)
        again = self.schedule.again
        if (phase == "learn" and self.schedule.is_below(trainer, epochs)) or (phase == "invariance" and again):
            self.partition_task(trainer, module, task_of(trainer, type(self).__name__))

    def _phase(self, module: LightningModule) -> str | None:
        state = state_of(module)
        return None if state is None or state.ledger.current is None else state.ledger.current.phase

    def _end_phase(self, trainer: Trainer, module: LightningModule) -> None:
        self._ended = True
        phase = self._phase(module)
        state = state_of(module)
        if state is None or phase is None:
            return
        task = task_of(trainer, type(self).__name__)
        if phase == "invariance" and self._partitioned_at == trained(trainer):
            # The fit was stopped right after the partition: a second fit is its INVARIANCE, if one comes.
            decide_together(trainer, module, task, partial(remember_claim, module, task))
            return
        if phase == "invariance":
            take_averages(trainer, module)
            look_at_outputs(trainer)
            seal = partial(seal_task, module, task, self.options, seed=self.seed, folders=self.folders)
            decide_together(trainer, module, task, seal)
            restart_averages(trainer, module)
        elif self.schedule.due_at_end(trainer, self._step):
            self.partition_task(trainer, module, task)
            decide_together(trainer, module, task, partial(remember_claim, module, task))
        else:
            warn(
                f"Task '{state.ledger.tasks[-1].name}': the fit ended before its partition was due"
                f" ({self.schedule.text}); the next task is refused until this one is partitioned. Fit it again.",
                PartitionWarning,
            )
