"""A task is added to what strategies keep of all tasks together: its data are read once for all of these strategies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_cf.errors import ContinualError, ContinualWarning, warn
from lightning_cf.task_inference.batches import joined, numbers_in
from lightning_cf.task_inference.cumulative import Cumulative, Labelled, Shared, cumulative, in_full, moved
from lightning_cf.task_inference.electing import without
from lightning_cf.task_inference.inference import BUDGET, TaskInference
from lightning_cf.task_inference.known import Known
from lightning_cf.task_inference.readout import Readout
from lightning_cf.task_inference.registry import STRATEGIES
from lightning_cf.task_inference.sites import Sites, kept
from lightning_cf.task_inference.strategies import REJECTED
from lightning_cf.utilities.randomness import keyed_generator

ENOUGH = 2000
"""So many samples of the first task show what its features are like."""

MOST = 2**26
"""So many numbers of them are held at most, beside a first batch."""


class Shares(ABC):
    """Shares a task's training batches out among several processes."""

    @abstractmethod
    def possible(self) -> bool:
        """Whether all of them read the same data in the same order."""

    @abstractmethod
    def add(
        self, sites: Sites, shared: Mapping[str, Shared], first: int, own: Callable[[int], None]
    ) -> list[dict[str, Shared]]:
        """What strategies add up of all batches from one on: here of every so many, and elsewhere of those between.

        Args:
            sites: where the first task's scores look.
            shared: by strategy what it keeps, with nothing added up.
            first: of the batches.
            own: looks at this process's part, every so many of them.

        Returns:
            for each other process by strategy what it has added up.
        """


@dataclass
class Gathering:
    """A strategy that a task is added to, batch by batch.

    Attributes:
        strategy: whose it is.
        shared: what it keeps before; nothing before the first task.
        sites: where the first task's scores look.
        columns: all classes that it knows, this task's among them.
        generator: for whatever is drawn.
        budget: how many numbers may be kept.
        error: what failed, if something did: then nothing more is done.
        waiting: the first batches, until they are enough to show what features are like.
        values: how familiar held-out data look.
    """

    strategy: Cumulative
    shared: Mapping[str, Tensor]
    sites: Sites
    columns: Int64[Tensor, "classes"]
    generator: torch.Generator
    budget: int
    error: Exception | None = None
    waiting: list[Labelled] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def see(self, seen: Readout, columns: Int64[Tensor, "batch"]) -> None:
        """Adds a batch of training data."""
        if self.shared:
            self._add(seen, columns)
            return
        self.waiting.append((self.strategy.lean(seen), columns))
        samples = sum(len(each) for _, each in self.waiting)
        if samples >= ENOUGH or sum(numbers_in(each) for each, _ in self.waiting) >= MOST:
            self._begin()

    def close(self) -> None:
        """Ends the task, after its last batch: the place where strategies solve for what their scores need."""
        if not self.shared:
            if not self.waiting:
                raise ContinualError("task_inference: no sample of the first task can be looked at.")
            self._begin()
        self.shared = self.strategy.close(self.shared)

    def weigh(self, seen: Readout) -> None:
        """Takes note of how familiar a batch of held-out data looks."""
        near, here = moved(self.strategy, self.shared, seen), self.columns.to(seen.outputs.device)
        with in_full(seen):
            outputs = self.strategy.outputs(near, seen, self.sites, here)
            self.values.append(self.strategy.familiarity(near, outputs, here))

    def calibration(self) -> Float[Tensor, "3"]:
        """Mean, deviation and threshold of how familiar the held-out data look."""
        values = torch.cat(self.values)
        threshold = values.quantile(REJECTED).clamp_max(self.strategy.familiar)
        return torch.stack([values.mean(), values.std(correction=0).clamp_min(1e-6), threshold])

    def _begin(self) -> None:
        with in_full(self.waiting[0][0]):
            first = joined([seen for seen, _ in self.waiting])
            self.shared = self.strategy.begin(first, self.sites, self.generator, self.budget)
        for seen, columns in self.waiting:
            self._add(seen, columns)
        self.waiting = []

    def _add(self, seen: Readout, columns: Int64[Tensor, "batch"]) -> None:
        self.shared = add_batch(self.strategy, self.shared, seen, self.sites, columns)


def gather(
    inference: TaskInference,
    known: Known,
    training: Callable[[Sites, int, int], Iterator[Labelled]],
    held_out: Callable[[Sites], Iterable[Readout]],
    shares: Shares | None = None,
) -> None:
    """Adds a task to what strategies keep of all tasks together; to be called before it is learned.

    A task that was added when it was claimed stays as it is at its seal, unless it is the first: what its units show is
    then made anew.

    Args:
        inference: in place.
        known: the task.
        training: gives its training data: what the network shows of a batch, and output columns; from a batch on, and
            every so many of them.
        held_out: what the network shows of held-out data, which calibrates.
        shares: looks at some batches on other processes, where there are such.
    """
    tasks = [*(task for task in inference.tasks if task.name != known.name), known]
    first, columns = tasks[0], torch.cat([task.sites.outputs for task in tasks])
    anew = first is known and inference.looks is None  # else it looks where a task did that was forgotten
    sites = first.sites if inference.looks is None else inference.looks
    before = next((task for task in inference.tasks if task.name == known.name), known)
    gatherings = []
    for strategy in cumulative(STRATEGIES[name] for name in inference.strategies):
        name = strategy.name
        if not anew and name in before.calibration:
            known.calibration[name] = before.calibration[name]
            known.fitted |= {name: before.fitted[name]} if name in before.fitted else {}
            continue
        generator = keyed_generator(inference.seed, first.name, "features")
        shared = {} if anew else inference.shared[name]
        gatherings.append(Gathering(strategy, shared, sites, columns, generator, inference.budget))
    if gatherings:
        _read(gatherings, partial(training, sites), held_out(sites), shares)
    for each in gatherings:
        _keep(inference, known, each, {} if anew else inference.shared[each.strategy.name])


def _keep(inference: TaskInference, known: Known, found: Gathering, before: Shared) -> None:
    """Keeps what a strategy has with a task; one that failed is left out."""
    name = found.strategy.name
    try:
        if found.error is not None:
            raise found.error
        added = found.strategy.added(before, found.shared) if inference.apart else {}
        calibration = found.calibration()
        spoiled = [key for key, x in found.shared.items() if bool(x.isnan().any())]
        if spoiled:
            raise ContinualError(f"what it keeps of all tasks holds values that are not numbers ({spoiled[0]}).")
    except Exception as error:  # whatever a strategy raises on data that its trial did not see
        inference.strategies = without(inference.strategies, name, error, several=inference.votes is not None)
        inference.shared.pop(name, None)
        return
    known.calibration[name] = kept(calibration)
    inference.shared[name] = {key: kept(value) for key, value in found.shared.items()}
    _tell_size(inference, found.strategy, before)
    if added:
        known.fitted[name] = {key: kept(value) for key, value in added.items()}


def _tell_size(inference: TaskInference, strategy: Cumulative, before: Shared) -> None:
    """Says where a strategy came to keep more than the budget that somebody gave it."""
    own = getattr(strategy, "budget", None)
    budget, given = own or inference.budget, own is not None or inference.budget != BUDGET
    now, then = (sum(x.numel() for x in held.values()) for held in (inference.shared[strategy.name], before))
    if given and then <= budget < now:
        warn(
            f"task_inference={strategy.name} keeps {now:,} numbers, more than budget={budget:,}: so few do not hold"
            " what it needs, or there are more classes than at first, or its features were given and say how many there"
            " are. Raise the budget, or give fewer features.",
            ContinualWarning,
        )


def _read(
    gatherings: Sequence[Gathering],
    training: Callable[[int, int], Iterator[Labelled]],
    held_out: Iterable[Readout],
    shares: Shares | None,
) -> None:
    """Reads the data once for all strategies; what fails ends in the ``error`` of whose it is."""
    try:
        if shares is not None and all(each.strategy.summed for each in gatherings) and shares.possible():
            _share(gatherings, training, shares)
        else:
            _see(gatherings, training(0, 1))
        _each(gatherings, Gathering.close)
        for seen in held_out:
            _each(gatherings, partial(Gathering.weigh, seen=seen))
    except Exception as error:  # whatever the data or the network raise, no strategy has them
        for each in gatherings:
            each.error = each.error or error


def _see(gatherings: Sequence[Gathering], training: Iterator[Labelled]) -> None:
    """Adds all batches to what each strategy keeps."""
    for seen, columns in training:
        _each(gatherings, partial(Gathering.see, seen=seen, columns=columns))


def _begun(gatherings: Sequence[Gathering], training: Iterator[Labelled]) -> int:
    """Adds as many batches as it takes until every strategy knows what its features are like; how many those were."""
    count = 0
    while not all(each.shared or each.error is not None for each in gatherings):
        found = next(training, None)
        if found is None:
            break
        _each(gatherings, partial(Gathering.see, seen=found[0], columns=found[1]))
        count += 1
    return count


def _share(gatherings: Sequence[Gathering], training: Callable[[int, int], Iterator[Labelled]], shares: Shares) -> None:
    """Adds all batches, of which each process looks at some once it is known what features are like."""
    first = _begun(gatherings, training(0, 1))
    here = [each for each in gatherings if each.shared and each.error is None]
    if not here:
        return
    begun = {each.strategy.name: unsummed(each.strategy, each.shared) for each in here}
    for found in shares.add(here[0].sites, begun, first, lambda step: _see(here, training(first, step))):
        for each in here:
            sums = summed(each.strategy, each.shared)
            added = {name: x + sums[name] if name in sums else x for name, x in found[each.strategy.name].items()}
            each.shared = {**each.shared, **added}


def add_batch(
    strategy: Cumulative, shared: Shared, seen: Readout, sites: Sites, columns: Int64[Tensor, "batch"]
) -> Shared:
    """What a strategy keeps with a batch of training data added, on the batch's device."""
    with in_full(seen):
        return strategy.add(moved(strategy, shared, seen), seen, sites, columns.to(seen.outputs.device))


def summed(strategy: Cumulative, shared: Shared) -> dict[str, Tensor]:
    """What a strategy adds up, batch by batch, on the CPU."""
    return {name: value.cpu() for name, value in shared.items() if name.startswith(strategy.summed)}


def unsummed(strategy: Cumulative, shared: Shared) -> dict[str, Tensor]:
    """What it keeps else, on the CPU."""
    return {name: value.cpu() for name, value in shared.items() if not name.startswith(strategy.summed)}


def _each(gatherings: Sequence[Gathering], step: Callable[[Gathering], None]) -> None:
    """Does a step for each strategy that did not fail yet."""
    for each in gatherings:
        if each.error is None:
            try:
                step(each)
            except Exception as error:  # whatever a strategy raises on data that its trial did not see
                each.error = error
