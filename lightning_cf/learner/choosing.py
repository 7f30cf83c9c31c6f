"""Which strategies infer a network's tasks: what it allows, what was measured as best, and what works when tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_cf.errors import ContinualError, ContinualWarning, warn
from lightning_cf.learner.inferring import bare_heads, inference_of, keep_inference, unseen, watch_task
from lightning_cf.learner.labels import Kept, positions_of, why_no_labels
from lightning_cf.learner.nameless import forward_is_told
from lightning_cf.learner.rehearsal import rehearse
from lightning_cf.learner.state import ContinualState
from lightning_cf.lightning_api import LightningModule
from lightning_cf.network.foreign_heads import idle_heads, of_idle
from lightning_cf.network.forward import eval_mode
from lightning_cf.task_inference import STRATEGIES, Readout, Sites, TaskInference, check_strategies, read
from lightning_cf.task_inference.sites import Watched
from lightning_cf.task_inference.strategies import CHOICES, NEEDS, Keep
from lightning_cf.task_inference.trained import changes_input, trained_heads
from lightning_cf.tasks.evaluation import predict
from lightning_cf.tasks.task import Task
from lightning_cf.tasks.training_batches import first_batch
from lightning_cf.utilities.randomness import isolated_generators

ORDER = ("lda", "reconstruction_logits", "lda_units", "subspaces", "energy")
"""In which they are tried: the best ones first where held-out data do not say otherwise; the second one is trained."""

CANDIDATES = 2
"""So many are fitted where the best is to be found: held-out data of the tasks say which of them predicts."""


def choose_strategies(
    module: LightningModule,
    state: ContinualState,
    task: Task,
    wanted: str | tuple[str, ...],
    keep: Keep = "beside",
    options: TaskInference | None = None,
) -> tuple[str, ...]:
    """The strategies to fit, the one that predicts first; none where tasks cannot be inferred and nobody insists.

    Each one is tried first (see ``rehearsal``): what would fail at the seal is left out, or refused by name.

    Args:
        module: the network.
        state: of it, with the task begun.
        task: the first one.
        wanted: a strategy's name, or several; ``auto`` for the best that the network allows, ``statistics`` for the
            best that leaves training as it is, ``all`` for all that the network allows, ``unchanged`` for those of them
            that do not train over changed inputs.
        keep: whether a strategy may be taken for these words that looks at the input beside the network.
        options: with the budget and what else is said of how they keep; default as nobody says.

    Raises:
        ContinualError: for a strategy that there is not, or that the network or the task does not allow.
    """
    named = () if wanted in CHOICES else (wanted,) if isinstance(wanted, str) else wanted
    check_strategies(named)
    tried = partial(_tried, module, state, task, options or TaskInference(()))
    reason, possible = _possible(module, state, task)
    if isinstance(wanted, str) and not named:
        possible = [name for name in possible if keep == "beside" or not STRATEGIES[name].beside]
        return _chosen(wanted, possible, reason, tried, f"{type(module).__name__} with task '{task.name}'")
    for name in named:
        if name not in possible:
            needs = NEEDS.get(STRATEGIES[name].needs, "")
            lacks = f"it needs {needs}, which {type(module).__name__} with task '{task.name}' does not have."
            raise ContinualError(
                f"task_inference={name}: {reason or lacks} Use task_inference=auto, which takes what the network"
                " allows."
            )
    failure = tried(named)
    if failure:
        raise ContinualError(
            f"task_inference={' and '.join(named)}: it does not work for {type(module).__name__} with task"
            f" '{task.name}': {failure} Use task_inference=auto, which takes what works, or leave it out:"
            " task_inference=null."
        )
    return named


def _tried(
    module: LightningModule, state: ContinualState, task: Task, options: TaskInference, names: tuple[str, ...]
) -> str:
    """What fails where some strategies are tried; empty where nothing does."""
    return rehearse(module, state, task, replace(options, strategies=names))


def _chosen(
    wanted: str, possible: list[str], reason: str, tried: Callable[[tuple[str, ...]], str], where: str
) -> tuple[str, ...]:
    """The strategies that work of those that are possible: the first two for ``auto`` and ``statistics``, else all."""
    order = [name for name in ORDER if wanted != "statistics" or not trained_heads([STRATEGIES[name]])]
    several = wanted in ("all", "unchanged")
    names = [name for name in order if name in possible]
    if several:
        others = (n for n in possible if wanted == "all" or not changes_input(STRATEGIES[n]))
        names = list(dict.fromkeys([*names, *others]))
    if several and names and not tried(tuple(names)):
        return tuple(names)
    chosen: list[str] = []
    for name in names:
        failure = tried((name,))
        if not failure:
            chosen.append(name)
            if len(chosen) == CANDIDATES and not several:
                break
        else:
            reason = f"{name} does not work: {failure}"
            warn(
                f"task_inference={wanted}: {name} is left out, since it does not work for {where}: {failure}",
                ContinualWarning,
            )
    if not chosen and several:
        raise ContinualError(f"task_inference={wanted}: {reason} Leave it out: task_inference=null.")
    return tuple(chosen)


def _possible(module: LightningModule, state: ContinualState, task: Task) -> tuple[str, list[str]]:
    """Why no task can be inferred, if so, and the strategies that the network and the task allow."""
    if task.classes is None:
        return f"task '{task.name}' has no classes to tell apart.", []
    for name in state.structure.rides:
        if (alone := state.structure.only_on(name)) is not None:
            reason = f"'{alone}' runs for task '{name}' as it does not for others, so no forward pass shows all tasks."
            state.tell(f"No task is inferred: {reason}")
            return reason, []
    bare = bare_heads(state)
    if bare:
        return f"the output layer '{bare[0]}' has no weight of its own.", []
    if idle := idle_heads(module, state.structure, state.example, state.forward):
        state.tell(f"No task is inferred: {of_idle(idle[0])}")
        return of_idle(idle[0]), []
    with eval_mode(module), torch.no_grad(), isolated_generators():
        batch = first_batch(module, task)
        watched = watch_task(module, task, state, batch)
        sites = Sites.of(module, state.structure, state.ledger, task.name, watched)
        forward = Kept(partial(predict, module, task))
        readout = read(module, [sites], partial(forward, batch))
    predictions, target = forward.found
    if readout.missing:
        state.tell("No task is inferred: no pass by which a task is scored runs the output layers of all tasks.")
        return f"the output layer '{readout.missing[0]}' does not run where task '{task.name}' is scored.", []
    if reason := _why_no_rows(state, task, target, len(predictions), len(readout.outputs)):
        return reason, []
    has = _shown(state, task, batch, (sites, readout, watched), len(predictions))
    return "", [name for name, strategy in STRATEGIES.items() if has[strategy.needs]]


def _shown(
    state: ContinualState, task: Task, batch: Any, seen: tuple[Sites, Readout, Watched], samples: int
) -> dict[str, bool]:
    """Which of the needs of strategies a network and the batches of its task meet."""
    sites, readout, watched = seen
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)
    pair = pair and not task.task_loaders.side_by_side  # else a training step's batch is no pair
    has = {"": True, "inputs": sites.inputs is not None, "hidden": bool(sites.hidden)}
    has["frozen"] = has["hidden"] and state.ledger.exact
    # A layer that reads a sample in pieces, such as row by row, shows no row of values a sample.
    one_row = sites.inputs in readout.given
    has["first"] = one_row and bool(sites.hidden) and sites.hidden[0].producer == sites.inputs
    # The heads train on the labels in the batch, whatever the task's evaluate= makes of them.
    pair = pair and positions_of(task.classes or [], batch[1], samples) is not None
    has["chain"] = one_row and bool(sites.chain) and pair and len(sites.hidden) >= len(sites.chain)
    hooked = {sites.inputs, *(site.weight for site in sites.hidden[: len(sites.chain)])}
    has["chain"] = has["chain"] and hooked <= watched.hooked
    x = batch[0] if pair and isinstance(batch[0], Tensor) and len(batch[0]) == samples else torch.empty(0)
    has["samples"] = bool(sites.hidden) and x.ndim > 1 and x[0].numel() > 1
    has["square"] = has["samples"] and x.ndim > 2 and x.shape[-1] == x.shape[-2]
    return has


def _why_no_rows(state: ContinualState, task: Task, target: Any, scored: int, rows: int) -> str:
    """Why targets do not say what each row of outputs is, if so."""
    if positions_of(task.classes or [], target, scored) is None:
        return why_no_labels(task, target, scored)
    if scored == rows:
        return ""
    reason = f"evaluate= of task '{task.name}' scores {scored} of {rows} rows of outputs."
    state.tell(f"No task is inferred: {reason}")
    return reason


def prepare(
    module: LightningModule,
    state: ContinualState,
    task: Task,
    wanted: str | tuple[str, ...],
    *,
    keep: Keep = "beside",
    options: TaskInference | None = None,
) -> None:
    """Chooses strategies where the ledger has none yet, else tries those chosen.

    Args:
        module: the network.
        state: of it, with the task begun.
        task: the current one.
        wanted: as for :func:`choose_strategies`, like ``keep``.
        keep: likewise.
        options: likewise.
    """
    known = inference_of(state.ledger)
    if known is None or not known.strategies:  # a first task without classes chooses none
        options = options or TaskInference(())
        names = choose_strategies(module, state, task, wanted, keep, options)
        known = replace(options, strategies=names, votes={} if wanted in CHOICES else None)
        if names and forward_is_told(module, state, task):
            leave_out(state, known, task, _TOLD)
        keep_inference(state.ledger, known)
    elif task.classes is not None and (alone := unseen(state, task)) is not None:
        state.tell(
            f"Task '{task.name}' cannot be inferred: '{alone}' runs for it as it does not for earlier tasks, so no"
            " forward pass shows all of them. Name this task where it is predicted."
        )
    elif task.classes is not None and state.ledger.phase == "learn":
        done = task.name in known.left_out
        told = not done and forward_is_told(module, state, task)
        failure = "" if done else _TOLD if told else rehearse(module, state, task, known)
        if failure:
            leave_out(state, known, task, failure)


def leave_out(state: ContinualState, inference: TaskInference, task: Task, reason: str) -> None:
    """Notes that a task is not inferred, and says why."""
    inference.left_out.append(task.name)
    keep_inference(state.ledger, inference)
    warn(f"Task '{task.name}' will not be inferred: {reason}", ContinualWarning)


_TOLD = (
    "its evaluate= tells the forward pass more than the input, such as which task it is, and without that its outputs"
    " are others. Name this task where it is predicted."
)
