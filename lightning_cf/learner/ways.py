"""How a task runs a network: what is traced, on which example, and whether it is a way that is known."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_cf.errors import ContinualError, StructureError
from lightning_cf.functional.phases import trace
from lightning_cf.lightning_api import LightningModule, is_overridden
from lightning_cf.network.forward import Forward, call, eval_mode, fresh, named_tensors, same_state, samples
from lightning_cf.network.structure import Structure, layer_of
from lightning_cf.network.ways import Ways
from lightning_cf.ownership.ledger import Isolation
from lightning_cf.tasks.evaluation import on_device
from lightning_cf.tasks.targets import checked_pair
from lightning_cf.tasks.task import Task, required_arguments, supervised
from lightning_cf.tasks.training_batches import first_batch
from lightning_cf.utilities.randomness import isolated_generators, seed_all


def _batch(example: Any) -> int:
    """How many samples an example has."""
    return next((len(x) for x in tree_leaves(example) if isinstance(x, Tensor) and x.ndim), 1)


def _same_way(structure: Structure, a: int, b: int) -> bool:
    """Whether two ways through a network use all that they use alike."""
    if structure.ways == 1:
        return True
    return all((a in use.ways) == (b in use.ways) for uses in structure.entries.values() for use in uses)


def _alike(module: LightningModule, known: Collection[str], a: tuple[Any, Forward], b: tuple[Any, Forward]) -> bool:
    """Whether a network runs the same operations for two examples, on the same of its tensors, which are all known."""
    seen, other = (_Signature.of(module, example, forward) for example, forward in (a, b))
    return seen is not None and seen == other and all(name in known for _, *names in seen for name in names)


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
                seed_all(0)
                forward(module, fresh(samples(module, example, 2)))
        except Exception:  # whatever a user's forward pass raises
            return None
        return recorder.found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        names = [self.names[id(x)] for x in tree_leaves((args, kwargs)) if id(x) in self.names]
        self.found.append((str(func), *names))
        return func(*args, **(kwargs or {}))


def _way(module: LightningModule, task: Task) -> tuple[Any, Forward]:
    """An example, and how the task runs the network on it: all outputs, and those that it is scored on."""
    batch = first_batch(module, task)
    inputs = _inputs(module, task, batch)
    if task.evaluate is supervised and inputs is not None and required_arguments(module.forward) == 1:
        return _in_parts(module, task, inputs, call)
    _check_pairs(module, task, batch)
    example, evaluated = _scored(module, task, batch)
    if inputs is None or not _runs(module, inputs, call, 2):
        return example, evaluated
    return (inputs, example), Ways([call, evaluated])


def _own_way(module: LightningModule, task: Task) -> tuple[Any, Forward]:
    """An example, and how a further task runs the network on it."""
    batch = task.check_data()
    _check_pairs(module, task, batch)
    if task.evaluate is supervised and required_arguments(module.forward) == 1:
        return _in_parts(module, task, on_device(module, task, batch)[0], call)
    return _scored(module, task, batch)


def _scored(module: LightningModule, task: Task, batch: Any) -> tuple[Any, Forward]:
    """A batch, and what the task makes of it to be scored."""

    def evaluated(net: nn.Module, batch: Any) -> Tensor:
        return checked_pair(task, task.evaluate(net, batch))[0]  # type: ignore[arg-type]

    return _in_parts(module, task, on_device(module, task, batch), evaluated)


@dataclass
class _Whole:
    """A batch that is one thing, such as a graph with its adjacency: nothing cuts samples out of it."""

    batch: Any


def _in_parts(module: LightningModule, task: Task, example: Any, forward: Forward) -> tuple[Any, Forward]:
    """An example of which a few samples do too; whole where it is no collection of samples and they do not."""
    loader = task.task_loaders.given("train")["train"]
    one = isinstance(loader, DataLoader) and loader.batch_size is None and loader.batch_sampler is None
    if not one or _runs(module, example, forward, 2):
        return example, forward
    return _Whole(example), lambda net, whole: forward(net, fresh(on_device(module, task, whole.batch)))


def _check_pairs(module: LightningModule, task: Task, batch: Any) -> None:
    if task.evaluate is supervised and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise ContinualError(
            f"Task '{task.name}': its batches are no (input, target) pairs, so there is no example to trace"
            f" {type(module).__name__} with, and no telling how to score it. Give the task"
            " evaluate=lambda module, batch: (predictions, target), or set example_input_array in the module."
        )


def _check_returned(task: Task, columns: list[int], returned: list[int], size: int) -> None:
    """Raises ContinualError where a task is to own outputs none of which its way returns, of ``size`` in all heads."""
    if returned and set(returned).isdisjoint(columns) and max(columns) < size:
        said = f"outputs={task.outputs}" if task.outputs else f"classes={task.classes}"
        raise ContinualError(
            f"Task '{task.name}' says {said}, which are outputs of another head: counted through all heads, the one"
            f" that it runs gives outputs {returned[0]} to {returned[-1]}. Leave {said.split('=')[0]}= out: a"
            " task's outputs are then those that its evaluate returns, and a label counts within them."
        )


def _check_known(module: LightningModule, task: Task, known: Structure, now: Structure) -> None:
    """Raises ContinualError where the ways of earlier tasks are not what they were, once a further one is followed."""
    before, layers = known.head.layers, now.head.layers
    read = [layer for layer in before if layer not in layers and any(layer_of(name) == layer for name in now.entries)]
    if read:
        raise ContinualError(
            f"Task '{task.name}' reads what the output layer '{read[0]}' of an earlier task gives. Outputs belong to"
            " their task alone; later tasks read hidden units only. Let it read what"
            f" '{read[0]}' reads, the units before it."
        )
    if layers[: len(before)] != before or not now.entries.keys() >= known.entries.keys():
        raise ContinualError(
            f"Task '{task.name}': the way in which earlier tasks run {type(module).__name__} is another one now. A"
            " forward pass that chooses its layers by something that changes, such as an attribute, cannot be"
            " followed: let evaluate= of each task name its own, as"
            " lambda module, batch: (module(batch[0], task='a'), batch[1]), or with heads"
            " lambda module, batch: (module.heads['a'](module(batch[0])), batch[1])."
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


def _runs(module: LightningModule, example: Any, forward: Forward, count: int) -> bool:
    """Whether a network can be run on so many samples of an example."""
    try:
        with torch.no_grad(), eval_mode(module), same_state(module):
            forward(module, fresh(samples(module, example, count)))
    except Exception:  # whatever a user's forward pass raises
        return False
    return True


def _traced_apart(
    module: LightningModule, task: Task, example: Any, forward: Forward, reason: StructureError
) -> Structure:
    try:
        return _traced(module, task, example, forward, isolation="perturb")
    except StructureError:
        raise StructureError(f"{reason} Neither isolation='perturb' nor exclude= helps without that.") from reason


def _traced(module: LightningModule, task: Task, example: Any, forward: Forward, *, isolation: Isolation) -> Structure:
    try:
        return trace(module, example, forward, isolation=isolation)
    except ContinualError:
        raise
    except Exception as error:
        size = _batch(example)
        if _runs(module, example, forward, size):
            raise ContinualError(
                f"Task '{task.name}': {type(module).__name__} runs on its first batch of {size} samples, but not on 2"
                f" of them: {error} It is traced, judged and asked in batches of other sizes: let it take the size from"
                " what it gets, such as torch.zeros(1, len(x), 16) for a state, not from a number."
            ) from error
        advice = "That is what its evaluate= says; let it run the module as a training step does."
        if task.evaluate is supervised:
            advice = (
                "Give the task evaluate=lambda module, batch: (predictions, target), or set example_input_array in the"
                " module."
            )
        raise ContinualError(
            f"Task '{task.name}': {type(module).__name__} cannot run on its first batch: {error} {advice}"
        ) from error
