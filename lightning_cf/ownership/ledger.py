"""Who owns which unit, and therefore which entries may move in which phase."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from lightning_cf.errors import CapacityError, ContinualError, check_list, check_path
from lightning_cf.network.structure import NO_UNIT, Entries, Structure, lookup
from lightning_cf.ownership.levels import FREE as FREE
from lightning_cf.ownership.levels import Levels
from lightning_cf.utilities.files import load_tensors

NO_OWNER = -2
"""Stands for what no unit computes, such as the network's input."""

Phase = Literal["learn", "invariance", "sealed"]
PHASES = ("learn", "invariance", "sealed")
Isolation = Literal["exact", "perturb"]
ISOLATIONS = ("exact", "perturb")

CHECKPOINT_KEY = "lightning_cf"
"""Where a Lightning checkpoint holds the ledger."""


@dataclass
class TaskEntry:
    """What the ledger knows of a task.

    Attributes:
        name: its name.
        classes: labels in its data.
        outputs: the head's columns that belong to it, one a class.
        phase: "learn" until it is partitioned, then "invariance", then "sealed".
    """

    name: str
    classes: list[int]
    outputs: list[int]
    phase: Phase = "learn"


def one_column(width: int) -> str:
    """What to do where the head's only output tells two classes apart; for messages."""
    if width > 1:
        return ""
    return (
        " Where one output tells two classes apart, say so: outputs=[0], metric=torchmetrics.classification."
        "BinaryAccuracy(), and evaluate= that gives that output as the target's shape has it."
    )


@dataclass
class NeuronLedger:
    """The owner of every unit: ``FREE``, or the number of the task that claimed it.

    Attributes:
        owners: for each hidden group by name, the owner of each unit.
        outputs: the owner of each output column.
        width: how many classes the module shows: columns of the head as the user built it.
        head: path of the layer whose columns the outputs are.
        reserved: output columns of each task by name, begun or still to come.
        positions: of tasks without classes whose columns stand elsewhere: at which positions the module shows them.
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

    @classmethod
    def for_structure(cls, structure: Structure) -> NeuronLedger:
        """A ledger in which every unit is free."""
        owners = {group.name: torch.full((group.size,), FREE) for group in structure.groups}
        outputs = torch.full((structure.head.size,), FREE)
        return cls(owners, outputs, structure.head.size, structure.head_layer, norms=dict(structure.norms))

    def fit_to(self, structure: Structure) -> None:
        """Takes over the units of a network traced anew, before any is owned."""
        fresh = NeuronLedger.for_structure(structure)
        self.owners, self.norms = fresh.owners, fresh.norms
        self.revision += 1

    def extend_to(self, structure: Structure, task: str) -> None:
        """Takes over units that a further task's way through the network met: layers and outputs of its own, free.

        Args:
            structure: of all ways, the further one too.
            task: whose way it is, for messages.

        Raises:
            ContinualError: if units that are known are others now.
        """
        fresh = NeuronLedger.for_structure(structure)
        found = {name: len(owner) for name, owner in fresh.owners.items()}
        same = {name for name, owner in self.owners.items() if found.get(name) == len(owner)}
        owners = {n: owner for n, owner in self.owners.items() if n in same or bool((owner != FREE).any())}
        known = {name: len(owner) for name, owner in owners.items()}
        lost = known.keys() - same
        joined = next((group.layers for group in structure.groups if not lost.isdisjoint(group.layers)), ())
        if not bool((torch.cat([*self.owners.values(), self.outputs]) >= 0).any()):
            self.owners, self.outputs = fresh.owners, fresh.outputs
        elif joined:
            layers = ", ".join(f"'{layer}'" for layer in joined)
            raise ContinualError(
                f"Task '{task}' runs the network in a way that joins units which earlier tasks own one by one: those of"
                f" {layers} would share one fate, since it adds, concatenates or normalises them together. Make all"
                " tasks known before the first one is learned, ContinualModule(module).add_task(task) for each, as the"
                " runner does; or give this task a layer of its own there."
            )
        elif found.items() >= known.items() and len(fresh.outputs) >= len(self.outputs):
            self.owners = {name: owners.get(name, owner) for name, owner in fresh.owners.items()}
            self.outputs = torch.cat([self.outputs, fresh.outputs[len(self.outputs) :]])
        elif found.items() <= known.items() and len(fresh.outputs) <= len(self.outputs):
            return  # read from a checkpoint, and not all of its tasks are met again yet
        else:
            raise ContinualError(
                f"Task '{task}' brings layers of its own to a network whose ledger knows others that no task has run"
                " yet in this process. Make the earlier tasks known first: ContinualModule(module).add_task(task)."
            )
        self.width, self.norms = structure.head.size, fresh.norms
        self.revision += 1

    # Tasks

    @property
    def current(self) -> TaskEntry | None:
        """The task that was begun and is not sealed."""
        return self.tasks[-1] if self.tasks and self.tasks[-1].phase != "sealed" else None

    def index(self, name: str) -> int:
        """Number of the task of that name.

        Raises:
            KeyError: if the ledger does not know it.
        """
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
        if name not in self.reserved:
            known = ", ".join(f"'{task}'" for task in self.reserved) or "none"
            raise ContinualError(f"No outputs are set aside for a task '{name}'; known tasks: {known}.")
        return list(self.reserved[name])

    def undone_by(self, other: NeuronLedger) -> list[str]:
        """The tasks that another ledger does not know as far as this one does: not at all, or in an earlier phase."""
        there = {task.name: task.phase for task in other.tasks}
        return [
            task.name
            for task in self.tasks
            if task.name not in there or PHASES.index(there[task.name]) < PHASES.index(task.phase)
        ]

    def reserve(self, name: str, outputs: Sequence[int]) -> None:
        """Sets output columns aside for a task.

        Raises:
            ContinualError: for a column that another task has, or that the head does not have.
        """
        owner = f"Task '{name}'"
        outputs = check_list(owner, "outputs", outputs, "columns")
        strange = [output for output in outputs if isinstance(output, bool) or not isinstance(output, int)]
        if strange:
            raise ContinualError(f"{owner}: outputs must be whole numbers, got {strange[0]!r}.")
        for output in outputs:
            if not 0 <= output < len(self.outputs):
                raise ContinualError(
                    f"Task '{name}' needs output {output}, but the output head has {len(self.outputs)} columns"
                    f" (0 to {len(self.outputs) - 1}). Widen the head, the old rows first (a ContinualModule does it"
                    f" for classes), or correct the task's classes.{one_column(len(self.outputs))}"
                )
            for other, taken in self.reserved.items():
                if other != name and output in taken:
                    raise ContinualError(
                        f"Task '{name}' and task '{other}' both have output {output}. Give one of them outputs=[...] of"
                        " its own, or wrap the module in ContinualModule, which adds outputs for classes that return."
                    )
        self.reserved[name] = list(outputs)

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
            ContinualError: for an earlier task, for a task after one that was never partitioned, and for outputs that
                another task has.
            CapacityError: if a group has no free unit left for a new task.
        """
        if self.knows(name):
            if self.current is None or self.current.name != name:
                raise ContinualError(
                    f"Task '{name}' was learned before and its units are sealed; give new data a name of its own."
                )
            return self.current
        if self.current is not None:
            if self.current.phase == "learn":
                source = f" The ledger was read from {self.origin}: load a later checkpoint, or" if self.origin else ""
                raise ContinualError(
                    f"Task '{name}' cannot start: task '{self.current.name}' was never partitioned, so nothing would"
                    f" protect it.{source} {'fit' if source else 'Fit'} '{self.current.name}' again up to its partition"
                    " (PartitionCallback, after=...)."
                )
            self.seal()
        if outputs is not None:
            self.reserve(name, outputs)
        if name not in self.reserved:
            raise ContinualError(f"Task '{name}' cannot start: no outputs are set aside for it; reserve them first.")
        self.require_capacity(name, structure)
        self.tasks.append(TaskEntry(name, list(classes), self.reserved[name]))
        self.outputs[self.reserved[name]] = len(self.tasks) - 1
        self.revision += 1
        return self.tasks[-1]

    def require_capacity(self, name: str, structure: Structure | None = None) -> None:
        """Raises CapacityError if a group has no free unit left for the task of that name."""
        ran = None if structure is None else {group.name for group in structure.groups_on(structure.way_of(name))}
        for group, owner in self.owners.items():
            if ran is not None and structure is not None and structure.ways > 1 and group not in ran:
                continue
            if group not in self.whole and not bool((owner == FREE).any()):
                shares = ", ".join(
                    f"{int((owner == i).sum())} by '{task.name}'"
                    for i, task in enumerate(self.tasks)
                    if bool((owner == i).any())
                )
                raise CapacityError(
                    f"Task '{name}' cannot start: no free unit is left in '{group}' ({len(owner)} of"
                    f" {len(owner)} owned: {shares}). Lower max_claim for the tasks before it, raise"
                    " reserve_tasks, or widen the layer."
                )

    def claim(self, claimed: Mapping[str, Bool[Tensor, "_"]]) -> None:
        """Gives units to the current task: those marked become its own, its other ones become free again.

        Args:
            claimed: for each group by name, the units that the task is to own.
        """
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

    # Masks

    def owner_of_units(self, structure: Structure) -> Int64[Tensor, "units"]:
        """Owner of every unit of the structure, the outputs' at the end.

        Raises:
            ContinualError: if the network is not the one the ledger was made for.
        """
        sizes = {group.name: group.size for group in structure.groups}
        known = {name: len(owner) for name, owner in self.owners.items()}
        if sizes != known or structure.head.size != len(self.outputs):
            raise ContinualError(
                f"The ledger was made for another network: it knows units {known} and {len(self.outputs)} outputs,"
                f" the network has {sizes} and {structure.head.size}. Where earlier tasks have heads of their own, make"
                " them known first: ContinualModule(module).add_task(task)."
            )
        return torch.cat([self.owners[group.name] for group in structure.groups] + [self.outputs])

    def norm_owners(self) -> dict[str, Int64[Tensor, "..."]]:
        """For each module that normalises several units together under ``exact``, the owner of each element."""
        if self.isolation != "exact":
            return {}
        owner = torch.cat([*self.owners.values(), self.outputs])
        return {path: lookup(units, owner, none=NO_OWNER) for path, units in self.norms.items()}

    def levels(self, structure: Structure, tasks: int | None = None) -> Levels:
        """From which task on each entry is held still.

        Args:
            structure: of the network.
            tasks: how many of the tasks begun count; default all of them.
        """
        owner = self.owner_of_units(structure)
        if tasks is not None:
            owner = torch.where(owner < tasks, owner, FREE)
        return Levels(structure, owner, [task.name for task in self.tasks[:tasks]])

    def frozen(self, structure: Structure, tensors: Mapping[str, Tensor]) -> dict[str, Bool[Tensor, "..."]]:
        """For each tensor, the entries that may not move now; each mask broadcasts to its tensor.

        In LEARN what computes free units and the task's outputs moves, in INVARIANCE what computes the claimed units
        and the task's outputs; otherwise nothing. What has no unit moves with the first task that runs it.
        """
        task = len(self.tasks) - 1
        masks = {}
        before, now = self.levels(structure, max(task, 0)), self.levels(structure)
        for name in tensors:
            uses = structure.entries.get(name)
            if self.current is None or uses is None:
                masks[name] = torch.tensor(self.current is None or task > 0).reshape((1,) * tensors[name].ndim)
            else:
                masks[name] = self._held(before, now, uses)
                if self.isolation == "exact":
                    masks[name] = masks[name] | self.cut(structure, uses)
        return masks

    def _held(self, before: Levels, now: Levels, uses: Sequence[Entries]) -> Bool[Tensor, "..."]:
        """Entries that the current task may not move: levels of the tasks before it, and with it."""
        assert self.current is not None
        task, learns = len(self.tasks) - 1, self.current.phase == "learn"
        masks, own = [], False
        for use in uses:
            outputs = use.target >= now.structure.head.first
            rides = task in now.riders(use)
            own |= rides
            held = before.of(use) >= 0
            if rides and not learns:
                held = held | (now.of(use) != task)
            if use.used is not None:
                held = held & use.used
            held = torch.where(outputs, now.owners(use) != task, held)
            first = now.first(use)
            masks.append(torch.where(use.target == NO_UNIT, first != task if first >= 0 else task > 0, held))
        return _any(masks) if own or learns else torch.ones((), dtype=torch.bool)

    def sealed(self, structure: Structure, tensors: Iterable[str]) -> dict[str, Bool[Tensor, "..."]]:
        """For each tensor, the entries of earlier tasks, which no phase moves; each mask broadcasts to its tensor."""
        current = len(self.tasks) - (self.current is not None)
        levels = self.levels(structure, current)
        masks = {}
        for name in tensors:
            if name in structure.entries:
                uses = structure.entries[name]
                masks[name] = _any(
                    torch.where(use.target == NO_UNIT, levels.first(use) >= 0, levels.owners(use) >= 0) for use in uses
                )
        return masks

    def cut(self, structure: Structure, uses: Iterable[Entries]) -> Bool[Tensor, "..."]:
        """Entries that must be zero under exact isolation: from a free or later unit into an owned one.

        While a task learns, its outputs read free units too; they are cut at its partition. What one task's way
        connects is never cut for another's: see :meth:`needed`.
        """
        learns = self.current is not None and self.current.phase == "learn"
        levels = self.levels(structure, len(self.tasks) - 1 if learns else None)
        masks = []
        for use in uses:
            target, source = levels.of(use), lookup(use.source, levels.owner, none=NO_OWNER)
            masks.append((target >= 0) & ((source == FREE) | (source > target)))
        return _any(masks)

    def needed(self, structure: Structure, tensors: Mapping[str, Tensor]) -> Bool[Tensor, "units"]:
        """Units that the current task must claim, since what reads them cannot be cut.

        A layer that tasks share and that each feeds from a layer of its own: what earlier tasks own there connects
        units that they own, by entries that are not zero; in the current task's way, the same entries read units of
        its own.

        Args:
            structure: of the network.
            tensors: its parameters.
        """
        needed = torch.zeros(structure.n_units + 1, dtype=torch.bool)
        task = len(self.tasks) - 1
        if structure.ways == 1 or self.isolation != "exact":
            return needed[:-1]
        levels = self.levels(structure)
        free = torch.cat([(levels.owner == FREE) | (levels.owner == task), torch.tensor([False])])
        sealed = self.sealed(structure, tensors)
        way = structure.way_of(self.tasks[task].name)
        for name, tensor in tensors.items():
            for use in structure.uses_on(name, way):
                there = free[use.source] & (levels.of(use) == task) & sealed[name]
                if bool(there.any()):
                    there = there & (tensor.detach() != 0).cpu()
                    needed[use.source.expand(there.shape)[there]] = True
        return needed[:-1]

    # Persistence

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain containers that ``torch.load(weights_only=True)`` reads."""
        return {
            "owners": {name: owner.clone() for name, owner in self.owners.items()},
            "outputs": self.outputs.clone(),
            "width": self.width,
            "head": self.head,
            "reserved": {name: list(outputs) for name, outputs in self.reserved.items()},
            "positions": {name: list(positions) for name, positions in self.positions.items()},
            "tasks": [asdict(task) for task in self.tasks],
            "isolation": self.isolation,
            "whole": list(self.whole),
            "norms": {path: units.clone() for path, units in self.norms.items()},
            "records": [dict(record) for record in self.records],
            "directions": {name: basis.clone() for name, basis in self.directions.items()},
            "inference": self.inference,
            "heads": {layer: list(columns) for layer, columns in self.heads.items()},
            "fingerprints": copy.deepcopy(self.fingerprints),
            "ways": list(self.ways),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> NeuronLedger:
        """The ledger that :meth:`state_dict` described.

        Raises:
            ContinualError: for anything else.
        """
        try:
            return cls._from_state_dict(state)
        except (KeyError, TypeError, AttributeError) as error:
            raise ContinualError(
                f"This is no ledger that NeuronLedger.state_dict() gave: {type(error).__name__}: {error}. Read one with"
                " NeuronLedger.from_checkpoint(path)."
            ) from error

    @classmethod
    def _from_state_dict(cls, state: Mapping[str, Any]) -> NeuronLedger:
        return cls(
            owners={name: owner.clone().cpu() for name, owner in state["owners"].items()},
            outputs=state["outputs"].clone().cpu(),
            width=state["width"],
            head=state["head"],
            reserved={name: list(outputs) for name, outputs in state["reserved"].items()},
            positions={name: list(positions) for name, positions in state.get("positions", {}).items()},
            tasks=[TaskEntry(**task) for task in state["tasks"]],
            isolation=state["isolation"],
            whole=list(state["whole"]),
            norms={path: units.clone().cpu() for path, units in state.get("norms", {}).items()},
            records=[dict(record) for record in state["records"]],
            directions={name: basis.clone().cpu() for name, basis in state.get("directions", {}).items()},
            inference=state.get("inference"),
            heads={layer: list(columns) for layer, columns in state.get("heads", {}).items()},
            fingerprints=copy.deepcopy(state.get("fingerprints", {})),
            ways=list(state.get("ways", [])),
        )

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> NeuronLedger:
        """Reads the ledger from a Lightning checkpoint that was written with one of the callbacks.

        Raises:
            ContinualError: if the checkpoint holds none, or there is no such file.
        """
        path = check_path("NeuronLedger", "path", path)
        if not path.is_file():
            raise ContinualError(f"NeuronLedger: {path} is no file; give a checkpoint of Lightning's.")
        checkpoint = load_tensors(
            path,
            f"{path} is no checkpoint that can be read safely: it is damaged, or holds more than tensors and plain"
            " values.",
        )
        if not isinstance(checkpoint, Mapping) or CHECKPOINT_KEY not in checkpoint:
            raise ContinualError(
                f"{path} holds no ledger: it was written without lightning_cf's callbacks, or with"
                " save_weights_only=True, which leaves out what callbacks add."
            )
        ledger = cls.from_state_dict(checkpoint[CHECKPOINT_KEY])
        ledger.origin = str(path)
        return ledger


def _any(masks: Iterable[Bool[Tensor, "..."]]) -> Bool[Tensor, "..."]:
    first, *others = [*masks] or [torch.zeros((), dtype=torch.bool)]
    for mask in others:
        first = first | mask
    return first
