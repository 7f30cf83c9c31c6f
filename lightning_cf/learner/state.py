"""What the callbacks share about a module: its structure, its ledger, and which task's outputs it shows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ReferenceType, ref

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_cf.errors import ContinualError, DivergenceError, StructureError, StructureWarning, check_kind, warn
from lightning_cf.invariance.disturbance import Disturbance
from lightning_cf.lightning_api import LightningModule, is_overridden
from lightning_cf.network.finite import Snapshot, described, in_forward_order, infinite_on_purpose, not_finite
from lightning_cf.network.foreign_heads import check_foreign_heads
from lightning_cf.network.forward import Forward, call, eval_mode, named_tensors, same_state, samples
from lightning_cf.network.output_heads import head_of, heads_of
from lightning_cf.network.structure import Structure, UnitGroup
from lightning_cf.network.tracing.trace import trace
from lightning_cf.network.ways import Ways
from lightning_cf.ownership.ledger import Isolation, NeuronLedger
from lightning_cf.ownership.output_view import OutputView
from lightning_cf.ownership.owner_aware_norms import make_owner_aware
from lightning_cf.partition.outcome import Outcome
from lightning_cf.subspaces.subspace import GivenSubspace, Subspace
from lightning_cf.tasks.evaluation import on_device
from lightning_cf.tasks.targets import checked_pair
from lightning_cf.tasks.task import Task, required_arguments, supervised
from lightning_cf.tasks.training_batches import first_batch
from lightning_cf.utilities.randomness import isolated_generators

_ATTRIBUTE = "_continual_state"
_PENDING = "_continual_ledger"


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
        checked_ways: how many ways through the network were checked for exact isolation.
        collect: puts into the ledger what is trained beside the network now, if anything.
        infinite: names of tensors that held infinite numbers before any task, and may: masks, bounds.
        safe: the network as the current phase found it, while a fit runs.
        fitted: the task of the last fit, which holds that fit's Trainer.
        mixed: what mixes the columns of the network's outputs, so that only ``perturb`` works; empty if nothing does.
        said: warnings about the network that were given.
        checked: the structure whose output layers of other libraries' classes were looked at.
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
    checked_ways: int = 0
    collect: Callable[[], None] | None = None
    mixed: str = ""
    infinite: frozenset[str] = frozenset()
    safe: Snapshot | None = None
    said: set[str] = field(default_factory=set)
    fitted: ReferenceType[Task] | None = None
    checked: Structure | None = None

    def set_mask_outputs(self, mask_outputs: bool) -> None:
        """Whether each task sees its own outputs only.

        Raises:
            StructureError: where outputs cannot be masked one by one, because each is made from several.
        """
        if mask_outputs and self.mixed:
            raise StructureError(f"{self.mixed} {_MIXED}")
        self.mask_outputs = mask_outputs

    def watched(self, module: nn.Module) -> dict[str, Tensor]:
        """What must be finite, in the order of the forward pass."""
        tensors = in_forward_order(self.structure, named_tensors(module))
        return {name: x for name, x in tensors.items() if name not in self.infinite}

    def check_finite(self, module: nn.Module, when: str) -> None:
        """Raises DivergenceError if the network holds numbers that are not finite, and names the first layer."""
        tensors = self.watched(module)
        names = not_finite(tensors)
        if names:
            raise DivergenceError(f"{when}: the network is not finite, first in {described(names, tensors)}.")

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

    def bases(self, subspace: Subspace | None, tensors: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "_ _"]]:
        """The basis of a sub-space in each group that it holds."""
        found: dict[str, Float[Tensor, "_ _"]] = {}
        if subspace is None:
            return found
        if isinstance(subspace, GivenSubspace):
            subspace.check_layers([group.name for group in self.structure.groups])
        for group in self.groups:
            inputs = sum(rows.width(tensors[rows.tensor]) for rows in group.rows if rows.role == "weight")
            basis = subspace.basis(group.name, inputs, self.ledger.directions)
            if basis is not None and len(basis) != inputs:
                raise ContinualError(
                    f"The sub-space of '{group.name}' is one of {len(basis)} inputs, but the current task gives it"
                    f" {inputs}: it runs other layers there, such as an adapter. Leave the sub-space out."
                )
            if basis is not None:
                found[group.name] = basis
        return found

    @property
    def groups(self) -> tuple[UnitGroup, ...]:
        """The groups that the current task's way through the network computes, and by what; all between tasks."""
        task = self.ledger.current
        return self.structure.groups if task is None else self.structure.groups_on(self.structure.way_of(task.name))

    def retrace(self, module: nn.Module) -> None:
        """Traces the module again, after its head grew."""
        structure = trace(module, self.example, self.forward, apart=self.ledger.isolation == "perturb")
        self.structure = replace(structure, rides=self.structure.rides)

    def set_isolation(self, module: nn.Module, isolation: Isolation) -> None:
        """Under ``perturb``, operations that mix units need not unite them: where some did, the units come apart."""
        if self.ledger.isolation == isolation:
            return
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
        self.met.add(task.name)
        columns = self.outputs_of(task)
        if not columns:
            columns = returned.tolist()
        if not columns:
            raise ContinualError(
                f"Task '{task.name}': its evaluate returns no columns of a layer, so it must say which outputs it owns:"
                " outputs=[...]."
            )
        if fresh:
            self._check_returned(task, columns, returned.tolist())
        return columns

    def _check_returned(self, task: Task, columns: list[int], returned: list[int]) -> None:
        """Raises ContinualError where a task is to own outputs none of which its way through the network returns."""
        head, apart = self.structure.head, returned and set(returned).isdisjoint(columns)
        if len(head.layers) > 1 and apart and max(columns) < head.size:
            said = f"outputs={task.outputs}" if task.outputs else f"classes={task.classes}"
            raise ContinualError(
                f"Task '{task.name}' says {said}, which are outputs of another head: counted through all heads, the one"
                f" that it runs gives outputs {returned[0]} to {returned[-1]}. Leave {said.split('=')[0]}= out: a"
                " task's outputs are then those that its evaluate returns, and a label counts within them."
            )

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
        if plain and _alike(module, ways[0], way):
            self._ride(task, 0)
            return self.structure.returned[0]
        count = min(_batch(example) for example, _ in ways)
        examples = tuple(samples(module, example, count) for example, _ in ways)
        forward = Ways([run for _, run in ways])
        structure = _traced(module, task, examples, forward, apart=self.ledger.isolation == "perturb")
        layers = self.structure.head.layers
        if (
            not structure.entries.keys() >= self.structure.entries.keys()
            or structure.head.layers[: len(layers)] != layers
        ):
            raise ContinualError(
                f"Task '{task.name}': the way in which earlier tasks run {type(module).__name__} is another one now. A"
                " forward pass that chooses a head by something that changes cannot be followed: let forward give the"
                " body's features, and evaluate= of each task name its head:"
                " lambda module, batch: (module.heads['a'](module(batch[0])), batch[1])."
            )
        number = len(ways) - 1
        same = next((n for n in range(number) if _same_way(structure, n, number)), number)
        if same == number:
            if not self.ledger.knows(task.name):
                self._check_met()
            self.ledger.extend_to(structure, task.name)
            self.structure = replace(structure, rides=self.structure.rides)
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
        copied = replace(self, ledger=ledger, start=start, met=set(self.met))
        copied.shown = copied.disturbance = copied.collect = copied.fitted = None
        return copied

    def __reduce__(self) -> Any:
        """What travels in a module's pickle: a plain dict, which any process reads, and :func:`state_of` takes up."""
        return dict, (_packed(self.ledger, self),)

    @contextmanager
    def showing(self, module: nn.Module, tasks: Sequence[Task]) -> Iterator[OutputView | None]:
        """Shows the outputs of one task, or of several sample by sample (see ``OutputView.view_of_sample``)."""
        positions = [task.classes or self.ledger.positions.get(task.name) for task in tasks]
        if self.shown is not None or not self.mask_outputs or None in positions:
            yield self.shown
            return
        views = [
            list(zip(at or [], self.outputs_of(task), strict=True)) for at, task in zip(positions, tasks, strict=True)
        ]
        if self.checked is not self.structure:
            check_foreign_heads(module, self.structure, self.example, self.forward)
            self.checked = self.structure
        several = len(self.structure.head.layers) > 1
        head = heads_of(module, self.structure) if several else head_of(module, self.structure)
        with OutputView(head, width=self.ledger.width, views=views) as view:
            self.shown = view
            try:
                yield view
            finally:
                self.shown = None


_MIXED = "Or use isolation='perturb' with MaskedGradientCallback(mask_outputs=False)."


def _batch(example: Any) -> int:
    """How many samples an example has."""
    return next((len(x) for x in tree_leaves(example) if isinstance(x, Tensor) and x.ndim), 1)


def _same_way(structure: Structure, a: int, b: int) -> bool:
    """Whether two ways through a network use all that they use alike."""
    if structure.ways == 1:
        return True
    return all((a in use.ways) == (b in use.ways) for uses in structure.entries.values() for use in uses)


def _alike(module: LightningModule, a: tuple[Any, Forward], b: tuple[Any, Forward]) -> bool:
    """Whether a network runs the same operations on the same parameters and buffers for two examples."""
    seen = [_Signature.of(module, example, forward) for example, forward in (a, b)]
    return None not in seen and seen[0] == seen[1]


class _Signature(TorchDispatchMode):
    """The operations that run, and which of a module's tensors each takes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {id(tensor): name for name, tensor in named_tensors(module).items()}
        self.found: list[tuple[str, ...]] = []

    @classmethod
    def of(cls, module: LightningModule, example: Any, forward: Forward) -> list[tuple[str, ...]] | None:
        """Of one forward pass; None where it fails."""
        recorder = cls(module)
        try:
            with torch.no_grad(), isolated_generators(), eval_mode(module), same_state(module), recorder:
                forward(module, samples(module, example, 2))
        except Exception:  # whatever a user's forward pass raises
            return None
        return recorder.found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        names = [self.names[id(x)] for x in tree_leaves((args, kwargs)) if id(x) in self.names]
        self.found.append((str(func), *names))
        return func(*args, **(kwargs or {}))


def state_of(module: nn.Module) -> ContinualState | None:
    """The state kept beside a module, or None before its first task."""
    state: ContinualState | dict[str, Any] | None = getattr(module, _ATTRIBUTE, None)
    if isinstance(state, dict):  # the module comes out of a pickle
        del module.__dict__[_ATTRIBUTE]
        ledger = NeuronLedger.from_state_dict(state["ledger"])
        try:
            kept = pickle.loads(state["state"])
        except Exception:  # it was made in another process, whose evaluate= is not there: a fit traces the module anew
            object.__setattr__(module, _PENDING, _Pending(ledger))
            return None
        state = ContinualState(ledger=ledger, **kept)
        object.__setattr__(module, _ATTRIBUTE, state)
    return state


class _Pending:
    """A ledger that waits beside a module for its first fit."""

    def __init__(self, ledger: NeuronLedger) -> None:
        self.ledger = ledger

    def __reduce__(self) -> Any:
        return dict, (_packed(self.ledger),)


def _pending(module: nn.Module) -> NeuronLedger | None:
    """The ledger that waits beside a module, if one does."""
    kept: _Pending | dict[str, Any] | None = getattr(module, _PENDING, None)
    if isinstance(kept, dict):
        kept = _Pending(NeuronLedger.from_state_dict(kept["ledger"]))
        object.__setattr__(module, _PENDING, kept)
    return None if kept is None else kept.ledger


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


def state_for(module: LightningModule, task: Task) -> ContinualState:
    """The state kept beside a module; made by tracing it on the task's data when there is none.

    Raises:
        StructureError: if the module cannot be traced.
        ContinualError: if the task has no data, or its batches give no input to trace with.
    """
    state = state_of(module)
    if state is None:
        example, forward = _way(module, task)
        ledger = _pending(module)
        apart = ledger is not None and ledger.isolation == "perturb"
        mixed = ""
        try:
            structure = _traced(module, task, example, forward, apart=apart)
        except StructureError as error:
            if ledger is not None:
                raise
            structure = _traced_apart(module, task, example, forward, error)
            ledger = NeuronLedger.for_structure(structure)
            ledger.isolation = "perturb"  # all that it can be; ``set_isolation`` says so where it is to be another
            mixed = str(error)
        ledger = ledger or NeuronLedger.for_structure(structure)
        if ledger.head != structure.head_layer:
            raise ContinualError(
                f"Task '{task.name}' leads to the output head '{structure.head_layer}', but the module's ledger knows"
                f" '{ledger.head}' as the first one. Where earlier tasks have heads of their own, make them known"
                " first: ContinualModule(module).add_task(task)."
            )
        state = ContinualState(structure, ledger, example, forward, mask_outputs=not mixed, mixed=mixed)
        state.infinite = infinite_on_purpose(structure, module)
        object.__setattr__(module, _ATTRIBUTE, state)
    return state


def ledger_of(module: nn.Module) -> NeuronLedger | None:
    """The ledger kept beside a module, also one that was loaded before the module's first fit."""
    state = state_of(module)
    return _pending(module) if state is None else state.ledger


def keep_ledger(module: nn.Module, ledger: NeuronLedger) -> None:
    """Makes a ledger the module's own, such as one that ``NeuronLedger.from_checkpoint`` read.

    A network with norms that mix units needs it to compute what it computed when the checkpoint was written: under
    ``exact`` these norms go by owners (see ``normalisation.py``). Loading a ContinualModule does it by itself.
    """
    check_kind("keep_ledger", "module", module, nn.Module, "the network that the ledger is about")
    check_kind("keep_ledger", "ledger", ledger, NeuronLedger, "a NeuronLedger, such as from_checkpoint(path) reads")
    state = state_of(module)
    if state is None:
        object.__setattr__(module, _PENDING, _Pending(ledger))
    else:
        ledger.revision = state.ledger.revision + 1  # so that masks made for the other one are made anew
        state.ledger = ledger
    make_owner_aware(module, ledger.norm_owners())


def _way(module: LightningModule, task: Task) -> tuple[Any, Forward]:
    """An example, and how the task runs the network on it: all outputs, and those that it is scored on."""
    batch = first_batch(module, task)
    inputs = _inputs(module, task, batch)
    if task.evaluate is supervised and inputs is not None and required_arguments(module.forward) == 1:
        return inputs, call
    _check_pairs(module, task, batch)
    example, evaluated = _scored(module, task, batch)
    if inputs is None or not _runs(module, inputs):
        return example, evaluated
    return (inputs, example), Ways([call, evaluated])


def _own_way(module: LightningModule, task: Task) -> tuple[Any, Forward]:
    """An example, and how a further task runs the network on it."""
    batch = task.check_data()
    _check_pairs(module, task, batch)
    if task.evaluate is supervised and required_arguments(module.forward) == 1:
        return on_device(module, task, batch)[0], call
    return _scored(module, task, batch)


def _scored(module: LightningModule, task: Task, batch: Any) -> tuple[Any, Forward]:
    """A batch, and what the task makes of it to be scored."""
    return on_device(module, task, batch), lambda net, batch: checked_pair(task, task.evaluate(net, batch))[0]


def _check_pairs(module: LightningModule, task: Task, batch: Any) -> None:
    if task.evaluate is supervised and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise ContinualError(
            f"Task '{task.name}': its batches are no (input, target) pairs, so there is no example to trace"
            f" {type(module).__name__} with, and no telling how to score it. Give the task"
            " evaluate=lambda module, batch: (predictions, target), or set example_input_array in the module."
        )


def _inputs(module: LightningModule, task: Task, batch: Any) -> Any:
    """What the module's forward pass takes, as far as one can tell."""
    if not is_overridden("forward", module, parent=LightningModule):
        return None
    if module.example_input_array is not None:
        return module.example_input_array
    first = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
    if not isinstance(first, Tensor):
        return None
    moved = on_device(module, task, batch)
    return moved if first is batch else moved[0]


def _runs(module: LightningModule, inputs: Any) -> bool:
    """Whether the module's forward pass takes these inputs."""
    try:
        with torch.no_grad(), eval_mode(module):
            call(module, samples(module, inputs, 2))
    except Exception:  # whatever a user's forward pass raises
        return False
    return True


def _traced_apart(
    module: LightningModule, task: Task, example: Any, forward: Forward, reason: StructureError
) -> Structure:
    try:
        return _traced(module, task, example, forward, apart=True)
    except StructureError:
        raise StructureError(f"{reason} Neither isolation='perturb' nor exclude= helps without that.") from reason


def _traced(module: LightningModule, task: Task, example: Any, forward: Forward, *, apart: bool) -> Structure:
    try:
        return trace(module, example, forward, apart=apart)
    except ContinualError:
        raise
    except Exception as error:
        advice = "That is what its evaluate= says; let it run the module as a training step does."
        if task.evaluate is supervised:
            advice = (
                "Give the task evaluate=lambda module, batch: (predictions, target), or set example_input_array in the"
                " module."
            )
        raise ContinualError(
            f"Task '{task.name}': {type(module).__name__} cannot run on its first batch: {error} {advice}"
        ) from error
