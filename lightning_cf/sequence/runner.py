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

from lightning_cf.callbacks import (
    InvarianceCallback,
    MaskedGradientCallback,
    PartitionCallback,
    TaskInferenceCallback,
)
from lightning_cf.callbacks.divergence import WatchingCallback
from lightning_cf.callbacks.loading import warn_of_traces
from lightning_cf.callbacks.precision import check_inputs
from lightning_cf.callbacks.session import check_launch, check_strategy
from lightning_cf.errors import ContinualError, check_choice, check_count, check_path
from lightning_cf.learner.inferring import highest_output, inference_of
from lightning_cf.learner.state import ContinualState, state_for
from lightning_cf.learner.steps import decide_together, seal_task, synchronise, weights_sha256
from lightning_cf.lightning_api import Callback, LightningModule, Trainer
from lightning_cf.module import ContinualModule
from lightning_cf.ownership.ledger import ISOLATIONS, Isolation
from lightning_cf.records.record import MANIFEST
from lightning_cf.records.recording import TaskFolders
from lightning_cf.sequence.class_incremental import score_strategies
from lightning_cf.sequence.data_identity import data_identity
from lightning_cf.sequence.identity import (
    callbacks_identity,
    check_allow,
    network_identity,
    optimizer_identity,
    task_identity,
    trainer_identity,
)
from lightning_cf.sequence.joint import JointTask, blaming_joint_batches
from lightning_cf.sequence.preflight import (
    check_classes,
    check_parts,
    check_root,
    check_tasks,
    check_widths,
    listed_tasks,
    load_pretrained,
)
from lightning_cf.sequence.result import Result
from lightning_cf.sequence.run_folder import check_room, size_of, take_folder, tell_damage, tell_differences
from lightning_cf.sequence.run_lock import RunLock
from lightning_cf.sequence.store import FoundState, RunProgress, RunStore
from lightning_cf.sequence.trainers import (
    MakeTrainer,
    check_trains,
    end_processes,
    fit_whole,
    listed_callbacks,
    make_trainer,
)
from lightning_cf.subspaces.subspace import LearnedSubspace
from lightning_cf.task_inference import Strategy, TaskInference
from lightning_cf.tasks.contexts import placed_on, seeded
from lightning_cf.tasks.evaluation import constant_predictor, evaluate, transferred
from lightning_cf.tasks.scoring_check import check_scoring
from lightning_cf.tasks.task import Batches, Task
from lightning_cf.utilities.files import make_folder, writing
from lightning_cf.utilities.noting import noting
from lightning_cf.utilities.randomness import isolated_generators

Method = Literal["partition", "finetune", "joint"]
METHODS = ("partition", "finetune", "joint")
SCORED = ("test", "validation")


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
        task_inference: TaskInferenceCallback | Strategy | str | None = "auto",
        callbacks: Sequence[Callback] = (),
        isolation: Isolation = "exact",
        method: Method = "partition",
        pretrained: bool | str | Path = False,
        score_on: Literal["test", "validation"] = "test",
        seed: int = 0,
        root: str | Path,
        allow: Sequence[str] = (),
    ) -> None:
        self.module = ContinualModule(module)
        check_parts(trainer, partition, invariance, masking, task_inference, pretrained)
        self.tasks = listed_tasks(tasks)
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
        for ours in (self.partitioning, self.masking):
            if ours is not None and ours.ledger is not None:
                raise ContinualError(
                    f"runner: {type(ours).__name__}(ledger={str(ours.ledger)!r}) cannot be taken up: a run keeps its"
                    " own ledger in root. Leave it out, or fit the tasks one by one with the callbacks."
                )
        self.pretrained = pretrained
        self.callbacks = listed_callbacks("callbacks", callbacks)
        root = check_path("runner", "root", root)
        self.store = RunStore(root)
        self.lock = RunLock(self.store.root)
        self.allow = check_allow(allow)
        self.configuration: dict[str, Any] = {}  # of the command line, to be told apart by
        self._identity: dict[str, Any] | None = None
        if isinstance(getattr(masking, "subspace", None), LearnedSubspace) and not isinstance(
            getattr(invariance, "subspace", None), LearnedSubspace
        ):
            raise ContinualError(
                "runner: masking trains in a sub-space that is learned, but nothing learns it; give invariance the same"
                " subspace."
            )
        self.folders = TaskFolders(root / "tasks", partition is not None and partition.similarity_matrix)
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
        self.notes: list[str] = []
        self._host: Trainer | None = None

    def run(self) -> Result:
        """Runs what is left of the sequence.

        Returns:
            the scores of every task after every task, and what the partitions found.

        Raises:
            ContinualError: before any training, for tasks, a network or options that cannot work.
        """
        try:
            if self._host is None:
                self.start()
            self.lock.busy = True
            return self._run()
        except BaseException as error:
            if self._host is not None and not isinstance(error, Exception):
                end_processes(self._host)
            self._host = None  # so that another call takes up what was stored, not a phase half done
            raise
        finally:
            self.lock.release()

    def _run(self) -> Result:
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
        self.state.ledger.begin(task.name, task.classes or [], self.state.structure)
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
        with placed_on(self.module, self.host.strategy.root_device):
            self.partitioning.partition_task(self.host, self.module, task)
        self.note_stage(task, "partitioned")

    def invariance(self, task: Task) -> None:
        """INVARIANCE: the claimed units train on while the redundant ones are perturbed; then the claim is sealed."""
        if self.method == "partition" and self.state.ledger.current is not None:
            if self.partitioning is not None and self.perturbing is not None:
                self.fit(task, self.invariance_epochs, [self.perturbing, self.masking, self.inferring])
            if self.state.ledger.current is not None:  # else a partition callback of the user's own sealed it
                with placed_on(self.module, self.host.strategy.root_device):
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
            for layer, share in self.state.ledger.capacity().items():
                self.progress.capacity.setdefault(layer, []).append(share)

    def result(self) -> Result:
        """What the run found so far."""
        with placed_on(self.module, self.host.strategy.root_device), isolated_generators():
            constant = [
                constant_predictor(
                    self.module, task, self.scoring_batches(task), shown=self.state.showing(self.module, [task])
                )
                for task in self.tasks
            ]
        return Result.of(self.progress, self.module, self.state, self.tasks, constant)

    # What they need

    def start(self) -> None:
        """Checks everything that can be checked before training, and takes up an earlier run's state.

        From here to the end of :meth:`run` nobody else can run in the folder.
        """
        with noting(self.notes):
            self._start()

    def _start(self) -> None:
        check_root(self.store.root)
        self._host = self.new_trainer(max_epochs=self.epochs, callbacks=[], root=self.store.root)
        check_launch(self._host)
        check_trains(self._host)
        batches = check_tasks(self.tasks, self._host, self.seed)
        strategy = self._host.strategy
        if strategy.launcher is not None:
            strategy.launcher.launch(strategy.setup_environment, trainer=self._host)
        check_strategy(self._host)
        self.module.trainer = self._host
        self._host.precision_plugin.convert_module(self.module)
        folders = [self.folders.of(position, task.name) for position, task in enumerate(self.tasks)]
        self.first_only(partial(take_folder, self.lock, self.store, self.phases, folders))
        try:
            with seeded(self.seed, "outputs"):
                self.state = self.prepare_module()
            for task, batch in zip(self.tasks, batches, strict=True):
                given = self._host.precision_plugin.convert_input(batch)
                with placed_on(self.module, self._host.strategy.root_device), self.state.showing(self.module, [task]):
                    check_inputs(self._host, self.module, task.name, transferred(self.module, task, given))
            self.take_up()
        except BaseException:
            self.lock.release()
            raise
        self.notes[:] = dict.fromkeys([*self.progress.warnings, *self.notes])
        self.progress.warnings = list(self.notes)
        if self.host.world_size > 1:
            self.host.strategy.barrier()

    def take_up(self) -> None:
        """Goes on from what the folder holds of this run, if it holds something."""
        settings = self.settings()
        found = self.first_only(lambda: self.store.find(settings, self.allow))
        self.progress = RunProgress(initial_weights=self._initial)
        if found is not None:
            self.progress = self.store.take_up(found, self.module, self.state)
        self.first_only(partial(self.check_folder, found, settings))
        self.mend_files()

    def check_folder(self, found: FoundState | str | None, settings: dict[str, Any]) -> None:
        """Tells of what differs; raises ContinualError where the disk has no room for what is left of the run."""
        if isinstance(found, FoundState):
            tell_differences(self.store.root, self.progress, found.allowed, self._initial)
        left = [name for name in self.phases if name not in self.progress.finished]
        if left:
            check_room(self.store.root, self.module, checkpoints=sum(n.startswith("invariance ") for n in left))
        if self.lock.held:  # a run that is over may be read where nothing can be written
            self.store.note(settings)

    def mend_files(self) -> None:
        """Tells of damaged files of finished tasks; writes the latest checkpoint anew, if it is one of them."""
        damaged = self.store.damaged(self.progress) if self.host.is_global_zero else {}
        if self.host.world_size > 1:
            damaged = self.host.strategy.broadcast(damaged)
        last = self.progress.finished[-1] if self.progress.finished else ""
        for task in self.tasks:
            name = self.name_of(self.folders.of(self.tasks.index(task), task.name) / "checkpoint.ckpt")
            if name in damaged and last in (f"invariance {task.name}", f"score {task.name}"):
                self.keep(task)
                damaged[name] += "; it is written anew"
        if self.host.is_global_zero:
            tell_damage(self.store.root, damaged)

    def first_only(self, step: Callable[[], Any]) -> Any:
        """What a step gives on the first process; the others get its error, or the name of the state that it found."""
        if self.host.world_size == 1:
            return step()
        found: Any = None
        told: Any = None
        if self.host.is_global_zero:
            try:
                found = step()
                told = found.name if isinstance(found, FoundState) else None
            except ContinualError as error:
                told = error
        told = self.host.strategy.broadcast(told)
        if isinstance(told, ContinualError):
            raise told
        return found if self.host.is_global_zero else told

    @property
    def phases(self) -> list[str]:
        """Names of all phases, in order."""
        if self.method == "joint":
            return ["baseline", "joint", "score"]
        steps = ("learn", "partition", "invariance", "score")
        return ["baseline", *(f"{step} {task.name}" for task in self.tasks for step in steps)]

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
        state = state_for(self.module, self.tasks[0])  # which gives lazy layers their shapes
        self._initial = getattr(self, "_initial", None) or weights_sha256(self.module)
        state.check_finite(self.module, "runner: nothing is trained")
        if not state.ledger.tasks:
            warn_of_traces(self.module, state.structure)
        state.set_isolation(self.module, self.isolation)
        if self.masking is not None:
            state.set_mask_outputs(self.masking.mask_outputs)
        for task in self.tasks:
            check_classes(state, task)
            self.module.add_task(task)
            with state.showing(self.module, [task]):
                check_scoring(self.module, task)
        if self.partitioning is not None:
            self.partitioning.select(self.module, state)
            if self.method == "partition":
                check_widths(state, [task.name for task in self.tasks])
        if self.inferring is not None and self.method == "partition":
            self.inferring.check(self.module, state, self.tasks[0])
        return state

    def phase(self, name: str, step: Callable[[], None]) -> None:
        """Runs a phase unless an earlier run finished it, and stores what it left."""
        if name in self.progress.finished:
            return
        began = time.monotonic()
        with seeded(self.seed, name), noting(self.notes):
            step()
            synchronise(self.host, self.module)
        self.state.check_finite(self.module, f"runner: phase '{name}' is not stored")
        self.progress.warnings = list(self.notes)
        self.progress.seconds += time.monotonic() - began
        self.progress.finished.append(name)
        self.first_only(partial(self.save, name))
        if self.host.world_size > 1:
            self.host.strategy.barrier()

    def save(self, phase: str) -> None:
        """Stores what a phase left, unless another run has taken the folder over."""
        self.lock.check()
        self.note_files(phase)
        self.store.save(self.module, self.progress, self.state, self.settings())

    def note_files(self, phase: str) -> None:
        """Keeps the checksums of the files that a phase left for its task."""
        for position, task in enumerate(self.tasks):
            if phase.partition(" ")[2] == task.name:
                for file in (MANIFEST, "checkpoint.ckpt"):
                    name = self.name_of(self.folders.of(position, task.name) / file)
                    digest = self.store.digest_of(name)
                    if digest is not None:
                        self.progress.files[name] = digest

    def name_of(self, path: Path) -> str:
        """A file's path in the run's folder."""
        return path.relative_to(self.store.root).as_posix()

    def fit(self, task: Any, epochs: int, ours: Sequence[Callback | None]) -> None:
        """One Trainer, one fit, everything random keyed by the phase; nothing for no epochs."""
        if epochs == 0:
            return
        callbacks = [copy.deepcopy(callback) for callback in [*self.callbacks, *ours] if callback is not None]
        if not any(isinstance(callback, WatchingCallback) for callback in callbacks):
            callbacks.append(WatchingCallback())
        folder = self.store.root / "phases" / f"{len(self.progress.finished):03d}"
        with self.state.showing(self.module, [task]) if isinstance(task, Task) else nullcontext():
            if isinstance(task, Task):
                self.state.begin_fit(task)
            trainer = self.new_trainer(max_epochs=epochs, callbacks=callbacks, root=folder)
            fit_whole(trainer, self.module, task)

    def new_trainer(self, *, max_epochs: int, callbacks: list[Callback], root: Path) -> Trainer:
        """A Trainer from the user's factory."""
        theirs = self.make_trainer.keywords if isinstance(self.make_trainer, partial) else {}
        if "max_epochs" in theirs:
            raise ContinualError(
                f"runner: the trainer sets max_epochs={theirs['max_epochs']}; the runner's epochs={self.epochs} and"
                f" invariance_epochs={self.invariance_epochs} decide. Leave max_epochs out."
            )
        given = copy.deepcopy(self.given_callbacks())
        return make_trainer(self.make_trainer, max_epochs=max_epochs, callbacks=[*given, *callbacks], root=root)

    def given_callbacks(self) -> list[Callback]:
        """Those that the user's factory gives each Trainer."""
        theirs = self.make_trainer.keywords if isinstance(self.make_trainer, partial) else {}
        return listed_callbacks("the trainer's callbacks", theirs.get("callbacks"))

    def keep(self, task: Task) -> None:
        """Writes the network as it is after a task, next to the record of its partition."""
        folder = self.folders.of(self.tasks.index(task), task.name)
        self.host.strategy.connect(self.module)
        make_folder(folder)
        with writing(folder / "checkpoint.ckpt", size_of(self.module)):
            self.host.save_checkpoint(folder / "checkpoint.ckpt", weights_only=True)

    @property
    def tasks_left(self) -> int:
        """How many tasks are still to come, the current one counted."""
        return len(self.tasks) - len(self.state.ledger.tasks) + 1

    def scoring_batches(self, task: Task) -> Batches:
        """The data that a task is scored on."""
        tests = task.task_loaders.testing() if self.score_on == "test" else None
        return task.judging_batches() if tests is None else tests

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
        with placed_on(self.module, self.host.strategy.root_device):
            self.progress.stages.setdefault(task.name, {})[stage] = self.score_of(task)

    def settings(self) -> dict[str, Any]:
        """What must be the same when a run is taken up again; found once, before anything is trained."""
        if self._identity is None:
            given = [*self.callbacks, *self.host.callbacks]  # type: ignore[attr-defined]
            self._identity = {
                "method": self.method,
                "isolation": self.isolation,
                "epochs": self.epochs,
                "invariance_epochs": self.invariance_epochs,
                "seed": self.seed,
                "score_on": self.score_on,
                "order": [task.name for task in self.tasks],
                "tasks": {task.name: task_identity(task, self.state.outputs_of(task)) for task in self.tasks},
                "pretrained": self.pretrained if isinstance(self.pretrained, bool) else self._initial,
                "partition": None if self.partitioning is None else self.partitioning.settings(),
                "invariance": None if self.perturbing is None else self.perturbing.settings(),
                "masking": None if self.masking is None else self.masking.settings(),
                "task_inference": None if self.inferring is None else self.inferring.settings(),
                "network": {group.name: group.size for group in self.state.structure.groups},
                "processes": self.host.world_size,
                **network_identity(self.module),
                "optimizer": optimizer_identity(self.module),
                "trainer": trainer_identity(self.host),
                "callbacks": callbacks_identity(given),
                "data": {task.name: data_identity(task, test=self.score_on == "test") for task in self.tasks},
                "configuration": self.configuration,
            }
        return self._identity
