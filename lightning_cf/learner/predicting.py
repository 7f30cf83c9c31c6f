"""Predictions for inputs of which nobody says whose task they are."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_cf.errors import ContinualError
from lightning_cf.learner.inferring import known_inference
from lightning_cf.learner.keeping import ledger_of
from lightning_cf.lightning_api import LightningModule, is_overridden
from lightning_cf.network.finite import infinite_rows, rows_finite, rows_of, sample_axis
from lightning_cf.network.forward import call, in_precision_of
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.task_inference import Prediction, TaskInference
from lightning_cf.task_inference.read_variants import as_called
from lightning_cf.tasks.evaluation import forward_context


@torch.no_grad()
def predict_any(
    module: LightningModule, x: Any, strategy: str | None = None, among: str | Sequence[str] | None = None
) -> Prediction:
    """Predicts without a task's name, or where it is known to be one of some tasks.

    Args:
        module: a module whose ledger keeps what tasks are inferred by.
        x: a batch of inputs, as the module's forward pass takes it; a tuple or a list for several.
        strategy: another one of those that were fitted than the first.
        among: names of the tasks that the inputs can be of, or the one task's; default all that were learned.

    Raises:
        ContinualError: if no task was learned that can be inferred, a name is not one of these, or the forward pass
            takes other inputs.
    """
    ledger, inference = _known(module)
    x = as_called(module, in_precision_of(module, x), nested=inference.nested)
    chosen = _positions(inference, among)
    turned = any(task.sites.turned for task in inference.tasks)

    def found_of(x: Any) -> Prediction:
        try:
            with forward_context(module):
                run = partial(call, module)
                readout = inference.read(module, run, x, strategy or inference.strategies[0], alone=True)
        except TypeError:
            _check_call(module, x)
            raise
        if readout.missing:
            raise ContinualError(
                f"'{readout.missing[0]}' does not run in the forward pass, so its task cannot be compared with others."
                " Let forward compute the outputs of all tasks, side by side."
            )
        rows = [] if readout.inputs is not None else rows_of(x, len(readout.outputs), turned=turned)
        strange = infinite_rows(rows)
        return inference.predict(readout, ledger.width, strategy, none=strange, among=chosen)

    found = found_of(x)
    rows = rows_of(x, len(found.classes), turned=turned)
    fine = None if all(bool(part.isfinite().all()) for part in rows) else rows_finite(rows)
    if fine is not None and bool(fine.any()):
        # Another pass for the others, as if those rows were like any: a network may compute with the whole batch.
        others = found_of(_with_other_rows(x, fine, turned=turned))
        pairs = zip(others, found, strict=True)
        found = Prediction(*(torch.where(fine.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs))
    places = torch.tensor([*(ledger.index(task.name) for task in inference.tasks), -1], device=found.tasks.device)
    return found._replace(tasks=places[found.tasks])


def _known(module: LightningModule) -> tuple[NeuronLedger, TaskInference]:
    """What a module's ledger keeps to infer tasks by.

    Raises:
        ContinualError: if there is nothing, or no forward pass to do it in.
    """
    ledger = ledger_of(module)
    inference = None if ledger is None else known_inference(ledger)
    if inference is not None and not inference.strategies:
        raise ContinualError(
            f"No strategy infers the tasks of {type(module).__name__}: its network or its tasks allow none, such as"
            " where a sample has many labels. Name the task and read its outputs, which outputs_of(NAME) of a"
            " ContinualModule numbers."
        )
    if ledger is None or inference is None or not inference.tasks:
        raise ContinualError(
            f"{type(module).__name__} knows no task that it could infer: seal one first, with a TaskInferenceCallback"
            " in the fit (a ContinualModule brings it), on tasks with classes."
        )
    if not is_overridden("forward", module, parent=LightningModule):
        raise ContinualError(
            f"Predictions without a task's name run the forward pass, but {type(module).__name__} has none. Define"
            " forward(self, x): it takes a batch of inputs and computes the outputs of all tasks."
        )
    return ledger, inference


def _check_call(module: LightningModule, x: Any) -> None:
    """Raises ContinualError for an input that is not all that the forward pass takes, or more."""
    parts = x if isinstance(x, tuple) else (x,)
    try:
        inspect.signature(module.forward).bind(*parts)
    except TypeError as error:
        raise ContinualError(
            f"Predictions without a task's name run the forward pass of {type(module).__name__} on x, which it cannot:"
            f" {error}. Give all that forward takes, several in a tuple: predict((x, y)). What only a loss reads, such"
            " as labels, may have a default: forward(self, x, y=None). If it takes the task's name, name the task"
            " instead and read its outputs, which outputs_of(NAME) of a ContinualModule numbers."
        ) from error
    except ValueError:  # as where it is no function of Python's
        pass


def _positions(inference: TaskInference, among: str | Sequence[str] | None) -> list[int] | None:
    """Where tasks stand, by their names.

    Raises:
        ContinualError: for what is no name of a task that can be inferred.
    """
    if among is None:
        return None
    names = [task.name for task in inference.tasks]
    wanted = [among] if isinstance(among, str) or not isinstance(among, Iterable) else list(among)
    strange = [name for name in wanted if name not in names]
    if strange or not wanted:
        got = repr(strange[0]) if strange else "none"
        raise ContinualError(f"among: must name tasks that can be inferred ({', '.join(names)}), got {got}.")
    return [names.index(name) for name in wanted]


def _with_other_rows(x: Any, fine: Bool[Tensor, "batch"], *, turned: bool) -> Any:
    """An input with a copy of its first finite sample in the place of each that is not."""
    chosen = torch.where(fine, torch.arange(len(fine), device=fine.device), fine.int().argmax())

    def copied(leaf: Tensor) -> Tensor:
        axis = sample_axis(leaf, len(fine), turned=turned) if leaf.is_floating_point() else None
        return leaf if axis is None else leaf.index_select(axis, chosen.to(leaf.device))

    return tree_map_only(Tensor, copied, x)
