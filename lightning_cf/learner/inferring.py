"""Task inference on a live module: what is kept of a task when it is sealed, and predictions without its name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from lightning_cf.errors import ContinualError, ContinualWarning, DivergenceWarning, warn
from lightning_cf.learner.accumulating import accumulate, elect
from lightning_cf.learner.labels import Kept, positions_of
from lightning_cf.learner.state import ContinualState
from lightning_cf.learner.together import Everyone
from lightning_cf.lightning_api import LightningModule
from lightning_cf.network.forward import call, eval_mode, fresh, same_state
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.task_inference import STRATEGIES, Known, Sites, TaskInference, View
from lightning_cf.task_inference.read_variants import input_of, read_all, unread, variants_of
from lightning_cf.task_inference.registry import check_strategies
from lightning_cf.task_inference.sites import Watched
from lightning_cf.task_inference.trained import trained_heads
from lightning_cf.task_inference.watching import watch
from lightning_cf.tasks.evaluation import forward_context, on_device, predict
from lightning_cf.tasks.task import Task, supervised
from lightning_cf.tasks.training_batches import training_batches
from lightning_cf.utilities.randomness import isolated_generators

Samples = tuple[View, Int64[Tensor, "samples"]]
"""A task's view of some samples, and their labels from 0 on."""

SAMPLES = 20_000
"""From how many of a task's training inputs its statistics are taken at most."""


def inference_of(ledger: NeuronLedger) -> TaskInference | None:
    """What a ledger keeps to infer tasks by, to be changed at will until :func:`keep_inference` puts it back."""
    return None if ledger.inference is None else TaskInference.from_state_dict(ledger.inference)


def known_inference(ledger: NeuronLedger) -> TaskInference | None:
    """What a ledger keeps to infer tasks by, to be read only: unpacked once until others are kept."""
    if ledger.inference is None:
        return None
    if ledger.read is None or ledger.read[0] is not ledger.inference:
        ledger.read = ledger.inference, TaskInference.from_state_dict(ledger.inference)
    found: TaskInference = ledger.read[1]
    check_strategies(found.strategies)  # some may have been taken out of the registry since
    return found


def keep_inference(ledger: NeuronLedger, inference: TaskInference) -> None:
    """Puts it back into the ledger, which goes into checkpoints and to other processes."""
    ledger.inference = inference.state_dict()


def bare_heads(state: ContinualState) -> list[str]:
    """Output layers whose weight is no parameter of that name, such as a parametrised one."""
    return [layer for layer in state.structure.head.layers if f"{layer}.weight" not in state.structure.entries]


def remember_task(
    module: LightningModule,
    task: Task,
    state: ContinualState,
    *,
    sealed: bool = True,
    everyone: Everyone | None = None,
) -> None:
    """Keeps what the strategies need of a task that was just sealed or claimed; nothing where none was chosen.

    Args:
        module: the network.
        task: just sealed or claimed.
        state: of the network.
        sealed: whether it was sealed.
        everyone: all processes, if there are several, to share in what reads all of the task's data.
    """
    inference = inference_of(state.ledger)
    if inference is None or not inference.strategies or unseen(state, task):
        return
    known = None
    if task.classes is not None and task.name not in inference.left_out:
        first: list[bool] = []
        with isolated_generators(), module.register_forward_pre_hook(partial(_note, first), with_kwargs=True):
            sites, training = look(module, task, state, training_batches(module, task), SAMPLES)
            variants, held_out = variants_of(inference.strategies), None
            if sites is not None and training is not None:
                held_out = view_of(module, task, sites, task.judging_batches(), SAMPLES, variants)
        if sites is None or training is None or held_out is None:
            warn(
                f"Task '{task.name}' cannot be inferred: its targets are not one of its classes for each sample.",
                ContinualWarning,
            )
        else:
            known = Known(task.name, list(task.classes), sites)
            training, held_out = finite_samples(training, task), finite_samples(held_out, task)
            with isolated_generators():
                accumulate(module, task, inference, known, everyone=everyone)
        inference.nested = inference.nested or first[:1] == [True]
    if known is not None and training is not None and held_out is not None:
        _begin_untrained(inference, known, training)
        inference.learn(known, training, held_out[0], sealed=sealed)
        if sealed:
            with isolated_generators():
                elect(module, task, inference, task.judging_batches())
    elif sealed:
        inference.forget_training()
    keep_inference(state.ledger, inference)


def _note(nested: list[bool], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Whether the first argument of a forward pass is a list or a tuple."""
    nested.append(isinstance(next(iter((*args, *kwargs.values())), None), (list, tuple)))


def _begin_untrained(inference: TaskInference, known: Known, training: tuple[View, Int64[Tensor, "samples"]]) -> None:
    """Heads that no training step met, since there was none, are kept as they begin."""
    if inference.training_task not in ("", known.name):
        inference.forget_training()
    for head in trained_heads(STRATEGIES[name] for name in inference.strategies):
        if head.head not in inference.training:
            inference.measure(training[0])
            inference.training[head.head] = inference.begin(head, known.name, *training, len(known.classes))
            inference.training_sites, inference.training_task = known.sites, known.name
            warn(
                f"task_inference: the head of {head.head} was never trained on task '{known.name}', since its fits took"
                " no training step with a TaskInferenceCallback. Use a strategy that is not trained, such as"
                " subspaces, or train.",
                ContinualWarning,
            )


def look(
    module: LightningModule, task: Task, state: ContinualState, batches: Iterable[Any], count: int
) -> tuple[Sites | None, tuple[View, Int64[Tensor, "samples"]] | None]:
    """Where a task's scores may look, as the first batch shows, and its view of some of its data.

    Args:
        module: the network.
        task: whose units and outputs are looked at.
        state: of the network.
        batches: the data; none gives None.
        count: how many samples to look at, at least.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return None, None
    with isolated_generators():
        watched = watch_task(module, task, state, first)
    sites = Sites.of(module, state.structure, state.ledger, task.name, watched)
    return sites, view_of(module, task, sites, chain([first], batches), count)


@torch.no_grad()
def watch_task(module: LightningModule, task: Task, state: ContinualState, batch: Any) -> Watched:
    """Of which layers one can see what they read: as the task is scored, and as predictions without a name run."""
    weights = [name for name, _ in module.named_parameters() if name in state.structure.entries]
    heads = Sites.output_layers(state.structure)
    run = partial(predict, module, task)
    with eval_mode(module), same_state(module):
        count = len(run(fresh(batch))[0])
    found = watch(module, weights, heads, run, batch, count)
    with suppress(Exception):  # whatever a user's forward pass raises for inputs that it does not take
        with forward_context(module):
            x = input_of(module, on_device(module, task, batch), nested=task.evaluate is supervised)
            alone = watch(module, weights, heads, partial(call, module), x, count, found)
        if alone.whole:
            found = found.both(alone)
    return replace(found, unread=unread(module, lambda given: run(given)[0], batch))


def unseen(state: ContinualState, task: Task) -> str | None:
    """What a task runs in a way of its own, so that its sub-network cannot be looked at beside the others'."""
    return state.structure.only_on(task.name)


def highest_output(module: LightningModule, state: ContinualState, tasks: Iterable[Task]) -> TaskInference | None:
    """Inference by the highest of all outputs of some tasks, which needs nothing kept; None for tasks without classes.

    Args:
        module: the network.
        state: of it.
        tasks: those that were learned.
    """
    known = []
    for task in tasks:
        if task.classes is None or bare_heads(state):
            return None
        sites = Sites(None, (), Sites.output_layers(state.structure), torch.tensor(state.outputs_of(task)))
        calibration = {"joint": torch.tensor([0.0, 1.0, 0.0])}
        known.append(Known(task.name, list(task.classes), sites, {"joint": {}}, calibration))
    return TaskInference(("joint",), known)


def finite_samples(found: Samples, task: Task, *, quiet: bool = False) -> tuple[View, Int64[Tensor, "_"]]:
    """Those samples of a task of which everything that its scores look at is finite, and their labels.

    Args:
        found: its view of samples, and labels.
        task: for messages.
        quiet: whether to leave out samples without a warning.

    Raises:
        ContinualError: if there is none.
    """
    view, labels = found
    fine = view.finite()
    if bool(fine.all()):
        return found
    bad, count = int((~fine).sum()), len(fine)
    if bad == count:
        raise ContinualError(
            f"Task '{task.name}': no sample is finite in what the network shows of it, so nothing can be kept to infer"
            " the task by. Look at its data, or leave task inference out."
        )
    if not quiet:
        warn(
            f"Task '{task.name}': {bad} of {count} samples are not finite in what the network shows of them; what"
            " infers the task is found on the others.",
            DivergenceWarning,
        )
    return view.part(fine), labels[fine.to(labels.device)]


def view_of(
    module: LightningModule,
    task: Task,
    sites: Sites,
    batches: Iterable[Any],
    count: int,
    variants: Sequence[str] = (),
) -> tuple[View, Int64[Tensor, "samples"]] | None:
    """A task's view of some of its data, and the labels from 0 on; None where targets are no labels.

    Data that come class by class are read on until a quarter of its fair share is seen of each, or four times as much.
    """
    views, labels, seen = [], [], 0
    for batch in batches:
        forward = Kept(partial(predict, module, task))
        readout = read_all(module, [sites], forward, batch, variants)
        own = positions_of(task.classes or [], forward.found[1], len(readout.outputs))
        if own is None:
            return None
        views.append(View.of(readout, sites))
        labels.append(own)
        seen += len(own)
        if seen >= count and (seen >= 4 * count or _all_there(torch.cat(labels), len(task.classes or []))):
            break
    return (View.joined(views), torch.cat(labels)) if views else None


def _all_there(labels: Int64[Tensor, "samples"], classes: int) -> bool:
    """Whether a quarter of an equal share of the samples is of each class at least."""
    return bool((labels.bincount(minlength=classes) * 4 * classes >= len(labels)).all())
