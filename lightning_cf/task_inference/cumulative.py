"""Strategies that keep state over tasks: what they keep belongs to all, and each task adds to it at its seal."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_cf.errors import ContinualError
from lightning_cf.task_inference.known import Known
from lightning_cf.task_inference.lineup import Lineup
from lightning_cf.task_inference.prediction import Inferred
from lightning_cf.task_inference.readout import Readout, View, taken
from lightning_cf.task_inference.sites import Sites
from lightning_cf.task_inference.strategies import Fitted, Strategy, TaskScores

Shared = Mapping[str, Tensor]
"""What a strategy keeps of all tasks together: statistics, never data."""


class Cumulative(Strategy):
    """A strategy whose tasks share what it keeps; it compares all classes of all tasks with one another.

    At each seal it sees all of the task's training data once, batch by batch. A class is an output column of the
    network, so that two tasks of the same labels have classes of their own.
    """

    raw = True
    at_rest: tuple[str, ...] = ("sums.",)
    """With what the names begin of what no score needs; it stays on the CPU."""
    summed: tuple[str, ...] = ()
    """With what the names begin of sums over a task's samples: where all else is there and these are not, they begin
    anew. Several processes then share the task's data; without such names the first one reads them all."""
    familiar: float = float("inf")
    """What is as familiar as this is not unknown, whatever held-out data say: some of them may have been trained on."""

    def begin(self, seen: Readout, sites: Sites, generator: torch.Generator, budget: int) -> dict[str, Tensor]:
        """What is found once, on some of the first task's data.

        Args:
            seen: what the network shows of them.
            sites: where the first task's scores look, and so which units it owns.
            generator: on the CPU, for whatever is drawn.
            budget: how many numbers may be kept in all, once every output has its data.
        """
        return {}

    def lean(self, seen: Readout) -> Readout:
        """What the network shows of a batch without what is not looked at, which may be large."""
        return seen

    @abstractmethod
    def add(self, shared: Shared, seen: Readout, sites: Sites, columns: Int64[Tensor, "batch"]) -> Shared:
        """What is kept, with a batch of a task's training data added.

        Args:
            shared: what was kept before, on the batch's device.
            seen: what the network shows of the batch.
            sites: where the first task's scores look.
            columns: the class of each sample, as the number of its output.
        """

    def close(self, shared: Shared) -> Shared:
        """What is kept, after the last batch of a task: the place to solve for what scores need."""
        return shared

    def added(self, before: Shared, after: Shared) -> dict[str, Tensor]:
        """What a task added, as tensors that :meth:`subtract` takes.

        Args:
            before: what was kept without it; nothing for the first one.
            after: what is kept with it; also before it was closed.

        Raises:
            ContinualError: where that cannot be had.
        """
        raise ContinualError(f"task_inference={self.name}: what a task added cannot be taken away again.")

    def subtract(self, shared: Shared, added: Shared) -> Shared:
        """What would be kept had a task never been there.

        Args:
            shared: what is kept with it.
            added: what it added.

        Raises:
            ContinualError: where that is not what it added.
        """
        raise NotImplementedError

    def only(self, shared: Shared, added: Sequence[Shared]) -> Shared:
        """What would be kept had these tasks been there and no other, but for what was found on the first one's data.

        Args:
            shared: what is kept.
            added: what each of them added.

        Raises:
            ContinualError: where that cannot be had.
        """
        raise ContinualError(f"task_inference={self.name}: what tasks add cannot be put together again.")

    def renumbered(self, kept: Shared, at: Mapping[int, int]) -> Shared:
        """What is kept where the network's outputs have other numbers now, as when an output layer before theirs grew.

        Args:
            kept: of all tasks, or what one of them added.
            at: by number so far, the number of each output that has another now.

        Raises:
            ContinualError: where that cannot be had.
        """
        raise ContinualError(
            f"task_inference={self.name}: outputs have other numbers now, by which it keeps the classes of the tasks so"
            " far. Add outputs behind the last one, or give the strategy a method renumbered(kept, at)."
        )

    @abstractmethod
    def outputs(
        self, shared: Shared, seen: Readout, sites: Sites, columns: Int64[Tensor, "classes"]
    ) -> Float[Tensor, "batch classes"]:
        """How likely each class is for each sample of any batch, as logarithms but for a number that all share.

        Args:
            shared: what is kept, on the batch's device.
            seen: what the network shows of the batch.
            sites: where the first task's scores look.
            columns: the classes that are wanted.
        """

    def familiarity(
        self, shared: Shared, outputs: Float[Tensor, "batch classes"], columns: Int64[Tensor, "classes"]
    ) -> Float[Tensor, "batch"]:
        """How much each sample looks like one of the known classes, in a unit that later tasks leave as it is.

        Args:
            shared: what is kept.
            outputs: as :meth:`outputs` gives them.
            columns: the class of each.
        """
        return outputs.amax(dim=1)

    def score(self, fitted: Fitted, view: View) -> Float[Tensor, "batch"]:
        """Not asked: tasks are scored together."""
        raise NotImplementedError(f"{type(self).__name__} scores all tasks together.")


def task_scores(outputs: Float[Tensor, "batch classes"], lineup: Lineup) -> TaskScores:
    """The logarithm of each task's probability: its classes' together, of a softmax over all of them.

    Args:
        outputs: of all classes.
        lineup: whose outputs these are.
    """
    return lineup.reduced(lambda logs: logs.logsumexp(dim=-1), outputs.log_softmax(dim=1))


Labelled = tuple[Readout, Int64[Tensor, "batch"]]
"""What the network shows of a batch, and the output column of each sample's class."""


def infer_together(
    strategy: Cumulative,
    shared: Shared,
    sites: Sites,
    tasks: Sequence[Known],
    lineup: Lineup,
    readout: Readout,
) -> Inferred:
    """Scores of all tasks for a batch: the logarithm of each one's probability.

    Args:
        strategy: whose scores.
        shared: what it keeps.
        sites: where the first task's scores looked, which may have been forgotten since.
        tasks: those to score.
        lineup: where their outputs stand.
        readout: what the network shows of the batch.
    """
    shared = moved(strategy, shared, readout)
    outputs = strategy.outputs(shared, readout, sites, lineup.columns)
    scores = task_scores(outputs, lineup)
    _, spread, threshold = torch.stack([task.calibration[strategy.name] for task in tasks]).to(outputs.device).T
    familiar = strategy.familiarity(shared, outputs, lineup.columns)
    # One threshold for all tasks: what is familiar is so in one unit, and would else be ranked by how each was judged.
    none = ((threshold.mean() - familiar) / spread.mean()).sigmoid()[:, None]
    within = lineup.each(pooled, taken(readout.outputs, lineup.columns, 1), outputs)
    probabilities = torch.cat([(1 - none) * scores.exp(), none], dim=1)
    return Inferred(scores, probabilities, lineup.likeliest(within), within)


def pooled(logits: Float[Tensor, "... classes"], others: Float[Tensor, "... classes"]) -> Float[Tensor, "... classes"]:
    """What two say of the classes within a task, as one distribution: their probabilities' geometric mean.

    The sub-network and what all tasks share err on other samples; a logarithmic pool of both is right more often than
    either (Genest and Zidek 1986).

    >>> pooled(torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])).tolist()
    [[0.5, 0.5]]
    """
    return ((logits.log_softmax(dim=-1) + others.log_softmax(dim=-1)) / 2).softmax(dim=-1)


def in_full(seen: Readout) -> torch.autocast:
    """Computes in float32, whatever the network ran in: sums are exact there."""
    return torch.autocast(seen.outputs.device.type, enabled=False)


def moved(strategy: Cumulative, shared: Shared, seen: Readout) -> dict[str, Tensor]:
    """What is kept, on a batch's device, but for what no score needs."""
    device = seen.outputs.device
    return {k: v if k.startswith(strategy.at_rest) else v.to(device) for k, v in shared.items()}


def cumulative(strategies: Iterable[Strategy]) -> list[Cumulative]:
    """Those of some strategies that keep state over tasks."""
    return [strategy for strategy in strategies if isinstance(strategy, Cumulative)]
