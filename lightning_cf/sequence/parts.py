"""The package's own callbacks in a run: copies of what the user gave, told of the run, refused where they don't fit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_cf.callbacks import InvarianceCallback, MaskedGradientCallback, PartitionCallback, TaskInferenceCallback
from lightning_cf.errors import ContinualError
from lightning_cf.ownership.ledger import Isolation
from lightning_cf.records.folders import TaskFolders
from lightning_cf.sequence.trainers import Trainers
from lightning_cf.subspaces.subspace import LearnedSubspace
from lightning_cf.task_inference import Strategy


@dataclass(frozen=True)
class Parts:
    """What the runner's options of these names hold; None where one is left out."""

    partition: PartitionCallback | None
    invariance: InvarianceCallback | None
    masking: MaskedGradientCallback | None
    task_inference: TaskInferenceCallback | None

    @classmethod
    def of(
        cls,
        partition: PartitionCallback | None,
        invariance: InvarianceCallback | None,
        masking: MaskedGradientCallback | None,
        task_inference: TaskInferenceCallback | Strategy | str | Sequence[Strategy | str] | None,
    ) -> Parts:
        """Copies of what the user gave; a strategy of task inference becomes a callback.

        Raises:
            ContinualError: for callbacks that a run cannot take up, or that do not go together.
        """
        given = task_inference
        if given is not None and not isinstance(given, TaskInferenceCallback):
            given = TaskInferenceCallback(given)
        for ours in (partition, masking):
            if ours is not None and ours.ledger is not None:
                raise ContinualError(
                    f"runner: {type(ours).__name__}(ledger={str(ours.ledger)!r}) cannot be taken up: a run keeps its"
                    " own ledger in root. Leave it out, or fit the tasks one by one with the callbacks."
                )
        if isinstance(getattr(masking, "subspace", None), LearnedSubspace) and not isinstance(
            getattr(invariance, "subspace", None), LearnedSubspace
        ):
            raise ContinualError(
                "runner: masking trains in a sub-space that is learned, but nothing learns it; give invariance the same"
                " subspace."
            )
        return cls(copy.deepcopy(partition), copy.deepcopy(invariance), copy.deepcopy(masking), copy.deepcopy(given))

    def check_moment(self, trainers: Trainers, *, pretrained: bool) -> None:
        """Raises ContinualError for a partition at a time of its own, or one that needs weights of before LEARN.

        Args:
            trainers: with the epochs that decide when a task is partitioned.
            pretrained: whether the first task's LEARN is left out.
        """
        if self.partition is None:
            return
        if self.partition.after != 1.0:
            raise ContinualError(
                f"runner: the partition has after={self.partition.after}; epochs={trainers.epochs} and"
                f" invariance_epochs={trainers.invariance_epochs} decide when a task is partitioned. Leave it out."
            )
        if pretrained and self.partition.options.measure == "update":
            raise ContinualError(
                "runner: measure='update' compares with the weights before a task was learned, which a pretrained"
                " module does not have. Use measure='weight' or 'activation'."
            )

    def tell(self, *, seed: int, isolation: Isolation, folders: TaskFolders) -> None:
        """Tells them of the run: what everything random depends on, how tasks are isolated, where records go."""
        for part in (self.partition, self.invariance, self.masking, self.task_inference):
            if part is not None:
                part.join_run(seed=seed, isolation=isolation, folders=folders)

    def settings(self) -> dict[str, Any]:
        """What each says of itself, to tell runs apart."""
        return {
            "partition": None if self.partition is None else self.partition.settings(),
            "invariance": None if self.invariance is None else self.invariance.settings(),
            "masking": None if self.masking is None else self.masking.settings(),
            "task_inference": None if self.task_inference is None else self.task_inference.settings(),
        }
