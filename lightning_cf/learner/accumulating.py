"""What a live module shows of all of a task's data, for strategies that keep state over tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_leaves

from lightning_cf.errors import ContinualError
from lightning_cf.learner.labels import Kept, positions_of, why_no_labels
from lightning_cf.learner.together import Everyone
from lightning_cf.lightning_api import LightningModule
from lightning_cf.network.finite import infinite_rows, rows_finite, rows_of
from lightning_cf.task_inference import STRATEGIES, Known, Readout, Sites, TaskInference
from lightning_cf.task_inference.cumulative import Labelled, Shared, cumulative
from lightning_cf.task_inference.gathering import Shares, add_batch, gather, summed
from lightning_cf.task_inference.read_variants import read_all, variants_of
from lightning_cf.tasks.evaluation import predict
from lightning_cf.tasks.sharing import order_of
from lightning_cf.tasks.task import Task
from lightning_cf.tasks.training_batches import training_batches
from lightning_cf.utilities.randomness import isolated_generators


def accumulate(
    module: LightningModule,
    task: Task,
    inference: TaskInference,
    known: Known,
    training: Callable[[], Iterable[Any]] | None = None,
    held_out: Callable[[], Iterable[Any]] | None = None,
    *,
    everyone: Everyone | None = None,
) -> None:
    """Adds a task to what strategies keep of all tasks together, if there are such; before it is learned.

    Args:
        module: the network.
        task: whose data it is.
        inference: in place.
        known: the task.
        training: gives its training batches from the start; default all of them, in order.
        held_out: gives batches that it was not trained on; default what judges its partition.
        everyone: all processes, if there are several, each of which then reads some of the training batches.
    """
    strategies = cumulative(STRATEGIES[name] for name in inference.strategies)
    if not strategies:
        return
    variants = variants_of([strategy.name for strategy in strategies])
    show = partial(shown, module, task, known, variants)
    every = training or partial(training_batches, module, task, ordered=True)

    def of_part(sites: Sites, first: int, step: int) -> Iterator[Labelled]:
        return show(sites, islice(every(), first, None, step))

    gather(
        inference,
        known,
        of_part,
        lambda sites: (seen for seen, _ in show(sites, (held_out or task.judging_batches)())),
        None if everyone is None or training is not None else AmongAll(everyone, task, known, variants),
    )


@dataclass(frozen=True)
class AmongAll(Shares):
    """Shares a task's training batches out among all processes.

    Attributes:
        everyone: the processes.
        task: whose batches they are.
        known: the task, as inference knows it.
        variants: changes of the input that are looked at, too.
    """

    everyone: Everyone
    task: Task
    known: Known
    variants: tuple[str, ...]

    def possible(self) -> bool:
        """Whether all processes read the same data in the same order."""
        orders = self.everyone.do(_order, partial(order_of, self.task))
        return None not in orders and len(set(orders)) == 1

    def add(
        self, sites: Sites, shared: Mapping[str, Shared], first: int, own: Callable[[int], None]
    ) -> list[dict[str, Shared]]:
        """What each other process has added up of its part, while this one looks at its own."""
        work = Part(self.known.state_dict(), sites.state_dict(), self.variants, shared, first)
        return self.everyone.do(work, partial(own, self.everyone.processes))[1:]


def _order(module: LightningModule, task: Task) -> str | None:
    return order_of(task)


@dataclass(frozen=True)
class Part:
    """A process's part of a task's training batches, for strategies that keep state over tasks.

    Attributes:
        known: the task, as inference knows it.
        sites: where the first task's scores look.
        variants: changes of the input that are looked at, too.
        shared: by strategy what it keeps, with nothing added up.
        first: batch that is shared out.
    """

    known: dict[str, Any]
    sites: dict[str, Any]
    variants: tuple[str, ...]
    shared: Mapping[str, Shared]
    first: int

    def __call__(self, module: LightningModule, task: Task) -> dict[str, Shared]:
        """What each strategy has added up of this process's batches."""
        known, sites = Known.from_state_dict(self.known), Sites.from_state_dict(self.sites)
        found = dict(self.shared)
        with isolated_generators():
            every = training_batches(module, task, ordered=True)
            part = islice(every, self.first + distributed.get_rank(), None, distributed.get_world_size())
            strategies = cumulative(STRATEGIES[name] for name in self.shared)
            for seen, columns in shown(module, task, known, self.variants, sites, part):
                for each in strategies:
                    found[each.name] = add_batch(each, found[each.name], seen, sites, columns)
        return {each.name: summed(each, found[each.name]) for each in strategies}


def training_of(module: LightningModule, task: Task, inference: TaskInference) -> Callable[[Sites], Iterable[Labelled]]:
    """What the network shows of a known task's training data, as they were added, once more from the start."""
    known = next(known for known in inference.tasks if known.name == task.name)
    variants = variants_of([strategy.name for strategy in cumulative(STRATEGIES[n] for n in inference.strategies)])
    return lambda sites: shown(module, task, known, variants, sites, training_batches(module, task, ordered=True))


@torch.no_grad()
def elect(module: LightningModule, task: Task, inference: TaskInference, held_out: Iterable[Any]) -> None:
    """Lets held-out data of the task that was learned last say which strategy predicts, where that is to be chosen."""

    def readouts() -> Iterator[Readout]:
        for batch in held_out:
            yield inference.read(module, partial(predict, module, task), batch)

    inference.elect(readouts())


@torch.no_grad()
def shown(
    module: LightningModule,
    task: Task,
    known: Known,
    variants: tuple[str, ...],
    sites: Sites,
    batches: Iterable[Any],
) -> Iterator[Labelled]:
    """What the network shows of each batch, and each sample's output column; samples that are not finite are left out.

    Raises:
        ContinualError: for targets that are not one of the task's classes for each sample.
    """
    for batch in batches:
        forward = Kept(partial(predict, module, task))
        readout = read_all(module, [sites, known.sites], forward, batch, variants)  # whose outputs may be more by now
        target = forward.found[1]
        own = positions_of(known.classes, target, len(readout.outputs))
        if own is None:
            raise ContinualError(why_no_labels(task, target, len(readout.outputs)))
        if any(_same(leaf, target) for leaf in tree_leaves(readout.x)):
            readout = replace(readout, x=None)  # a forward pass that is given labels too, as for a loss of its own
        fine = rows_finite([readout.outputs, *([] if readout.inputs is None else [readout.inputs])])
        rows = rows_of(readout.x, len(fine)) if readout.inputs is None else []
        if (strange := infinite_rows(rows)) is not None:
            fine = fine & ~strange
        columns = known.sites.outputs.to(own.device)[own]
        yield (readout, columns) if bool(fine.all()) else (readout.part(fine), columns[fine.to(columns.device)])


def _same(leaf: Any, target: Tensor) -> bool:
    """Whether a part of an input is what is to be predicted from it."""
    if not isinstance(leaf, Tensor) or not leaf.numel():
        return False
    equal = leaf.shape == target.shape and len(target) > 1 and torch.equal(leaf, target.to(leaf.device))
    return equal or leaf.data_ptr() == target.data_ptr()
