"""The redundant units are perturbed while the claimed ones train on (US 12387107, paragraphs 19 to 22 and 31)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_cf.callbacks.session import ContinualCallback
from lightning_cf.errors import check_count
from lightning_cf.ledger import FREE
from lightning_cf.perturbation import Ablate, Perturbation
from lightning_cf.randomness import keyed_generator
from lightning_cf.state import ContinualState, state_of
from lightning_cf.structure import named_tensors


class InvarianceCallback(ContinualCallback):
    """Perturbs the redundant units in each training step of INVARIANCE, so that the task stops depending on them.

    The perturbation is there for the length of a training step: validation and checkpoints see the undisturbed
    network, which also stands at the end of the phase. Under ``isolation="exact"`` it cannot reach the claimed
    outputs and is skipped; INVARIANCE is then fine-tuning of the claimed units on their own.

    Args:
        perturbation: how; default :class:`~lightning_cf.perturbation.Ablate`, which kept most in benchmarks.
        every_n_steps: a new perturbation every so many optimiser steps, held in between.
        seed: the perturbation depends on (seed, task, step) and nothing else.
    """

    def __init__(self, *, perturbation: Perturbation | None = None, every_n_steps: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.perturbation = Ablate() if perturbation is None else perturbation
        self.every_n_steps = check_count("invariance", "every_n_steps", every_n_steps)
        self.seed = seed
        self._base: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Perturbs."""
        state = state_of(pl_module)
        task = None if state is None else state.ledger.current
        if (
            state is not None
            and task is not None
            and task.phase == "invariance"
            and state.ledger.isolation == "perturb"
        ):
            draw = trainer.global_step // self.every_n_steps
            self._perturb(pl_module, state, keyed_generator(self.seed, task.name, "invariance", draw))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Puts the undisturbed values back."""
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Puts the undisturbed values back."""
        self._restore(pl_module)

    @torch.no_grad()
    def _perturb(self, module: LightningModule, state: ContinualState, generator: torch.Generator) -> None:
        tensors = named_tensors(module)
        for group in state.structure.groups:
            redundant = (state.ledger.owners[group.name] == FREE).nonzero().flatten()
            if len(redundant) == 0:
                continue
            for rows in group.rows:
                self._base.setdefault(rows.tensor, tensors[rows.tensor].detach().clone())
            vectors = group.weights(tensors)
            there = redundant.to(vectors.device)
            vectors[there] = self.perturbation(vectors[there], generator)
            group.write_weights(tensors, vectors, redundant)
            if isinstance(self.perturbation, Ablate):
                for rows in group.rows:
                    if rows.role != "weight":
                        rows.write(tensors[rows.tensor], torch.zeros_like(rows.read(tensors[rows.tensor])), redundant)

    @torch.no_grad()
    def _restore(self, module: LightningModule) -> None:
        state = state_of(module)
        if not self._base or state is None:
            return
        tensors = named_tensors(module)
        for group in state.structure.groups:
            redundant = (state.ledger.owners[group.name] == FREE).nonzero().flatten()
            for rows in group.rows:
                if rows.tensor in self._base:
                    rows.write(tensors[rows.tensor], rows.read(self._base[rows.tensor]), redundant)
        self._base = {}
