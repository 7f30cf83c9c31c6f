"""Strategies with a head: a few parameters that train with a task's sub-network and are frozen with it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_cf.task_inference.readout import View, taken
from lightning_cf.task_inference.sites import Sites
from lightning_cf.task_inference.strategies import Fitted, Strategy


class Trained(Strategy):
    """A strategy whose head is trained while its task is.

    Attributes:
        head: name of what is trained; strategies of one head share it.
        share: how much its loss counts beside that of other heads.
        fixed: which values of the head are no parameters.
        changes: changes of the input that its loss looks at: names of ``variants.VARIANTS``, or ``"strange"`` for
            ``variants.strange``; each is a further forward pass in training.
    """

    head: ClassVar[str]
    share: float = 1.0
    fixed: ClassVar[tuple[str, ...]] = ()
    changes: tuple[str, ...] = ()

    @abstractmethod
    def begin(
        self, view: View, labels: Int64[Tensor, "samples"], classes: int, unit: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Starting values of what is trained, and what goes with it.

        Args:
            view: the task's view of some of its training data.
            labels: of these, from 0 on.
            classes: how many there are.
            unit: the variance of the first task's input.
            generator: what the values depend on, with the sizes.
        """

    @abstractmethod
    def narrowed(self, fitted: Fitted, before: Sites, after: Sites) -> dict[str, Tensor]:
        """What was trained while all free units were the task's own, less what its partition took away.

        Args:
            fitted: as trained.
            before: where it looked.
            after: where it is to look.
        """

    @abstractmethod
    def loss(self, fitted: Fitted, view: View, labels: Int64[Tensor, "samples"]) -> Float[Tensor, ""]:
        """What joins the module's own loss, for a batch."""

    def keep(
        self,
        view: View,
        labels: Int64[Tensor, "samples"],
        classes: int,
        held_out: View,
        trained: Mapping[str, Fitted],
    ) -> dict[str, Tensor]:
        """What was trained under this strategy's head, as it stands at the end of the task."""
        return dict(trained.get(self.head, {}))


class LinearHead(Trained):
    """A head that is one linear layer over the task's own units of all hidden layers."""

    def begin(
        self, view: View, labels: Int64[Tensor, "samples"], classes: int, unit: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """A weight (own units x outputs) and a bias of zeros, so that the head says nothing before it was trained."""
        columns = self.columns(classes)
        return {
            "weight": view.logits.new_zeros(own_units(view).shape[1], columns),
            "bias": view.logits.new_zeros(columns),
        }

    @abstractmethod
    def columns(self, classes: int) -> int:
        """How many outputs the layer has for a task with so many classes."""

    def narrowed(self, fitted: Fitted, before: Sites, after: Sites) -> dict[str, Tensor]:
        """Without the rows of units that are no more the task's own."""
        return {**fitted, "weight": fitted["weight"][own_places(before, after, len(before.hidden))]}

    @staticmethod
    def outputs(fitted: Fitted, view: View) -> Float[Tensor, "batch outputs"]:
        """What the linear layer computes of the task's own units, one row a sample."""
        return own_units(view) @ fitted["weight"] + fitted["bias"]


def own_units(view: View, layers: int | None = None) -> Float[Tensor, "batch units"]:
    """The task's own units in the first layers, or in all."""
    pairs = list(zip(view.hidden, view.own, strict=True))[:layers]
    return torch.cat([taken(hidden, own.nonzero().flatten(), 1) for hidden, own in pairs], dim=1)


def own_places(before: Sites, after: Sites, layers: int) -> Int64[Tensor, "_"]:
    """Where the own units that are left stand among those before, in so many layers joined."""
    found, start = [], 0
    for old, new in zip(before.hidden[:layers], after.hidden[:layers], strict=True):
        own = old.columns[old.own]
        found.append(start + places(own, new.columns[new.own]))
        start += len(own)
    return torch.cat(found)


def places(among: Int64[Tensor, "_"], wanted: Int64[Tensor, "_"]) -> Int64[Tensor, "_"]:
    """Where the wanted numbers stand among others, which are in ascending order."""
    return torch.searchsorted(among, wanted)


def changes_input(strategy: Strategy) -> bool:
    """Whether it trains over changed inputs too, and so changes what all other strategies see."""
    return any(head.changes for head in trained_heads([strategy]))


def trained_heads(strategies: Iterable[Strategy]) -> list[Trained]:
    """A strategy for each head that some strategies, or their parts, have."""
    found: dict[str, Trained] = {}
    for strategy in strategies:
        for part in (strategy, *strategy.parts):
            if isinstance(part, Trained):
                found.setdefault(part.head, part)
    return list(found.values())
