"""One batch, and the same with its input changed, as the strategies of task inference look at it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from lightning_cf.task_inference.readout import Readout, read
from lightning_cf.task_inference.registry import STRATEGIES
from lightning_cf.task_inference.sites import Sites
from lightning_cf.task_inference.variants import changed


def variants_of(names: Sequence[str]) -> tuple[str, ...]:
    """The changes of the input that some strategies look at; names that there are not have none."""
    known = [STRATEGIES[name] for name in names if name in STRATEGIES]
    return tuple(dict.fromkeys(variant for strategy in known for variant in strategy.variants))


def read_all(
    module: nn.Module, tasks: Sequence[Sites], run: Callable[[Any], Any], batch: Any, variants: Sequence[str]
) -> Readout:
    """What a network shows of a batch, and of the batch with its input changed.

    Args:
        module: the network.
        tasks: what to look at.
        run: runs the network on a batch.
        batch: an input, or a tuple whose first is the input.
        variants: names of the changes.
    """
    others = {name: read(module, tasks, partial(run, changed(batch, name))) for name in variants}
    others = {name: replace(other, inputs=None) for name, other in others.items()}
    return replace(read(module, tasks, partial(run, batch)), others=others)
