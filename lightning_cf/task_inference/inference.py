"""Which task is this input? What is kept of each task, and how it becomes one distribution over all classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import is_
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from lightning_cf.errors import ContinualError
from lightning_cf.network.finite import not_finite
from lightning_cf.task_inference.cumulative import Cumulative, cumulative, infer_together
from lightning_cf.task_inference.electing import elected
from lightning_cf.task_inference.known import Known
from lightning_cf.task_inference.lineup import Lineup
from lightning_cf.task_inference.packing import packed, unpacked
from lightning_cf.task_inference.prediction import Inferred, Prediction
from lightning_cf.task_inference.read_variants import read_all, variants_of
from lightning_cf.task_inference.readout import Readout, View, taken
from lightning_cf.task_inference.registry import STRATEGIES, check_strategies
from lightning_cf.task_inference.sites import Sites, kept
from lightning_cf.task_inference.strategies import REJECTED
from lightning_cf.task_inference.trained import Trained, trained_heads
from lightning_cf.utilities.randomness import keyed_generator

BUDGET = 150_000
"""How many numbers a strategy that keeps state over tasks may keep where nobody says."""


@dataclass
class TaskInference:
    """Knows, of each task that was sealed, what its inputs look like to its sub-network.

    Attributes:
        strategies: names of those that are fitted; the first one predicts (see :meth:`elect`).
        tasks: what is kept of each, in the order in which they were learned.
        unit: the variance of the first task's input, in which residuals are measured; 0 before it is known.
        training: by head (see ``trained``), what is trained with the current task.
        training_sites: where that looks.
        training_task: name of that task.
        left_out: names of tasks that turned out, before they trained, not to be such as can be inferred.
        shared: by strategy, what one that keeps state over tasks keeps of all of them (see ``cumulative``).
        budget: how many numbers such a strategy may keep.
        seed: what it draws depends on.
        votes: where the one that predicts is to be chosen, of how many held-out samples each told the task, and
            under no name how many there were; else None.
        looks: where the first task's scores looked, once it is known, which what is shared looks at.
        apart: whether to keep what each task added to what is shared, so that it can be taken away without its data.
        nested: whether the fits gave the forward pass a list or a tuple as one argument.
    """

    strategies: tuple[str, ...]
    tasks: list[Known] = field(default_factory=list)
    unit: float = 0.0
    training: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    training_sites: Sites | None = None
    training_task: str = ""
    left_out: list[str] = field(default_factory=list)
    shared: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    budget: int = BUDGET
    seed: int = 0
    votes: dict[str, int] | None = None
    looks: Sites | None = None
    apart: bool = False
    nested: bool = False
    _lineups: dict[torch.device, tuple[list[Known], Lineup]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_strategies(self.strategies)

    def learn(
        self,
        known: Known,
        training: tuple[View, Int64[Tensor, "samples"]],
        held_out: View,
        *,
        sealed: bool = True,
    ) -> None:
        """Keeps a task that was claimed, with what was trained for it.

        Args:
            known: the task, with nothing fitted yet.
            training: its view of its training data, and the labels, from 0 on.
            held_out: its view of held-out data, which calibrates.
            sealed: whether it is over; else what is trained for it trains on, and the seal keeps it anew.
        """
        with torch.autocast(held_out.logits.device.type, enabled=False):
            self._fit(known, training, held_out)
        self.tasks = [task for task in self.tasks if task.name != known.name] + [known]
        if sealed:
            self.forget_training()

    def begin(
        self, head: Trained, task: str, view: View, labels: Int64[Tensor, "samples"], classes: int, seed: int = 0
    ) -> dict[str, Tensor]:
        """What a head starts with on a task: depends on the seed, the task's name and its view of its data alone."""
        return head.begin(view, labels, classes, self.unit, keyed_generator(seed, task, "task inference"))

    def measure(self, view: View) -> None:
        """Takes the unit of residuals from the first task's view of its data, where it is not known yet."""
        if not self.unit and view.inputs is not None:
            self.unit = float(view.inputs.var(dim=0).mean().nan_to_num(1.0).clamp_min(1e-12))

    def forget_training(self) -> None:
        """Drops what is trained: its task is over."""
        self.training, self.training_sites, self.training_task = {}, None, ""

    def _fit(self, known: Known, training: tuple[View, Int64[Tensor, "samples"]], held_out: View) -> None:
        view, labels = training
        trained = {}
        for head in trained_heads(STRATEGIES[name] for name in self.strategies):
            if head.head in self.training and self.training_sites is not None:
                values = head.narrowed(self.training[head.head], self.training_sites, known.sites)
                trained[head.head] = {key: value.to(view.logits.device) for key, value in values.items()}
        for name in self.strategies:
            strategy = STRATEGIES[name]
            if isinstance(strategy, Cumulative):
                continue
            fitted = strategy.keep(view, labels, len(known.classes), held_out, trained)
            score = strategy.score(fitted, held_out)
            known.fitted[name] = {key: kept(value) for key, value in fitted.items()}
            spread = score.std(correction=0).clamp_min(1e-6)
            calibration = torch.stack([score.mean(), spread, score.quantile(REJECTED)])
            known.calibration[name] = kept(calibration)
            bad = not_finite({**known.fitted[name], "calibration": known.calibration[name]})
            if bad:
                raise ContinualError(
                    f"task_inference={name}: what is kept of task '{known.name}' is not finite ({bad[0]}), found on"
                    f" {len(labels)} samples of it. Give the task more data, or choose another strategy."
                )

    def elect(self, held_out: Iterable[Readout]) -> None:
        """Puts that strategy first which told the task of the most held-out samples, over all seals so far.

        Args:
            held_out: what the network shows of held-out data of the task that was learned last.
        """
        votes = self.votes
        if votes is None or len(self.tasks) < 2 or len(self.strategies) < 2:
            return
        for readout in held_out:
            for name in self.strategies:
                told = self.infer(readout, name).scores.argmax(dim=1) == len(self.tasks) - 1
                votes[name] = votes.get(name, 0) + int(told.sum())
            votes[""] = votes.get("", 0) + len(readout.outputs)
        self.strategies = elected(self.strategies, votes)

    def infer(self, readout: Readout, strategy: str | None = None) -> Inferred:
        """Scores every known task; in float32, in whatever precision the network ran.

        Raises:
            ContinualError: if no task is known, or the strategy was not fitted.
        """
        name = self.strategies[0] if strategy is None else strategy
        if name not in self.strategies:
            raise ContinualError(
                f"task_inference='{name}' was not fitted when the tasks were sealed; what was: "
                + ", ".join(self.strategies)
            )
        if not self.tasks:
            raise ContinualError("No task with classes was sealed yet, so there is none to infer.")
        with torch.autocast(readout.outputs.device.type, enabled=False):
            return self._infer(readout, name)

    def _infer(self, readout: Readout, name: str) -> Inferred:
        chosen, lineup = STRATEGIES[name], self.lineup(readout.outputs.device)
        if isinstance(chosen, Cumulative):
            sites = self.looks or self.tasks[0].sites
            return infer_together(chosen, self.shared[name], sites, self.tasks, lineup, readout)
        scores, device = [], readout.outputs.device
        calibration = torch.stack([task.calibration[name] for task in self.tasks]).to(device)
        for task in self.tasks:
            fitted = {key: value.to(device) for key, value in task.fitted[name].items()}
            scores.append(chosen.score(fitted, View.of(readout, task.sites)))
        found, (mean, spread, threshold) = torch.stack(scores, dim=1), calibration.T
        if not chosen.raw:
            found, threshold = (found - mean) / spread, (threshold - mean) / spread
            spread = torch.ones_like(spread)
        probabilities = chosen.probabilities(found, spread, threshold)
        logits = taken(readout.outputs, lineup.columns, 1)
        within = lineup.each(lambda own: own.softmax(dim=-1), logits)
        return Inferred(found, probabilities, lineup.likeliest(logits), within)

    def lineup(self, device: torch.device) -> Lineup:
        """Where the outputs of the tasks stand, side by side."""
        tasks, found = self._lineups.get(device, ([], None))
        if found is None or len(tasks) != len(self.tasks) or not all(map(is_, tasks, self.tasks)):
            found = Lineup.of(self.tasks, device)
            self._lineups[device] = list(self.tasks), found
        return found

    def predict(
        self,
        readout: Readout,
        width: int,
        strategy: str | None = None,
        *,
        none: Bool[Tensor, "batch"] | None = None,
        among: Sequence[int] | None = None,
    ) -> Prediction:
        """Class, distribution, task and score of each sample.

        A sample that is not finite, in the first layer's input or in the outputs of a task, is none of the known, with
        the lowest score.

        Args:
            readout: of a batch.
            width: how many classes there are, seen or not.
            strategy: another one than the first.
            none: samples that are none of the known, whatever they look like.
            among: positions of the tasks that it can be, where that is known.
        """
        lineup = self.lineup(readout.outputs.device)
        given = [taken(readout.outputs, lineup.columns, 1), *([] if readout.inputs is None else [readout.inputs])]
        inferred = self.infer(readout, strategy)
        inferred = (inferred if among is None else inferred.among(among)).without(given, none)
        batch, none_of = len(inferred.scores), len(self.tasks)
        best = inferred.probabilities.argmax(dim=1)
        known = best.clamp_max(none_of - 1)
        classes = inferred.classes.gather(1, known[:, None])[:, 0].masked_fill(best == none_of, -1)
        probabilities = inferred.probabilities.new_zeros(batch, width + 1)
        probabilities[:, -1] = inferred.probabilities[:, -1]
        probabilities.index_add_(1, lineup.classes, inferred.probabilities[:, lineup.task] * inferred.within)
        tasks = best.masked_fill(best == none_of, -1)
        return Prediction(classes, probabilities, tasks, inferred.scores.amax(dim=1))

    def read(
        self,
        module: nn.Module,
        run: Callable[[Any], Any],
        batch: Any,
        strategy: str | None = None,
        *,
        alone: bool = False,
    ) -> Readout:
        """Runs the network on a batch, and on what else the strategies want of it, and reads what the tasks look at.

        Args:
            module: the network.
            run: runs it on a batch.
            batch: an input, or a tuple whose first is the input.
            strategy: the one that will be asked, if it is one only.
            alone: whether the batch is the input and nothing else.
        """
        names = self.strategies if strategy is None else (strategy,)
        return read_all(module, [task.sites for task in self.tasks], run, batch, variants_of(names), alone=alone)

    def renumber(self, at: Mapping[int, int], heads: Mapping[str, Sequence[int]]) -> None:
        """Outputs have other numbers now, as where an output layer grew.

        Args:
            at: by number so far, the number of each output now.
            heads: by path of each output layer, the outputs that it computes now.

        Raises:
            ContinualError: if a strategy cannot follow.
        """
        at = {old: new for old, new in at.items() if old != new}
        for strategy in cumulative(STRATEGIES[name] for name in self.strategies) if at else ():
            for own in (self.shared, *(task.fitted for task in self.tasks)):
                if strategy.name in own:
                    own[strategy.name] = dict(strategy.renumbered(own[strategy.name], at))
        self.tasks = [replace(task, sites=task.sites.renumbered(at, heads)) for task in self.tasks]
        self.looks = None if self.looks is None else self.looks.renumbered(at, heads)
        self.training_sites = None if self.training_sites is None else self.training_sites.renumbered(at, heads)

    def stored_floats(self, strategy: str | None = None) -> int:
        """How many numbers a strategy keeps beside the network, of all tasks together."""
        name = self.strategies[0] if strategy is None else strategy
        own = sum(task.numbers(name) for task in self.tasks)
        return own + sum(value.numel() for value in self.shared.get(name, {}).values())

    def state_dict(self) -> dict[str, Any]:
        """Everything that is kept, as tensors and plain containers that ``torch.load(weights_only=True)`` reads."""
        return packed(vars(self))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> TaskInference:
        """Makes again, on the CPU, what :meth:`state_dict` described; also what older versions did."""
        return cls(**unpacked(state))
