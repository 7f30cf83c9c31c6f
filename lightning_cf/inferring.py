"""Task inference on a live module: what is kept of a task when it is sealed, and predictions without its name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int64
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_cf.errors import ContinualError, DivergenceWarning
from lightning_cf.evaluation import forward_context, predict
from lightning_cf.finite import rows_finite
from lightning_cf.ledger import NeuronLedger
from lightning_cf.state import ContinualState, ledger_of
from lightning_cf.structure import call, eval_mode, in_precision_of
from lightning_cf.task_inference import (
    STRATEGIES,
    Known,
    Prediction,
    Sites,
    TaskInference,
    View,
    check_strategies,
    read,
)
from lightning_cf.task_inference.inference import read_all, variants_of
from lightning_cf.task_inference.strategies import CHOICES, NEEDS
from lightning_cf.task_inference.trained import changes_input
from lightning_cf.tasks import Task

Samples = tuple[View, Int64[Tensor, "samples"]]
"""A task's view of some samples, and their labels from 0 on."""

SAMPLES = 20_000
"""From how many of a task's training inputs its statistics are taken at most."""

ORDER = ("reconstruction_logits", "subspaces", "energy")
"""The best ones first, as measured in benchmarks; the first one is trained with the network."""


def inference_of(ledger: NeuronLedger) -> TaskInference | None:
    """What a ledger keeps to infer tasks by."""
    return None if ledger.inference is None else TaskInference.from_state_dict(ledger.inference)


def keep_inference(ledger: NeuronLedger, inference: TaskInference) -> None:
    """Puts it back into the ledger, which goes into checkpoints and to other processes."""
    ledger.inference = inference.state_dict()


def positions_of(labels: list[int], target: Any, batch: int) -> Int64[Tensor, "batch"] | None:
    """Which of the labels each target is; None where the targets are no labels, one a sample."""
    if not isinstance(target, Tensor) or target.is_floating_point() or target.shape != (batch,):
        return None
    found = (target[:, None] == torch.tensor(labels, device=target.device)).long()
    return found.argmax(dim=1) if bool(found.any(dim=1).all()) else None


def choose_strategies(module: LightningModule, state: ContinualState, task: Task, wanted: str) -> tuple[str, ...]:
    """The strategies to fit, the one that predicts first; none where tasks cannot be inferred and nobody insists.

    Args:
        module: the network.
        state: of it, with the task begun.
        task: the first one.
        wanted: a strategy's name; ``auto`` for the best that the network allows, ``statistics`` for the best that
            leaves training as it is, ``all`` for all that the network allows, ``unchanged`` for those of them that do
            not train over changed inputs.

    Raises:
        ContinualError: for a strategy that there is not, or that the network or the task does not allow.
    """
    if wanted not in CHOICES:
        check_strategies([wanted])
    reason, possible = _possible(module, state, task)
    if wanted in CHOICES:
        order = ORDER[1:] if wanted == "statistics" else ORDER
        best = next((name for name in order if name in possible), None)
        several = wanted in ("all", "unchanged")
        if best is None and several:
            raise ContinualError(f"task_inference={wanted}: {reason} Leave it out: task_inference=null.")
        if best is None:
            return ()
        others = (n for n in possible if n != best and (wanted == "all" or not changes_input(STRATEGIES[n])))
        return (best, *others) if several else (best,)
    if wanted not in possible:
        needs = NEEDS.get(STRATEGIES[wanted].needs, "")
        lacks = f"it needs {needs}, which {type(module).__name__} with task '{task.name}' does not have."
        raise ContinualError(
            f"task_inference={wanted}: {reason or lacks} Use task_inference=auto, which takes what the network allows."
        )
    return (wanted,)


def _possible(module: LightningModule, state: ContinualState, task: Task) -> tuple[str, list[str]]:
    """Why no task can be inferred, if so, and the strategies that the network and the task allow."""
    if task.classes is None:
        return f"task '{task.name}' has no classes to tell apart.", []
    bare = _bare_heads(state)
    if bare:
        return f"the output layer '{bare[0]}' has no weight of its own.", []
    sites = Sites.of(module, state.structure, state.ledger, task.name)
    with eval_mode(module), torch.no_grad(), isolate_rng():
        batch = task.check_data()
        forward = Kept(partial(predict, module, task))
        readout = read(module, [sites], partial(forward, batch))
    predictions, target = forward.found
    if readout.missing:
        return f"no forward pass computes the outputs of all tasks: '{readout.missing[0]}' does not run.", []
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)
    if positions_of(task.classes, target, len(predictions)) is None:
        return f"the targets of task '{task.name}' are no labels, one a sample.", []
    has = {"": True, "inputs": sites.inputs is not None, "hidden": bool(sites.hidden)}
    # A layer that reads a sample in pieces, such as row by row, shows no row of values a sample.
    one_row = sites.inputs in readout.given
    has["first"] = one_row and bool(sites.hidden) and sites.hidden[0].producer == sites.inputs
    # The heads train on the labels in the batch, whatever the task's evaluate= makes of them.
    pair = pair and positions_of(task.classes, batch[1], len(predictions)) is not None
    has["chain"] = one_row and bool(sites.chain) and pair and len(sites.hidden) >= len(sites.chain)
    x = batch[0] if pair and isinstance(batch[0], Tensor) and len(batch[0]) == len(predictions) else torch.empty(0)
    has["samples"] = bool(sites.hidden) and x.ndim > 1 and x[0].numel() > 1
    has["square"] = has["samples"] and x.ndim > 2 and x.shape[-1] == x.shape[-2]
    return "", [name for name, strategy in STRATEGIES.items() if has[strategy.needs]]


def _bare_heads(state: ContinualState) -> list[str]:
    """Output layers whose weight is no parameter of that name, such as a parametrised one."""
    return [layer for layer in state.structure.head.layers if f"{layer}.weight" not in state.structure.entries]


def remember_task(module: LightningModule, task: Task, state: ContinualState, *, sealed: bool = True) -> None:
    """Keeps what the strategies need of a task that was just sealed or claimed; nothing where none was chosen."""
    inference = inference_of(state.ledger)
    if inference is None or not inference.strategies or task.classes is None:
        return
    sites = Sites.of(module, state.structure, state.ledger, task.name)
    with isolate_rng():
        training = view_of(module, task, sites, task.train_dataloader(), SAMPLES)
        variants = variants_of(inference.strategies)
        held_out = view_of(module, task, sites, task.judging_batches(), SAMPLES, variants)
    if training is None or held_out is None:
        warnings.warn(f"Task '{task.name}' cannot be inferred: its targets are no labels, one a sample.", stacklevel=2)
        return
    training, held_out = (finite_samples(found, task) for found in (training, held_out))
    inference.learn(Known(task.name, list(task.classes), sites), training, held_out[0], sealed=sealed)
    keep_inference(state.ledger, inference)


def highest_output(module: LightningModule, state: ContinualState, tasks: Iterable[Task]) -> TaskInference | None:
    """Inference by the highest of all outputs of some tasks, which needs nothing kept; None for tasks without classes.

    Args:
        module: the network.
        state: of it.
        tasks: those that were learned.
    """
    known = []
    for task in tasks:
        if task.classes is None or _bare_heads(state):
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
        warnings.warn(
            f"Task '{task.name}': {bad} of {count} samples are not finite in what the network shows of them; what"
            " infers the task is found on the others.",
            DivergenceWarning,
            stacklevel=3,
        )
    return view.part(fine), labels[fine.to(labels.device)]


class Kept:
    """A function whose last result is kept.

    Args:
        function: what to call.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function
        self.found: Any = None

    def __call__(self, batch: Any) -> None:
        """Calls it."""
        self.found = self.function(batch)


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


@torch.no_grad()
def predict_any(module: LightningModule, x: Any, strategy: str | None = None) -> Prediction:
    """Predicts without a task's name.

    Args:
        module: a module whose ledger keeps what tasks are inferred by.
        x: a batch of inputs, as the module's forward pass takes it; a tuple for several.
        strategy: another one of those that were fitted than the first.

    Raises:
        ContinualError: if no task was learned that can be inferred.
    """
    ledger = ledger_of(module)
    inference = None if ledger is None else inference_of(ledger)
    if ledger is None or inference is None or not inference.tasks:
        raise ContinualError(
            f"{type(module).__name__} knows no task that it could infer: seal one first, with a TaskInferenceCallback"
            " in the fit (a ContinualModule brings it), on tasks with classes."
        )
    x = in_precision_of(module, x)

    def found_of(x: Any) -> Prediction:
        with forward_context(module):
            readout = inference.read(module, partial(call, module), x, strategy or inference.strategies[0])
        if readout.missing:
            raise ContinualError(
                f"'{readout.missing[0]}' does not run in the forward pass, so its task cannot be compared with others."
                " Let forward compute the outputs of all tasks, side by side."
            )
        strange = _infinite(x) if readout.inputs is None else None
        return inference.predict(readout, ledger.width, strategy, none=strange)

    found, fine = found_of(x), _rows_fine(x)
    if fine is not None and bool(fine.any()) and not bool(fine.all()):
        # Another pass for the others, as if those rows were like any: a network may compute with the whole batch.
        others = found_of(_with_other_rows(x, fine))
        pairs = zip(others, found, strict=True)
        found = Prediction(*(torch.where(fine.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs))
    places = torch.tensor([*(ledger.index(task.name) for task in inference.tasks), -1], device=found.tasks.device)
    return found._replace(tasks=places[found.tasks])


def _rows_of(x: Any) -> list[Tensor]:
    """The floating-point tensors of an input that hold one row a sample."""
    given = [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.ndim]
    return [leaf for leaf in given if leaf.is_floating_point() and len(leaf) == len(given[0])]


def _rows_fine(x: Any) -> Bool[Tensor, "batch"] | None:
    """Which rows of an input are finite; None where it has no numbers that might not be."""
    rows = _rows_of(x)
    return rows_finite(rows) if rows else None


def _infinite(x: Any) -> Bool[Tensor, "batch"] | None:
    """Which rows of an input hold infinite numbers, which gates and the like make finite."""
    rows = _rows_of(x)
    return torch.stack([leaf.reshape(len(leaf), -1).isinf().any(dim=1) for leaf in rows]).any(dim=0) if rows else None


def _with_other_rows(x: Any, fine: Bool[Tensor, "batch"]) -> Any:
    """An input with a copy of its first finite row in the place of each that is not."""
    chosen = torch.where(fine, torch.arange(len(fine), device=fine.device), fine.int().argmax())
    rows = {id(leaf) for leaf in _rows_of(x)}
    return tree_map_only(Tensor, lambda leaf: leaf[chosen.to(leaf.device)] if id(leaf) in rows else leaf, x)
