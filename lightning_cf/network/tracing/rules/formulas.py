"""Norms that a module's forward pass writes out: which reductions over units can be taken by owners instead.

A reduction over units makes them one, unless each unit may have it over what its own owner may read. That is so where
all that is done with the result within the module is done element by element with those units. If the module returns
them then, and holds no layers, its forward pass can run once for each owner; else the reduction can give one result for
each unit, where it keeps its dims (see ``ownership/owner_aware_norms.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_cf.network.structure import OUTSIDE
from lightning_cf.network.tracing.labels import NO_LABEL, Labels, Units
from lightning_cf.network.tracing.reductions import Reduction
from lightning_cf.network.tracing.rules.call import aten
from lightning_cf.network.tracing.shadows import Level, Shadows


@dataclass
class _Taken:
    """A reduction that a module took, as a function that could be restricted, and over which units, if over several."""

    dims: tuple[int, ...]
    keeps_dims: bool
    levels: list[tuple[Level, Callable[[], Labels]]] = field(default_factory=list)


class Formulas:
    """The reductions of every module that runs.

    Args:
        module: the network.
        units: the trace's.
        shadows: the trace's.
    """

    def __init__(self, module: nn.Module, units: Units, shadows: Shadows) -> None:
        self.units, self.shadows = units, shadows
        self._taken: dict[str, list[_Taken]] = {}
        self._given: dict[str, list[tuple[Tensor, int]]] = {}
        self._now: _Taken | None = None
        self._kept: dict[str, list[_Taken]] = {}
        self._alone = {
            path
            for path, child in module.named_modules()
            if not any(True for part in child.children() for _ in (*part.parameters(), *part.buffers()))
        }
        """Modules whose children hold no weights: they can run several times for one."""

    def enter(self, path: str, given: Any) -> None:
        """Notes what a module is given when it begins to run: whether it changes its inputs is asked when it ends."""
        if path in self._alone:
            tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor) and not x.is_inference()]
            self._given[path] = [(x, x._version) for x in tensors]

    @contextmanager
    def function(self, path: str | None, reduction: Reduction | None) -> Iterator[None]:
        """Notes the function that runs meanwhile, in the module at ``path``."""
        if reduction is None or path is None or self._now is not None:
            yield
            return
        self._now = _Taken(reduction.dims, reduction.keeps_dims)
        self._taken.setdefault(path, []).append(self._now)
        try:
            yield
        finally:
            self._now = None

    def level(
        self, path: str, x: Tensor, result: Tensor, labels: Labels, dims: Sequence[int], settle: Callable[[], Labels]
    ) -> Level | None:
        """What a reduction is made from that can be taken by owners, else None.

        Args:
            path: of the module that takes it.
            x: what is reduced.
            result: to what.
            labels: of what is reduced.
            dims: along which dims.
            settle: unites its units, if it has to be.
        """
        inline = path not in self._alone
        if self._now is None or path == OUTSIDE or (inline and result.ndim != x.ndim):
            return None
        resolved = self.units.resolve(labels)
        varying = [dim for dim in range(x.ndim) if bool((resolved != resolved.narrow(dim, 0, 1)).any())]
        if len(varying) != 1 or varying[0] not in dims or not bool((resolved != NO_LABEL).all()):
            return None
        for dim in range(x.ndim):
            labels = labels if dim in varying else labels.amax(dim, keepdim=True)
        level = Level(path, varying[0] - x.ndim, labels.flatten(), inline)
        self._now.levels.append((level, settle))
        return level

    def meets(self, level: Level, tensors: Sequence[Tensor]) -> bool:
        """Whether an operation element by element keeps what is taken by owners among their units."""
        for x in tensors:
            labels = self.units.resolve(self.shadows[x].labels)
            if not bool(labels.any()):
                continue
            if level.inline and not self._along(labels, level.axis, level.elements):
                return False
            inside = self.units.resolve(level.elements)
            if self.shadows[x].weight or not bool((labels.unique()[:, None] == inside).any(dim=1).all()):
                return False
        return True

    @staticmethod
    def stays(level: Level, func: Any) -> bool:
        """Whether an operation on one tensor leaves the axis of what is taken by owners where it is."""
        return not level.inline or torch.Tag.pointwise in func.tags or func.overloadpacket in _IN_PLACE

    def leave(self, path: str, output: Any, by_owners: Callable[[Labels], bool]) -> None:
        """Ends a module's run: unites what it reduced, unless that can be taken by owners.

        Args:
            path: of the module.
            output: what it returns.
            by_owners: leaves the norm to its module; gets the labels of its elements, shaped ``(1, width, 1, ...)``
                with an axis for the units and one for each behind it, and one more in front if it is to run once.
        """
        taken = self._taken.pop(path, [])
        levels = [level for one in taken for level, _ in one.levels]
        if not levels:
            return
        first = levels[0]
        meant = [one for one in taken if one.keeps_dims or not first.inline]  # those that will be taken by owners
        alike = all(one.levels or first.axis not in one.dims for one in meant) and all(
            level.axis == first.axis and self._equal(level.elements, first.elements) for level in levels
        )
        behind = [1] * (-1 - first.axis)
        if first.inline:
            done = alike and by_owners(first.elements.reshape(1, 1, -1, *behind))
        else:
            untouched = all(x._version == version for x, version in self._given.get(path, []))  # else it runs once only
            returned = all(self._returned(x, first) for x in tree_leaves(output) if isinstance(x, Tensor))
            done = alike and untouched and returned and by_owners(first.elements.reshape(1, -1, *behind))
        if done:
            self._kept.setdefault(path, []).extend(taken)
        else:
            self._unite(taken)

    def give_up(self, norms: Mapping[str, Tensor], first: int) -> list[str]:
        """Unites what is a norm over the network's outputs, which tasks see one by one.

        Args:
            norms: the units that are normalised together, by module.
            first: number of the first output.

        Returns:
            the modules of such norms.
        """
        over = [path for path in self._kept if bool((norms[path] >= first).any())]
        for path in over:
            self._unite(self._kept.pop(path))
        return over

    @staticmethod
    def _unite(taken: Sequence[_Taken]) -> None:
        for one in taken:
            for _, settle in one.levels:
                settle()

    def _equal(self, a: Labels, b: Labels) -> bool:
        return a.shape == b.shape and bool((self.units.resolve(a) == self.units.resolve(b)).all())

    def _along(self, resolved: Labels, axis: int, elements: Labels) -> bool:
        """Whether labels are those of the elements along an axis, at every place."""
        if resolved.ndim < -axis or resolved.shape[axis] != len(elements):
            return False
        return bool((resolved.movedim(axis, -1) == self.units.resolve(elements)).all())

    def _returned(self, x: Tensor, level: Level) -> bool:
        """Whether a tensor that a module returns has the norm's units along their axis."""
        if any(pending.level for pending in self.shadows[x].pending):
            return False
        return self._along(self.units.resolve(self.shadows[x].labels), level.axis, level.elements)


_IN_PLACE = {aten._to_copy, aten.alias, aten.clone, aten.detach, aten.expand}
