"""When a partition is due: after a share of a fit, every so many steps or epochs, or once a logged value is low."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_cf.errors import ContinualError, check_count, check_number, check_share, check_text
from lightning_cf.lightning_api import Trainer


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When a task is partitioned; the arguments are those of ``PartitionCallback``."""

    after: float = 1.0
    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    when_below: float | None = None
    monitor: str = "train_loss"

    def __post_init__(self) -> None:
        check_share("partition", "after", self.after)
        for name, count in (("every_n_steps", self.every_n_steps), ("every_n_epochs", self.every_n_epochs)):
            if count is not None:
                check_count("partition", name, count)
        if self.when_below is not None:
            check_number("partition", "when_below", self.when_below)
        check_text("partition", "monitor", self.monitor)
        if self.every_n_steps is not None and self.every_n_epochs is not None:
            raise ContinualError("partition: every_n_steps and every_n_epochs contradict each other; give one of them.")
        if self.during_training and self.after != 1.0:
            raise ContinualError(
                f"partition: after={self.after} and {self.text} contradict each other; give one of them."
            )

    @property
    def during_training(self) -> bool:
        """Whether the time of the partition depends on steps, epochs or a logged value, not on a share of the fit."""
        return any(given is not None for given in (self.every_n_steps, self.every_n_epochs, self.when_below))

    @property
    def again(self) -> bool:
        """Whether partitions follow the first one."""
        return self.every_n_steps is not None or self.every_n_epochs is not None

    @property
    def text(self) -> str:
        """The options that say when a partition is due, for messages."""
        named = {name: getattr(self, name) for name in ("every_n_steps", "every_n_epochs", "when_below")}
        given = [f"{name}={value}" for name, value in named.items() if value is not None]
        return ", ".join(given) or f"after={self.after}"

    def due_at_epoch_end(self, trainer: Trainer) -> bool:
        """Whether a partition is due at the end of this epoch."""
        done = trainer.current_epoch + 1
        if self.every_n_epochs is not None:
            return done % self.every_n_epochs == 0
        if self.during_training:
            return self.every_n_steps is None
        return 0 < self.after < 1 and not counts_steps(trainer) and done >= self.due_epoch(trainer)

    def due_by_steps(self, trainer: Trainer, before: int) -> bool:
        """Whether a batch's steps completed another ``every_n_steps``, or that share of a fit of ``max_steps``.

        Args:
            trainer: after the batch.
            before: its optimiser steps before the batch.
        """
        n = self.every_n_steps
        if 0 < self.after < 1 and counts_steps(trainer):
            return before < math.ceil(self.after * trainer.max_steps - 1e-9) <= trainer.global_step
        return n is not None and trainer.global_step // n > before // n

    def due_at_end(self, trainer: Trainer, before: int) -> bool:
        """Whether a fit that ends in LEARN ends with a partition, which leaves INVARIANCE to a second fit.

        Args:
            trainer: at the fit's end.
            before: its optimiser steps before the last batch.
        """
        if not self.during_training:
            return self.after == 1.0 or over(trainer)
        due = self.due_at_epoch_end(trainer) if self.every_n_steps is None else self.due_by_steps(trainer, before)
        return due and self.is_below(trainer, trainer.current_epoch + 1)

    def due_epoch(self, trainer: Trainer) -> int:
        """After how many epochs the share of the fit is done.

        Raises:
            ContinualError: if the Trainer does not say how long the fit is.
        """
        if trainer.max_epochs == 0:
            raise ContinualError(
                f"partition: after={self.after} is a share of the fit's epochs, but the Trainer has max_epochs=0, which"
                " allows none; raise it."
            )
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            raise ContinualError(
                f"partition: after={self.after} is a share of the fit's epochs or steps, but the Trainer has"
                " neither max_epochs nor max_steps; set one."
            )
        return max(1, math.ceil(self.after * trainer.max_epochs - 1e-9))

    def is_below(self, trainer: Trainer, epochs: int) -> bool:
        """Whether the monitored value is below its bound, on every process, after so many whole epochs."""
        if self.when_below is None:
            return True
        value = trainer.callback_metrics.get(self.monitor)
        if value is None and epochs < (trainer.check_val_every_n_epoch or 1):
            return False  # it may come with the first validation
        if value is None:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ContinualError(
                f"partition: when_below={self.when_below} watches monitor='{self.monitor}', which was not logged;"
                f" logged is {logged}. Log it with self.log in the module, or choose another monitor."
            )
        below: bool = trainer.strategy.reduce_boolean_decision(float(value) < self.when_below, all=True)
        return below


def trained(trainer: Trainer) -> tuple[int, int]:
    """How far the fit is: its optimiser steps, or its batches where a loop steps behind Lightning's back."""
    steps = trainer.global_step
    return steps, 0 if steps else trainer.fit_loop.total_batch_idx


def counts_steps(trainer: Trainer) -> bool:
    """Whether the fit's length is given in steps alone."""
    return (trainer.max_epochs is None or trainer.max_epochs < 1) and trainer.max_steps > 0


def over(trainer: Trainer) -> bool:
    """Whether the fit ends with the epoch that is ending, by its number of epochs or steps."""
    done = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    epochs = trainer.max_epochs is not None and 0 < trainer.max_epochs <= done
    return epochs or (trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps)


def last_batch(trainer: Trainer) -> bool:
    """Whether the fit ends with the batch that is ending, by its number of epochs or steps."""
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 >= trainer.max_epochs > 0
    ends = last_epoch and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return ends or stops(trainer) or (trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps)


def stops(trainer: Trainer) -> bool:
    """Whether a callback or a signal asked the fit to stop, and it will."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early
