"""Whether a task can be scored: tried before training on what will judge its partition."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import closing, suppress
from typing import Any

import torch
from torch import Tensor

from lightning_cf.errors import ContinualError, DataWarning, warn
from lightning_cf.lightning_api import LightningModule
from lightning_cf.network.forward import eval_mode, same_state
from lightning_cf.network.kept_entries import values_kept
from lightning_cf.tasks.evaluation import Scorer, judge, predict
from lightning_cf.tasks.reading import samples_in
from lightning_cf.tasks.targets import finite, part_at, strange
from lightning_cf.tasks.task import Task, supervised
from lightning_cf.tasks.training_batches import first_batch, settle
from lightning_cf.utilities.randomness import isolated_generators

SCANNED = 2048
"""Over how many judging samples labels are looked at before training."""

_DRAWS = 16
"""Of weights, none of which changes a prediction that does not depend on them."""

_SCORED = 4
"""Of these, how many are scored at most."""


@torch.no_grad()
def check_scoring(module: LightningModule, task: Task) -> None:
    """Scores the first batch that judges partitions, and looks at the labels of some more.

    Raises:
        ContinualError: if that does not work: better now than after training.
    """
    settle(module, task)
    why = task.task_loaders.whole()
    if why:
        warn(
            f"Task '{task.name}' has no validation data, and none of its training data can be held out: {why}. Its"
            " partition is judged on the data that it trains on. Give it a validation loader.",
            DataWarning,
        )
    metric = task.metric
    if metric is not None and metric.higher_is_better is None:
        warn(
            f"Task '{task.name}': {type(metric).__name__} does not say whether higher is better; it is taken to be. Set"
            " higher_is_better in its class.",
            DataWarning,
        )
    _find_targets(module, task)
    _check_depends(module, task)
    scorer, seen, classes = Scorer(module, task, "its judging data"), 0, set[int]()
    with eval_mode(module), same_state(module), isolated_generators(), scorer.naming():
        rows = False
        for number, batch in enumerate(task.judging_batches()):
            if number == 0 or rows or _to_be_looked_at(task, batch):
                scorer.add(batch, number)
            seen += samples_in(batch)
            labels = task.task_loaders.labels_of(batch, batch[1].shape[-1] if scorer.one_hot else None)
            classes.update([] if labels is None else labels.tolist())
            if number == 0:
                rows = scorer.one_hot or scorer.apart  # those of a later batch may be none
                _try_score(scorer)
            wanted = len(task.classes or []) if task.has_validation else min(2, len(task.classes or []))
            if seen >= SCANNED and (not classes or len(classes.intersection(task.classes or [])) >= wanted):
                return  # else they may be sorted: it goes on to the next class
        if scorer.metric is None:
            scorer.score()  # says that no batch came
    _tell_unjudged(task, classes, seen)


def _tell_unjudged(task: Task, found: set[int], samples: int) -> None:
    """Warns where all that judges is of one class of several, or a validation set has none of some classes.

    Who always says the one class is never wrong, and who never says the others is not either. What is held out of
    training data is few samples, and rare classes need them to learn from.
    """
    classes = task.classes or []
    there = sorted(found.intersection(classes))
    absent = [label for label in classes if label not in found]
    if not there or not absent or (len(there) > 1 and not task.has_validation):
        return
    if len(there) == 1:
        what = f"are all of class {there[0]}: the others count"
    else:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        what = f"are none of classes {', '.join(map(str, absent[:5]))}{more}: these count"
    warn(
        f"Task '{task.name}' has {len(classes)} classes, but the {samples} samples that judge its partition {what} for"
        " nothing. If its validation data are sorted, shuffle them once; if too few are read or held out, raise"
        " limit_val_batches or holdout.",
        DataWarning,
    )


def _find_targets(module: LightningModule, task: Task) -> None:
    """Finds out where in a batch the targets are that an ``evaluate`` of the task's own gives."""
    if task.evaluate is not supervised:
        batch = first_batch(module, task)
        with (
            eval_mode(module),
            isolated_generators(),
            suppress(Exception),
        ):  # what it raises on judging data is said there
            predict(module, task, batch)
        task.check_labels(batch)


def _check_depends(module: LightningModule, task: Task) -> None:
    """Raises ContinualError if an ``evaluate`` of the task's own predicts the same whatever the network's weights are.

    A partition that is judged by such predictions may claim nothing at all and lose nothing.
    """
    if task.evaluate is supervised:
        return
    constant = False
    with (
        eval_mode(module),
        same_state(module),
        isolated_generators(),
        suppress(Exception),
    ):  # said with the first real batch
        batch = next(iter(task.judging_batches()))
        before = predict(module, task, batch)[0]
        with closing(_drawn(module, _DRAWS)) as drawn:
            for _ in drawn:
                if not torch.equal(predict(module, task, batch)[0], before):
                    return
        constant = True
    if constant:
        raise ContinualError(
            f"Task '{task.name}': its evaluate predicts the same whatever the network's weights are, so that no"
            " partition can be judged by it. Let it return what the network says:"
            " evaluate=lambda module, batch: (module(batch[0]), batch[1])."
        )


def _drawn(module: LightningModule, draws: int) -> Generator[None]:
    """So many times other weights; afterwards they are what they were."""
    trained = [x for x in module.parameters() if x.is_floating_point()]
    with values_kept(trained):
        for draw in range(draws):
            generator = torch.Generator().manual_seed(draw)
            for x in trained:
                x.copy_(torch.randn(x.shape, generator=generator))
            yield


@torch.no_grad()
def warn_of_constant(module: LightningModule, task: Task, score: float) -> None:
    """Warns where random weights score what the trained ones did: then any claim is within tolerance.

    Such as where labels are numbered otherwise than predictions, or among so few classes one of the top k is right.

    Args:
        module: in eval mode, with the task's outputs shown; its weights are put back.
        task: whose judging data and metric are used.
        score: the task's before its partition.
    """
    with closing(_drawn(module, _SCORED)) as drawn, same_state(module), isolated_generators():
        for _ in drawn:
            try:
                if judge(module, task) != score:
                    return
            except Exception:  # predictions of random weights may be what no metric takes
                return
    metric = "accuracy" if task.metric is None else type(task.metric).__name__
    warn(
        f"Task '{task.name}': its {metric} is {score:.4g} on the data that judges its partition, and so it is with"
        " random weights: any claim keeps it. Either the task was not learned, or the number says nothing: look at the"
        " metric, its number of classes and top_k, at what evaluate= gives, and whether the judging data are enough.",
        DataWarning,
    )


def _try_score(scorer: Scorer) -> None:
    """Raises ContinualError if no score comes of the first batch, nor of all batches."""
    try:
        if scorer.counted and math.isfinite(scorer.score()):
            return
    except ContinualError:
        raise
    except Exception:  # a metric that needs more than a batch, or one that cannot be
        pass
    judge(scorer.module, scorer.task)


def _to_be_looked_at(task: Task, batch: Any) -> bool:
    """Whether a batch holds labels of other tasks, or no targets where others have theirs, or is not finite."""
    loaders = task.task_loaders
    if loaders.renumbered or not isinstance(part_at(batch, loaders.place_of_targets), Tensor):
        return True
    labels = loaders.labels_of(batch)
    other = task.classes is not None and labels is not None and strange(labels, task.classes, [])
    return bool(other) or not finite(batch)
