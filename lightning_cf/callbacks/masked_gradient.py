"""Only units that may move do: free ones in LEARN, claimed ones in INVARIANCE (US 12387107, paragraphs 19 and 23)."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cf.callbacks.averaging import exact_averages
from lightning_cf.callbacks.session import ContinualCallback, task_of
from lightning_cf.errors import ContinualError, ContinualWarning, FrozenWarning, check_flag, warn
from lightning_cf.learner.state import ContinualState, ledger_of, state_for, state_of
from lightning_cf.lightning_api import LightningModule, Trainer, TrainerFn
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.structure import UnitGroup
from lightning_cf.ownership.freezing import Freezer
from lightning_cf.ownership.frozen_entries import FrozenEntries
from lightning_cf.ownership.levels import FREE
from lightning_cf.subspaces.projection import Projection
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
        self._freezer: Freezer | None = None
        self._projection: Projection | None = None
        self._revision = -1
        self._unmet: dict[str, nn.Parameter] = {}
        self._sealed: dict[str, FrozenEntries] = {}
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
        """Starts holding."""
        super().on_fit_start(trainer, pl_module)
        state = state_for(pl_module, task_of(trainer, type(self).__name__))
        state.set_mask_outputs(self.mask_outputs)
        self._show(pl_module, state, trainer)
        later = len(state.ledger.tasks) > 1
        self._unmet = {
            name: parameter
            for name, parameter in pl_module.named_parameters()
            if later and parameter.requires_grad and name not in state.structure.entries
        }
        tensors = {n: t for n, t in named_tensors(pl_module).items() if t.is_floating_point()}
        sealed = state.ledger.sealed(state.structure, tensors)
        self._sealed = {n: FrozenEntries(tensors[n], mask) for n, mask in sealed.items() if bool(mask.any())}
        for entries in self._sealed.values():
            entries.save()
        self._hold(trainer, pl_module, state)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Takes up masks, or optimisers, that changed within the fit."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        state = state_of(pl_module)
        if state is None or self._freezer is None:
            return
        if any(a is not b for a, b in zip_longest(self._freezer.optimizers, trainer.optimizers)):
            self._hold(trainer, pl_module, state)
        if state.ledger.revision != self._revision:
            self._hold(trainer, pl_module, state)
            assert self._freezer is not None
            self._freezer.zero_optimizer_state()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Perturbed units stay perturbed over a step, for a batch that takes several."""
        state = state_of(pl_module)
        if self._freezer is not None and state is not None and state.disturbance is not None:
            self._freezer.save_meanwhile(state.disturbance)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Several processes reduce their gradients after the hooks ran: zeroes the frozen entries again."""
        super().on_after_backward(trainer, pl_module)
        state = state_of(pl_module)
        if self._unmet and state is not None:
            self._tell_what_stays(state)
        if trainer.world_size > 1 and self._freezer is not None:
            self._freezer.zero_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Under manual optimisation weights may move without an optimiser's step: puts frozen entries back."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        state = state_of(pl_module)
        if pl_module.automatic_optimization or self._freezer is None or state is None:
            return
        if state.ledger.isolation == "exact" and state.ledger.revision == self._revision:
            self._freezer.restore()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets go; what callbacks behind our back did to units of earlier tasks is undone, with a warning."""
        super().on_fit_end(trainer, pl_module)
        self._release()
        state = state_of(pl_module)
        if state is not None:
            self._put_back(pl_module, state)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go."""
        super().teardown(trainer, pl_module, stage)
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets go; teardown does not run after an exception, which may have come in the middle of a step."""
        super().on_exception(trainer, pl_module, exception)
        state = state_of(pl_module)
        current = state is not None and state.ledger.revision == self._revision
        if self._freezer is not None and state is not None and current and state.ledger.isolation == "exact":
            self._freezer.restore()
        for entries in self._sealed.values():
            entries.restore()
        self._release()
        self._sealed = {}

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

    def _hold(self, trainer: Trainer, module: LightningModule, state: ContinualState) -> None:
        self._let_go()
        tensors = named_tensors(module)
        # Before the freezer, whose hook then runs later and has the last word.
        self._projection = Projection(tensors, self._held(state, tensors)).attach(trainer.optimizers)
        read = {n: t for n, t in tensors.items() if isinstance(t, nn.Parameter) or n in state.structure.entries}
        frozen = state.ledger.frozen(state.structure, read)
        with nullcontext() if state.disturbance is None else state.disturbance.paused():
            self._freezer = Freezer(module, frozen).attach(trainer.optimizers)
        self._revision = revision = state.ledger.revision
        self._averages.enter_context(exact_averages(trainer, frozen, lambda: state.ledger.revision == revision))
        torch.compiler.reset()  # code that was compiled before does not see new hooks

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
            for group in state.groups
            if group.name in bases
        ]

    def _put_back(self, module: LightningModule, state: ContinualState) -> None:
        """Checks at a fit's end that units of earlier tasks are what they were, and what was cut is zero."""
        moved = [name for name, entries in self._sealed.items() if entries.moved()]
        for name in moved:
            self._sealed[name].restore()
        self._sealed = {}
        known = {record["task"] for record in state.ledger.records}
        partitioned = all(task.name in known for task in state.ledger.tasks if task.phase != "learn")
        if state.ledger.isolation == "exact" and partitioned:
            parameters = dict(module.named_parameters())
            sealed = state.ledger.sealed(state.structure, parameters)
            for name, parameter in parameters.items():
                cut = state.ledger.cut(state.structure, state.structure.entries.get(name, ()))
                if state.structure.ways > 1 and name in sealed:
                    cut = cut & ~sealed[name]  # in no way through the network is anything cut that another one reads
                if bool(cut.any()):
                    cut = cut.to(parameter.device)
                    if bool(torch.where(cut, parameter.detach(), 0).any()):
                        parameter.detach().masked_fill_(cut, 0)
                        moved.append(name)
        for name, by in state.structure.written.items():
            if name in moved:
                moved.remove(name)
                warn(
                    f"{by} writes '{name}' in the forward pass, which belongs to earlier tasks: it was put back.",
                    FrozenWarning,
                )
        if moved:
            warn(
                f"Something else than an optimiser's step changed entries of {', '.join(map(repr, moved))} that belong"
                " to earlier tasks, or are zero for good: they were put back. Look for a callback or hook that writes"
                " weights at the end of a fit (Lightning's WeightAveraging and its kin are known and taken care of).",
                FrozenWarning,
            )

    def _let_go(self) -> None:
        self._averages.close()
        for holder in (self._projection, self._freezer):
            if holder is not None:
                holder.detach()
        self._projection = self._freezer = None

    def _release(self) -> None:
        if self._freezer is not None:
            torch.compiler.reset()
        self._let_go()
        self._shown.close()
