"""Only units that may move do: free ones in LEARN, claimed ones in INVARIANCE (US 12387107, paragraphs 19 and 23)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_cf.callbacks.session import ContinualCallback, task_of, without_address
from lightning_cf.errors import ContinualError
from lightning_cf.freezing import Freezer
from lightning_cf.ledger import FREE
from lightning_cf.projection import Projection
from lightning_cf.state import ContinualState, state_for, state_of
from lightning_cf.structure import UnitGroup, named_tensors
from lightning_cf.subspace import Subspace


class MaskedGradientCallback(ContinualCallback):
    """Holds the units that earlier tasks own bitwise still, and shows each task its own outputs only.

    In LEARN the free units train and read everything; in INVARIANCE the task's claimed units do. Works with any
    optimiser: gradients of frozen entries are zero before clipping, and their values are put back after each step.

    Args:
        subspace: what holds the weights that later tasks train (paragraph 24): what training adds to the free units'
            incoming vectors, from the second task on, lies in it, and their biases and norm entries stay. The smaller
            it is, the more is retained under ``isolation="perturb"`` and the less can be learned.
        mask_outputs: while a task trains or is tested, show only its outputs (the others hold the lowest number), so
            that an unchanged loss over all classes trains the task's own. Needs logits; set False for losses that
            spread over all outputs.
    """

    def __init__(self, *, subspace: Subspace | None = None, mask_outputs: bool = True) -> None:
        super().__init__()
        self.subspace = subspace
        self.mask_outputs = mask_outputs
        self._freezer: Freezer | None = None
        self._projection: Projection | None = None
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

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Perturbed units stay perturbed over a step, for a batch that takes several."""
        state = state_of(pl_module)
        if self._freezer is not None and state is not None and state.disturbance is not None:
            self._freezer.save()

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

    def settings(self) -> dict[str, Any]:
        """Its options as plain values, to tell runs apart."""
        return {name: without_address(getattr(self, name)) for name in ("subspace", "mask_outputs")}

    def _show(self, module: LightningModule, state: ContinualState, trainer: Trainer) -> None:
        self._shown.enter_context(state.showing(module, [task_of(trainer, type(self).__name__)]))

    def _hold(self, trainer: Trainer, module: LightningModule, state: ContinualState) -> None:
        self._let_go()
        tensors = named_tensors(module)
        # Before the freezer, whose hook then runs later and has the last word.
        self._projection = Projection(tensors, self._held(state, tensors)).attach(trainer.optimizers)
        read = {n: t for n, t in tensors.items() if isinstance(t, nn.Parameter) or n in state.structure.entries}
        self._freezer = Freezer(module, state.ledger.frozen(state.structure, read)).attach(trainer.optimizers)
        self._revision = state.ledger.revision

    def _held(self, state: ContinualState, tensors: dict[str, Tensor]) -> list[tuple[UnitGroup, Tensor, Tensor]]:
        """The free units of a later task, with the basis that holds them."""
        task = state.ledger.current
        if self.subspace is None or task is None or task.phase != "learn" or len(state.ledger.tasks) == 1:
            return []
        bases = state.bases(self.subspace, tensors)
        if not bases:
            raise ContinualError(
                f"masking: nothing was learned yet of the sub-space that task '{task.name}' is to train in. Give"
                " InvarianceCallback the same subspace, in the fit of the task before."
            )
        return [
            (group, (state.ledger.owners[group.name] == FREE).nonzero().flatten(), bases[group.name])
            for group in state.structure.groups
            if group.name in bases
        ]

    def _let_go(self) -> None:
        for holder in (self._projection, self._freezer):
            if holder is not None:
                holder.detach()
        self._projection = self._freezer = None

    def _release(self) -> None:
        self._let_go()
        self._shown.close()
