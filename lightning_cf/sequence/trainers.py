"""The Trainers that a run asks the user's factory for, one a phase."""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning_cf.callbacks.divergence import WatchingCallback
from lightning_cf.callbacks.session import ContinualCallback
from lightning_cf.errors import ContinualError, check_count, check_list
from lightning_cf.lightning_api import (
    Callback,
    LightningDataModule,
    LightningModule,
    SIGTERMException,
    Trainer,
    _SubprocessScriptLauncher,
    check_same_lightning,
)

MakeTrainer = Callable[..., Trainer]


@dataclass(frozen=True)
class Trainers:
    """Makes the Trainers of a run, one a phase.

    Attributes:
        factory: the user's, which makes a Trainer from keywords.
        epochs: of LEARN, for each task.
        invariance_epochs: of INVARIANCE, for each task.
    """

    factory: MakeTrainer
    epochs: int
    invariance_epochs: int

    @classmethod
    def of(cls, factory: MakeTrainer, *, epochs: int, invariance_epochs: int) -> Trainers:
        """As the constructor; raises ContinualError for epochs that are no counts."""
        epochs = check_count("runner", "epochs", epochs)
        return cls(factory, epochs, check_count("runner", "invariance_epochs", invariance_epochs, least=0))

    def make(self, *, max_epochs: int, callbacks: Sequence[Callback], root: Path) -> Trainer:
        """A Trainer from the user's factory, with copies of the callbacks that the factory gives, then those given."""
        theirs = self.factory.keywords if isinstance(self.factory, partial) else {}
        if "max_epochs" in theirs:
            raise ContinualError(
                f"runner: the trainer sets max_epochs={theirs['max_epochs']}; the runner's epochs={self.epochs} and"
                f" invariance_epochs={self.invariance_epochs} decide. Leave max_epochs out."
            )
        given = copy.deepcopy(listed_callbacks("the trainer's callbacks", theirs.get("callbacks")))
        return make_trainer(self.factory, max_epochs=max_epochs, callbacks=[*given, *callbacks], root=root)


def for_phase(callbacks: Sequence[Callback | None]) -> list[Callback]:
    """Copies of the callbacks of a phase, with one that watches whether training diverges if none of them does."""
    copies = [copy.deepcopy(callback) for callback in callbacks if callback is not None]
    watched = any(isinstance(callback, WatchingCallback) for callback in copies)
    return copies if watched else [*copies, WatchingCallback()]


def make_trainer(factory: MakeTrainer, *, max_epochs: int, callbacks: Sequence[Callback], root: Path) -> Trainer:
    """A Trainer from the user's factory, which must hand on what it gets.

    Raises:
        ContinualError: if it makes none, or one of other epochs or callbacks.
    """
    options: dict[str, Any] = {"max_epochs": max_epochs, "callbacks": list(callbacks), "default_root_dir": root}
    try:
        trainer = factory(**options)
    except ContinualError:
        raise
    except Exception as error:  # whatever Lightning says to its options, or a factory of the user's own
        raise ContinualError(f"runner: the trainer cannot be made: {error}") from error
    check_same_lightning("runner", trainer)
    if not isinstance(trainer, Trainer):
        raise ContinualError(f"runner: trainer must make a Trainer from keywords, but made a {type(trainer).__name__}.")
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return trainer
    lost = [c for c in callbacks if not any(c is kept for kept in trainer.callbacks)]  # type: ignore[attr-defined]
    if trainer.max_epochs != max_epochs or lost:
        raise ContinualError(
            "runner: trainer must hand its keywords (max_epochs, callbacks, default_root_dir) on to the Trainer, as"
            " partial(Trainer, accelerator='auto') does; the one given leaves out"
            f" {'callbacks' if lost else f'max_epochs={max_epochs}'}."
        )
    return trainer


def check_trains(trainer: Trainer) -> None:
    """Raises ContinualError for a Trainer whose fits would end before their first step."""
    for name in ("limit_train_batches", "max_steps"):
        if getattr(trainer, name) == 0:
            raise ContinualError(f"runner: the trainer sets {name}=0, so that nothing would train; leave it out.")


def fit_whole(trainer: Trainer, module: LightningModule, data: LightningDataModule) -> None:
    """One fit, which returns only if it came to its own end.

    Raises:
        SIGTERMException: if the process was asked to end. Lightning's leaves the status 0, which schedulers take for
            success; a shell's is 143.
    """
    try:
        trainer.fit(module, datamodule=data)
        if trainer.received_sigterm:  # in what comes after the last batch
            raise SIGTERMException
    except SIGTERMException as stopped:
        stopped.code = 128 + signal.SIGTERM
        raise
    if trainer.interrupted:
        raise ContinualError("runner: the fit was interrupted before its end; run again to go on after the last phase.")


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Meanwhile SIGTERM and SIGINT end the process: one that waits for other nodes runs no handler of Python's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def end_processes(trainer: Trainer) -> None:
    """Ends the other processes that a Trainer launched; one that waits for this one would not see a gentler signal."""
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        trainer.strategy.launcher.kill(signal.SIGKILL)


def listed_callbacks(name: str, callbacks: Any) -> list[Callback]:
    """One callback or several as a list.

    Raises:
        ContinualError: for what is no callback, and for those that the runner makes for each phase.
    """
    if callbacks is None or isinstance(callbacks, Callback):
        callbacks = [] if callbacks is None else [callbacks]
    listed = check_list("runner", name, callbacks, "Callbacks")
    for callback in listed:
        if not isinstance(callback, Callback):
            kind = f"the class {callback.__name__}" if isinstance(callback, type) else f"a {type(callback).__name__}"
            raise ContinualError(f"runner: {name} must be a list of Callbacks, got {kind} in it.")
        if isinstance(callback, ContinualCallback):
            raise ContinualError(
                f"runner: {name} holds a {type(callback).__name__}, which the runner gives each phase itself; hand it"
                " over as partition=, invariance=, masking= or task_inference=."
            )
    return listed
