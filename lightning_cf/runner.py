"""Trains one network on tasks one after another: learn, partition, retrain, seal, score."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_cf.callbacks import (
    InvarianceCallback,
    MaskedGradientCallback,
    PartitionCallback,
    TaskInferenceCallback,
)
from lightning_cf.callbacks.divergence import WatchingCallback
from lightning_cf.callbacks.session import check_strategy
from lightning_cf.class_incremental import score_strategies
from lightning_cf.contexts import on_device, seeded
from lightning_cf.errors import ContinualError, check_choice, check_count
from lightning_cf.evaluation import check_scoring, constant_predictor, evaluate
from lightning_cf.inferring import highest_output, inference_of
from lightning_cf.joint import JointTask
from lightning_cf.ledger import ISOLATIONS, Isolation
from lightning_cf.module import ContinualModule
from lightning_cf.preflight import check_tasks, check_widths, load_pretrained
from lightning_cf.progress import RunProgress, RunStore
from lightning_cf.recording import TaskFolders
from lightning_cf.result import Result
from lightning_cf.state import ContinualState, state_for
from lightning_cf.steps import decide_together, seal_task, synchronise
from lightning_cf.subspace import LearnedSubspace
from lightning_cf.task_inference import Strategy, TaskInference
from lightning_cf.tasks import Batches, Task, single

Method = Literal["partition", "finetune", "joint"]
METHODS = ("partition", "finetune", "joint")
SCORED = ("test", "validation")

MakeTrainer = Callable[..., Trainer]


class SequentialTaskRunner:
    """Runs a sequence of tasks through one network, one Trainer a phase; goes on where an earlier run stopped.

    Args:
        module: the network; wrapped in a ContinualModule if it is none.
        tasks: in the order in which they come.
        trainer: makes a Trainer from keywords, such as ``partial(Trainer, accelerator="auto")``.
        epochs: of LEARN, for each task.
        invariance_epochs: of INVARIANCE, for each task.
        partition: how to partition; None leaves partition and INVARIANCE out, so that nothing is protected.
        invariance: what to perturb meanwhile; None leaves INVARIANCE out.
        masking: what holds owned units still; None lets everything train.
        task_inference: how tasks are inferred where nobody names them: a :class:`TaskInferenceCallback` or what its
            ``strategy`` may be; None leaves it out. Fine-tuning and joint training take the highest of all outputs.
        callbacks: the user's own; every phase gets copies, ours come behind them.
        isolation: ``"exact"`` or ``"perturb"``, see :class:`PartitionCallback`.
        method: ``"partition"``; ``"finetune"`` trains the tasks in turn and protects nothing; ``"joint"`` trains them
            together. Both train as many epochs as the two phases have.
        pretrained: whether the module was trained on the first task before (paragraph 28), so that its LEARN is left
            out: True, or a checkpoint with its weights, of Lightning or of ``torch.save(module.state_dict(), path)``.
        score_on: ``"test"``: test data, or what judges partitions where a task has none; ``"validation"``: always the
            latter, to choose options by.
        seed: what everything random depends on.
        root: folder for checkpoints, records and logs. A run started again on it goes on after its last finished phase.
    """

    def __init__(
        self,
        module: LightningModule,
        tasks: Sequence[Task],
        *,
        trainer: MakeTrainer = Trainer,
        epochs: int = 6,
        invariance_epochs: int = 4,
        partition: PartitionCallback | None = PartitionCallback(),
        invariance: InvarianceCallback | None = InvarianceCallback(),
        masking: MaskedGradientCallback | None = MaskedGradientCallback(),
        task_inference: TaskInferenceCallback | Strategy | str | None = "auto",
        callbacks: Sequence[Callback] = (),
        isolation: Isolation = "exact",
        method: Method = "partition",
        pretrained: bool | str | Path = False,
        score_on: Literal["test", "validation"] = "test",
        seed: int = 0,
        root: str | Path,
    ) -> None:
        self.module = ContinualModule(module)
        self.tasks = list(tasks)
        self.make_trainer = trainer
        self.epochs = check_count("runner", "epochs", epochs)
        self.invariance_epochs = check_count("runner", "invariance_epochs", invariance_epochs, least=0)
        check_choice("runner", "isolation", isolation, ISOLATIONS)
        check_choice("runner", "method", method, METHODS)
        self.score_on = check_choice("runner", "score_on", score_on, SCORED)
        self.isolation: Isolation = isolation
        self.method: Method = method
        self.seed = check_count("runner", "seed", seed, least=0)
        self.partitioning = copy.deepcopy(partition)
        self.perturbing = copy.deepcopy(invariance)
        self.masking = copy.deepcopy(masking)
        given = TaskInferenceCallback(task_inference) if isinstance(task_inference, (str, Strategy)) else task_inference
        self.inferring = copy.deepcopy(given)
        if self.inferring is not None:
            self.inferring.seed = self.seed
        self.pretrained = pretrained
        self.callbacks = list(callbacks)
        self.store = RunStore(Path(root))
        if isinstance(getattr(masking, "subspace", None), LearnedSubspace) and not isinstance(
            getattr(invariance, "subspace", None), LearnedSubspace
        ):
            raise ContinualError(
                "runner: masking trains in a sub-space that is learned, but nothing learns it; give invariance the same"
                " subspace."
            )
        self.folders = TaskFolders(Path(root) / "tasks", partition is not None and partition.similarity_matrix)
        if self.perturbing is not None:
            self.perturbing.seed = self.seed
        if self.partitioning is not None:
            if self.partitioning.after != 1.0:
                raise ContinualError(
                    f"runner: the partition has after={self.partitioning.after}; epochs={self.epochs} and"
                    f" invariance_epochs={self.invariance_epochs} decide when a task is partitioned. Leave it out."
                )
            if pretrained is not False and self.partitioning.options.measure == "update":
                raise ContinualError(
                    "runner: measure='update' compares with the weights before a task was learned, which a pretrained"
                    " module does not have. Use measure='weight' or 'activation'."
                )
            self.partitioning.isolation, self.partitioning.seed = self.isolation, self.seed
            self.partitioning.folders = self.folders
        self.progress = RunProgress()
        self._host: Trainer | None = None

    def run(self) -> Result:
        """Runs what is left of the sequence.

        Returns:
            the scores of every task after every task, and what the partitions found.

        Raises:
            ContinualError: before any training, for tasks, a network or options that cannot work.
        """
        try:
            return self._run()
        except BaseException:
            self._host = None  # so that another call takes up what was stored, not a phase half done
            raise

    def _run(self) -> Result:
        if self._host is None:
            self.start()
        self.phase("baseline", self.score)
        if self.method == "joint":
            self.phase("joint", self.learn_jointly)
            self.phase("score", self.score)
        else:
            for task in self.tasks:
                self.phase(f"learn {task.name}", partial(self.learn, task))
                self.phase(f"partition {task.name}", partial(self.partition, task))
                self.phase(f"invariance {task.name}", partial(self.invariance, task))
                self.phase(f"score {task.name}", self.score)
        return self.result()

    # The method's steps

    def learn(self, task: Task) -> None:
        """LEARN: the free units train on the task (all units under ``method="finetune"``).

        Where the partition comes during training, this one fit holds INVARIANCE too.
        """
        given = self.pretrained is not False and task is self.tasks[0]
        learning, both = (0 if given else self.epochs), (0 if given else self.epochs) + self.invariance_epochs
        if self.method == "finetune":
            self.fit(task, both, [])
            return
        self.state.ledger.begin(task.name, task.classes or [])
        if self.partitioning is not None:
            self.partitioning.remember_start(self.module, self.state)
        if self.partitioning is None:
            self.fit(task, both, [self.masking, self.inferring])
        elif self.partitioning.during_training and not given:
            self.partitioning.tasks_left = self.tasks_left
            self.fit(task, both, [self.partitioning, self.perturbing, self.masking, self.inferring])
        else:
            self.fit(task, learning, [self.perturbing, self.masking, self.inferring])

    def partition(self, task: Task) -> None:
        """Partitions the task's units and claims those that carry it, unless that happened in training."""
        self.note_stage(task, "learned")
        current = self.state.ledger.current
        if self.method == "finetune" or self.partitioning is None or current is None or current.phase == "invariance":
            return
        self.partitioning.tasks_left = self.tasks_left
        with on_device(self.module, self.host.strategy.root_device):
            self.partitioning.partition_task(self.host, self.module, task)
        self.note_stage(task, "partitioned")

    def invariance(self, task: Task) -> None:
        """INVARIANCE: the claimed units train on while the redundant ones are perturbed; then the claim is sealed."""
        if self.method == "partition" and self.state.ledger.current is not None:
            if self.partitioning is not None and self.perturbing is not None:
                self.fit(task, self.invariance_epochs, [self.perturbing, self.masking, self.inferring])
            with on_device(self.module, self.host.strategy.root_device):
                self.seal(task)
            self.note_stage(task, "retrained")
        self.keep(task)

    def seal(self, task: Task) -> None:
        """Ends the task: what it owns never moves again."""
        options = None if self.partitioning is None else self.partitioning.options
        decide_together(
            self.host,
            self.module,
            lambda: seal_task(self.module, task, options, seed=self.seed, folders=self.folders),
        )

    def learn_jointly(self) -> None:
        """Trains all tasks together, each sample scored on its own task's outputs."""
        with self.state.showing(self.module, self.tasks) as view:
            self.fit(JointTask(self.tasks, view), self.epochs + self.invariance_epochs, [])

    def score(self) -> None:
        """Scores every task, told which it is and not."""
        with on_device(self.module, self.host.strategy.root_device):
            self.progress.rows.append([self.score_of(task) for task in self.tasks])
            inference = self.inference()
            if inference is not None:
                tests = [(task, self.scoring_batches(task)) for task in self.tasks if task.classes]
                score_strategies(self.module, inference, tests, self.progress.strategies)
        if self.method == "partition" and len(self.progress.rows) > 1:
            for layer, share in self.state.ledger.capacity().items():
                self.progress.capacity.setdefault(layer, []).append(share)

    def result(self) -> Result:
        """What the run found so far."""
        with on_device(self.module, self.host.strategy.root_device), isolate_rng():
            constant = [
                constant_predictor(
                    self.module, task, self.scoring_batches(task), shown=self.state.showing(self.module, [task])
                )
                for task in self.tasks
            ]
        return Result.of(self.progress, self.module, self.state, self.tasks, constant)

    # What they need

    def start(self) -> None:
        """Checks everything that can be checked before training, and takes up an earlier run's state."""
        check_tasks(self.tasks)
        self._host = self.new_trainer(max_epochs=self.epochs, callbacks=[], root=self.store.root)
        strategy = self._host.strategy
        if strategy.launcher is not None:
            strategy.launcher.launch(strategy.setup_environment, trainer=self._host)
        check_strategy(self._host)
        self.module.trainer = self._host
        self._host.precision_plugin.convert_module(self.module)
        with seeded(self.seed, "outputs"):
            self.state = self.prepare_module()
        self.state.check_finite(self.module, "runner: nothing is trained")
        self.progress = self.store.open(self.module, self.state, self.settings())
        if self.host.world_size > 1:
            self.host.strategy.barrier()

    @property
    def host(self) -> Trainer:
        """A Trainer that never fits: knows the device and speaks with the other processes between phases."""
        assert self._host is not None, "start() makes it"
        return self._host

    def prepare_module(self) -> ContinualState:
        """Sets outputs aside for every task; raises if the network cannot be traced or is too narrow."""
        if not isinstance(self.pretrained, bool):
            load_pretrained(self.module, self.pretrained)
        self.module.installs_callbacks = False
        state = state_for(self.module, self.tasks[0])
        state.set_isolation(self.module, self.isolation)
        if self.masking is not None:
            state.set_mask_outputs(self.masking.mask_outputs)
        for task in self.tasks:
            self.module.add_task(task)
            with state.showing(self.module, [task]):
                check_scoring(self.module, task)
        if self.partitioning is not None:
            self.partitioning.select(self.module, state)
            if self.method == "partition":
                check_widths(state, len(self.tasks))
        if self.inferring is not None and self.method == "partition":
            self.inferring.check(self.module, state, self.tasks[0])
        return state

    def phase(self, name: str, step: Callable[[], None]) -> None:
        """Runs a phase unless an earlier run finished it, and stores what it left."""
        if name in self.progress.finished:
            return
        began = time.monotonic()
        with seeded(self.seed, name):
            step()
            synchronise(self.host, self.module)
        self.state.check_finite(self.module, f"runner: phase '{name}' is not stored")
        self.progress.seconds += time.monotonic() - began
        self.progress.finished.append(name)
        if self.host.is_global_zero:
            self.store.save(self.module, self.progress, self.state)
        if self.host.world_size > 1:
            self.host.strategy.barrier()

    def fit(self, task: Any, epochs: int, ours: Sequence[Callback | None]) -> None:
        """One Trainer, one fit, everything random keyed by the phase; nothing for no epochs."""
        if epochs == 0:
            return
        callbacks = [copy.deepcopy(callback) for callback in [*self.callbacks, *ours] if callback is not None]
        if not any(isinstance(callback, WatchingCallback) for callback in callbacks):
            callbacks.append(WatchingCallback())
        folder = self.store.root / "phases" / f"{len(self.progress.finished):03d}"
        with self.state.showing(self.module, [task]) if isinstance(task, Task) else nullcontext():
            trainer = self.new_trainer(max_epochs=epochs, callbacks=callbacks, root=folder)
            trainer.fit(self.module, datamodule=task)

    def new_trainer(self, *, max_epochs: int, callbacks: list[Callback], root: Path) -> Trainer:
        """A Trainer from the user's factory."""
        theirs = self.make_trainer.keywords if isinstance(self.make_trainer, partial) else {}
        if "max_epochs" in theirs:
            raise ContinualError(
                f"runner: the trainer sets max_epochs={theirs['max_epochs']}; the runner's epochs={self.epochs} and"
                f" invariance_epochs={self.invariance_epochs} decide. Leave max_epochs out."
            )
        given = theirs.get("callbacks") or []
        given = copy.deepcopy(list(given) if isinstance(given, Sequence) else [given])
        return self.make_trainer(max_epochs=max_epochs, callbacks=[*given, *callbacks], default_root_dir=root)

    def keep(self, task: Task) -> None:
        """Writes the network as it is after a task, next to the record of its partition."""
        folder = self.folders.of(self.tasks.index(task), task.name)
        self.host.strategy.connect(self.module)
        self.host.save_checkpoint(folder / "checkpoint.ckpt", weights_only=True)

    @property
    def tasks_left(self) -> int:
        """How many tasks are still to come, the current one counted."""
        return len(self.tasks) - len(self.state.ledger.tasks) + 1

    def scoring_batches(self, task: Task) -> Batches:
        """The data that a task is scored on."""
        tests = self.score_on == "test" and "test_dataloader" in task.__dict__
        return single(task.test_dataloader()) if tests else task.judging_batches()

    def score_of(self, task: Task) -> float:
        """The task's score on the data that it is scored on, on its own outputs; higher is better."""
        with self.state.showing(self.module, [task]):
            score = evaluate(self.module, task, self.scoring_batches(task))
        if math.isnan(score):
            raise ContinualError(
                f"runner: task '{task.name}' scores {score}. Look at the data that it is scored on, its metric and its"
                " evaluate=."
            )
        return -score if task.metric is not None and task.metric.higher_is_better is False else score

    def inference(self) -> TaskInference | None:
        """What tasks are inferred by now; the highest output where nothing is partitioned."""
        if self.inferring is None or len(self.progress.rows) < 2:
            return None
        if self.method == "partition":
            return inference_of(self.state.ledger)
        learned = self.tasks if self.method == "joint" else self.tasks[: len(self.progress.rows) - 1]
        return highest_output(self.module, self.state, learned)

    def note_stage(self, task: Task, stage: str) -> None:
        """Keeps the task's score at a stage of the method."""
        with on_device(self.module, self.host.strategy.root_device):
            self.progress.stages.setdefault(task.name, {})[stage] = self.score_of(task)

    def settings(self) -> dict[str, Any]:
        """What must be the same when a run is taken up again."""
        return {
            "method": self.method,
            "isolation": self.isolation,
            "epochs": self.epochs,
            "invariance_epochs": self.invariance_epochs,
            "seed": self.seed,
            "score_on": self.score_on,
            "tasks": {task.name: list(self.state.outputs_of(task)) for task in self.tasks},
            "pretrained": self.pretrained if isinstance(self.pretrained, bool) else str(self.pretrained),
            "partition": None if self.partitioning is None else self.partitioning.settings(),
            "invariance": None if self.perturbing is None else self.perturbing.settings(),
            "masking": None if self.masking is None else self.masking.settings(),
            "task_inference": None if self.inferring is None else self.inferring.settings(),
            "network": {group.name: group.size for group in self.state.structure.groups},
            "processes": self.host.world_size,
        }
