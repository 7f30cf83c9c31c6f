"""A folder for each task, where the record of its partition is written (US 12387107, paragraph 39)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lightning_cf.errors import ContinualError, RunWarning, warn
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.structure import Structure
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.partition.options import PartitionOptions
from lightning_cf.partition.outcome import Outcome
from lightning_cf.records.record import LayerRecord, PartitionRecord, complete_record


@dataclass(frozen=True)
class TaskFolders:
    """A folder a task: ``00-NAME``, ``01-NAME`` and so on.

    Attributes:
        root: where they are.
        similarity_matrix: whether records hold the similarity of every two units.
    """

    root: Path
    similarity_matrix: bool = False

    def of(self, position: int, task: str) -> Path:
        """The folder of a task by its number and name."""
        return self.root / f"{position:02d}-{re.sub('[^A-Za-z0-9._-]', '_', task)[:80]}"

    def current(self, ledger: NeuronLedger) -> Path:
        """The folder of the ledger's latest task."""
        return self.of(len(ledger.tasks) - 1, ledger.tasks[-1].name)

    def write(self, ledger: NeuronLedger, options: PartitionOptions, outcome: Outcome) -> None:
        """Writes the record of the latest task's partition into the task's folder, in place of an older one."""
        layers = tuple(
            LayerRecord.of(
                found.group.name,
                found.group.layers,
                found.candidates,
                found.partition,
                found.vectors,
                found.biases,
                ledger.owners[found.group.name],
            )
            for found in outcome.groups
            if found.vectors is not None and found.biases is not None
        )
        record = PartitionRecord(
            task=ledger.tasks[-1].name,
            position=len(ledger.tasks) - 1,
            isolation=ledger.isolation,
            constraints={
                **options.as_dict(),
                "budget": {found.group.name: found.budget for found in outcome.groups},
            },
            accuracy=outcome.accuracy,
            ablation_accuracy=outcome.ablation_accuracy,
            layers=layers,
        )
        similarities = {found.group.name: found.similarity for found in outcome.groups if found.similarity is not None}
        record.write(self.current(ledger), similarities if self.similarity_matrix else None)

    def complete(self, module: nn.Module, structure: Structure, ledger: NeuronLedger) -> None:
        """Adds what the units are after INVARIANCE, if the task was recorded; a record that is damaged only warns."""
        folder = self.current(ledger)
        if not (folder / "partition.json").exists():
            return
        try:
            recorded = {layer.name for layer in PartitionRecord.load(folder).layers}
            tensors = named_tensors(module)
            after = {
                group.name: (group.weights(tensors), group.biases(tensors))
                for group in structure.groups_on(structure.way_of(ledger.tasks[-1].name))
                if group.name in recorded
            }
            complete_record(folder, after)
        except ContinualError as error:
            warn(f"{error} The run goes on without it.", RunWarning)
