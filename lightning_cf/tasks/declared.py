"""What of a task its loaders and the checks of its targets ask for, so that they need not know the task itself."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torchmetrics import Metric

from lightning_cf.lightning_api import LightningDataModule


@runtime_checkable
class Declared(Protocol):
    """What a user declares of a task.

    Attributes:
        name: of the task, for messages.
        classes: labels in its data; None where its targets are no labels.
        metric: that scores it; None for the share of right classes.
    """

    name: str
    classes: list[int] | None
    metric: Metric | None


@runtime_checkable
class WithData(Declared, Protocol):
    """A task with its data.

    Attributes:
        data: the user's.
        holdout: the share of the training data that is held out where the data have nothing to judge by.
    """

    data: LightningDataModule
    holdout: float

    def set_up(self, stage: str) -> None:
        """Sets the data up anew for a stage whose loaders are to be read, if the end of a fit tore them down."""
        ...
