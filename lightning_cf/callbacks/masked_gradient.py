"""Only units that may move do: free ones in LEARN, claimed ones in INVARIANCE (US 12387107, paragraphs 19 and 23)."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_cf.callbacks.averaging import exact_averages
from lightning_cf.callbacks.session import ContinualCallback, task_of
from lightning_cf.errors import ContinualError, ContinualWarning, check_flag, warn
from lightning_cf.exactness.memory import Memory
from lightning_cf.functional.holding import Hold
from lightning_cf.learner.following import follow_buffers
from lightning_cf.learner.keeping import ledger_of, state_for, state_of
from lightning_cf.learner.state import ContinualState
from lightning_cf.lightning_api import LightningModule, Trainer, TrainerFn, counters_at_zero
from lightning_cf.network.forward import Forward
from lightning_cf.ownership.sealed_entries import isolated
from lightning_cf.subspaces.subspace import Subspace, check_subspace
from lightning_cf.tasks.task import Task
from lightning_cf.utilities.describing import describe


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
        ledger: a checkpoint whose ledger the module takes up where it has none, for a plain module whose weights were
            loaded from it (see ``keep_ledger``).
    """

    holds = True

    def __init__(
        self,
        *,
        subspace: Subspace | None = None,
        mask_outputs: bool = True,
        ledger: str | Path | None = None,
    ) -> None:
        super().__init__()
        check_subspace("masking", subspace)
        self.ledger = ledger
        self.subspace = subspace
        self.mask_outputs = check_flag("masking", "mask_outputs", mask_outputs)
        self._hold: Hold | None = None
        self._unmet: dict[str, nn.Parameter] = {}
        self._shown = ExitStack()
        self._averages = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Also notes whether outputs are masked."""
        super().setup(trainer, pl_module, stage)
        state = state_of(pl_module)
        if stage == "fit" and state is not None:
            state.set_mask_outputs(self.mask_outputs)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows a known task's outputs when it is validated outside a fit."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._show_known(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows a known task's outputs when it is tested."""
        self._show_known(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on only what the task may move moves, and only its outputs are shown."""
        super().on_fit_start(trainer, pl_module)
        state = state_for(pl_module, task_of(trainer, type(self).__name__))
        state.set_mask_outputs(self.mask_outputs)
        self._hold = hold = Hold(
            pl_module,
            state.structure,
            state.ledger,
            subspace=self.subspace,
            example=state.example,
            forward=partial(_run_whole, state, state.forward),
        ).keep()
        state.last = None
        self._show(pl_module, state, trainer)
        later = len(state.ledger.tasks) > 1
        self._unmet = {
            name: parameter
            for name, parameter in pl_module.named_parameters()
            if later and parameter.requires_grad and name not in state.structure.entries
        }
        self._renew(trainer, state, hold)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Takes up masks, or optimisers, that changed within the fit."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        state, hold = state_of(pl_module), self._holding(pl_module)
        if state is None or hold is None:
            return
        if any(a is not b for a, b in zip_longest(hold.freezer.optimizers, trainer.optimizers)):
            self._renew(trainer, state, hold)
        if not hold.current:
            self._renew(trainer, state, hold)
            hold.freezer.zero_optimizer_state()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Perturbed units stay perturbed over a step, for a batch that takes several."""
        state, hold = state_of(pl_module), self._holding(pl_module)
        if hold is not None and state is not None and state.disturbance is not None:
            hold.freezer.save_meanwhile(state.disturbance)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Several processes reduce their gradients after the hooks ran: zeroes the frozen entries again."""
        super().on_after_backward(trainer, pl_module)
        state = state_of(pl_module)
        if self._unmet and state is not None:
            self._tell_what_stays(state)
        hold = self._holding(pl_module)
        if trainer.world_size > 1 and hold is not None:
            hold.freezer.zero_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Under manual optimisation weights may move without an optimiser's step: puts frozen entries back."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        hold = self._holding(pl_module)
        if hold is not None and not pl_module.automatic_optimization:
            hold.restore()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks whether earlier tasks give what they gave, while the network still is where it was trained."""
        super().on_train_end(trainer, pl_module)
        hold = self._holding(pl_module)
        if hold is not None and pl_module.device.type != "cpu":
            hold.look_back()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets go; what callbacks behind our back did to units of earlier tasks is undone, with a warning."""
        super().on_fit_end(trainer, pl_module)
        hold = self._holding(pl_module)
        if hold is not None:
            self._averages.close()
            hold.let_go()
            self._shown.close()
            hold.put_back()

    def end_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same once more, of what the module did at its own end of the fit; what the tasks gave is kept in mind."""
        super().end_fit(trainer, pl_module)
        hold, state = self._holding(pl_module), state_of(pl_module)
        if hold is not None and state is not None:
            hold.put_back()
            follow_buffers(pl_module, state)
            if isolated(state.ledger):
                run = partial(_run_whole, state, state.forward)
                state.last = Memory(pl_module, state.structure, state.ledger, state.example, run, claimed=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes every hook off the network, and shows all outputs again."""
        super().teardown(trainer, pl_module, stage)
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets go; teardown does not run after an exception, which may have come in the middle of a step."""
        super().on_exception(trainer, pl_module, exception)
        hold = self._holding(pl_module)
        if hold is not None:
            hold.give_up()
        self._release()

    def settings(self) -> dict[str, Any]:
        """Its options as plain values, to tell runs apart."""
        return {name: describe(getattr(self, name)) for name in ("subspace", "mask_outputs")}

    def _tell_what_stays(self, state: ContinualState) -> None:
        """Warns of parameters that the task's training reaches but cannot move, since nothing that is scored runs them.

        Those that it does not reach, such as heads of tasks to come, are none of its business.
        """
        unmet, self._unmet = self._unmet, {}
        trained = [name for name, parameter in unmet.items() if parameter.grad is not None]
        if trained:
            names = ", ".join(map(repr, trained[:5])) + (" and others" if len(trained) > 5 else "")
            state.tell(
                f"{names} stay as the first task left them: training reaches them, but neither forward nor evaluate= of"
                " a task so far runs them. Let evaluate= of this task run what it trains."
            )

    def _show_known(self, trainer: Trainer, module: LightningModule) -> None:
        """As :meth:`_show`, of a task that the ledger knows, be it from a checkpoint; nothing of another one."""
        ledger, task = ledger_of(module), getattr(trainer, "datamodule", None)
        if ledger is None or not isinstance(task, Task) or task.name not in ledger.reserved:
            return
        try:
            with torch.inference_mode(False):
                state = state_for(module, task)
        except ContinualError as error:
            warn(f"All outputs are shown, not those of task '{task.name}' alone: {error}", ContinualWarning)
        else:
            self._show(module, state, trainer)

    def _show(self, module: LightningModule, state: ContinualState, trainer: Trainer) -> None:
        self._shown.enter_context(state.showing(module, [task_of(trainer, type(self).__name__)]))

    def _holding(self, module: LightningModule) -> Hold | None:
        """What holds entries, with the ledger that the module has now: another process' may have taken its place."""
        state = state_of(module)
        if self._hold is not None and state is not None:
            self._hold.structure, self._hold.ledger = state.structure, state.ledger
        return self._hold

    def _renew(self, trainer: Trainer, state: ContinualState, hold: Hold) -> None:
        """Holds what may not move now; averages of weights too."""
        self._averages.close()
        disturbed = state.disturbance
        hold.renew(trainer.optimizers, undisturbed=None if disturbed is None else disturbed.paused())
        ledger, revision = state.ledger, state.ledger.revision
        self._averages.enter_context(exact_averages(trainer, hold.frozen, lambda: ledger.revision == revision))

    def _release(self) -> None:
        self._averages.close()
        if self._hold is not None:
            self._hold.let_go()
        self._hold = None
        self._shown.close()


def _run_whole(state: ContinualState, forward: Forward, module: nn.Module, example: Any) -> Any:
    """Runs the module with the outputs of all tasks in sight, whatever of them and of the Trainer it sees meanwhile."""
    counters = counters_at_zero(module) if isinstance(module, LightningModule) else nullcontext()
    with counters, nullcontext() if state.shown is None else state.shown.lifted():
        return forward(module, example)
