"""Work that all processes share while the first of them decides and the others wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lightning_cf.errors import ContinualError
from lightning_cf.learner.keeping import keep_ledger, state_of
from lightning_cf.lightning_api import LightningModule, Trainer
from lightning_cf.network.kept_entries import Snapshot
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.tasks.task import Task

Work = Callable[[LightningModule, Task], Any]
"""What a process does with its own copy of the network and the task's data; travels there, as does what it finds."""


@dataclass(frozen=True)
class Job:
    """Some work, and the network that it is done with.

    Attributes:
        snapshot: its numbers.
        ledger: as it stands on the first process.
        work: to be done.
    """

    snapshot: Snapshot
    ledger: dict[str, Any]
    work: Work


@dataclass(frozen=True)
class Everyone:
    """All processes of a fit: on the first one, which decides, while the others :func:`serve`.

    Attributes:
        trainer: of the fit.
        module: the network.
    """

    trainer: Trainer
    module: LightningModule

    @property
    def processes(self) -> int:
        """How many there are, this one counted."""
        return self.trainer.world_size

    def do(self, work: Work, own: Callable[[], Any]) -> list[Any]:
        """Has each other process do some work while this one does its own part; what each found, this one first.

        Raises:
            ContinualError: where another process failed.
        """
        state = state_of(self.module)
        assert state is not None
        self.trainer.strategy.broadcast(Job(Snapshot.of(self.module), state.ledger.state_dict(), work))
        found: list[Any] = [None] * self.processes
        try:
            mine, failure = own(), None
        except Exception as error:  # the others wait for this process to take what they found
            mine, failure = None, error
        torch.distributed.gather_object(None, found, dst=0)
        if failure is not None:
            raise failure
        if errors := [other for other in found if isinstance(other, ContinualError)]:
            raise errors[0]
        return [mine, *found[1:]]


def serve(trainer: Trainer, module: LightningModule, task: Task) -> Any:
    """On every process but the first: does what that one says, until it is done; what it then says."""
    while isinstance(said := trainer.strategy.broadcast(None), Job):
        said.snapshot.put_back(module)
        keep_ledger(module, NeuronLedger.from_state_dict(said.ledger))
        try:
            found = said.work(module, task)
        except Exception as error:  # the first process would wait for good
            found = ContinualError(f"Process {trainer.global_rank} failed: {error!r}")
        torch.distributed.gather_object(found, dst=0)
    return said
