"""How units are compared, clustered and chosen, and how many of them a task may claim (US 12387107, paragraph 38)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, TypedDict

from lightning_cf.errors import (
    ContinualError,
    check_choice,
    check_count,
    check_flag,
    check_list,
    check_number,
    check_share,
)
from lightning_cf.network.structure import Structure, UnitGroup
from lightning_cf.partition.clusters import CLUSTERS, Clusters
from lightning_cf.partition.representatives import REPRESENTATIVES, Representative
from lightning_cf.partition.similarity import PairMeasure

Measure = Literal["weight", "update", "activation"] | PairMeasure
MEASURES = ("weight", "update", "activation")


@dataclass(frozen=True, kw_only=True)
class PartitionOptions:
    """How units are compared and how many a task may claim.

    Attributes:
        measure: what is compared: ``"weight"`` (incoming weights, the patent's), ``"update"`` (weights less their
            value at the task's start), ``"activation"`` (outputs on the task's data; no bias term), or a callable
            ``measure(vectors_a, biases_a, vectors_b, biases_b)`` that gives the similarity of each unit of ``a``
            (rows) with each of ``b`` (columns) by their incoming weights, larger for units more alike.
        threshold: the similarity at which units form a cluster, or ``"auto"``: the smallest share of units whose
            cost in the task's metric stays within ``tolerance``.
        tolerance: how much of the metric ``"auto"`` may cost right after the partition, in the metric's unit.
        min_claim: the smallest share of a layer that ``"auto"`` tries, in (0, 1]; or a list, a share a task, the last
            for all that follow: a first task whose units all others read may be given more.
        max_claim: the largest share of a layer that one task may claim, in (0, 1], or a list likewise; default the free
            units divided by the tasks still to come, this one counted, or by ``reserve_tasks`` if that is more.
        reserve_tasks: for how many tasks, this one counted, room is kept at least, where ``max_claim`` is not given.
        clusters: ``"leader"``: each unit joins the first larger one that is similar enough; ``"components"``: chains
            of similar units are one cluster (single linkage).
        representative: which unit of a cluster is claimed: the one of the highest ``"magnitude"``, or a ``"random"``
            one (paragraphs 16 and 49).
        fold: whether the claimed units take over by regression what the redundant ones contributed.
        reinitialise: whether free units get fresh weights before the next task (``exact`` only).
        min_trainable: the least share of the network's parameters that later tasks must be able to train, in [0, 1]:
            ``exact`` is refused where operations that mix units, ``layers`` and ``exclude`` leave less.
        layers: the only layers to partition, by the name of a layer or of a module around several; default all.
        exclude: layers or modules that are not partitioned: the first task claims them whole.
    """

    measure: Measure = "weight"
    threshold: float | Literal["auto"] = "auto"
    tolerance: float = 0.005
    min_claim: float | Sequence[float] = 0.05
    max_claim: float | Sequence[float] | None = None
    reserve_tasks: int = 2
    clusters: Clusters = "leader"
    representative: Representative = "magnitude"
    fold: bool = True
    reinitialise: bool = True
    min_trainable: float = 0.0
    layers: Sequence[str] | None = None
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not callable(self.measure):
            check_choice("partition", "measure", self.measure, MEASURES)
        given = self.threshold
        number = isinstance(given, (int, float)) and not isinstance(given, bool) and math.isfinite(given)
        fine = given == "auto" if isinstance(given, str) else number and (callable(self.measure) or -1 <= given <= 1)
        if not fine:
            kind = "a finite number" if callable(self.measure) else "a number in [-1, 1]"
            raise ContinualError(f"partition: threshold must be {kind} or 'auto', got {self.threshold!r}.")
        check_number("partition", "tolerance", self.tolerance, least=0.0)
        self._check_claims()
        check_count("partition", "reserve_tasks", self.reserve_tasks)
        check_share("partition", "min_trainable", self.min_trainable)
        check_choice("partition", "clusters", self.clusters, CLUSTERS)
        check_choice("partition", "representative", self.representative, REPRESENTATIVES)
        if self.exclude is None:
            object.__setattr__(self, "exclude", ())
        for name in ("layers", "exclude"):
            names = getattr(self, name)
            if isinstance(names, str):
                raise ContinualError(f"partition: {name} must be a list of layer names, got the string {names!r}.")
            names = None if names is None else tuple(check_list("partition", name, names, "layer names"))
            strange = [layer for layer in names or () if not isinstance(layer, str)]
            if strange:
                raise ContinualError(
                    f"partition: {name} must be a list of layer names, such as 'network.1', got {strange[0]!r}."
                )
            object.__setattr__(self, name, names)
        for name in ("fold", "reinitialise"):
            check_flag("partition", name, getattr(self, name))

    def _check_claims(self) -> None:
        listed = [name for name in ("min_claim", "max_claim") if isinstance(getattr(self, name), (list, tuple))]
        for name in listed:
            shares = tuple(getattr(self, name))
            if not shares:
                raise ContinualError(
                    f"partition: {name} must be a share of a layer, or a list of one a task; got none."
                )
            object.__setattr__(self, name, shares)
        if listed:
            for number in range(max(len(getattr(self, name)) for name in listed)):
                self.of_task(number)
            return
        least = check_share("partition", "min_claim", self.min_claim, above_zero=True)
        if self.max_claim is not None:
            most = check_share("partition", "max_claim", self.max_claim, above_zero=True)
            if most < least:
                raise ContinualError(
                    f"partition: max_claim ({self.max_claim}) must not be below min_claim ({self.min_claim})."
                )

    def of_task(self, number: int) -> PartitionOptions:
        """With the shares of one task in place of lists of them, by its number."""
        shares = {"min_claim": self.min_claim, "max_claim": self.max_claim}
        own = {name: x[min(number, len(x) - 1)] for name, x in shares.items() if isinstance(x, tuple)}
        return replace(self, **own) if own else self

    def as_dict(self) -> dict[str, Any]:
        """Every option as a plain value; a callable measure by its name."""
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "measure": self.measure_name}

    @property
    def measure_name(self) -> str:
        """What the measure is called."""
        if isinstance(self.measure, str):
            return self.measure
        return _name(self.measure)

    def partitioned(self, structure: Structure) -> list[UnitGroup]:
        """The groups to partition.

        Raises:
            ContinualError: if ``layers`` or ``exclude`` names a layer that the network does not have.
        """
        known = {layer for group in structure.groups for layer in group.layers}
        for name, wanted in (("layers", self.layers or ()), ("exclude", self.exclude)):
            for layer in wanted:
                if not any(_inside(other, (layer,)) for other in known):
                    raise ContinualError(
                        f"partition: {name} names '{layer}', but the network has no such layer of hidden units;"
                        f" it has {', '.join(sorted(known))}."
                    )
        chosen = [
            group
            for group in structure.groups
            if (self.layers is None or any(_inside(layer, self.layers) for layer in group.layers))
            and not any(_inside(layer, self.exclude) for layer in group.layers)
            and group.size > 1  # a single unit cannot be split: the first task owns it
        ]
        if not chosen and structure.groups:
            given = "layers and exclude leave" if self.layers is not None or self.exclude else "the network has"
            united = " ".join(dict.fromkeys(found.message() for found in structure.mixings if found.collapsed))
            raise ContinualError(
                f"partition: {given} no layer to partition; a layer whose units all share one fate"
                " counts as excluded. Units that are added to or multiplied with each other, as a gate's with what it"
                " scales, share one fate under either isolation"
                + (f"; isolation='perturb' keeps apart those that an operation mixes. {united}" if united else ".")
            )
        return chosen

    def budget(self, size: int, free: int, tasks_left: int) -> int:
        """How many of a layer's units a task may claim.

        Args:
            size: units of the layer.
            free: its free units.
            tasks_left: tasks still to come, this one counted.
        """
        if self.max_claim is None:
            return max(1, free // max(tasks_left, self.reserve_tasks))
        assert isinstance(self.max_claim, (int, float)), "those of one task: of_task"
        return max(1, min(math.floor(self.max_claim * size + 1e-9), free - (tasks_left - 1)))


def _inside(layer: str, names: Sequence[str]) -> bool:
    """Whether a layer is one of those named, or within a module of that name."""
    return any(layer == name or layer.startswith(f"{name}.") for name in names)


def _name(measure: Callable[..., Any]) -> str:
    if isinstance(measure, partial):
        given = [*map(repr, measure.args), *(f"{name}={value!r}" for name, value in measure.keywords.items())]
        return f"{_name(measure.func)}({', '.join(given)})"
    module = getattr(measure, "__module__", None) or type(measure).__module__
    return f"{module}.{getattr(measure, '__qualname__', type(measure).__qualname__)}"


class PartitionKeywords(TypedDict, total=False):
    """The fields of :class:`PartitionOptions` as keywords."""

    measure: Measure
    threshold: float | Literal["auto"]
    tolerance: float
    min_claim: float | Sequence[float]
    max_claim: float | Sequence[float] | None
    reserve_tasks: int
    clusters: Clusters
    representative: Representative
    fold: bool
    reinitialise: bool
    min_trainable: float
    layers: Sequence[str] | None
    exclude: Sequence[str]


def options_from(given: PartitionKeywords) -> PartitionOptions:
    """The options of some keywords.

    Raises:
        ContinualError: for a keyword that is none of them.
    """
    known = PartitionKeywords.__annotations__
    strange = [name for name in given if name not in known]
    if strange:
        raise ContinualError(f"partition: there is no option {strange[0]!r}; there are {', '.join(sorted(known))}.")
    return PartitionOptions(**given)
