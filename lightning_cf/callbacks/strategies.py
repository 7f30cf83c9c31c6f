"""Which strategies and callbacks of Lightning's a fit cannot have, and why."""

from __future__ import annotations

import torch

from lightning_cf.errors import ContinualError
from lightning_cf.lightning_api import (
    DDPStrategy,
    ModelPruning,
    SingleDeviceStrategy,
    Trainer,
    _MultiProcessingLauncher,
)


def check_strategy(trainer: Trainer) -> None:
    """Raises ContinualError for strategies that would lose the ledger or shard what it guards.

    Also where other processes run than the strategy expects, once they are launched.
    """
    check_launch(trainer)
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if processes != trainer.world_size:
        raise ContinualError(
            f"The Trainer expects {trainer.world_size} processes, but {processes} are running: it would train on part"
            " of the data. Start each distributed job in a fresh process (unset LOCAL_RANK and WORLD_SIZE)."
        )


def check_launch(trainer: Trainer) -> None:
    """The part of :func:`check_strategy` that can be said before any process is launched."""
    strategy = trainer.strategy
    name = type(strategy).__name__
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ContinualError(
            "strategy='ddp_spawn' and its relatives run the fit in processes whose callback state and ledger are lost"
            " at its end. Use strategy='ddp'."
        )
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ContinualError(f"strategy {name} shards or moves the weights that the ledger guards. Use 'ddp'.")


def check_callbacks(trainer: Trainer) -> None:
    """Raises ContinualError for callbacks of Lightning's that change what the ledger guards."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelPruning):
            raise ContinualError(
                f"{type(callback).__name__} sets weights to zero, those of owned units too, and renames parameters."
                " Take it out; what no task needs is free: NeuronLedger.capacity() says how much."
            )
