"""One linear classifier over features that never change, from sums that tasks add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_cf.errors import ContinualError, ContinualWarning, check_choice, check_count, check_number, warn
from lightning_cf.task_inference.accumulated.closed_form import Familiarity, Linear, Separation, discriminant, ridge
from lightning_cf.task_inference.accumulated.sums import Sums, packed, products, rounded, unpacked
from lightning_cf.task_inference.cumulative import Cumulative, Shared
from lightning_cf.task_inference.features.base import Features, inner, moments
from lightning_cf.task_inference.features.by_medium import by_medium, medium_of
from lightning_cf.task_inference.readout import Readout
from lightning_cf.task_inference.sites import Sites

FORMS = ("lda", "ridge")
"""The classifiers in closed form."""

SHRINKAGE = 0.03
"""Times features over samples: how far a covariance is shrunk where nobody says; the fewer samples, the further."""

SHARPNESS = {"lda": 1.0, "ridge": 10.0}
"""By what outputs are multiplied before a softmax: regression's lie between 0 and 1."""

FLOOR = 0.2
"""Features that hardly vary on the first task's data are not blown up: this share of the mean deviation."""


class Accumulated(Cumulative):
    """Linear discriminant analysis or ridge regression over all classes of all tasks, from sums alone.

    Sub-networks that were trained apart are hard to compare; statistics over features that all tasks share are not.
    Each task adds the sums of its own data (``sums``), the same to the last bit in any order; then the classifier is
    solved anew. It is what training on all tasks at once would give (Zhuang et al. 2022,
    ACIL; McDonnell et al. 2023, RanPAC; Hayes and Kanan 2020, SLDA).

    Args:
        name: what to call it.
        form: ``"lda"`` or ``"ridge"``.
        features: what it sees of an input; default what suits the input's kind
            (:func:`~lightning_cf.task_inference.features.by_medium.by_medium`), within the budget.
        within: whether these are to be made of the first task's units, whatever the input is.
        shrinkage: of the covariance, towards a multiple of the identity, as a share of its mean variance. Default: what
            the features say, else :data:`SHRINKAGE` times features over samples.
        budget: how many numbers it may keep, where that is not what the callback says and no features are given.
    """

    at_rest = (*Cumulative.at_rest, "medium", "familiar.")  # which are in float64, and small
    summed = ("open.",)

    def __init__(
        self,
        name: str = "accumulated",
        *,
        form: str = "lda",
        features: Features | None = None,
        within: bool = False,
        shrinkage: float | None = None,
        budget: int | None = None,
    ) -> None:
        self.name = name  # type: ignore[misc]
        self.form = check_choice(name, "form", form, FORMS)
        if features is not None and budget is not None:
            raise ContinualError(
                f"{name}: budget says how many features to choose, and features= were given, which say so themselves;"
                " leave one of them out."
            )
        self.features, self.within = features, within
        self.shrinkage = None if shrinkage is None else check_number(name, "shrinkage", shrinkage, above=0.0)
        self.budget = None if budget is None else check_count(name, "budget", budget)
        self.familiar = -4.0 if form == "lda" else float("inf")  # in deviations, which have long tails
        self.beside = not within if features is None else features.beside  # type: ignore[misc]
        self.needs = "frozen" if self._looks_at_units else ""  # type: ignore[misc]
        self.variants = () if features is None else features.variants

    def begin(self, seen: Readout, sites: Sites, generator: torch.Generator, budget: int) -> dict[str, Tensor]:
        """What the features keep, and mean and deviation of each on these data."""
        kept: dict[str, Tensor] = {}
        if self.features is None:
            kept["medium"] = medium_of(seen, self.budget or budget, within=self.within)
        features = self._features(kept)
        if features.shrinkage is not None:
            kept["shrinkage"] = torch.tensor(features.shrinkage)
        fixed = features.begin(seen, sites, generator)
        rows = features.of(fixed, seen, sites)
        centre, deviation = moments(rows)
        bad = int((~rows.isfinite()).sum())
        if bad:
            warn(
                f"task_inference={self.name}: {bad} of {rows.numel()} values of features are not finite on the first"
                " task's data; each counts as its feature's mean. Look at what the features divide by.",
                ContinualWarning,
            )
        scale = deviation.clamp_min(FLOOR * float(deviation.mean())).clamp_min(1e-6)
        kept |= {"centre": centre, "scale": scale}
        return kept | {f"features.{name}": value for name, value in fixed.items()}

    def lean(self, seen: Readout) -> Readout:
        """Without what layers read, where no feature is made of it."""
        maps = self._looks_at_units or (self.features is None and seen.x is None)
        return replace(seen, read={}, given={}, maps=seen.maps if maps else {})

    def add(self, shared: Shared, seen: Readout, sites: Sites, columns: Int64[Tensor, "batch"]) -> Shared:
        """The task's sums so far with those of a batch."""
        rows = self._rounded(shared, seen, sites)
        width, outputs = rows.shape[1], seen.outputs.shape[1]
        totals = rows.new_zeros(outputs, width, dtype=torch.float64).index_add_(0, columns, rows.double())
        found = {"gram": products(rows), "totals": totals, "counts": columns.bincount(minlength=outputs)}
        before = inner(shared, "open")
        return {**shared, **{f"open.{n}": x if n not in before else x + before[n] for n, x in found.items()}}

    def close(self, shared: Shared) -> Shared:
        """The classifier, solved; and what makes a sample familiar."""
        found, kept = Sums.of(**inner(shared, "open")), inner(shared, "sums")
        return self._solved(shared, unpacked(kept) + found if kept else found)

    def added(self, before: Shared, after: Shared) -> dict[str, Tensor]:
        """The sums of the task's samples."""
        if summed := inner(after, "open"):
            return dict(packed(Sums.of(**summed)))
        kept, found = inner(before, "sums"), unpacked(inner(after, "sums"))
        return dict(packed(found - unpacked(kept) if kept else found))

    def subtract(self, shared: Shared, added: Shared) -> Shared:
        """The classifier, solved without the task's samples: the same to the last bit."""
        own = unpacked(added)
        left = unpacked(inner(shared, "sums")) - own
        if set(left.classes) & set(own.classes):
            raise ContinualError(
                f"task_inference={self.name}: these are not the samples that the task added, so they cannot be"
                " subtracted. Where its training data are changed at random, let TaskInferenceCallback(apart=True) keep"
                " what each task adds."
            )
        return self._solved(shared, left)

    def only(self, shared: Shared, added: Sequence[Shared]) -> Shared:
        """The classifier, solved for these tasks' sums alone."""
        return self._solved(shared, reduce(Sums.__add__, map(unpacked, added)))

    def renumbered(self, kept: Shared, at: Mapping[int, int]) -> Shared:
        """The classifier, solved for the same sums under other numbers; or these alone, where a task added them."""
        if "classes" in kept:
            return packed(unpacked(kept).renumbered(at))
        return self._solved(kept, unpacked(inner(kept, "sums")).renumbered(at))

    def _solved(self, shared: Shared, sums: Sums) -> Shared:
        shared = {name: value for name, value in shared.items() if not name.startswith("open.")}
        shrinkage = self.shrinkage
        if shrinkage is None:
            by_size = SHRINKAGE * sums.features / max(1, int(sums.counts.sum()))
            shrinkage = float(shared.get("shrinkage", min(by_size, 1.0)))
        familiar: dict[str, Tensor] = {}
        if self.form == "ridge":
            linear = ridge(sums, shrinkage)
        else:
            found = Separation.of(sums, shrinkage)
            linear, familiar = discriminant(found), vars(Familiarity.of(found))
        solved = {"order": linear.classes, "weight": linear.weight, "bias": linear.bias}
        named = {f"sums.{name}": value for name, value in packed(sums).items()}
        return {**shared, **named, **solved, **{f"familiar.{name}": value for name, value in familiar.items()}}

    def outputs(
        self, shared: Shared, seen: Readout, sites: Sites, columns: Int64[Tensor, "classes"]
    ) -> Float[Tensor, "batch classes"]:
        """The classifier's outputs for these classes, times its sharpness; a class without samples is never likely."""
        linear = Linear(shared["order"], shared["weight"], shared["bias"])
        outputs = linear(self._rounded(shared, seen, sites)) * SHARPNESS[self.form]
        if _same(linear.classes, columns):
            return outputs
        never = ~torch.isin(columns.to(linear.classes.device), linear.classes)
        return outputs[:, _places(linear.classes, columns)].masked_fill(never, -torch.inf)

    def familiarity(
        self, shared: Shared, outputs: Float[Tensor, "batch classes"], columns: Int64[Tensor, "classes"]
    ) -> Float[Tensor, "batch"]:
        """How much better a sample suits its nearest class than all together; its largest output for ridge."""
        kept = inner(shared, "familiar")
        if not kept:
            return outputs.amax(dim=1)
        order = shared["order"]
        return Familiarity(**kept)(outputs if _same(columns, order) else outputs[:, _places(columns, order)])

    @property
    def _looks_at_units(self) -> bool:
        return self.within if self.features is None else self.features.maps

    def _features(self, shared: Shared) -> Features:
        return by_medium(shared["medium"]) if self.features is None else self.features

    def _rounded(self, shared: Shared, seen: Readout, sites: Sites) -> Float[Tensor, "batch features"]:
        """The features in whole steps; for the same batch found once, whatever is summed over them."""
        centre, rows = seen.found.get(self.name, (None, None))
        if centre is None or rows is None or not torch.equal(centre, shared["centre"]):
            rows = self._features(shared).of(inner(shared, "features"), seen, sites)
            rows = rounded(((rows - shared["centre"]) / shared["scale"]).nan_to_num(0.0))
            seen.found[self.name] = shared["centre"], rows
        return rows


def _same(order: Int64[Tensor, "classes"], columns: Int64[Tensor, "_"]) -> bool:
    """Whether columns stand as the classifier's classes do, so that none need be looked for."""
    return order.device == columns.device and torch.equal(order, columns)


def _places(order: Int64[Tensor, "classes"], columns: Int64[Tensor, "_"]) -> Int64[Tensor, "_"]:
    """Where columns stand among the classifier's classes."""
    return (columns.to(order.device)[:, None] == order).int().argmax(dim=1)
