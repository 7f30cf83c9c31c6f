"""Trains, with a task's sub-network, what later says whether an input belongs to that task."""

from __future__ import annotations

import math
import warnings
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_cf.callbacks.session import ContinualCallback, task_of
from lightning_cf.contexts import seeded
from lightning_cf.errors import ContinualError, check_choice
from lightning_cf.inferring import (
    CHOICES,
    choose_strategies,
    inference_of,
    keep_inference,
    positions_of,
    view_of,
)
from lightning_cf.randomness import keyed_generator
from lightning_cf.state import ContinualState, state_of
from lightning_cf.structure import layer_of
from lightning_cf.task_inference import STRATEGIES, Readout, Sites, TaskInference, View
from lightning_cf.task_inference.reconstruction import Reconstruction
from lightning_cf.tasks import Task


class TaskInferenceCallback(ContinualCallback):
    """Keeps of each task what its inputs look like to its sub-network, so that predictions need no task's name.

    Most strategies take statistics when a task is sealed. The reconstruction head is trained while the claimed units
    train on (INVARIANCE): its loss is added to whatever loss the module has, at the network's outputs, so that any
    loop works; it has an optimiser of its own. What is kept goes into checkpoints with the ledger.

    Args:
        strategy: the name of one of ``lightning_cf.task_inference.STRATEGIES``; ``"auto"`` takes the best that the
            network allows, ``"statistics"`` the best of those that leave training as it is, ``"all"`` fits every one.
        weight: of the head's loss beside the module's own.
        lr: the head's learning rate in INVARIANCE, which falls along a cosine; a quarter of it while the task learns.
        seed: the head's first values depend on (seed, task) and nothing else.
    """

    def __init__(self, strategy: str = "auto", *, weight: float = 3.0, lr: float = 0.008, seed: int = 0) -> None:
        super().__init__()
        self.strategy, self.weight, self.lr, self.seed = strategy, weight, lr, seed
        check_choice("task_inference", "strategy", strategy, (*CHOICES, *STRATEGIES))
        for name, value in (("weight", weight), ("lr", lr)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ContinualError(f"task_inference: {name} must be above 0, got {value!r}.")
        self._heads: _Heads | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the task; chooses strategies at the first one."""
        super().on_fit_start(trainer, pl_module)
        state, task = state_of(pl_module), task_of(trainer, type(self).__name__)
        assert state is not None
        prepare(pl_module, state, task, self.strategy)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Makes the heads, anew after a partition, and tells them the batch's labels."""
        state = state_of(pl_module)
        if state is None or state.ledger.current is None:
            return
        if self._heads is None or self._heads.revision != state.ledger.revision:
            self._begin(trainer, pl_module, state)
        if self._heads is not None:
            self._heads.labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Scales the heads' loss as the module's own is scaled."""
        if self._heads is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._heads.unscale = 1.0 if scaler is None else float(scaler.get_scale())
            share = 1 / trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1.0
            self._heads.scale = self.weight * self._heads.unscale * share

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The heads take a step where the module took one."""
        if self._heads is not None:
            self._heads.labels = None
            if trainer.global_step > self._heads.stepped:
                self._heads.stepped = trainer.global_step
                self._heads.step(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the heads into the ledger first."""
        self._keep(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the heads into the ledger, where the seal finds them."""
        self._keep(pl_module)
        if self._heads is not None and not self._heads.attached:
            warnings.warn(
                "task_inference: the head was never trained: no batch of (input, label) pairs met a forward pass over"
                " as many samples. Use a strategy that is not trained, such as subspaces.",
                stacklevel=2,
            )
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets go; teardown does not run after an exception."""
        self._release()

    def settings(self) -> dict[str, Any]:
        """Its options as plain values, to tell runs apart."""
        return {name: getattr(self, name) for name in ("strategy", "weight", "lr")}

    def _begin(self, trainer: Trainer, module: LightningModule, state: ContinualState) -> None:
        self._keep(module)
        self._release()
        inference = inference_of(state.ledger)
        task = task_of(trainer, type(self).__name__)
        if inference is None or task.classes is None:
            return
        names = [name for name in inference.strategies if isinstance(STRATEGIES[name], Reconstruction)]
        if not names:
            return
        sites = Sites.of(module, state.structure, state.ledger, task.name)
        with seeded(self.seed, task.name, "task inference"):
            found = view_of(module, task, sites, task.train_dataloader(), 2000)
        if found is None:
            return
        view, labels = found
        assert view.inputs is not None
        if not inference.unit:
            inference.unit = float(view.inputs.var(dim=0).mean().clamp_min(1e-12))
            if trainer.world_size > 1:
                inference.unit = trainer.strategy.broadcast(inference.unit)
        generator = keyed_generator(self.seed, task.name, "task inference")
        strategy = STRATEGIES[names[0]]
        assert isinstance(strategy, Reconstruction)
        trained, before = inference.training.get(names[0]), inference.training_sites
        if trained is None or before is None:
            trained = strategy.begin(view, labels, len(task.classes), inference.unit, generator)
        else:
            trained = strategy.narrowed(trained, before, sites)
        if trainer.world_size > 1:
            trained = trainer.strategy.broadcast({name: value.cpu() for name, value in trained.items()})
        steps = int(min(trainer.estimated_stepping_batches, 10**9)) - trainer.global_step
        learns = state.ledger.current is not None and state.ledger.current.phase == "learn"
        lr = self.lr / 4 if learns else self.lr  # where all free units train, the higher rate now and then kills them
        self._heads = _Heads(module, sites, strategy, trained, list(task.classes), lr, max(1, steps))
        self._heads.names, self._heads.revision = names, state.ledger.revision
        self._heads.stepped = trainer.global_step
        state.collect = partial(self._keep, module)
        keep_inference(state.ledger, inference)

    def _keep(self, module: LightningModule) -> None:
        state = state_of(module)
        if self._heads is not None and state is not None and state.ledger.current is not None:
            inference = inference_of(state.ledger)
            if inference is not None:
                inference.training = {name: self._heads.values() for name in self._heads.names}
                inference.training_sites = self._heads.sites
                keep_inference(state.ledger, inference)

    def _release(self) -> None:
        if self._heads is not None:
            self._heads.hooks.close()
            state = state_of(self._heads.module)
            if state is not None:
                state.collect = None
            self._heads = None


def prepare(module: LightningModule, state: ContinualState, task: Task, wanted: str) -> None:
    """Chooses strategies where the ledger has none yet; needs a task that was begun."""
    if state.ledger.inference is None:
        names = choose_strategies(module, state, task, wanted)
        keep_inference(state.ledger, TaskInference(names))


class _Heads:
    """The reconstruction head of the current task, in training: added to the loss by the last layer's output."""

    def __init__(
        self,
        module: LightningModule,
        sites: Sites,
        strategy: Reconstruction,
        values: dict[str, Tensor],
        classes: list[int],
        lr: float,
        steps: int,
    ) -> None:
        self.module, self.sites, self.strategy, self.classes = module, sites, strategy, classes
        self.fixed = {"unit": values["unit"].to(module.device)}
        given = {name: value.detach().clone().to(module.device) for name, value in values.items() if name != "unit"}
        self.trained = {name: nn.Parameter(value) for name, value in given.items()}
        self.optimizer = torch.optim.Adam(self.trained.values(), lr=lr)
        warm = max(1, min(50, steps // 20))
        self.schedule = LambdaLR(
            self.optimizer, lambda i: min((i + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(i, steps) / steps)) + 1e-3)
        )
        self.names: list[str] = []
        self.revision, self.stepped = -1, 0
        self.labels: Any = None
        self.scale, self.unscale = 0.0, 1.0
        self.attached = False
        self.seen: dict[str, Tensor] = {}
        self.hooks = ExitStack()
        self.watched = {sites.inputs or "", *(site.weight for site in sites.hidden[: len(sites.chain)])}
        for name in self.watched:
            layer = module.get_submodule(layer_of(name))
            self.hooks.callback(layer.register_forward_pre_hook(partial(self._see, name)).remove)
        for path in sites.heads:
            self.hooks.callback(module.get_submodule(path).register_forward_hook(self._attach).remove)

    def values(self) -> dict[str, Tensor]:
        """What is trained and what goes with it."""
        return {**{name: p.detach().clone() for name, p in self.trained.items()}, **self.fixed}

    def step(self, trainer: Trainer) -> None:
        """A step of the head's own optimiser, on gradients averaged over processes."""
        for parameter in self.trained.values():
            if parameter.grad is not None:
                parameter.grad /= self.unscale
                if trainer.world_size > 1:
                    parameter.grad = trainer.strategy.reduce(parameter.grad, reduce_op="mean")
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        if gradients and all(bool(gradient.isfinite().all()) for gradient in gradients):
            self.optimizer.step()
            self.schedule.step()
        self.optimizer.zero_grad()

    def _see(self, name: str, layer: nn.Module, inputs: Any) -> None:
        if self.labels is not None and torch.is_grad_enabled():
            self.seen[name] = inputs[0] if isinstance(layer, nn.Linear) else inputs[0].movedim(1, -1)

    def _attach(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        seen, self.seen = self.seen, {}
        if not torch.is_grad_enabled() or not self.watched <= seen.keys():
            return None
        labels = positions_of(self.classes, self.labels, len(output))
        if labels is None:
            return None
        with torch.autocast(output.device.type, enabled=False):
            read = {n: x.float().reshape(len(output), -1, x.shape[-1]).mean(1) for n, x in seen.items()}
            readout = Readout(
                seen[self.sites.inputs or ""].float().reshape(len(output), -1),
                read,
                output.new_zeros(len(output), int(self.sites.outputs.max()) + 1, dtype=torch.float32),
                dict(self.module.named_parameters()),
            )
            partial_sites = Sites(
                self.sites.inputs,
                self.sites.hidden[: len(self.sites.chain)],
                self.sites.heads,
                self.sites.outputs,
                self.sites.chain,
            )
            loss = self.strategy.loss({**self.trained, **self.fixed}, View.of(readout, partial_sites), labels)
        self.attached = True
        attached: Tensor = _Attached.apply(output, loss, self)  # type: ignore[no-untyped-call]
        return attached


class _Attached(torch.autograd.Function):
    """Gives its input on, and a gradient of its own to a loss: so a loss joins another one in any loop."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, owner: _Heads) -> Tensor:
        """Its input."""
        ctx.owner, ctx.dtype = owner, loss.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient, and the scale of the loss that joined."""
        (gradient,) = gradients
        return gradient, torch.tensor(ctx.owner.scale, dtype=ctx.dtype, device=gradient.device), None
