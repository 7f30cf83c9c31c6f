"""Only units that may move do: free ones in LEARN, claimed ones in INVARIANCE (US 12387107, paragraphs 19 and 23)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_cf.callbacks.session import ContinualCallback, task_of
from lightning_cf.freezing import Freezer
from lightning_cf.state import ContinualState, state_for, state_of
from lightning_cf.structure import named_tensors


class MaskedGradientCallback(ContinualCallback):
    """Holds the units that earlier tasks own bitwise still, and shows each task its own outputs only.

    In LEARN the free units train and read everything; in INVARIANCE the task's claimed units do. Works with any
    optimiser: gradients of frozen entries are zero before clipping, and their values are put back after each step.

    Args:
        mask_outputs: while a task trains or is tested, show only its outputs (the others hold the lowest number), so
            that an unchanged loss over all classes trains the task's own. Needs logits; set False for losses that
            spread over all outputs.
    """

    def __init__(self, *, mask_outputs: bool = True) -> None:
        super().__init__()
        self.mask_outputs = mask_outputs
        self._freezer: Freezer | None = None
        self._revision = -1
        self._shown = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Also shows a known task's outputs when it is validated or tested outside a fit."""
        super().setup(trainer, pl_module, stage)
        state, task = state_of(pl_module), getattr(trainer, "datamodule", None)
        if stage in ("validate", "test") and state is not None and getattr(task, "name", None) in state.ledger.reserved:
            self._show(pl_module, state, trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts holding."""
        super().on_fit_start(trainer, pl_module)
        state = state_for(pl_module, task_of(trainer, type(self).__name__))
        state.mask_outputs = self.mask_outputs
        self._show(pl_module, state, trainer)
        self._hold(trainer, pl_module, state)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Takes up masks that changed within the fit."""
        state = state_of(pl_module)
        if state is not None and state.ledger.revision != self._revision:
            self._hold(trainer, pl_module, state)
            assert self._freezer is not None
            self._freezer.zero_optimizer_state()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Several processes reduce their gradients after the hooks ran: zeroes the frozen entries again."""
        if trainer.world_size > 1 and self._freezer is not None:
            self._freezer.zero_gradients()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets go."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets go; teardown does not run after an exception."""
        self._release()

    def _show(self, module: LightningModule, state: ContinualState, trainer: Trainer) -> None:
        self._shown.enter_context(state.showing(module, [task_of(trainer, type(self).__name__)]))

    def _hold(self, trainer: Trainer, module: LightningModule, state: ContinualState) -> None:
        if self._freezer is not None:
            self._freezer.detach()
        masks = state.ledger.frozen(state.structure, named_tensors(module))
        self._freezer = Freezer(module, masks).attach(trainer.optimizers)
        self._revision = state.ledger.revision

    def _release(self) -> None:
        if self._freezer is not None:
            self._freezer.detach()
            self._freezer = None
        self._shown.close()
