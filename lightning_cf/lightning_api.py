"""Lightning, by the name under which the user's process knows it: ``lightning.pytorch`` or ``pytorch_lightning``.

Both are one library, but their classes are different objects: a callback of one does not belong into a Trainer of the
other. Everything in this package takes Lightning from here: from ``pytorch_lightning`` where the process had imported
that and not ``lightning.pytorch``, else from ``lightning.pytorch``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning_cf.errors import ContinualError

NAMES = ("lightning.pytorch", "pytorch_lightning")

NAME = NAMES["pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules]
"""Which of the two this package was loaded with."""

if TYPE_CHECKING or NAME == "lightning.pytorch":
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.utilities.data import _replace_dunder_methods, _set_sampler_epoch, sized_len
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.fabric.utilities.warnings import PossibleUserWarning
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.callbacks import (
        BaseFinetuning,
        EarlyStopping,
        GradientAccumulationScheduler,
        ModelCheckpoint,
        ModelPruning,
        StochasticWeightAveraging,
        Timer,
        WeightAveraging,
    )
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities import CombinedLoader
    from lightning.pytorch.utilities.data import _is_dataloader_shuffled
    from lightning.pytorch.utilities.exceptions import SIGTERMException
    from lightning.pytorch.utilities.model_helpers import is_overridden
else:
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning_fabric.utilities.data import _replace_dunder_methods, _set_sampler_epoch, sized_len
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from lightning_fabric.utilities.warnings import PossibleUserWarning
    from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
    from pytorch_lightning.callbacks import (
        BaseFinetuning,
        EarlyStopping,
        GradientAccumulationScheduler,
        ModelCheckpoint,
        ModelPruning,
        StochasticWeightAveraging,
        Timer,
        WeightAveraging,
    )
    from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
    from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
    from pytorch_lightning.trainer.states import TrainerFn
    from pytorch_lightning.utilities import CombinedLoader
    from pytorch_lightning.utilities.data import _is_dataloader_shuffled
    from pytorch_lightning.utilities.exceptions import SIGTERMException
    from pytorch_lightning.utilities.model_helpers import is_overridden

__all__ = [
    "BaseFinetuning",
    "Callback",
    "CombinedLoader",
    "DDPStrategy",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LightningDataModule",
    "LightningModule",
    "MisconfigurationException",
    "ModelCheckpoint",
    "ModelPruning",
    "PossibleUserWarning",
    "SIGTERMException",
    "SLURMEnvironment",
    "SingleDeviceStrategy",
    "StochasticWeightAveraging",
    "Timer",
    "Trainer",
    "TrainerFn",
    "WeightAveraging",
    "_MultiProcessingLauncher",
    "_SubprocessScriptLauncher",
    "_is_dataloader_shuffled",
    "_replace_dunder_methods",
    "_set_sampler_epoch",
    "check_same_lightning",
    "counters_at_zero",
    "is_overridden",
    "sized_len",
]


@contextmanager
def counters_at_zero(module: LightningModule) -> Iterator[None]:
    """Meanwhile ``current_epoch`` and ``global_step`` of a module are 0, as in a Trainer that trained nothing yet."""
    trainer = module._trainer
    if trainer is None:
        yield
        return
    loop = trainer.fit_loop.epoch_loop
    epochs = trainer.fit_loop.epoch_progress.current
    steps = loop.automatic_optimization.optim_progress.optimizer.step.total
    manual = loop.manual_optimization.optim_step_progress.total
    before = epochs.completed, steps.completed, manual.completed
    epochs.completed = steps.completed = manual.completed = 0
    try:
        yield
    finally:
        epochs.completed, steps.completed, manual.completed = before


def check_same_lightning(owner: str, thing: object) -> None:
    """Refuses an object of the other Lightning.

    Args:
        owner: who got it, for the message.
        thing: a Trainer, module, datamodule or callback.

    Raises:
        ContinualError: if its class derives from the Lightning that this package was not loaded with.
    """
    other = NAMES[NAMES[0] == NAME]
    for base in type(thing).__mro__:
        if base.__module__ == other or base.__module__.startswith(f"{other}."):
            raise ContinualError(
                f"{owner}: {type(thing).__name__} comes from {other}, but lightning_cf works with {NAME} here. Both are"
                f" Lightning, yet their classes do not mix: import {other} before lightning_cf, and {NAME} nowhere, or"
                f" use {NAME} throughout."
            )
