"""What a run is made of, in plain values: by this a folder's run is told from another one (see ``comparison``)."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from lightning_cf.learner.state import ContinualState
from lightning_cf.lightning_api import (
    BaseFinetuning,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LightningModule,
    StochasticWeightAveraging,
    Timer,
    Trainer,
    WeightAveraging,
)
from lightning_cf.sequence.data_identity import data_identity
from lightning_cf.tasks.task import Task, supervised
from lightning_cf.utilities.describing import (
    UNKNOWN,
    constructor_names,
    describe,
    is_library,
    made_from,
    without_address,
)
from lightning_cf.utilities.randomness import isolated_generators

_HOOKS = (
    *("on_train_batch_start", "on_before_backward", "backward", "on_after_backward", "on_before_zero_grad"),
    *("on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step", "optimizer_zero_grad"),
    *("lr_scheduler_step", "on_before_batch_transfer", "on_after_batch_transfer"),
)
"""Hooks of a module that may change what a step does."""

_CHANGING = (BaseFinetuning, EarlyStopping, GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging)
"""Callbacks of Lightning's that change what is trained: one more or less is a difference."""


def run_identity(
    options: Mapping[str, Any],
    tasks: Sequence[Task],
    parts: Mapping[str, Any],
    module: LightningModule,
    state: ContinualState,
    trainer: Trainer,
    callbacks: Iterable[Callback],
    configuration: Mapping[str, Any],
) -> dict[str, Any]:
    """What must be the same when a run is taken up again; found before anything is trained.

    Args:
        options: the runner's plain ones.
        tasks: in their order.
        parts: what the runner's callbacks say of themselves, by the name of the runner's option.
        module: the network, as it will train.
        state: its structure, and the outputs of each task.
        trainer: one with the options of those that will fit it.
        callbacks: the user's.
        configuration: of the command line.
    """
    return {
        **options,
        "order": [task.name for task in tasks],
        "tasks": {task.name: task_identity(task, state.outputs_of(task)) for task in tasks},
        **parts,
        "network": {group.name: group.size for group in state.structure.groups},
        "processes": trainer.world_size,
        **network_identity(module),
        "optimizer": optimizer_identity(module),
        "trainer": trainer_identity(trainer),
        "callbacks": callbacks_identity(callbacks),
        "data": {task.name: data_identity(task, test=options["score_on"] == "test") for task in tasks},
        "configuration": dict(configuration),
    }


def task_identity(task: Task, outputs: Sequence[int]) -> dict[str, Any]:
    """What a task is: its outputs, classes, metric, how it is scored, and what it holds out."""
    metric = task.metric
    return {
        "outputs": list(outputs),
        "classes": task.classes,
        "metric": None if metric is None else _metric(metric),
        "evaluate": None if task.evaluate is supervised else describe(task.evaluate),
        "holdout": task.holdout,
    }


def network_identity(module: LightningModule) -> dict[str, Any]:
    """What a network is: shapes of its weights, its layers as they print themselves, its code and options."""
    layers = {
        path or "module": f"{_plain_name(child)}({without_address(child.extra_repr())}){_held(child)}"
        for path, child in module.named_modules()
        if not isinstance(child, Metric)
    }
    return {
        "parameters": {
            name: [list(p.shape), str(p.dtype).removeprefix("torch.")] for name, p in module.named_parameters()
        },
        "architecture": layers,
        "code": _code(module),
        "hyperparameters": {**_options(module), **_hyperparameters(module)},
    }


def optimizer_identity(module: LightningModule) -> Any:
    """The optimisers that the module configures, with their options and schedules; unknown where it needs a fit."""
    try:
        with isolated_generators(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = module.configure_optimizers()
        return [_stepping(each) for each in tree_leaves(found) if hasattr(each, "state_dict")]
    except Exception:  # whatever a user's method raises where no fit is under way
        return UNKNOWN


def trainer_identity(trainer: Trainer) -> dict[str, Any]:
    """Options of a Trainer that change what is trained; not those that say where."""
    names = (
        "precision",
        "gradient_clip_val",
        "gradient_clip_algorithm",
        "accumulate_grad_batches",
        "limit_train_batches",
        "limit_val_batches",
        "limit_test_batches",
        "overfit_batches",
        "max_steps",
        "min_steps",
        "val_check_interval",
        "check_val_every_n_epoch",
    )
    timers = (callback for callback in trainer.callbacks if isinstance(callback, Timer))  # type: ignore[attr-defined]
    ends = [seconds for seconds in (timer.time_remaining() for timer in timers) if seconds is not None]
    found = {name: describe(getattr(trainer, name, None)) for name in names}
    return found | {"max_time": min(ends, default=None)}


def callbacks_identity(callbacks: Iterable[Callback]) -> dict[str, Any]:
    """The user's callbacks by class, with plain constructor arguments; counters, paths and functions are left out."""
    found: dict[str, Any] = {kind.__name__: None for kind in _CHANGING}
    constant = (bool, int, float, str, tuple, type(None))
    for callback in callbacks:
        name = type(callback).__name__
        changing = isinstance(callback, _CHANGING)
        if is_library(type(callback).__module__) and not changing:
            continue
        named = constructor_names(callback)
        given = {
            k: v for k, v in made_from(callback).items() if k in named and isinstance(v, constant) and not _is_place(v)
        }
        while name in found and found[name] is not None:
            name += "'"
        found[name] = describe(given)
    return found


def _metric(metric: Metric) -> Any:
    return {"class": type(metric).__qualname__, **{k: describe(v) for k, v in made_from(metric).items()}}


def _plain_name(child: nn.Module) -> str:
    """The class as the user knows it, without what we derive from it."""
    kind: Any = getattr(child, "plain", None) if isinstance(getattr(type(child), "plain", None), type) else type(child)
    return str(kind.__name__).removeprefix("Continual")


def _held(child: nn.Module) -> str:
    """Which of a layer's own weights do not train, in words; empty if all do."""
    names = [name for name, p in child.named_parameters(recurse=False) if not p.requires_grad]
    return f" holds {', '.join(names)}" if names else ""


def _code(module: LightningModule) -> dict[str, Any]:
    """What the user's own classes compute and how they train, by class and method, with the methods that these call."""
    found: dict[str, Any] = {f"{_plain_name(module)}.{hook}": None for hook in _HOOKS}
    for kind in {type(child): None for child in module.modules()}:
        reached = _reached(kind)
        for base in kind.__mro__:
            if not is_library(base.__module__):
                found |= {
                    f"{base.__qualname__}.{name}": describe(vars(base)[name]) for name in reached & vars(base).keys()
                }
    return found


def _reached(kind: type) -> set[str]:
    """The names of a class' methods that its forward pass and its training call."""
    waiting, reached = ["forward", "training_step", "configure_optimizers", *_HOOKS], set[str]()
    while waiting:
        name = waiting.pop()
        for base in kind.__mro__ if name not in reached else ():
            function = vars(base).get(name)
            if isinstance(function, types.FunctionType) and not is_library(base.__module__):
                reached.add(name)
                waiting += function.__code__.co_names
    return reached


def _options(module: LightningModule) -> dict[str, Any]:
    """Plain constructor arguments that the module keeps under their name, and functions that it keeps."""
    named = constructor_names(module)
    constant = (partial, types.FunctionType, type)
    return {
        name.lstrip("_"): describe(value)
        for name, value in vars(module).items()
        if (name.lstrip("_") in named or (not name.startswith("_") and isinstance(value, constant)))
        and not isinstance(value, (nn.Module, Trainer))
    }


def _hyperparameters(module: LightningModule) -> dict[str, Any]:
    given = getattr(module, "_hparams", None) or {}
    return {str(name): describe(value) for name, value in dict(given).items() if not isinstance(value, nn.Module)}


def _is_place(value: Any) -> bool:
    return isinstance(value, str) and ("/" in value or "\\" in value)


def _stepping(found: Any) -> dict[str, Any]:
    """An optimiser's or schedule's class and plain options."""
    state = found.state_dict()
    groups = state.get("param_groups")
    if groups is None:
        options = {k: v for k, v in state.items() if isinstance(v, (bool, int, float, str)) or k == "base_lrs"}
        return {"class": type(found).__qualname__, **describe(options)}
    plain = [{k: v for k, v in group.items() if k != "params"} | {"tensors": len(group["params"])} for group in groups]
    same = plain[0] if len(plain) == 1 else None
    described: dict[str, Any] = describe(same) if same is not None else {"groups": describe(plain)}
    return {"class": type(found).__qualname__, **described}
