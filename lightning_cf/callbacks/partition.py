"""When and how a task's units are partitioned (US 12387107, paragraphs 15 to 17 and 29)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal

from lightning.pytorch import LightningModule, Trainer

from lightning_cf.callbacks.session import ContinualCallback, task_of
from lightning_cf.claiming import Measure, PartitionOptions, PartitionWarning
from lightning_cf.errors import ContinualError, check_choice, check_share
from lightning_cf.ledger import ISOLATIONS, Isolation
from lightning_cf.state import ContinualState, state_for, state_of
from lightning_cf.steps import decide_together, partition_task, seal_task


class PartitionCallback(ContinualCallback):
    """Splits the current task's units during or at the end of its fit, and claims the non-redundant ones.

    Until then the fit is LEARN, from then on INVARIANCE; at the fit's end the claim is sealed. With ``after=1.0`` the
    partition comes at the end of the fit, and a second fit on the same task is its INVARIANCE.

    Args:
        after: share of the fit's epochs after which to partition, in (0, 1].
        isolation: ``"exact"`` sets the weights from redundant into claimed units to zero for good: earlier outputs
            never change. ``"perturb"`` leaves everything connected, as the patent's text does.
        measure: see :class:`~lightning_cf.claiming.PartitionOptions`, like the options below.
        threshold: a similarity, or ``"auto"``.
        tolerance: what ``"auto"`` may cost in the task's metric.
        min_claim: smallest share of a layer that ``"auto"`` tries.
        max_claim: largest share of a layer that a task may claim.
        reserve_tasks: for how many tasks room is kept at least.
        fold: whether claimed units take over what redundant ones contributed.
        layers: the only layers to partition.
        exclude: layers that the first task claims whole.
        seed: what the re-initialised units depend on.
    """

    def __init__(
        self,
        *,
        after: float = 1.0,
        isolation: Isolation = "exact",
        measure: Measure = "weight",
        threshold: float | Literal["auto"] = "auto",
        tolerance: float = 0.005,
        min_claim: float = 0.05,
        max_claim: float | None = None,
        reserve_tasks: int = 2,
        fold: bool = True,
        layers: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.after = check_share("partition", "after", after, above_zero=True)
        check_choice("partition", "isolation", isolation, ISOLATIONS)
        self.isolation: Isolation = isolation
        self.options = PartitionOptions(
            measure=measure,
            threshold=threshold,
            tolerance=tolerance,
            min_claim=min_claim,
            max_claim=max_claim,
            reserve_tasks=reserve_tasks,
            fold=fold,
            layers=None if layers is None else tuple(layers),
            exclude=tuple(exclude),
        )
        self.seed = seed

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the task; keeps its starting weights where the measure needs them."""
        super().on_fit_start(trainer, pl_module)
        state = state_for(pl_module, task_of(trainer, type(self).__name__))
        current = state.ledger.current
        if len(state.ledger.tasks) > 1 and state.ledger.isolation != self.isolation:
            raise ContinualError(
                f"partition: isolation={self.isolation!r}, but the tasks so far were claimed under"
                f" {state.ledger.isolation!r}; one network keeps to one of them."
            )
        state.ledger.isolation = self.isolation
        self.select(state)
        if self.options.measure == "update" and current is not None and current.phase == "learn":
            state.remember_start(pl_module)

    def select(self, state: ContinualState) -> None:
        """Notes in the ledger which groups are not partitioned; raises for layers that the network does not have."""
        chosen = [group.name for group in self.options.partitioned(state.structure)]
        state.ledger.whole = [group.name for group in state.structure.groups if group.name not in chosen]

    def should_partition(self, trainer: Trainer) -> bool:
        """Whether the partition is due at the end of this epoch."""
        return not _last_epoch(trainer) and trainer.current_epoch + 1 >= self._due_epoch(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Partitions when it is due; at the fit's last epoch, before checkpoints are written, ends the phase."""
        if self._phase(pl_module) == "learn" and self.should_partition(trainer):
            self.partition(trainer, pl_module)
        elif _last_epoch(trainer):
            self._end_phase(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the phase where the fit stopped in another way than by its number of epochs."""
        if not _last_epoch(trainer):
            self._end_phase(trainer, pl_module)

    def partition(self, trainer: Trainer, module: LightningModule) -> None:
        """Partitions now: on the first process, which tells the others."""
        task = task_of(trainer, type(self).__name__)
        decide_together(trainer, module, lambda: partition_task(module, task, self.options))

    def _phase(self, module: LightningModule) -> str | None:
        state = state_of(module)
        return None if state is None or state.ledger.current is None else state.ledger.current.phase

    def _due_epoch(self, trainer: Trainer) -> int:
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            raise ContinualError(
                f"partition: after={self.after} is a share of the fit's epochs, but the Trainer has"
                " no max_epochs; set it."
            )
        return max(1, math.ceil(self.after * trainer.max_epochs - 1e-9))

    def _end_phase(self, trainer: Trainer, module: LightningModule) -> None:
        phase = self._phase(module)
        state = state_of(module)
        if state is None or phase is None:
            return
        if phase == "invariance":
            decide_together(trainer, module, lambda: seal_task(module, state, self.seed))
        elif self.after == 1.0 or (self.after < 1.0 and _last_epoch(trainer)):
            self.partition(trainer, module)
        else:
            warnings.warn(
                f"Task '{state.ledger.tasks[-1].name}': the fit ended before its partition was due"
                f" (after={self.after}); the next task is refused until this one is partitioned. Fit it again.",
                PartitionWarning,
                stacklevel=2,
            )


def _last_epoch(trainer: Trainer) -> bool:
    """Whether the fit ends with the epoch that is ending, by its number of epochs or steps."""
    done = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    epochs = trainer.max_epochs is not None and 0 < trainer.max_epochs <= done
    return epochs or (trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps)
