"""What the callbacks share about a module: its structure, its ledger, and which task's outputs it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_cf.disturbance import Disturbance
from lightning_cf.errors import ContinualError, DivergenceError, StructureError
from lightning_cf.evaluation import on_device
from lightning_cf.finite import Snapshot, described, in_forward_order, infinite_on_purpose, not_finite
from lightning_cf.ledger import Isolation, NeuronLedger
from lightning_cf.normalisation import make_owner_aware
from lightning_cf.outcome import Outcome
from lightning_cf.outputs import OutputView, head_of, heads_of
from lightning_cf.structure import Forward, Structure, call, eval_mode, named_tensors, samples
from lightning_cf.subspace import GivenSubspace, Subspace
from lightning_cf.tasks import Task, required_arguments, supervised
from lightning_cf.tracing import trace

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
        collect: puts into the ledger what is trained beside the network now, if anything.
        infinite: names of tensors that held infinite numbers before any task, and may: masks, bounds.
        safe: the network as the current phase found it, while a fit runs.
        mixed: what mixes the columns of the network's outputs, so that only ``perturb`` works; empty if nothing does.
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
    collect: Callable[[], None] | None = None
    mixed: str = ""
    infinite: frozenset[str] = frozenset()
    safe: Snapshot | None = None

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
        for group in self.structure.groups:
            inputs = sum(rows.width(tensors[rows.tensor]) for rows in group.rows if rows.role == "weight")
            basis = subspace.basis(group.name, inputs, self.ledger.directions)
            if basis is not None:
                found[group.name] = basis
        return found

    def retrace(self, module: nn.Module) -> None:
        """Traces the module again, after its head grew."""
        self.structure = trace(module, self.example, self.forward, apart=self.ledger.isolation == "perturb")

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
        structure = self.structure
        if task.name not in self.met and self.met and task.evaluate is not supervised:
            structure = self._take_up(module, task)
        self.met.add(task.name)
        columns = self.outputs_of(task)
        if not columns:
            columns = structure.returned[-1].tolist()
        if not columns:
            raise ContinualError(
                f"Task '{task.name}': its evaluate returns no columns of a layer, so it must say which outputs it owns:"
                " outputs=[...]."
            )
        return columns

    def _take_up(self, module: LightningModule, task: Task) -> Structure:
        """Traces the network as the task runs it, behind the ways known so far; kept if it meets other layers."""
        example, forward = _way(module, task)
        known = self.example, self.forward
        count = min(_batch(known[0]), _batch(example))
        both = samples(module, known[0], count), samples(module, example, count)

        def one_after_another(net: nn.Module, examples: Any) -> Any:
            return known[1](net, examples[0]), forward(net, examples[1])

        structure = _traced(module, task, both, one_after_another, apart=self.ledger.isolation == "perturb")
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
        if structure.entries.keys() != self.structure.entries.keys():
            self.ledger.extend_to(structure)
            self.structure, self.example, self.forward = structure, both, one_after_another
        return structure

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


def state_of(module: nn.Module) -> ContinualState | None:
    """The state kept beside a module, or None before its first task."""
    state: ContinualState | None = getattr(module, _ATTRIBUTE, None)
    return state


def state_for(module: LightningModule, task: Task) -> ContinualState:
    """The state kept beside a module; made by tracing it on the task's data when there is none.

    Raises:
        StructureError: if the module cannot be traced.
        ContinualError: if the task has no data, or its batches give no input to trace with.
    """
    state = state_of(module)
    if state is None:
        example, forward = _way(module, task)
        ledger = getattr(module, _PENDING, None)
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
    return getattr(module, _PENDING, None) if state is None else state.ledger


def keep_ledger(module: nn.Module, ledger: NeuronLedger) -> None:
    """Makes a ledger the module's own, such as one that ``NeuronLedger.from_checkpoint`` read.

    A network with norms that mix units needs it to compute what it computed when the checkpoint was written: under
    ``exact`` these norms go by owners (see ``normalisation.py``). Loading a ContinualModule does it by itself.
    """
    state = state_of(module)
    if state is None:
        object.__setattr__(module, _PENDING, ledger)
    else:
        ledger.revision = state.ledger.revision + 1  # so that masks made for the other one are made anew
        state.ledger = ledger
    make_owner_aware(module, ledger.norm_owners())


def _way(module: LightningModule, task: Task) -> tuple[Any, Forward]:
    """An example, and how the task runs the network on it: all outputs, and those that it is scored on."""
    batch = task.check_data()
    inputs = _inputs(module, task, batch)
    if task.evaluate is supervised and inputs is not None and required_arguments(module.forward) == 1:
        return inputs, call
    if task.evaluate is supervised and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise ContinualError(
            f"Task '{task.name}': its batches are no (input, target) pairs, so there is no example to trace"
            f" {type(module).__name__} with, and no telling how to score it. Give the task"
            " evaluate=lambda module, batch: (predictions, target), or set example_input_array in the module."
        )
    batch = on_device(module, task, batch)
    if inputs is None or not _runs(module, inputs):
        return batch, lambda net, batch: task.evaluate(net, batch)[0]
    return (inputs, batch), lambda net, example: (call(net, example[0]), task.evaluate(net, example[1])[0])


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
        raise ContinualError(
            f"Task '{task.name}': {type(module).__name__} cannot run on its first batch: {error} Give the task"
            " evaluate=lambda module, batch: (predictions, target), or set example_input_array in the module."
        ) from error
