"""Stops a fit that diverges before anything is claimed or stored, and puts back what was there before it.

A loss that is not finite makes it look: where the weights and statistics after the step are finite all the same, the
step was skipped (a gradient scaler does so) or somebody mended the gradients, and the fit goes on. Else it stops. On a
CPU each loss is looked at; a GPU, or other processes, are asked every ``LOOK`` batches. Whatever the losses say, the
weights are looked at when an epoch or the fit ends, and before a checkpoint is written.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_cf.callbacks.fit_watch import Watch
from lightning_cf.callbacks.label_watch import label_watch_of
from lightning_cf.learner.keeping import state_of
from lightning_cf.lightning_api import Callback, LightningModule, Trainer


class WatchingCallback(Callback):
    """Base of our callbacks: the first of them in a Trainer's list watches the fit, for all of them."""

    _watch: Watch | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first of our callbacks begins to watch the fit's numbers."""
        state = state_of(pl_module)
        ours = (c for c in trainer.callbacks if isinstance(c, WatchingCallback))  # type: ignore[attr-defined]
        if state is not None and next(ours) is self:
            self._watch = Watch(trainer, pl_module, state)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Refuses labels that are none of the task's."""
        labels = label_watch_of(trainer, pl_module)
        if labels is not None:
            labels.look(batch, batch_idx, trainer.fit_loop.total_batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Sees each loss, also where the optimisation is manual and the training step returns none."""
        if self._watch is not None:
            self._watch.see(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where a loss was not finite, looks how far the gradients are."""
        if self._watch is not None:
            self._watch.see_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops a fit that diverged; before anything else of ours is done at a batch's end."""
        if self._watch is not None:
            self._watch.end_batch(outputs, batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says which labels were found that are none of the task's; looks at the weights."""
        labels = label_watch_of(trainer, pl_module)
        if labels is not None:
            labels.settle(whole=_whole_epoch(trainer))
        if self._watch is not None:
            self._watch.look(everything=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says which labels no epoch held; looks at the weights and, where no partition did, at what they give."""
        labels = label_watch_of(trainer, pl_module)
        if labels is not None and (_whole_epoch(trainer) or not trainer.should_stop):
            labels.tell()
        if self._watch is not None:
            self._watch.look(everything=True)
            if not any(getattr(callback, "partitions", False) for callback in trainer.callbacks):  # type: ignore[attr-defined]
                self._watch.look_at_outputs()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the weights that other callbacks, such as averages, left."""
        if self._watch is not None:
            self._watch.look(everything=True)

    def end_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the very end of a fit, before it is noted what the weights of each task are."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Looks at the weights: no checkpoint holds any that are not finite."""
        if self._watch is not None:
            self._watch.look(everything=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Where numbers are not finite, however the fit ended, puts back what the phase began with."""
        if self._watch is not None:
            watch, self._watch = self._watch, None
            watch.put_back(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the numbers that a fit that diverges would have gone back to."""
        if self._watch is not None:
            self._watch.state.safe = None
            self._watch = None


def _whole_epoch(trainer: Trainer) -> bool:
    """Whether this process took all of the training data in the epoch that ends."""
    limit = trainer.limit_train_batches
    last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return last and isinstance(limit, float) and limit == 1 and trainer.world_size == 1


def watch_of(trainer: Trainer) -> Watch | None:
    """What watches a Trainer's fit now."""
    ours = (c._watch for c in trainer.callbacks if isinstance(c, WatchingCallback))  # type: ignore[attr-defined]
    return next((watch for watch in ours if watch is not None), None)


def look_at_outputs(trainer: Trainer) -> None:
    """Raises DivergenceError if a fit that is watched left weights with which the forward pass overflows."""
    watch = watch_of(trainer)
    if watch is not None:
        watch.look_at_outputs()
