"""Trains, with a task's sub-network, what later says whether an input belongs to that task."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from lightning_cf.callbacks.divergence import watch_of
from lightning_cf.callbacks.heads import Heads
from lightning_cf.callbacks.session import ContinualCallback, isolate, task_of
from lightning_cf.errors import (
    ContinualError,
    ContinualWarning,
    check_choice,
    check_count,
    check_flag,
    check_number,
    warn,
)
from lightning_cf.learner.choosing import choose_strategies, prepare
from lightning_cf.learner.inferring import finite_samples, inference_of, keep_inference, look, unseen
from lightning_cf.learner.keeping import state_of
from lightning_cf.learner.state import ContinualState
from lightning_cf.lightning_api import LightningModule, Trainer
from lightning_cf.task_inference import STRATEGIES, Strategy, TaskInference, register
from lightning_cf.task_inference.inference import BUDGET
from lightning_cf.task_inference.strategies import CHOICES, KEPT, Keep
from lightning_cf.task_inference.trained import trained_heads
from lightning_cf.tasks.contexts import seeded
from lightning_cf.tasks.task import Task
from lightning_cf.tasks.training_batches import training_batches
from lightning_cf.utilities.describing import describe


class TaskInferenceCallback(ContinualCallback):
    """Keeps of each task what its inputs look like to its sub-network, so that predictions need no task's name.

    Most strategies take statistics when a task is sealed. Others have a head (``task_inference.trained``) that trains
    with the task's units: its loss is added to whatever loss the module has, at the network's outputs, so that any
    loop works; it has an optimiser of its own. What is kept goes into checkpoints with the ledger.

    Args:
        strategy: the name of one of ``lightning_cf.task_inference.STRATEGIES``, or one of your own, or a list of such,
            of which the first one predicts and each is scored; ``"auto"`` takes the best that the network allows,
            ``"statistics"`` the best of those that leave training as it is, ``"all"`` fits every one, ``"unchanged"``
            every one but those that train over changed inputs, beside which all others change too.
        keep: what such words may choose from: ``"beside"`` for everything, also what looks at the input beside the
            network; ``"within"`` for what looks at the network's own units and outputs alone.
        budget: how many numbers a strategy that keeps state over tasks may keep of all of them together.
        apart: whether such a strategy also keeps what each task added, so that
            :meth:`~lightning_cf.ContinualModule.forget` needs no data; with each task about as many numbers more.
        weight: of the heads' loss beside the module's own.
        lr: the heads' learning rate in INVARIANCE, which falls along a cosine; a quarter of it while the task learns.
        seed: the heads' first values depend on (seed, task) and nothing else.
    """

    def __init__(
        self,
        strategy: str | Strategy | Sequence[str | Strategy] = "auto",
        *,
        keep: Keep = "beside",
        budget: int = BUDGET,
        apart: bool = False,
        weight: float = 3.0,
        lr: float = 0.008,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("task_inference", "keep", keep, KEPT)
        self.keep: Keep = keep
        self.budget = check_count("task_inference", "budget", budget)
        self.apart = check_flag("task_inference", "apart", apart)
        self.strategy, self.weight, self.lr, self.seed = _named(strategy), weight, lr, seed
        for name, value in (("weight", weight), ("lr", lr)):
            check_number("task_inference", name, value, above=0.0)
        check_count("task_inference", "seed", seed, least=0)
        self._heads: Heads | None = None

    def check(self, module: LightningModule, state: ContinualState, task: Task) -> None:
        """Raises ContinualError if the network or its first task does not allow the strategy; nothing is begun."""
        if state.ledger.inference is None and not state.ledger.tasks:
            ledger = copy.deepcopy(state.ledger)
            ledger.begin(task.name, task.classes or [], state.structure)
            choose_strategies(module, replace(state, ledger=ledger), task, self.strategy, self.keep, self._options())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the task; chooses strategies at the first one."""
        super().on_fit_start(trainer, pl_module)
        state, task = state_of(pl_module), task_of(trainer, type(self).__name__)
        assert state is not None
        isolate(trainer, pl_module, state)
        prepare(pl_module, state, task, self.strategy, keep=self.keep, options=self._options())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Makes the heads, anew after a partition, and tells them the batch's labels."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        state = state_of(pl_module)
        if state is None or state.ledger.current is None:
            return
        if self._heads is None or self._heads.revision != state.ledger.revision:
            self._begin(trainer, pl_module, state)
        if self._heads is not None:
            self._weigh(trainer, pl_module, 1.0)  # stays so where a loop of the user's own calls loss.backward()
            where = (state.ledger.current.phase, trainer.fit_loop.total_batch_idx, trainer.global_rank)
            self._heads.begin_batch(batch, (self.seed, state.ledger.current.name, "task inference", *where))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Scales the heads' loss as the module's own is scaled."""
        super().on_before_backward(trainer, pl_module, loss)
        if self._heads is not None:
            watch = watch_of(trainer)
            if watch is not None:
                watch.see(self._heads.loss)
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._weigh(trainer, pl_module, 1.0 if scaler is None else float(scaler.get_scale()))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The heads take a step where the module took one."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._heads is not None:
            self._heads.end_batch()
            if trainer.global_step > self._heads.stepped:
                self._heads.stepped = trainer.global_step
                self._heads.step(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the heads into the ledger first."""
        self._keep(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the heads into the ledger, where the seal finds them."""
        super().on_train_end(trainer, pl_module)
        self._keep(pl_module)
        idle = [] if self._heads is None else self._heads.idle()
        if idle:
            warn(
                f"task_inference: the head of {' and '.join(idle)} was never trained: no batch of (input, label) pairs"
                " met a forward pass over as many samples. Use a strategy that is not trained, such as subspaces.",
                ContinualWarning,
            )
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the heads and every hook off the network."""
        super().teardown(trainer, pl_module, stage)
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets go; teardown does not run after an exception."""
        super().on_exception(trainer, pl_module, exception)
        self._release()

    def _options(self) -> TaskInference:
        return TaskInference((), budget=self.budget, seed=self.seed, apart=self.apart)

    def settings(self) -> dict[str, Any]:
        """Its options as plain values, to tell runs apart."""
        names = [self.strategy] if isinstance(self.strategy, str) else list(self.strategy)
        made_from = [describe(STRATEGIES[name]) for name in names if name in STRATEGIES]
        return {
            **{name: getattr(self, name) for name in ("keep", "budget", "apart", "weight", "lr")},
            "strategy": names if len(names) > 1 else names[0],
            **({"made_from": made_from if len(made_from) > 1 else made_from[0]} if made_from else {}),
        }

    def _weigh(self, trainer: Trainer, module: LightningModule, scale: float) -> None:
        """Weighs the heads' loss as the module's own is: by its share of an optimiser's step, times a loss scale."""
        assert self._heads is not None
        share = 1 / trainer.accumulate_grad_batches if module.automatic_optimization else 1.0
        self._heads.weigh(self.weight * scale * share, scale)

    def _begin(self, trainer: Trainer, module: LightningModule, state: ContinualState) -> None:
        self._keep(module)
        self._release()
        inference = inference_of(state.ledger)
        task = task_of(trainer, type(self).__name__)
        if inference is None or task.classes is None or task.name in inference.left_out or not self._leads(trainer):
            return
        if unseen(state, task) is not None:
            return
        strategies = trained_heads(STRATEGIES[name] for name in inference.strategies)
        if not strategies:
            return
        with seeded(self.seed, task.name, "task inference"):
            sites, found = look(module, task, state, training_batches(module, task), 2000)
        if sites is None or found is None:
            return
        view, labels = finite_samples(found, task, quiet=True)
        if not inference.unit:
            inference.measure(view)
            if trainer.world_size > 1:
                inference.unit = trainer.strategy.broadcast(inference.unit)
        if inference.training_task not in ("", task.name):
            inference.forget_training()  # another task's, which was over without a seal of its own
        values = {}
        for strategy in strategies:
            trained, before = inference.training.get(strategy.head), inference.training_sites
            if trained is None or before is None:
                trained = inference.begin(strategy, task.name, view, labels, len(task.classes), self.seed)
            else:
                trained = strategy.narrowed(trained, before, sites)
            if trainer.world_size > 1:
                trained = trainer.strategy.broadcast({name: value.cpu() for name, value in trained.items()})
            values[strategy.head] = trained
        steps = int(min(trainer.estimated_stepping_batches, 10**9)) - trainer.global_step
        learns = state.ledger.phase == "learn"
        lr = self.lr / 4 if learns else self.lr  # where all free units train, the higher rate now and then kills them
        self._heads = Heads(module, task, sites, strategies, values, lr, max(1, steps))
        self._heads.revision, self._heads.stepped = state.ledger.revision, trainer.global_step
        state.collect = partial(self._keep, module)
        keep_inference(state.ledger, inference)

    def _leads(self, trainer: Trainer) -> bool:
        """Whether it is the first of its kind in the fit: two would train two heads for one task."""
        ours = (callback for callback in trainer.callbacks if isinstance(callback, TaskInferenceCallback))  # type: ignore[attr-defined]
        return next(ours, self) is self

    def _keep(self, module: LightningModule) -> None:
        state = state_of(module)
        if self._heads is not None and state is not None and state.ledger.current is not None:
            inference = inference_of(state.ledger)
            if inference is not None:
                inference.training = self._heads.values()
                inference.training_sites, inference.training_task = self._heads.sites, self._heads.task.name
                keep_inference(state.ledger, inference)

    def _release(self) -> None:
        if self._heads is not None:
            self._heads.hooks.close()
            state = state_of(self._heads.module)
            if state is not None:
                state.collect = None
            self._heads = None


def _named(strategy: object) -> str | tuple[str, ...]:
    """The name of a strategy or the names of several; those of one's own are registered."""
    if isinstance(strategy, str) or not isinstance(strategy, Sequence):
        name = register(strategy).name if isinstance(strategy, Strategy) else strategy
        return check_choice("task_inference", "strategy", name, (*CHOICES, *STRATEGIES))
    found = [register(each).name if isinstance(each, Strategy) else each for each in strategy]
    names = tuple(check_choice("task_inference", "each strategy", each, tuple(STRATEGIES)) for each in found)
    if not names or len(set(names)) < len(names):
        raise ContinualError(f"task_inference: strategy must be one or several, each once; got {list(names)}.")
    return names if len(names) > 1 else names[0]
