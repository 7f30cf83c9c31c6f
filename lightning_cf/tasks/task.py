"""A task: the user's own data with a name, its classes, its outputs and how it is scored."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torchmetrics import Metric

from lightning_cf.errors import ContinualError, check_function, check_kind, check_list, check_share, check_text
from lightning_cf.lightning_api import LightningDataModule, LightningModule, check_same_lightning, is_overridden
from lightning_cf.tasks.contexts import Draws
from lightning_cf.tasks.loaders import STAGES, Loaders
from lightning_cf.tasks.reading import Reading
from lightning_cf.tasks.targets import left_out, strange

Batches = Iterable[Any]

_WATCHED = ("setup", "teardown", "val_dataloader", "test_dataloader")
"""Hooks of the data that open loaders, or change what is behind them."""

_HOOKS = (
    "prepare_data",
    "predict_dataloader",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "on_exception",
    "state_dict",
    "load_state_dict",
)


class Task(LightningDataModule):
    """One task of a sequence: a datamodule around the user's own, which the callbacks find as ``trainer.datamodule``.

    >>> from lightning.pytorch.demos.boring_classes import BoringDataModule
    >>> task = Task("zero-one", BoringDataModule(), classes=[0, 1])
    >>> task.name, task.classes, task.outputs
    ('zero-one', [0, 1], None)

    Args:
        name: what the task is called in the ledger, in files and in plots; each task has a name of its own.
        data: a datamodule, or loaders by stage: ``{"train": ..., "val": ..., "test": ...}``.
        classes: the labels in the data; of a list, an array, a tensor or a series, as ``np.unique(y)`` gives.
        outputs: the head's columns that the task owns, one a class. Default: equal to its classes; in a
            ``ContinualModule``, columns of its own where an earlier task has those already. Without classes: those that
            ``evaluate`` returns, such as all of a head of the task's own.
        metric: any torchmetrics metric; default the accuracy over the task's own outputs.
        evaluate: gives predictions and targets of a batch; default ``x, y = batch; return module(x), y``, or
            ``module(x, y), y`` where the module's forward pass needs two arguments.
        holdout: share of the training data that is kept for judging partitions where the data has no validation set.
    """

    def __init__(
        self,
        name: str,
        data: LightningDataModule | Mapping[str, Any],
        *,
        classes: Iterable[Any] | None = None,
        outputs: Iterable[Any] | None = None,
        metric: Metric | None = None,
        evaluate: Callable[[LightningModule, Any], tuple[Tensor, Tensor]] | None = None,
        holdout: float = 0.1,
    ) -> None:
        super().__init__()
        self.name: str = _checked_name(name)
        self.classes = None if classes is None else _checked_columns(name, "classes", classes)
        self.outputs = None if outputs is None else _checked_columns(name, "outputs", outputs)
        _check_head(name, self.classes, self.outputs, evaluates=evaluate is not None)
        if metric is not None:
            check_kind(f"Task '{name}'", "metric", metric, Metric, "one torchmetrics Metric, such as BinaryAccuracy()")
        self.metric = metric
        if evaluate is not None:
            check_function(f"Task '{name}'", "evaluate", evaluate, "module, batch")
        self.evaluate = supervised if evaluate is None else evaluate
        self.holdout = check_share(f"Task '{name}'", "holdout", holdout)
        if holdout == 1:
            raise ContinualError(f"Task '{name}': holdout=1 leaves nothing to train on; keep it below 1.")
        self.task_loaders = Loaders(self)
        self.host: Any = None
        """The Trainer that the data know while none fits them: of a runner, which reads them between fits too."""
        self.torn_down: set[str] = set()
        self._told: set[int] = set()
        """Void labels that a warning named."""
        self._draws: dict[str, Draws] = {}
        """What the data draw when they are set up: for all stages, under no name, or for one alone."""
        self._set_first: tuple[str, set[str]] | None = None
        """The stage of the data's first setup, and the attributes that it set."""
        check_same_lightning(f"Task '{name}'", data)
        self.data = data if isinstance(data, LightningDataModule) else _Loaders(name, data)
        self._pass_on_hooks()

    def _pass_on_hooks(self) -> None:
        """Gives the data's hooks and options as the task's own.

        Lightning asks of each hook whether it is overridden, so only those that the data overrides are passed on.
        """
        for hook in _HOOKS:
            if is_overridden(hook, self.data, parent=LightningDataModule):
                setattr(self, hook, getattr(self.data, hook))
        for hook in _WATCHED:
            if is_overridden(hook, self.data, parent=LightningDataModule):
                setattr(self, hook, getattr(self, f"_{hook}"))
        for option in ("prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices"):
            setattr(self, option, getattr(self.data, option))

    def __getattr__(self, name: str) -> Any:
        """What the task does not have is the data's: its batch size, its number of classes."""
        if name.startswith("__") or "data" not in self.__dict__:
            raise AttributeError(f"Task has no attribute '{name}'.")
        return getattr(self.data, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = "data" not in self.__dict__ or name in self.__dict__ or hasattr(type(self), name)
        if not own and hasattr(self.data, name):
            setattr(self.data, name, value)
            self.task_loaders.drop(*STAGES)  # such as another batch size
            return
        another = name == "trainer" and value is not self.__dict__.get("trainer")
        super().__setattr__(name, value)
        if name == "trainer" and "data" in self.__dict__:
            self.data.trainer = value
            if value is not None:
                self.task_loaders.attach(value, another=another)

    def let_go(self) -> None:
        """Forgets the Trainer of the last fit; another one that fits the same data now stays known to it."""
        if self.data.trainer is self.trainer:
            self.trainer = self.host
        else:
            self.__dict__["trainer"] = self.host

    def set_up(self, stage: str) -> None:
        """Sets the data up anew for a stage whose loaders are to be read, if the end of a fit tore them down."""
        wanted = "test" if stage == "test" else "fit"
        if wanted in self.torn_down:
            self.torn_down.discard(wanted)
            self._set_data_up(wanted)

    @property
    def has_validation(self) -> bool:
        """Whether the data brings a validation set of its own."""
        return self.task_loaders.validates()

    def train_dataloader(self) -> Any:
        """The data's training loader, less what is held out where there is no validation set."""
        return self.task_loaders.hand("train")

    def judging_batches(self) -> Reading:
        """What a partition is judged on: validation data, else held-out or, failing that, all training data."""
        return self.task_loaders.judging()

    def check_data(self) -> Any:
        """Raises ContinualError if the task has no training data that can be read again; returns the first batch."""
        for batch in self.task_loaders.training():
            if self.evaluate is supervised or self.task_loaders.place_of_targets is not None:
                self.check_labels(batch)  # else it may number them anew
            return batch
        raise ContinualError(
            f"Task '{self.name}' has no training data: its train_dataloader() yields no batch with samples. Check the"
            " data set's length, its filter of classes, and drop_last with the batch size."
        )

    def check_labels(self, batch: Any) -> None:
        """Raises ContinualError for a batch with labels that are no classes of the task's."""
        labels = self.task_loaders.labels_of(batch)
        found = [] if self.classes is None or labels is None else strange(labels, self.classes, left_out(self))
        if found:
            raise ContinualError(
                f"Task '{self.name}' declares classes {self.classes}, but its data holds label {found[0]};"
                " correct classes=[...] or the data."
            )

    def _val_dataloader(self) -> Any:
        return self.task_loaders.hand("val")

    def _test_dataloader(self) -> Any:
        return self.task_loaders.hand("test")

    def _setup(self, stage: Any = None) -> None:
        self.task_loaders.drop(*{"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, STAGES))
        self.torn_down -= {"fit", "test"} if stage is None else {stage}
        self._set_data_up(stage)

    def _set_data_up(self, stage: Any) -> None:
        """Random splits of the data come out alike whenever they are drawn, for whatever stage.

        What judges or tests one fit is not trained on in another. Data that are drawn for one stage alone stay as they
        are drawn: the same draws for the samples of several stages would make them the same samples.
        """
        name, before = str(getattr(stage, "value", stage)), dict(vars(self.data))
        with self._draws.setdefault(name if name in self._draws else "", Draws()).repeated() as again:
            self.data.setup(stage)
        changed = {key for key, value in vars(self.data).items() if before.get(key) is not value}
        if self._set_first is None:
            self._set_first = name, changed
        first, shared = self._set_first
        if any(again) and name not in (first, *self._draws) and shared.isdisjoint(changed):
            with self._draws.setdefault(name, Draws()).repeated():
                self.data.setup(stage)

    def _teardown(self, stage: Any = None) -> None:
        self.task_loaders.drop(*STAGES)
        self.data.teardown(stage)
        self.torn_down = {"fit", "test"} if is_overridden("setup", self.data, parent=LightningDataModule) else set()


class _Loaders(LightningDataModule):
    """Loaders by stage, as a datamodule that overrides just the stages given."""

    def __init__(self, name: str, loaders: Mapping[str, Any]) -> None:
        super().__init__()
        wanted = f"Task '{name}': data must be a LightningDataModule or loaders by stage, with 'train' and perhaps"
        wanted += " 'val', 'test', 'predict'"
        if not isinstance(loaders, Mapping):
            kind = f"the class {loaders.__name__}" if isinstance(loaders, type) else f"a {type(loaders).__name__}"
            raise ContinualError(f"{wanted}: {{'train': DataLoader(...), 'val': DataLoader(...)}}; got {kind}.")
        unknown = set(loaders) - {"train", "val", "test", "predict"}
        if unknown or "train" not in loaders:
            raise ContinualError(f"{wanted}; got the stages {sorted(map(str, loaders))}.")
        for stage, loader in loaders.items():
            if stage != "train" and loader is None:
                continue  # there is none, as Lightning takes it
            if isinstance(loader, (str, bytes)) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
                raise ContinualError(
                    f"Task '{name}': data['{stage}'] must be a DataLoader, or something else that gives batches; got a"
                    f" {type(loader).__name__}."
                )
            setattr(self, f"{stage}_dataloader", _Constant(loader).get)


def _check_head(name: str, classes: list[int] | None, outputs: list[int] | None, *, evaluates: bool) -> None:
    """Raises ContinualError for a task that does not say what of the head is its own, or says it twice otherwise."""
    if classes is None and outputs is None and not evaluates:
        raise ContinualError(
            f"Task '{name}' needs classes=[...] or outputs=[...]: what of the head is its own? Or evaluate=...,"
            " which returns the task's own outputs."
        )
    if classes and outputs and len(classes) != len(outputs):
        raise ContinualError(
            f"Task '{name}' has {len(classes)} classes {classes} but {len(outputs)} outputs"
            f" {outputs}; give one output a class."
        )


class _Constant:
    def __init__(self, value: Any) -> None:
        self.value = value

    def get(self) -> Any:
        """The loader, as a data module's hook gives it."""
        return self.value


def supervised(module: LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    """Predictions and targets of a pair (input, target), tokens one by one."""
    x, y = batch
    predictions = module(x, y) if required_arguments(module.forward) == 2 else module(x)
    if not isinstance(predictions, Tensor) or not isinstance(y, Tensor) or y.is_floating_point():
        return predictions, y
    if predictions.shape[:1] + predictions.shape[2:] == y.shape:
        return predictions, y
    if predictions.shape[:-1] == y.shape or (predictions.ndim == 2 and len(predictions) == y.numel()):
        return predictions.flatten(0, -2), y.flatten()
    return predictions, y


def required_arguments(function: Callable[..., Any]) -> int:
    """How many positional arguments a function cannot do without."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def _checked_name(name: str) -> str:
    if not isinstance(name, str) or not name.strip():
        given = repr(name) if name is None or isinstance(name, (str, int, float)) else f"a {type(name).__name__}"
        raise ContinualError(f"A task needs a name, got {given}.")
    return check_text("Task", "name", name)


def _checked_columns(name: str, what: str, columns: Iterable[Any]) -> list[int]:
    columns = [_plain(column) for column in check_list(f"Task '{name}'", what, columns, "whole numbers")]
    if not columns or any(isinstance(c, bool) or not isinstance(c, int) or c < 0 for c in columns):
        raise ContinualError(f"Task '{name}': {what} must be whole numbers from 0 on, got {columns}.")
    if len(set(columns)) < len(columns):
        raise ContinualError(f"Task '{name}': {what} must differ from one another, got {columns}.")
    return columns


def _plain(column: Any) -> Any:
    """A whole number of numpy's, torch's or pandas' as Python's; anything else as it is."""
    scalar = isinstance(column, (np.generic, Tensor)) and column.ndim == 0
    return column.item() if scalar else column
