"""A seal on trial: what keeps a task, and what predicts then, run once before the first step on a made-up claim."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from lightning_cf.errors import ContinualError
from lightning_cf.learner.accumulating import accumulate
from lightning_cf.learner.inferring import view_of, watch_task
from lightning_cf.learner.labels import Kept, positions_of, why_no_labels
from lightning_cf.learner.state import ContinualState
from lightning_cf.lightning_api import LightningModule
from lightning_cf.network.finite import rows_finite
from lightning_cf.network.forward import call, eval_mode, fresh, same_state
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE
from lightning_cf.task_inference import STRATEGIES, Known, Sites, TaskInference, View, read
from lightning_cf.task_inference.read_variants import input_of, variants_of
from lightning_cf.task_inference.strategies import ON_TRIAL
from lightning_cf.task_inference.trained import Trained, trained_heads
from lightning_cf.task_inference.variants import VARIANTS, differs, strange
from lightning_cf.tasks.evaluation import forward_context, on_device, predict
from lightning_cf.tasks.task import Task, supervised
from lightning_cf.tasks.training_batches import first_batch
from lightning_cf.utilities.randomness import isolated_generators, keyed_generator

FEW = 1024
"""How many samples a strategy gets that cannot be fitted on a batch: the batch again and again."""


def rehearse(module: LightningModule, state: ContinualState, task: Task, inference: TaskInference) -> str:
    """Tries, on a batch of the task's data, all that its seal is to do so that the task can be inferred.

    Half of the free units are claimed at random on a copy of the ledger; heads begin, have a loss and lose what the
    claim takes; every strategy is fitted and calibrated, written down and read back, and predicts, as the task is
    scored and as nobody says which it is. Weights, buffers, ledger and generators stay what they are.

    Args:
        module: the network.
        state: of it, with the task begun and not partitioned.
        task: the current one, which has classes.
        inference: the strategies to try, and what is known of earlier tasks.

    Returns:
        what failed; empty where all of it worked.
    """
    outer = ON_TRIAL.set(True)
    try:
        with torch.no_grad(), isolated_generators(), eval_mode(module), same_state(module), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _rehearse(module, state, task, TaskInference.from_state_dict(inference.state_dict()))
    except ContinualError as error:
        return str(error)
    except Exception as error:  # whatever a strategy, a network or an evaluate= of a user's own raises
        return f"{type(error).__name__}: {error}"
    finally:
        ON_TRIAL.reset(outer)
    return ""


def _rehearse(module: LightningModule, state: ContinualState, task: Task, inference: TaskInference) -> None:
    batch = first_batch(module, task)
    batch, judging = _finite(batch), _finite(next(iter(task.judging_batches()), batch))
    for data in (batch, judging):
        predictions, target = predict(module, task, data)
        if positions_of(task.classes or [], target, len(predictions)) is None:
            raise ContinualError(why_no_labels(task, target, len(predictions)))
    watched = watch_task(module, task, state, batch)
    ledger = replace(state.ledger, inference=None)
    ledger = copy.deepcopy(ledger)
    learning = Sites.of(module, state.structure, ledger, task.name, watched)
    _claim(ledger, task)
    claimed = Sites.of(module, state.structure, ledger, task.name, watched)
    _train(module, task, inference, learning, batch)
    training = _seen(module, task, claimed, batch, ())
    held_out, _ = _seen(module, task, claimed, judging, variants_of(inference.strategies))
    known = Known(task.name, list(task.classes or []), claimed)
    accumulate(module, task, inference, known, lambda: [batch], lambda: [judging])
    _learn(inference, known, training, held_out)
    kept = TaskInference.from_state_dict(inference.state_dict())
    _predict(kept, module, Kept(partial(predict, module, task)), batch, ledger.width)
    with forward_context(module):
        x = input_of(module, on_device(module, task, batch), nested=task.evaluate is supervised)
        try:
            call(module, fresh(x))
        except Exception:  # what it takes is another part of the batch, which nobody can tell
            return
        _predict(kept, module, partial(call, module), x, ledger.width)


def _finite(batch: Any) -> Any:
    """A pair without the samples that are not finite, which the seal leaves out; another batch as it is."""
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)):
        return batch
    x, y = batch
    if not x.ndim or x.shape[:1] != y.shape[:1] or not x.is_floating_point() or x.layout != torch.strided:
        return batch
    fine = rows_finite([x])
    return batch if bool(fine.all()) or not bool(fine.any()) else (x[fine], y[fine.to(y.device)])


def _claim(ledger: NeuronLedger, task: Task) -> None:
    """Half of the free units, at random, of each group that is partitioned; all of the others.

    A task that has its claim keeps it.
    """
    if ledger.phase == "invariance":
        return
    claimed = {}
    for name, owner in ledger.owners.items():
        free = (owner == FREE).nonzero().flatten()
        count = len(free) if name in ledger.whole else max(1, len(free) // 2)
        chosen = free[torch.randperm(len(free), generator=keyed_generator("rehearsal", task.name, name))[:count]]
        claimed[name] = torch.zeros(len(owner), dtype=torch.bool).index_fill(0, chosen, True)
    ledger.claim(claimed)


def _train(module: LightningModule, task: Task, inference: TaskInference, learning: Sites, batch: Any) -> None:
    """Begins the heads and computes their loss, without a step."""
    heads = trained_heads(STRATEGIES[name] for name in inference.strategies)
    inference.forget_training()
    if not heads:
        return
    view, labels = _seen(module, task, learning, batch, ())
    inference.measure(view)
    for head in heads:
        values = inference.begin(head, task.name, view, labels, len(task.classes or []))
        head.loss(values, _changed(module, task, learning, batch, head, view), labels)
        inference.training[head.head] = values
    inference.training_sites, inference.training_task = learning, task.name


def _changed(module: LightningModule, task: Task, sites: Sites, batch: Any, head: Trained, view: View) -> View:
    """The view with those of the batch's changed inputs that a head trains over."""
    others = {}
    for change in head.changes:
        x, generator = batch[0], keyed_generator("rehearsal", task.name)
        other = strange(x, generator) if change == "strange" else VARIANTS[change](x)
        readout = read(module, [sites], partial(predict, module, task, (other, batch[1])))
        seen = View.of(readout, sites)
        others[change] = seen.part(differs(x, other).to(seen.logits.device)) if change == "strange" else seen
    return replace(view, others=others)


def _seen(
    module: LightningModule, task: Task, sites: Sites, batch: Any, variants: tuple[str, ...]
) -> tuple[View, Int64[Tensor, "samples"]]:
    found = view_of(module, task, sites, [batch], 1, variants)
    assert found is not None, "the labels were looked at"
    return found


def _learn(
    inference: TaskInference, known: Known, training: tuple[View, Int64[Tensor, "samples"]], held_out: View
) -> None:
    try:
        inference.learn(known, training, held_out)
    except Exception:  # a batch may be too few samples for a strategy of the user's own
        again = torch.arange(FEW, device=training[1].device)
        view, labels = training[0].part(again % len(training[1])), training[1][again % len(training[1])]
        inference.learn(known, (view, labels), held_out.part(again % len(held_out.logits)))


def _predict(
    inference: TaskInference, module: LightningModule, run: Callable[[Any], Any], batch: Any, width: int
) -> None:
    """Every strategy predicts, where the forward pass computes the outputs of all tasks."""
    readout = inference.read(module, run, batch)
    for name in () if readout.missing else inference.strategies:
        inference.predict(readout, width, name)
