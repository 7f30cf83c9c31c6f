"""Who owns which unit, and therefore which entries may move in which phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from lightning_cf.network.structure import Entries, Structure, lookup
from lightning_cf.ownership.growth import grown, nobody
from lightning_cf.ownership.ledger_state import packed, read_checkpoint, unpacked
from lightning_cf.ownership.levels import FREE, NO_OWNER, Levels
from lightning_cf.ownership.masks import Masks
from lightning_cf.ownership.phases import Phase, TaskEntry, undone
from lightning_cf.ownership.refusals import (
    check_capacity,
    check_network,
    check_outputs,
    check_reserved,
    check_set_aside,
    is_current,
)

Isolation = Literal["exact", "perturb"]
ISOLATIONS = ("exact", "perturb")


@dataclass
class NeuronLedger:
    """The owner of every unit: ``FREE``, or the number of the task that claimed it.

    Attributes:
        owners: for each hidden group by name, the owner of each unit.
        outputs: the owner of each output column.
        width: how many classes the module shows: columns of the head as the user built it.
        head: path of the layer whose columns the outputs are.
        reserved: output columns of each task by name, begun or still to come.
        positions: of tasks whose columns are not shown at their classes: at which positions the module shows them.
        tasks: the tasks so far, in the order in which they were learned.
        isolation: "exact" or "perturb".
        whole: groups that are not partitioned: the first task owns them whole.
        norms: for each module that normalises several units together, the unit of each element.
        records: one entry for each task's partition of a group (what ``result.json`` shows).
        directions: learned sub-spaces: an orthonormal basis (inputs x dimensions) for each group that has one.
        inference: what is kept of each task to infer it by (see ``task_inference``); None where nothing is.
        heads: for each layer that computes outputs, the column of each of its rows.
        fingerprints: of each task by name, some of the values that it owns (see ``fingerprints.py``).
        origin: the file that the ledger was read from, for messages; not kept.
        ways: names of tasks that may run the network in a way of their own, which must be known before others go on.
        revision: counts the changes, so that whoever caches masks knows when to make them anew.
        read: what ``inference`` was when it was last unpacked to be read only, and what came out; not kept.
    """

    owners: dict[str, Int64[Tensor, "_"]]
    outputs: Int64[Tensor, "columns"]
    width: int
    head: str
    reserved: dict[str, list[int]] = field(default_factory=dict)
    positions: dict[str, list[int]] = field(default_factory=dict)
    tasks: list[TaskEntry] = field(default_factory=list)
    isolation: Isolation = "exact"
    whole: list[str] = field(default_factory=list)
    norms: dict[str, Int64[Tensor, "..."]] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    directions: dict[str, Tensor] = field(default_factory=dict)
    inference: dict[str, Any] | None = None
    heads: dict[str, list[int]] = field(default_factory=dict)
    fingerprints: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    origin: str = ""
    ways: list[str] = field(default_factory=list)
    revision: int = 0
    read: tuple[dict[str, Any], Any] | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def for_structure(cls, structure: Structure) -> NeuronLedger:
        """A ledger in which every unit is free."""
        owners, outputs = nobody(structure)
        return cls(owners, outputs, structure.head.size, structure.head_layer, norms=dict(structure.norms))

    def fit_to(self, structure: Structure) -> None:
        """Takes over the units of a network traced anew, before any is owned."""
        self.owners, self.norms = nobody(structure).hidden, dict(structure.norms)
        self.revision += 1

    def extend_to(self, structure: Structure, task: str) -> None:
        """Takes over units that a further task's way through the network met: layers and outputs of its own, free.

        Args:
            structure: of all ways, the further one too.
            task: whose way it is, for messages.

        Raises:
            ContinualError: if units that are known are others now.
        """
        owners = grown(self.owners, self.outputs, structure, task)
        if owners is not None:
            self.owners, self.outputs = owners
            self.width, self.norms = structure.head.size, dict(structure.norms)
            self.revision += 1

    @property
    def exact(self) -> bool:
        """Whether what one task owns never reads what it does not own; else it is trained not to depend on it."""
        return self.isolation == "exact"

    @property
    def current(self) -> TaskEntry | None:
        """The task that was begun and is not sealed."""
        return self.tasks[-1] if self.tasks and self.tasks[-1].phase != "sealed" else None

    @property
    def phase(self) -> Phase:
        """The current task's; "sealed" where there is none."""
        return "sealed" if self.current is None else self.current.phase

    def index(self, name: str) -> int:
        """Number of the task of that name; a KeyError if the ledger does not know it."""
        if not self.knows(name):
            raise KeyError(name)
        return [task.name for task in self.tasks].index(name)

    def knows(self, name: str) -> bool:
        """Whether a task of that name was begun."""
        return any(task.name == name for task in self.tasks)

    def outputs_of(self, name: str) -> list[int]:
        """The columns of the module's output that belong to a task, one for each of its classes, in their order.

        Raises:
            ContinualError: for a task that the ledger does not know.
        """
        check_reserved(name, self.reserved)
        return list(self.reserved[name])

    def undone_by(self, other: NeuronLedger) -> list[str]:
        """The tasks that another ledger does not know as far as this one does: not at all, or in an earlier phase."""
        return undone(self.tasks, other.tasks)

    def reserve(self, name: str, outputs: Sequence[int]) -> None:
        """Sets output columns aside for a task.

        Raises:
            ContinualError: for a column that another task has, or that the head does not have; for none, or one twice;
                for others than those with which a task was begun.
        """
        self.reserved[name] = check_outputs(name, outputs, self.reserved, len(self.outputs), self.tasks)

    def add_outputs(self, count: int) -> list[int]:
        """Takes note of new columns at the end of the head; returns their numbers."""
        first = len(self.outputs)
        self.outputs = torch.cat([self.outputs, torch.full((count,), FREE)])
        self.revision += 1
        return list(range(first, first + count))

    def begin(
        self,
        name: str,
        classes: Sequence[int] = (),
        structure: Structure | None = None,
        *,
        outputs: Sequence[int] | None = None,
    ) -> TaskEntry:
        """Starts or continues a task.

        A name never seen starts LEARN, and seals the task before it; the current task goes on in its phase.

        Args:
            name: of the task.
            classes: labels in its data.
            structure: of the network, where tasks run it in several ways: the others' units need not be free.
            outputs: the head's columns that are to be its own, where they were not reserved before.

        Raises:
            ContinualError: for an earlier task, a task after one that was never partitioned, a name that is no text,
                and outputs that cannot be its own (see :meth:`reserve`); the ledger stays as it was.
            CapacityError: if a group has no free unit left for a new task.
        """
        if is_current(name, self.tasks, self.origin):
            if outputs is not None:
                self.reserve(name, outputs)
            return self.tasks[-1]
        self.require_capacity(name, structure)
        if outputs is not None:
            self.reserve(name, outputs)
        check_set_aside(name, self.reserved)
        if self.current is not None:
            self.seal()
        self.tasks.append(TaskEntry(name, list(classes), self.reserved[name]))
        self.outputs[self.reserved[name]] = len(self.tasks) - 1
        self.revision += 1
        return self.tasks[-1]

    def require_capacity(self, name: str, structure: Structure | None = None) -> None:
        """Raises CapacityError if a group has no free unit left for the task of that name."""
        groups = self.owners.keys() - set(self.whole)
        if structure is not None and structure.ways > 1:
            groups &= {group.name for group in structure.groups_on(structure.way_of(name))}
        check_capacity(name, self.owners, [group for group in self.owners if group in groups], self.tasks)

    def claim(self, claimed: Mapping[str, Bool[Tensor, "_"]]) -> None:
        """Gives units of each group, by its name, to the current task; its other ones become free again."""
        task = len(self.tasks) - 1
        for name, owner in self.owners.items():
            owner[owner == task] = FREE
            owner[claimed[name] & (owner == FREE)] = task
        self.tasks[-1].phase = "invariance"
        self.revision += 1

    def seal(self) -> None:
        """Ends the current task: its units never move again."""
        self.tasks[-1].phase = "sealed"
        self.revision += 1

    def capacity(self) -> dict[str, float]:
        """Share of units that are free, for each group that is partitioned."""
        owners = {name: owner for name, owner in self.owners.items() if name not in self.whole}
        return {name: float((owner == FREE).double().mean()) for name, owner in owners.items()}

    def owner_of_units(self, structure: Structure) -> Int64[Tensor, "units"]:
        """Owner of every unit of the structure, the outputs' at the end.

        Raises:
            ContinualError: if the network is not the one the ledger was made for.
        """
        check_network(self.owners, self.outputs, structure)
        return torch.cat([self.owners[group.name] for group in structure.groups] + [self.outputs])

    def norm_owners(self) -> dict[str, Int64[Tensor, "..."]]:
        """For each module that normalises several units together under ``exact``, the owner of each element."""
        if not self.exact:
            return {}
        owner = torch.cat([*self.owners.values(), self.outputs])
        return {path: lookup(units, owner, none=NO_OWNER) for path, units in self.norms.items()}

    def levels(self, structure: Structure, tasks: int | None = None) -> Levels:
        """From which task on each entry is held still; of the tasks begun, the first ``tasks`` count, or all."""
        owner = self.owner_of_units(structure)
        if tasks is not None:
            owner = torch.where(owner < tasks, owner, FREE)
        return Levels(structure, owner, [task.name for task in self.tasks[:tasks]])

    def frozen(self, structure: Structure, tensors: Mapping[str, Tensor]) -> dict[str, Bool[Tensor, "..."]]:
        """For each tensor, the entries that may not move now; each mask broadcasts to its tensor.

        In LEARN what computes free units and the task's outputs moves, in INVARIANCE what computes the claimed units
        and the task's outputs; otherwise nothing. What has no unit moves with the first task that runs it.
        """
        return self._masks(structure).frozen(tensors)

    def sealed(self, structure: Structure, tensors: Iterable[str]) -> dict[str, Bool[Tensor, "..."]]:
        """For each tensor, the entries of earlier tasks, which no phase moves; each mask broadcasts to its tensor."""
        return self._masks(structure).sealed(tensors)

    def cut(self, structure: Structure, uses: Iterable[Entries]) -> Bool[Tensor, "..."]:
        """Entries that must be zero under exact isolation: from a free or later unit into an owned one.

        While a task learns, its outputs read free units too; they are cut at its partition. What one task's way
        connects is never cut for another's: see :meth:`needed`.
        """
        return self._masks(structure).cut(uses)

    def needed(self, structure: Structure, tensors: Mapping[str, Tensor]) -> Bool[Tensor, "units"]:
        """Units that the current task must claim, since what reads them cannot be cut; ``tensors`` are parameters."""
        if structure.ways == 1 or not self.exact:
            return torch.zeros(structure.n_units, dtype=torch.bool)
        return self._masks(structure).needed(tensors, structure.way_of(self.tasks[-1].name))

    def _masks(self, structure: Structure) -> Masks:
        before, now = self.levels(structure, max(len(self.tasks) - 1, 0)), self.levels(structure)
        return Masks(before, now, len(self.tasks) - 1, self.phase, self.exact)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain containers that ``torch.load(weights_only=True)`` reads."""
        return packed(vars(self))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> NeuronLedger:
        """The ledger that :meth:`state_dict` described.

        Raises:
            ContinualError: for anything else.
        """
        return cls(**unpacked(state))

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> NeuronLedger:
        """Reads the ledger from a Lightning checkpoint that was written with one of the callbacks.

        Raises:
            ContinualError: if the checkpoint holds none, or there is no such file.
        """
        file, state = read_checkpoint(path)
        ledger = cls.from_state_dict(state)
        ledger.origin = str(file)
        return ledger
