"""What the callbacks share about a module: its structure, its ledger, and which task's outputs it shows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor, nn

from lightning_cf.errors import ContinualError, StructureError, StructureWarning, warn
from lightning_cf.exactness.memory import Memory
from lightning_cf.functional.phases import trace
from lightning_cf.functional.showing import view_of
from lightning_cf.invariance.disturbance import Disturbance
from lightning_cf.learner.ways import _alike, _batch, _check_known, _check_returned, _own_way, _same_way, _traced
from lightning_cf.lightning_api import LightningModule
from lightning_cf.network.foreign_heads import check_foreign_heads, check_unmoved, idle_heads
from lightning_cf.network.forward import Forward, samples
from lightning_cf.network.kept_entries import Snapshot
from lightning_cf.network.structure import Structure
from lightning_cf.network.ways import Ways
from lightning_cf.ownership.ledger import Isolation, NeuronLedger
from lightning_cf.ownership.output_view import OutputView
from lightning_cf.partition.outcome import Outcome
from lightning_cf.tasks.task import Task, supervised
from lightning_cf.utilities.randomness import isolated_generators


@dataclass
class ContinualState:
    """Kept beside a module, outside its ``state_dict``, from the first task on.

    Attributes:
        structure: the module's unit groups.
        ledger: who owns what.
        example: an input to trace and probe with.
        forward: how to run the module on it.
        mask_outputs: whether each task trains and is scored on its own outputs only.
        start: parameters at the current task's start, where a partition asked to keep them.
        shown: the view through which the outputs are seen now, if any.
        outcome: what the current task's partitions found so far, if it had any.
        disturbance: what perturbs the redundant units now, if anything.
        met: names of the tasks whose way through the network is known.
        declared: classes and outputs that tasks declared which have not begun.
        untrained: name of a task that has begun and not taken a step.
        last: what the tasks so far gave when the last fit was over.
        checked_ways: how many ways through the network were checked for exact isolation.
        collect: puts into the ledger what is trained beside the network now, if anything.
        safe: the network as the current phase found it, while a fit runs.
        fitted: the task of the last fit, which holds that fit's Trainer.
        mixed: what mixes the columns of the network's outputs, so that only ``perturb`` works; empty if nothing does.
        said: warnings about the network that were given.
        checked: the structure whose output layers were looked at.
        idle: those of them that do not run themselves.
    """

    structure: Structure
    ledger: NeuronLedger
    example: Any
    forward: Forward
    mask_outputs: bool = True
    start: dict[str, Tensor] | None = None
    shown: OutputView | None = None
    outcome: Outcome | None = None
    disturbance: Disturbance | None = None
    met: set[str] = field(default_factory=set)
    declared: dict[str, Any] = field(default_factory=dict)
    untrained: str = ""
    last: Memory | None = None
    checked_ways: int = 0
    collect: Callable[[], None] | None = None
    mixed: str = ""
    safe: Snapshot | None = None
    said: set[str] = field(default_factory=set)
    fitted: ReferenceType[Task] | None = None
    checked: Structure | None = None
    idle: list[str] = field(default_factory=list)

    def set_mask_outputs(self, mask_outputs: bool) -> None:
        """Whether each task sees its own outputs only.

        Raises:
            StructureError: where outputs cannot be masked one by one, because each is made from several.
        """
        if mask_outputs and self.mixed:
            raise StructureError(f"{self.mixed} {_MIXED}")
        self.mask_outputs = mask_outputs

    def remember(self, module: nn.Module) -> None:
        """In a fit: from here on, this is what a fit that diverges goes back to."""
        if self.safe is not None:
            self.safe = Snapshot.of(module)

    def begin_fit(self, task: Task) -> None:
        """The Trainer of the last fit on another task goes: it holds that fit's optimisers, twice the weights."""
        last = None if self.fitted is None else self.fitted()
        if last is not None and last is not task:
            last.let_go()
        self.fitted = ref(task)

    def undisturb(self) -> None:
        """Puts perturbed units back, if some are perturbed now."""
        if self.disturbance is not None:
            self.disturbance.undo()
            self.disturbance = None

    def retrace(self, module: nn.Module) -> None:
        """Traces the module again, after its head grew."""
        structure = trace(module, self.example, self.forward, isolation=self.ledger.isolation)
        self.structure = self._same_network(structure)

    def _same_network(self, structure: Structure) -> Structure:
        """The network traced anew, with what is known of it by other means than a trace of now."""
        known = self.structure
        infinite = known.infinite | (structure.infinite - known.entries.keys())  # what is new may hold them too
        return replace(structure, rides=known.rides, infinite=infinite)

    def set_isolation(self, module: nn.Module, isolation: Isolation) -> None:
        """Under ``perturb``, operations that mix units need not unite them: where some did, the units come apart.

        Raises:
            ContinualError: if tasks were claimed under the other.
        """
        if self.ledger.isolation == isolation:
            return
        if len(self.ledger.tasks) > 1:
            raise ContinualError(
                f"partition: isolation={isolation!r}, but the tasks so far were claimed under"
                f" {self.ledger.isolation!r}; one network keeps to one of them."
            )
        self.ledger.isolation = isolation
        if isolation == "exact" or self.structure.mixings:
            try:
                self.retrace(module)
            except StructureError as error:  # it could be traced with its units apart
                raise StructureError(f"{error} {_MIXED}") from error
            self.ledger.fit_to(self.structure)

    def outputs_of(self, task: Task) -> list[int]:
        """The head's columns that a task owns."""
        return self.ledger.reserved.get(task.name) or task.outputs or task.classes or []

    def meet(self, module: LightningModule, task: Task) -> list[int]:
        """Makes known how a task runs the network, which may be a way of its own; gives the columns that it is to own.

        Raises:
            ContinualError: if the task does not say, and it cannot be told from what its ``evaluate`` returns.
        """
        returned, fresh = self.structure.returned[-1], task.name not in self.met
        if fresh and self.met:
            returned = self._take_up(module, task)
        elif not self.met:
            self._ride(task, len(self.forward.forwards) - 1 if isinstance(self.forward, Ways) else 0)
        columns = self.outputs_of(task) or returned.tolist()
        if not columns:
            raise ContinualError(
                f"Task '{task.name}': its evaluate returns no columns of a layer, so it must say which outputs it owns:"
                " outputs=[...]."
            )
        if fresh and len(self.structure.head.layers) > 1:
            columns = self._within_its_head(task, columns, returned.tolist())
            _check_returned(task, columns, returned.tolist(), self.structure.head.size)
        self.met.add(task.name)
        return columns

    def _within_its_head(self, task: Task, columns: list[int], returned: list[int]) -> list[int]:
        """The columns of a task that runs a head of its own, in which its classes count from 0 on."""
        within = [returned[label] for label in task.classes or [] if label < len(returned)]
        if task.name not in self.ledger.reserved and not task.outputs and not set(columns) <= set(returned):
            columns = within if len(within) == len(columns) else columns
        if columns == within:
            self.ledger.positions[task.name] = columns  # it sees its head as it stands
        return columns

    def tell(self, warning: str) -> None:
        """Says once what a user should know of the network."""
        if warning not in self.said:
            self.said.add(warning)
            warn(warning, StructureWarning)

    def check_met(self) -> None:
        """Raises ContinualError where an earlier task may run the network in a way that this process does not know."""
        if self.structure.ways > 1:
            self._check_met()

    def _check_met(self) -> None:
        unmet = [task.name for task in self.ledger.tasks if task.name in self.ledger.ways and task.name not in self.met]
        if unmet:
            raise ContinualError(
                f"Task '{unmet[0]}' was learned with an evaluate= of its own, and nobody told this process how it runs"
                " the network, so nothing would protect what it reads there. Make the earlier tasks known first:"
                " ContinualModule(module).add_task(task)."
            )

    def _ride(self, task: Task, way: int) -> None:
        """Notes in which of the ways through the network a task runs it."""
        self.structure = replace(self.structure, rides={**self.structure.rides, task.name: way})
        if task.name not in self.ledger.ways and (way or task.evaluate is not supervised):
            self.ledger.ways.append(task.name)

    def _take_up(self, module: LightningModule, task: Task) -> Tensor:
        """Traces the network as the task runs it, behind the ways known so far; kept if it is a way of its own.

        Returns:
            the output columns that the task is scored on.
        """
        plain = task.evaluate is supervised
        if plain and all(name in self.structure.entries for name, p in module.named_parameters() if p.requires_grad):
            self._ride(task, 0)  # it runs forward, which runs all that trains
            return self.structure.returned[0]
        with isolated_generators():
            way = _own_way(module, task)
        ways = [*self._ways(), way]
        if plain and _alike(module, self.structure.entries.keys(), ways[0], way):
            self._ride(task, 0)
            return self.structure.returned[0]
        count = min(_batch(example) for example, _ in ways)
        examples = tuple(samples(module, example, count) for example, _ in ways)
        forward = Ways([run for _, run in ways])
        structure = _traced(module, task, examples, forward, isolation=self.ledger.isolation)
        _check_known(module, task, self.structure, structure)
        number = len(ways) - 1
        same = next((n for n in range(number) if _same_way(structure, n, number)), number)
        if same == number:
            if not self.ledger.knows(task.name):
                self._check_met()
            self.ledger.extend_to(structure, task.name)
            self.structure = self._same_network(structure)
            self.example, self.forward = examples, forward
        self._ride(task, same)
        return structure.returned[-1]

    def _ways(self) -> list[tuple[Any, Forward]]:
        """Examples, and how to run the network on them, in each way known so far."""
        if isinstance(self.forward, Ways):
            return list(zip(self.example, self.forward.forwards, strict=True))
        return [(self.example, self.forward)]

    def __deepcopy__(self, memo: dict[int, Any]) -> ContinualState:
        """With a ledger of its own, and without what a fit hung up."""
        ledger, start = copy.deepcopy((self.ledger, self.start), memo)
        copied = replace(self, ledger=ledger, start=start, met=set(self.met), declared=dict(self.declared))
        copied.shown = copied.disturbance = copied.collect = copied.fitted = copied.last = None
        return copied

    def __reduce__(self) -> Any:
        """What travels in a module's pickle: a plain dict, which any process reads, and :func:`state_of` takes up."""
        return dict, (_packed(self.ledger, self),)

    @contextmanager
    def showing(self, module: nn.Module, tasks: Sequence[Task]) -> Iterator[OutputView | None]:
        """Shows the outputs of one task, or of several sample by sample (see ``OutputView.mix``)."""
        positions = [self.ledger.positions.get(task.name) or task.classes for task in tasks]
        if self.shown is not None or not self.mask_outputs or None in positions:
            yield self.shown
            return
        views = [
            list(zip(at or [], self.outputs_of(task), strict=True)) for at, task in zip(positions, tasks, strict=True)
        ]
        if self.checked is not self.structure:
            check_foreign_heads(module, self.structure, self.example, self.forward)
            self.idle = idle_heads(module, self.structure, self.example, self.forward)
            self.checked = self.structure
        if self.idle:
            self.tell(check_unmoved(self.idle[0], views))
        with view_of(module, self.structure, self.ledger, views) as view:
            self.shown = view
            try:
                yield view
            finally:
                self.shown = None


_MIXED = "Or use isolation='perturb' with MaskedGradientCallback(mask_outputs=False)."
_TRAVELLING = ("structure", "example", "forward", "mask_outputs", "start", "met", "mixed")


def _packed(ledger: NeuronLedger, state: ContinualState | None = None) -> dict[str, Any]:
    """The ledger, and as bytes the rest where it can be pickled: not where a task's ``evaluate`` is a lambda."""
    found = None
    if state is not None:
        try:
            found = pickle.dumps({name: getattr(state, name) for name in _TRAVELLING})
        except Exception:  # whatever the parts of a user's own raise
            found = None
    return {"ledger": ledger.state_dict(), "state": found}
