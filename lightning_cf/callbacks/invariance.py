"""The redundant units are perturbed while the claimed ones train on (US 12387107, paragraphs 19 to 22 and 31)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_cf.callbacks.session import ContinualCallback
from lightning_cf.errors import ContinualError, check_count
from lightning_cf.invariance.disturbance import Disturbance
from lightning_cf.invariance.perturbations import Perturbation, Resample, check_perturbation
from lightning_cf.learner.keeping import state_of
from lightning_cf.learner.state import ContinualState
from lightning_cf.lightning_api import LightningModule, Trainer
from lightning_cf.network.forward import named_tensors
from lightning_cf.ownership.levels import FREE
from lightning_cf.subspaces.bases import bases_of, current_groups
from lightning_cf.subspaces.learned_directions import DirectionLearner
from lightning_cf.subspaces.subspace import LearnedSubspace, Subspace, check_subspace
from lightning_cf.utilities.describing import describe, without_address
from lightning_cf.utilities.randomness import isolated_generators, keyed_generator


class InvarianceCallback(ContinualCallback):
    """Perturbs the redundant units in the training steps of INVARIANCE, so that the task stops depending on them.

    The perturbation is there for the length of a training step: validation and checkpoints see the undisturbed
    network, which also stands at the end of the phase. Under ``isolation="exact"`` it cannot reach the claimed
    outputs and is skipped; INVARIANCE is then fine-tuning of the claimed units on their own.

    Args:
        perturbation: how; default :class:`lightning_cf.Resample`, which kept most in benchmarks.
        subspace: what holds the perturbation (paragraph 21); give :class:`MaskedGradientCallback` the same one.
        every_n_steps: a new perturbation every so many optimiser steps, held in between. Default: each step.
        every_n_batches: or every so many batches, which differ from steps where gradients accumulate.
        every_n_epochs: or every so many epochs.
        seed: the perturbation depends on (seed, task, phase, count of steps, batches or epochs) and nothing else.
    """

    def __init__(
        self,
        *,
        perturbation: Perturbation | None = None,
        subspace: Subspace | None = None,
        every_n_steps: int | None = None,
        every_n_batches: int | None = None,
        every_n_epochs: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.perturbation = Resample() if perturbation is None else perturbation
        check_perturbation("invariance", self.perturbation)
        check_subspace("invariance", subspace)
        self.subspace = subspace
        given = {"steps": every_n_steps, "batches": every_n_batches, "epochs": every_n_epochs}
        given = {unit: count for unit, count in given.items() if count is not None} or {"steps": 1}
        if len(given) > 1:
            raise ContinualError(
                f"invariance: {' and '.join(f'every_n_{unit}={n}' for unit, n in given.items())} contradict each other;"
                " give one of them."
            )
        self.unit, self.every_n = next(iter(given.items()))
        check_count("invariance", f"every_n_{self.unit}", self.every_n)  # type: ignore[arg-type]
        self.seed = check_count("invariance", "seed", seed, least=0)
        self._learner: DirectionLearner | None = None
        self._bases: Mapping[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the task; where the sub-space is learned, begins to watch the gradients."""
        super().on_fit_start(trainer, pl_module)
        state = state_of(pl_module)
        assert state is not None
        self._bases = bases_of(state.structure, state.ledger, self.subspace, named_tensors(pl_module))
        if not state.ledger.exact and len(state.ledger.tasks) == 1:
            self._try(pl_module, state)
        if isinstance(self.subspace, LearnedSubspace):
            self._learner = DirectionLearner(self.subspace, self._redundant(state))
            self._learner.attach(pl_module, current_groups(state.structure, state.ledger))
            self._revision = state.ledger.revision

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Perturbs the redundant units for this batch, in INVARIANCE under ``perturb``."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        state = state_of(pl_module)
        if state is None or state.ledger.phase != "invariance":
            return
        if self._learner is not None and self._revision != state.ledger.revision:
            self._learner.units, self._revision = self._redundant(state), state.ledger.revision
            self._learner.best = math.inf  # a partition makes the loss jump
            self._learn(trainer, pl_module, self._learner)
        if not state.ledger.exact:
            generator = keyed_generator(self.seed, state.ledger.tasks[-1].name, "invariance", self._draw(trainer))
            state.undisturb()
            state.disturbance = Disturbance(
                pl_module, state.structure, state.ledger, self.perturbation, generator, self._bases
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Puts the undisturbed values back."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        state = state_of(pl_module)
        if state is None:
            return
        state.undisturb()
        if self._learner is not None:
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            self._learner.end_step(loss if isinstance(loss, Tensor) else None)
            if self._learner.step % self._learner.subspace.steps == 0:
                fell = self._learner.loss_fell()
                # A partition at this step's end is taken up when the next step starts, in whatever order callbacks run.
                if state.ledger.phase == "invariance" and self._revision == state.ledger.revision:
                    self._learn(trainer, pl_module, self._learner, fell)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the undisturbed values back where a batch was left early."""
        super().on_train_epoch_end(trainer, pl_module)
        self._undisturb(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the undisturbed values back where a batch was left early."""
        self._undisturb(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps what LEARN found for the INVARIANCE of a later fit."""
        super().on_train_end(trainer, pl_module)
        state = state_of(pl_module)
        if state is None or self._learner is None or state.ledger.current is None:
            return
        if state.ledger.current.phase == "learn" or self._revision != state.ledger.revision:
            self._learn(trainer, pl_module, self._learner)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts the undisturbed values back and takes the hooks off the gradients."""
        super().teardown(trainer, pl_module, stage)
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Puts the undisturbed values back and lets go; teardown does not run after an exception."""
        super().on_exception(trainer, pl_module, exception)
        self._release(pl_module)

    def settings(self) -> dict[str, Any]:
        """Its options as plain values, to tell runs apart."""
        return {name: describe(getattr(self, name)) for name in ("perturbation", "subspace", "unit", "every_n")}

    def _try(self, module: LightningModule, state: ContinualState) -> None:
        """Perturbs once and puts back: what cannot work on these layers is found before the first step."""
        generator = keyed_generator(self.seed, "trial")
        try:
            with isolated_generators():
                Disturbance(module, state.structure, state.ledger, self.perturbation, generator, self._bases).undo()
        except ContinualError:
            raise
        except Exception as error:  # whatever a perturbation of the user's own raises
            raise ContinualError(
                f"invariance: the perturbation {without_address(self.perturbation)} fails on this network: {error}"
            ) from error

    def _draw(self, trainer: Trainer) -> int:
        """Which draw is due, counted from the fit's start."""
        counts = {
            "steps": trainer.global_step,
            "batches": trainer.fit_loop.total_batch_idx,
            "epochs": trainer.current_epoch,
        }
        return counts[self.unit] // self.every_n  # type: ignore[operator]

    def _learn(self, trainer: Trainer, module: LightningModule, learner: DirectionLearner, fell: bool = True) -> None:
        """Takes up the directions of recent gradients, on every process those of the first."""
        state = state_of(module)
        assert state is not None
        directions = (
            learner.directions(current_groups(state.structure, state.ledger)) if fell and trainer.is_global_zero else {}
        )
        if trainer.world_size > 1:
            directions = trainer.strategy.broadcast(directions)
        if directions:
            state.ledger.directions.update(directions)
            self._bases = bases_of(state.structure, state.ledger, self.subspace, named_tensors(module))

    def _redundant(self, state: ContinualState) -> dict[str, Tensor]:
        return {name: (owner == FREE).nonzero().flatten() for name, owner in state.ledger.owners.items()}

    def _undisturb(self, module: LightningModule) -> None:
        state = state_of(module)
        if state is not None:
            state.undisturb()

    def _release(self, module: LightningModule) -> None:
        self._undisturb(module)
        if self._learner is not None:
            self._learner.detach()
            self._learner = None
