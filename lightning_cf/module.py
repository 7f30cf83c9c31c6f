"""ContinualModule: a user's LightningModule with a ledger that stays with it and outputs of its own for each task."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import nn

from lightning_cf.callbacks import (
    InvarianceCallback,
    MaskedGradientCallback,
    PartitionCallback,
    TaskInferenceCallback,
)
from lightning_cf.errors import ContinualError, LedgerWarning, check_kind, warn
from lightning_cf.learner.forgetting import forget_task
from lightning_cf.learner.keeping import keep_ledger, ledger_of
from lightning_cf.learner.meeting import meet_task
from lightning_cf.learner.predicting import predict_any
from lightning_cf.learner.widening import fit_heads
from lightning_cf.lightning_api import Callback, LightningModule, check_same_lightning
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.ledger_state import CHECKPOINT_KEY
from lightning_cf.task_inference import Prediction
from lightning_cf.tasks.task import Task


class ContinualModule(LightningModule):
    """Wraps a LightningModule in place: ``ContinualModule(net)`` is ``net``, with a class derived from its own.

    Hooks, ``self.log``, names of weights and checkpoints stay what they are; the plain class loads the checkpoints.
    What comes with it: the ledger persists with the module's state, classes that return in another domain get output
    columns of their own, ``predict`` needs no task's name, and a fit installs those callbacks that the Trainer lacks.

    >>> from lightning.pytorch.demos.boring_classes import BoringModel
    >>> net = BoringModel()
    >>> module = ContinualModule(net)
    >>> module is net, isinstance(module, BoringModel), type(module).__name__
    (True, True, 'ContinualBoringModel')

    Args:
        module: the LightningModule to wrap.

    Raises:
        ContinualError: if it is none, or something else is given too.
    """

    installs_callbacks: bool = True
    """Whether a fit installs the callbacks that the Trainer lacks."""

    adds_outputs_for_tasks = True
    """Its output layer grows where a task needs columns that it has not; see :func:`meet_task`."""

    __jit_unused_properties__ = [*LightningModule.__jit_unused_properties__, "ledger"]  # noqa: RUF012

    def __new__(cls, *args: Any, **kwargs: Any) -> ContinualModule:
        """Changes the class of the module given; a derived class is made as usual."""
        if cls is not ContinualModule:
            return super().__new__(cls)
        module = args[0] if args else kwargs.get("module")
        check_same_lightning("ContinualModule", module)
        if not isinstance(module, LightningModule):
            raise ContinualError(
                f"ContinualModule wraps a LightningModule, got {type(module).__name__};"
                " give a plain network its loss and optimiser first, for instance with lightning_cf.Classifier."
            )
        others = [*map(repr, args[1:]), *(f"{name}=" for name in kwargs if name != "module")]
        if others:
            raise ContinualError(
                f"ContinualModule takes the LightningModule alone, got {', '.join(others)} too. Options belong to the"
                " callbacks, which a Trainer or a SequentialTaskRunner is given."
            )
        if not isinstance(module, ContinualModule):
            module.__class__ = _derived(type(module))  # type: ignore[arg-type]
        assert isinstance(module, ContinualModule)
        module.__dict__.pop("installs_callbacks", None)  # of a runner, which installs its own
        return module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not ((args and args[0] is self) or kwargs.get("module") is self):
            super().__init__(*args, **kwargs)

    @property
    def ledger(self) -> NeuronLedger | None:
        """Who owns which unit; None before the first task."""
        return ledger_of(self)

    def add_task(self, task: Task) -> list[int]:
        """Sets the task's outputs aside, adding columns to the head where it has none for the task's classes.

        So for classes whose columns another task has, and for class numbers beyond the head's columns: with ten
        columns, a task of the classes 10 and 11 gets the columns 10 and 11. A fit does this for its task. A head that
        grows computes its older columns with another kernel, whose rounding differs in the last bit; add all tasks
        before the first fit, as the runner does, to keep every bit.

        Returns:
            the output column of each of the task's classes.
        """
        check_kind("ContinualModule", "task", task, Task, "a Task(name, data, classes=[...])")
        return meet_task(self, task)

    def outputs_of(self, task: Task | str) -> list[int]:
        """The output columns of a task, one for each of its classes: ``module(x)[:, module.outputs_of("zero-one")]``.

        Args:
            task: the task, or its name.

        Raises:
            ContinualError: for a task that was neither fitted nor added.
        """
        name = task if isinstance(task, str) else task.name
        if self.ledger is None:
            raise ContinualError(f"No outputs are set aside for a task '{name}': no task was fitted or added yet.")
        return self.ledger.outputs_of(name)

    def forget(self, task: Task | str) -> dict[str, int]:
        """Takes a task out again, on purpose, between fits: its outputs, what infers it, and units that nobody reads.

        All other tasks' outputs stay bitwise what they are; what a later task reads goes on being held for it.

        Args:
            task: the task with the training data that it had; its name will do where what tasks add to what they share
                is kept apart (``TaskInferenceCallback(apart=True)``) or nothing is shared.

        Returns:
            for each group of units, how many are free now that were not.

        Raises:
            ContinualError: for a task that was not fitted, and where it cannot be forgotten; then nothing changed.
        """
        if not isinstance(task, str):
            check_kind("ContinualModule", "task", task, Task, "the Task that is to be forgotten, or its name")
        return forget_task(self, task)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """A module's own ``predict`` where it has one, else as :meth:`predict_any`."""
        inherited: Any = getattr(super(), "predict", None)
        return self.predict_any(x, *args, **kwargs) if inherited is None else inherited(x, *args, **kwargs)

    def predict_any(self, x: Any, strategy: str | None = None, among: str | Sequence[str] | None = None) -> Prediction:
        """Class, probabilities, inferred task and its score for a batch of inputs; nobody says which task it is.

        Args:
            x: as ``forward`` takes it; a tuple or a list for several inputs.
            strategy: one that was fitted (``TaskInferenceCallback``), default the one that was chosen.
            among: names of the tasks that the inputs can be of, or the one task's, where that is known.

        Raises:
            ContinualError: if no task that can be inferred was learned yet, or a name is not one of these.
        """
        if x is None or isinstance(x, (str, bytes, int, float)):
            raise ContinualError(
                f"predict: x must be a batch of inputs, as forward takes it, got a {type(x).__name__}."
            )
        return predict_any(self, x, strategy, among)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`predict_any`, for ``Trainer.predict``; of pairs the first is the input. A module's own one stays.

        Where no task so far has classes, as Lightning's.
        """
        inherited: Any = super().predict_step
        learned = [] if self.ledger is None else self.ledger.tasks
        if inherited.__func__ is not LightningModule.predict_step or (learned and not any(t.classes for t in learned)):
            return inherited(*args, **kwargs)
        batch = kwargs["batch"] if "batch" in kwargs else args[0]
        return self.predict_any(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def configure_callbacks(self) -> Sequence[Callback]:
        """The module's own, and those of ours that neither it nor the Trainer has."""
        own = super().configure_callbacks()
        callbacks = list(own) if isinstance(own, Sequence) else [own]
        if self.installs_callbacks:
            present = [*self.trainer.callbacks, *callbacks]  # type: ignore[attr-defined]
            ours = (
                PartitionCallback(),
                InvarianceCallback(),
                MaskedGradientCallback(),
                TaskInferenceCallback("statistics"),
            )
            for callback in ours:
                if not any(isinstance(other, type(callback)) for other in present):
                    callbacks.append(callback)
        return callbacks

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled by the plain class, of which the derived one is made: it has no place of its own."""
        reduced: Any = super().__reduce_ex__(protocol)
        bases: Any = type(self).__bases__
        if len(bases) == 2 and bases[0] is ContinualModule and type(self) is _derived(bases[1]):
            return (_blank, (bases[1],), *reduced[2:])
        return reduced

    def get_extra_state(self) -> dict[str, Any]:
        """The ledger as plain values, which a ``state_dict`` of this module holds beside its weights."""
        return {} if self.ledger is None else self.ledger.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes the ledger from a ``state_dict`` and widens the head to the columns that the ledger knows."""
        if state:
            known, ledger = self.ledger, NeuronLedger.from_state_dict(state)
            keep_ledger(self, ledger)
            fit_heads(self, ledger, {} if known is None else known.heads)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *found: Any) -> None:
        """Weights of the plain class are whole without a ledger."""
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *found)
        missing: list[str] = found[0]
        if prefix + _EXTRA_STATE in missing:
            missing.remove(prefix + _EXTRA_STATE)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Moves the ledger out of the weights, so that the plain class loads the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        ledger = checkpoint["state_dict"].pop(_EXTRA_STATE, {})
        if ledger:
            checkpoint[CHECKPOINT_KEY] = ledger

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Moves the ledger back among the weights, where loading looks for it."""
        super().on_load_checkpoint(checkpoint)
        self._warn_of_loss(checkpoint.get(CHECKPOINT_KEY))
        checkpoint["state_dict"][_EXTRA_STATE] = checkpoint.get(CHECKPOINT_KEY, {})

    def _warn_of_loss(self, found: dict[str, Any] | None) -> None:
        """Warns where a Trainer without our callbacks, which would put the module back, loads an older ledger."""
        trainer, known = self._trainer, self.ledger
        if trainer is None or known is None or not found:
            return
        lost = known.undone_by(NeuronLedger.from_state_dict(found))
        guarded = any(hasattr(callback, "partitions") for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if lost and not guarded:
            warn(
                f"ckpt_path={str(trainer.ckpt_path)!r} is older than what the module has learned: it takes back"
                f" {' and '.join(map(repr, lost))}, weights and ledger. Load the last checkpoint again before you fit.",
                LedgerWarning,
            )


_EXTRA_STATE = nn.modules.module._EXTRA_STATE_KEY_SUFFIX


def _blank(base: type[LightningModule]) -> ContinualModule:
    """A module to be filled with a pickled one's state."""
    made = _derived(base)  # type: ignore[arg-type]
    return made.__new__(made)


@cache
def _derived(base: type[LightningModule]) -> type[ContinualModule]:
    # Scripting compiles properties, but for these; the wrapped class may list its own.
    unused = {"__jit_unused_properties__": [*base.__jit_unused_properties__, "ledger"]}
    return type(f"Continual{base.__name__}", (ContinualModule, base), {"__module__": base.__module__, **unused})


def wrapped_for_run(module: LightningModule) -> ContinualModule:
    """A module wrapped for a run, which gives each fit its callbacks: the user's own fits get those that they got."""
    installs = isinstance(module, ContinualModule) and module.installs_callbacks
    wrapped = ContinualModule(module)
    wrapped.installs_callbacks = installs
    return wrapped
