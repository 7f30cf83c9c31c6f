"""Trains one network on tasks one after another: learn, partition, retrain, seal, score."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from lightning_cf.callbacks import InvarianceCallback, MaskedGradientCallback, PartitionCallback, TaskInferenceCallback
from lightning_cf.callbacks.loading import warn_of_traces
from lightning_cf.errors import check_count, check_path
from lightning_cf.learner.inferring import highest_output, inference_of
from lightning_cf.learner.keeping import state_for
from lightning_cf.learner.meeting import meet_task
from lightning_cf.learner.state import ContinualState
from lightning_cf.learner.steps import decide_together, seal_task, weights_sha256
from lightning_cf.lightning_api import Callback, LightningModule, Trainer
from lightning_cf.module import wrapped_for_run
from lightning_cf.network.finite import check_finite
from lightning_cf.ownership.ledger import Isolation
from lightning_cf.sequence.class_incremental import score_strategies
from lightning_cf.sequence.identity import run_identity
from lightning_cf.sequence.joint import JointTask, blaming_joint_batches
from lightning_cf.sequence.parts import Parts
from lightning_cf.sequence.preflight import (
    Method,
    check_choices,
    check_parts,
    check_widths,
    listed_tasks,
    load_pretrained,
)
from lightning_cf.sequence.result import Result
from lightning_cf.sequence.scoring import ScoreOn, constant_scores, score_of, scoring_batches
from lightning_cf.sequence.stored_run import StoredRun
from lightning_cf.sequence.trainers import MakeTrainer, Trainers, fit_whole, for_phase, listed_callbacks
from lightning_cf.task_inference import Strategy, TaskInference
from lightning_cf.tasks.contexts import placed_on
from lightning_cf.tasks.scoring_check import check_scoring
from lightning_cf.tasks.task import Batches, Task
from lightning_cf.utilities.randomness import isolated_generators


class SequentialTaskRunner(StoredRun):
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
        allow: in what a run that is started again may differ from the folder's, such as ``["optimizer", "data"]``: the
            names that the error about a difference says.
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
        task_inference: TaskInferenceCallback | Strategy | str | Sequence[Strategy | str] | None = "auto",
        callbacks: Sequence[Callback] = (),
        isolation: Isolation = "exact",
        method: Method = "partition",
        pretrained: bool | str | Path = False,
        score_on: ScoreOn = "test",
        seed: int = 0,
        root: str | Path,
        allow: Sequence[str] = (),
    ) -> None:
        module = wrapped_for_run(module)
        check_parts(trainer, partition, invariance, masking, task_inference, pretrained)
        check_choices(isolation=isolation, method=method, score_on=score_on)
        self.isolation, self.method, self.score_on = isolation, method, score_on
        self.pretrained = pretrained
        super().__init__(
            module,
            listed_tasks(tasks),
            Trainers.of(trainer, epochs=epochs, invariance_epochs=invariance_epochs),
            root=check_path("runner", "root", root),
            seed=check_count("runner", "seed", seed, least=0),
            similarity_matrix=partition is not None and partition.similarity_matrix,
            allow=allow,
        )
        self.callbacks = listed_callbacks("callbacks", callbacks)
        self.parts = Parts.of(partition, invariance, masking, task_inference)
        self.parts.check_moment(self.trainers, pretrained=pretrained is not False)
        self.parts.tell(seed=self.seed, isolation=self.isolation, folders=self.folders)
        self.epochs, self.invariance_epochs = self.trainers.epochs, self.trainers.invariance_epochs
        self.configuration: dict[str, Any] = {}  # of the command line, to be told apart by
        self._identity: dict[str, Any] | None = None

    def run(self) -> Result:
        """Runs what is left of the sequence.

        Returns:
            the scores of every task after every task, and what the partitions found.

        Raises:
            ContinualError: before any training, for tasks, a network or options that cannot work.
        """
        with self.held():
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
        parts = self.parts
        given = self.pretrained is not False and task is self.tasks[0]
        learning, both = (0 if given else self.epochs), (0 if given else self.epochs) + self.invariance_epochs
        if self.method == "finetune":
            self.fit(task, both, [])
            return
        self.state.ledger.begin(task.name, task.classes or [], self.state.structure)
        if parts.partition is not None:
            parts.partition.remember_start(self.module, self.state)
        if parts.partition is None:
            self.fit(task, both, [parts.masking, parts.task_inference])
        elif parts.partition.during_training and not given:
            parts.partition.expect(self.tasks_left)
            self.fit(task, both, [parts.partition, parts.invariance, parts.masking, parts.task_inference])
        else:
            self.fit(task, learning, [parts.invariance, parts.masking, parts.task_inference])

    def partition(self, task: Task) -> None:
        """Partitions the task's units and claims those that carry it, unless that happened in training."""
        self.note_stage(task, "learned")
        partitioning = self.parts.partition
        if self.method == "finetune" or partitioning is None or self.state.ledger.phase != "learn":
            return
        partitioning.expect(self.tasks_left)
        with placed_on(self.module, self.host.strategy.root_device):
            partitioning.partition_task(self.host, self.module, task)
        self.note_stage(task, "partitioned")

    def invariance(self, task: Task) -> None:
        """INVARIANCE: the claimed units train on while the redundant ones are perturbed; then the claim is sealed."""
        if self.method == "partition" and self.state.ledger.current is not None:
            parts = self.parts
            if parts.partition is not None and parts.invariance is not None:
                self.fit(task, self.invariance_epochs, [parts.invariance, parts.masking, parts.task_inference])
            if self.state.ledger.current is not None:  # else a partition callback of the user's own sealed it
                with placed_on(self.module, self.host.strategy.root_device):
                    self.seal(task)
            self.note_stage(task, "retrained")
        self.keep(task)

    def seal(self, task: Task) -> None:
        """Ends the task: what it owns never moves again."""
        options = None if self.parts.partition is None else self.parts.partition.options
        seal = partial(seal_task, self.module, task, options, seed=self.seed, folders=self.folders)
        decide_together(self.host, self.module, task, seal)

    def learn_jointly(self) -> None:
        """Trains all tasks together, each sample scored on its own task's outputs."""
        with self.state.showing(self.module, self.tasks) as view, blaming_joint_batches(self.module):
            self.fit(JointTask(self.tasks, view), self.epochs + self.invariance_epochs, [])

    def score(self) -> None:
        """Scores every task, told which it is and not."""
        with placed_on(self.module, self.host.strategy.root_device):
            self.progress.rows.append([self.score_of(task) for task in self.tasks])
            inference = self.inference()
            if inference is not None:
                tests = [(task, self.scoring_batches(task)) for task in self.tasks if task.classes]
                score_strategies(self.module, inference, tests, self.progress.strategies)
        if self.method == "partition" and len(self.progress.rows) > 1:
            self.progress.note_capacity(self.state.ledger.capacity())

    def result(self) -> Result:
        """Scores and partitions so far, with what a constant predictor would reach; reads all scoring data once."""
        with placed_on(self.module, self.host.strategy.root_device), isolated_generators():
            constant = constant_scores(self.module, self.state, self.tasks, self.score_on)
        return Result.of(self.progress, self.module, self.state, self.tasks, constant)

    # What they need

    @property
    def phases(self) -> list[str]:
        """Names of all phases, in order."""
        if self.method == "joint":
            return ["baseline", "joint", "score"]
        steps = ("learn", "partition", "invariance", "score")
        return ["baseline", *(f"{step} {task.name}" for task in self.tasks for step in steps)]

    def prepare_module(self) -> ContinualState:
        """Sets outputs aside for every task; raises if the network cannot be traced or is too narrow."""
        if not isinstance(self.pretrained, bool):
            load_pretrained(self.module, self.pretrained)
        self.module.installs_callbacks = False
        state = state_for(self.module, self.tasks[0])  # which gives lazy layers their shapes
        self._initial = self._initial or weights_sha256(self.module)
        check_finite(self.module, state.structure, "runner: nothing is trained")
        if not state.ledger.tasks:
            warn_of_traces(self.module, state.structure)
        state.set_isolation(self.module, self.isolation)
        if self.parts.masking is not None:
            state.set_mask_outputs(self.parts.masking.mask_outputs)
        for task in self.tasks:
            meet_task(self.module, task, new_classes=False)
            with state.showing(self.module, [task]):
                check_scoring(self.module, task)
        if self.parts.partition is not None:
            self.parts.partition.select(self.module, state)
            if self.method == "partition":
                check_widths(state, [task.name for task in self.tasks])
        if self.parts.task_inference is not None and self.method == "partition":
            self.parts.task_inference.check(self.module, state, self.tasks[0])
        return state

    def fit(self, task: Any, epochs: int, ours: Sequence[Callback | None]) -> None:
        """One Trainer, one fit, everything random keyed by the phase; nothing for no epochs."""
        if epochs == 0:
            return
        callbacks = for_phase([*self.callbacks, *ours])
        folder = self.store.root / "phases" / f"{len(self.progress.finished):03d}"
        with self.state.showing(self.module, [task]) if isinstance(task, Task) else nullcontext():
            if isinstance(task, Task):
                self.state.begin_fit(task)
            trainer = self.trainers.make(max_epochs=epochs, callbacks=callbacks, root=folder)
            fit_whole(trainer, self.module, task)

    @property
    def tasks_left(self) -> int:
        """How many tasks are still to come, the current one counted."""
        return len(self.tasks) - len(self.state.ledger.tasks) + 1

    def scoring_batches(self, task: Task) -> Batches:
        """The data that a task is scored on, as ``score_on`` says."""
        return scoring_batches(task, self.score_on)

    def score_of(self, task: Task) -> float:
        """The task's score on that data, on its own outputs; higher is better."""
        return score_of(self.module, self.state, task, self.score_on)

    def inference(self) -> TaskInference | None:
        """What tasks are inferred by now; the highest output where nothing is partitioned."""
        if self.parts.task_inference is None or len(self.progress.rows) < 2:
            return None
        if self.method == "partition":
            return inference_of(self.state.ledger)
        learned = self.tasks if self.method == "joint" else self.tasks[: len(self.progress.rows) - 1]
        return highest_output(self.module, self.state, learned)

    def note_stage(self, task: Task, stage: str) -> None:
        """Keeps the task's score at a stage of the method: "learned", "partitioned" or "retrained"."""
        with placed_on(self.module, self.host.strategy.root_device):
            self.progress.stages.setdefault(task.name, {})[stage] = self.score_of(task)

    def settings(self) -> dict[str, Any]:
        """What must be the same when a run is taken up again; found once, before anything is trained."""
        if self._identity is None:
            names = ("method", "isolation", "epochs", "invariance_epochs", "seed", "score_on")
            options = {name: getattr(self, name) for name in names}
            pretrained = self.pretrained if isinstance(self.pretrained, bool) else self._initial
            parts = {"pretrained": pretrained, **self.parts.settings()}
            given = [*self.callbacks, *self.host.callbacks]  # type: ignore[attr-defined]
            self._identity = run_identity(
                options, self.tasks, parts, self.module, self.state, self.host, given, self.configuration
            )
        return self._identity
