"""What is the same run: what a folder's run was made of, and in what another start differs from it."""

from __future__ import annotations

import hashlib
import math
import types
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from lightning_cf.errors import ContinualError
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

FIXED = ("method", "isolation", "order", "tasks", "parameters", "network")
"""What no ``allow`` can change: what was learned would not fit."""

VARIABLE = (
    *("epochs", "invariance_epochs", "seed", "score_on", "pretrained", "partition", "invariance", "masking"),
    *("task_inference", "processes", "architecture", "code", "hyperparameters", "optimizer", "trainer", "callbacks"),
    *("data", "configuration"),
)
"""What ``allow`` may name, alone or with a name within it."""

_WHOLE = ("architecture", "parameters", "network", "tasks", "data", "invariance", "masking")
"""Where a name that only one of two runs has is a difference; elsewhere another version may know of more options."""

_NEWER = ("sampler", "batch", "labels")
"""What earlier versions did not know of: a name that only one of two runs has is no difference there."""

_COUNTS = (
    *(f"trainer.{name}_batches" for name in ("limit_train", "limit_val", "limit_test", "overfit")),
    "trainer.val_check_interval",
)
"""Where 1 is a batch and 1.0 is all of them."""

_HOOKS = (
    *("on_train_batch_start", "on_before_backward", "backward", "on_after_backward", "on_before_zero_grad"),
    *("on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step", "optimizer_zero_grad"),
    *("lr_scheduler_step", "on_before_batch_transfer", "on_after_batch_transfer"),
)
"""Hooks of a module that may change what a step does."""

_CHANGING = (BaseFinetuning, EarlyStopping, GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging)
"""Callbacks of Lightning's that change what is trained: one more or less is a difference."""


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


def differences(found: Any, wanted: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Where two descriptions differ: name, what was found, what is wanted now; what is unknown does not differ."""
    if any(isinstance(each, str) and each == UNKNOWN for each in (found, wanted)):
        return []
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        group, last = path.partition(".")[0], path.rpartition(".")[2]
        optional = group not in _WHOLE or last == "code"
        result = []
        for key in dict.fromkeys([*found, *wanted]):
            name = f"{path}.{key}" if path else str(key)
            if key in found and key in wanted:
                result += differences(found[key], wanted[key], name)
            elif not optional and key not in _NEWER:
                result.append((name, found.get(key, "nothing"), wanted.get(key, "nothing")))
        return result
    lists = isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted)
    if lists and all(isinstance(each, (Mapping, list, float)) for each in [*found, *wanted]):
        pairs = enumerate(zip(found, wanted, strict=True))
        return [each for i, pair in pairs for each in differences(*pair, f"{path}.{i}")]
    return [] if _same(found, wanted, path) else [(path, found, wanted)]


def check_same(folder: Any, found: Any, wanted: Any, allow: Sequence[str]) -> list[str]:
    """Compares two runs.

    Returns:
        the differences that were allowed, in words.

    Raises:
        ContinualError: names those that were not.
    """
    allowed: list[tuple[str, str]] = []
    refused: list[tuple[str, str]] = []
    for name, was, now in differences(found, wanted):
        told = f"{name}={_short(was)}, not {_short(now)}"
        meant = name.partition(".")[0] not in FIXED and any(name == a or name.startswith(f"{a}.") for a in allow)
        (allowed if meant else refused).append((name, told))
    if refused:
        shown = "; ".join(told for _, told in refused[:5])
        more = f"; and {len(refused) - 5} differences more" if len(refused) > 5 else ""
        names = list(dict.fromkeys(name.partition(".")[0] for name, _ in refused))
        fixed = [name for name in names if name in FIXED]
        way = "" if fixed else f", or allow={names} to go on with them changed"
        raise ContinualError(
            f"The folder {folder} holds a run with {shown}{more}; go on with the same settings, or choose another"
            f" folder{way}."
        )
    return [told for _, told in allowed]


def check_allow(allow: Sequence[str]) -> list[str]:
    """The names of what may differ.

    Raises:
        ContinualError: for one that is nothing that runs are told apart by, or that cannot differ.
    """
    if isinstance(allow, str) or not all(isinstance(name, str) for name in allow):
        raise ContinualError(f"runner: allow must be a list of names such as ['optimizer'], got {allow!r}.")
    for name in allow:
        group = name.partition(".")[0]
        if group in FIXED:
            raise ContinualError(
                f"runner: allow names '{name}': what was learned would not fit. Choose another folder."
            )
        if group not in VARIABLE:
            raise ContinualError(
                f"runner: allow names '{name}', which runs are not told apart by; these are: {', '.join(VARIABLE)}."
            )
    return list(allow)


def _same(found: Any, wanted: Any, path: str) -> bool:
    if path in _COUNTS and type(found) is not type(wanted):
        return False  # a batch is not all of them
    approximate = path.startswith("data.") and isinstance(found, float) and isinstance(wanted, float)
    return math.isclose(found, wanted, rel_tol=1e-4, abs_tol=1e-4) if approximate else bool(found == wanted)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


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
