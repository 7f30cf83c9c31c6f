"""The method's steps between training phases: partition a task, seal it; on several processes alike."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_cf.errors import ContinualError
from lightning_cf.functional.inputs import FOLD_SAMPLES
from lightning_cf.functional.phases import run_claim
from lightning_cf.functional.sealing import run_seal
from lightning_cf.learner.inferring import remember_task
from lightning_cf.learner.keeping import keep_ledger, ledger_of, state_for, state_of
from lightning_cf.learner.together import Everyone, serve
from lightning_cf.lightning_api import LightningModule, Trainer
from lightning_cf.network.finite import check_finite
from lightning_cf.network.forward import eval_mode, named_tensors
from lightning_cf.network.kept_entries import Snapshot, values_kept
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.partition.claim import Claimer
from lightning_cf.partition.cost import warn_of_cost
from lightning_cf.partition.folding import cut_claimed
from lightning_cf.partition.options import PartitionOptions
from lightning_cf.records.folders import TaskFolders
from lightning_cf.tasks.evaluation import judge, predict
from lightning_cf.tasks.reading import samples_in
from lightning_cf.tasks.scoring_check import warn_of_constant
from lightning_cf.tasks.task import Task
from lightning_cf.tasks.training_batches import training_batches
from lightning_cf.utilities.randomness import isolated_generators


def partition_task(
    module: LightningModule,
    task: Task,
    options: PartitionOptions,
    *,
    tasks_left: int = 1,
    seed: int = 0,
    folders: TaskFolders | None = None,
) -> None:
    """Partitions the current task's units, claims the non-redundant ones and, under ``exact``, probes for leaks.

    Args:
        module: the network, in place.
        task: the current task; its training data is folded on, its validation data judges.
        options: how to partition.
        tasks_left: tasks still to come, this one counted, as far as known.
        seed: what randomly chosen representatives depend on.
        folders: where to record what was found.

    Raises:
        LeakError: if a claimed output still depends on free weights.
    """
    state = state_for(module, task)
    state.undisturb()
    again = state.ledger.phase == "invariance"

    def shown(run: Callable[[], Any]) -> Any:
        with state.showing(module, [task]):
            return run()

    claimer = Claimer(
        module=module,
        structure=state.structure,
        ledger=state.ledger,
        options=options,
        score=lambda: shown(partial(judge, module, task)),
        higher_is_better=not _lower_is_better(task),
        passes=lambda: (partial(shown, run) for run in _passes(module, task)),
        start=state.start,
        tasks_left=tasks_left,
        seed=seed,
        keep=folders is not None,
        earlier=state.outcome if again else None,
    )
    record = None if folders is None else partial(folders.write, state.ledger, options)
    state.outcome = run_claim(claimer, state.example, state.forward, record=record)
    if not again:
        with eval_mode(module), state.showing(module, [task]):
            warn_of_constant(module, task, state.outcome.accuracy)


def seal_task(
    module: LightningModule,
    task: Task,
    options: PartitionOptions | None = None,
    *,
    seed: int = 0,
    folders: TaskFolders | None = None,
    everyone: Everyone | None = None,
) -> None:
    """Seals the current task's claim, if it has one; under ``exact`` it then gives the free units a fresh start.

    Args:
        module: the network, in place.
        task: the current task.
        options: of its partition, which say whether free units start afresh.
        seed: what the fresh weights depend on, with the task's name.
        folders: where its partition was recorded, if it was.
        everyone: all processes, to share in what is kept to infer tasks by.
    """
    state = state_for(module, task)
    state.undisturb()
    check_finite(module, state.structure, f"Task '{task.name}' cannot be sealed")
    if not state.ledger.exact:
        score = ablation_accuracy(module, task)
        for record in state.ledger.records:
            if record["task"] == task.name:
                record["retrained_ablation_accuracy"] = score
    if not all(record.get("within_tolerance", True) for record in state.ledger.records if record["task"] == task.name):
        tolerance = (options or PartitionOptions()).tolerance
        with isolated_generators(), eval_mode(module), state.showing(module, [task]):
            now = judge(module, task)
        warn_of_cost(state.ledger, tolerance, lower_is_better=_lower_is_better(task), now=now)
    if folders is not None:
        folders.complete(module, state.structure, state.ledger)
    if state.collect is not None:
        state.collect()
    run_seal(
        module,
        state.structure,
        state.ledger,
        seed=seed,
        options=options,
        keep=lambda: remember_task(module, task, state, everyone=everyone),
    )
    state.start = state.outcome = None


def _lower_is_better(task: Task) -> bool:
    return task.metric is not None and task.metric.higher_is_better is False


def remember_claim(module: LightningModule, task: Task, everyone: Everyone | None = None) -> None:
    """Keeps what infers a task that has its claim and may train on: its seal, if it comes, keeps it anew."""
    state = state_for(module, task)
    state.undisturb()
    if state.collect is not None:
        state.collect()
    remember_task(module, task, state, sealed=False, everyone=everyone)


def ablation_accuracy(module: LightningModule, task: Task) -> float:
    """The current task's score without its redundant units, on the data that judges partitions."""
    state = state_for(module, task)
    parameters = list(module.parameters())
    with values_kept(parameters), isolated_generators(), eval_mode(module), state.showing(module, [task]):
        cut_claimed(module, state.structure, state.ledger)
        return judge(module, task)


def decide_together(trainer: Trainer, module: LightningModule, task: Task, step: Callable[..., None]) -> None:
    """Runs a step on the first process; the others take over its weights and ledger, or its error.

    Args:
        trainer: of the fit, on every process.
        module: the network.
        task: that the step is about, on every process.
        step: is given ``everyone=``, all processes, if there are several, so that they may share some of its work.
    """
    if trainer.world_size == 1:
        step(everyone=None)
    else:
        _decide_first(trainer, module, task, step)
    state = state_of(module)
    if state is not None:
        state.remember(module)


def _decide_first(trainer: Trainer, module: LightningModule, task: Task, step: Callable[..., None]) -> None:
    if not trainer.is_global_zero:
        said = serve(trainer, module, task)
        if isinstance(said, ContinualError):
            raise said
        snapshot, ledger = said
        snapshot.put_back(module)
        keep_ledger(module, NeuronLedger.from_state_dict(ledger))
        return
    try:
        step(everyone=Everyone(trainer, module))
        payload = (Snapshot.of(module), _ledger(module).state_dict())
    except ContinualError as error:
        trainer.strategy.broadcast(error)
        raise
    except Exception as error:  # the others would wait for good
        trainer.strategy.broadcast(ContinualError(f"The first process failed: {error!r}"))
        raise
    trainer.strategy.broadcast(payload)


def synchronise(trainer: Trainer, module: nn.Module) -> None:
    """At the end of a phase: gives every process the first one's buffers, and checks that all hold one network.

    Raises:
        ContinualError: if weights or owners differ between processes.
    """
    if trainer.world_size == 1:
        return
    buffers = trainer.strategy.broadcast({name: buffer.cpu() for name, buffer in module.named_buffers()})
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])
    ledger = ledger_of(module)
    owners = "" if ledger is None else repr({name: owner.tolist() for name, owner in ledger.owners.items()})
    hashes: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(hashes, weights_sha256(module) + hashlib.sha256(owners.encode()).hexdigest())
    if len(set(hashes)) > 1:
        raise ContinualError(
            f"The processes hold different networks at the end of a phase (hashes {[h[:8] for h in hashes]}): something"
            " outside the Trainer changed weights on one of them, or drew from a generator of its own."
        )


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors(module).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _ledger(module: nn.Module) -> NeuronLedger:
    ledger = ledger_of(module)
    assert ledger is not None
    return ledger


def _passes(module: LightningModule, task: Task) -> Iterator[Callable[[], Any]]:
    """Forward passes over the task's training data, up to ``FOLD_SAMPLES`` inputs."""
    seen = 0
    for batch in training_batches(module, task):
        yield partial(predict, module, task, batch)
        seen += samples_in(batch)
        if seen >= FOLD_SAMPLES:
            return
