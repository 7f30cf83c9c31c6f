"""Whether a training step takes a task's inputs in the precision in which they come."""

from __future__ import annotations

import copy
import inspect
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch

from lightning_cf.errors import ContinualError
from lightning_cf.lightning_api import LightningModule, Trainer
from lightning_cf.network.forward import fresh, in_precision_of, tensors_of
from lightning_cf.utilities.randomness import isolated_generators


def check_inputs(trainer: Trainer, module: LightningModule, task: str, batch: Any) -> None:
    """Tries the training step on a copy, where a batch holds floating-point numbers of another type than the weights.

    Tracing and scoring convert such inputs, a training step does not; it may do so itself, or not mind.

    Args:
        trainer: whose precision holds.
        module: with its weights in that precision.
        task: its name.
        batch: as the training step would get it.

    Raises:
        ContinualError: if the step fails on the batch as it is, and not on a converted one.
    """
    own = {p.dtype for p in module.parameters() if p.is_floating_point()}
    found = {x.dtype for x in tensors_of(batch) if x.is_floating_point()}
    if not own or found <= own:
        return
    error = _failure(trainer, module, batch)
    if error is not None and _failure(trainer, module, in_precision_of(module, batch)) is None:
        theirs, ours = (", ".join(sorted(str(x).removeprefix("torch.") for x in types)) for types in (found - own, own))
        raise ContinualError(
            f"Task '{task}': its inputs are {theirs}, the weights {ours}, and the training step does not take them:"
            f" {error}. Convert the inputs in the data set, or choose the Trainer's precision to fit."
        ) from error


def _failure(trainer: Trainer, module: LightningModule, batch: Any) -> Exception | None:
    """What a training step on a copy of the module raises, if anything; it logs nothing and moves nothing."""
    context: AbstractContextManager[Any] = trainer.precision_plugin.train_step_context()
    try:
        with isolated_generators(), warnings.catch_warnings(), torch.enable_grad(), context:
            warnings.simplefilter("ignore")  # about logging without a Trainer
            trial = copy.deepcopy(module)
            trial.train()
            trial.training_step(*_arguments(trial, fresh(batch)))
    except Exception as error:  # whatever a user's step raises, or a module that cannot be copied
        return error
    return None


def _arguments(module: LightningModule, batch: Any) -> list[Any]:
    """What Lightning hands to the training step, the batch and its number as far as they are asked for."""
    asked = inspect.signature(module.training_step).parameters.values()
    several = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in asked) or len(asked) > 1
    return [batch, 0] if several else [batch]
