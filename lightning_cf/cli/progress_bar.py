"""One progress bar over all phases of all methods of a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from lightning_cf.cli.stopping import check_stopped, take_signals
from lightning_cf.lightning_api import Callback, LightningModule, Trainer


class RunBar:
    """A bar that counts epochs; shown by the first process only."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        self.total: float = 0
        self.title = ""

    def __enter__(self) -> RunBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the bar as it stands; what is printed afterwards comes below it."""
        if self.bar is not None:
            self.bar.close()

    def callback(self) -> Callback:
        """A callback that moves the bar; copies of it move the same bar, since a function is not copied."""

        def move(epochs: float, text: str) -> None:
            self.move(epochs, text)

        return _MoveBar(move)

    def move(self, epochs: float, text: str) -> None:
        """Moves the bar on, by parts of an epoch."""
        if self.bar is None:
            self.bar = tqdm(
                total=self.total,
                mininterval=0.1 if sys.stderr.isatty() else 5.0,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
            )
        self.bar.set_description_str(f"{self.title:>8} | {text:<24}", refresh=False)
        self.bar.update(min(epochs, self.bar.total - self.bar.n))  # parts of epochs do not add up to the last digit

    @staticmethod
    def write(text: str) -> None:
        """Prints a line above the bar, which stays where it is."""
        tqdm.write(text, file=sys.stderr)


class _MoveBar(Callback):
    def __init__(self, move: Callable[[float, str], None]) -> None:
        self.move = move

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        take_signals()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        take_signals()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        check_stopped()
        if trainer.is_global_zero:
            task = trainer.datamodule.name  # type: ignore[attr-defined]
            self.move(1 / max(1, int(trainer.num_training_batches)), f"task {task}")
