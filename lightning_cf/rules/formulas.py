"""Norms that a module's forward pass writes out: which reductions over units can be taken by owners instead.

A reduction over units makes them one, unless each unit may have it over what its own owner may read. That is so where all
that is done with the result within the module is done element by element with those units, and the module returns them:
then its forward pass can run once for each owner (see ``normalisation.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_cf.labels import NONE, Labels, Units
from lightning_cf.reductions import Reduction
from lightning_cf.shadows import Level, Shadows


@dataclass
class _Taken:
    """A reduction that a module took, as a function that could be restricted, and over which units, if over several."""

    dims: tuple[int, ...]
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
        self._alone = {
            path
            for path, child in module.named_modules()
            if not any(True for part in child.children() for _ in (*part.parameters(), *part.buffers()))
        }
        """Modules whose children hold no weights: they can run several times for one."""

    def enter(self, path: str, given: Any) -> None:
        """Begins a module's run."""
        if path in self._alone:
            tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor) and not x.is_inference()]
            self._given[path] = [(x, x._version) for x in tensors]

    @contextmanager
    def function(self, path: str, reduction: Reduction | None) -> Iterator[None]:
        """Notes the function that runs meanwhile, in the module at ``path``."""
        if reduction is None or path not in self._alone or self._now is not None:
            yield
            return
        self._now = _Taken(reduction.dims)
        self._taken.setdefault(path, []).append(self._now)
        try:
            yield
        finally:
            self._now = None

    def level(self, path: str, x: Tensor, labels: Labels, dims: Sequence[int], settle: Callable[[], Labels]) -> Any:
        """What a reduction is made from that can be taken by owners, else None.

        Args:
            path: of the module that takes it.
            x: what is reduced.
            labels: its labels.
            dims: along which dims.
            settle: unites its units, if it has to be.
        """
        if self._now is None:
            return None
        resolved = self.units.resolve(labels)
        varying = [dim for dim in range(x.ndim) if bool((resolved != resolved.narrow(dim, 0, 1)).any())]
        if len(varying) != 1 or varying[0] not in dims or not bool((resolved != NONE).all()):
            return None
        for dim in range(x.ndim):
            labels = labels if dim in varying else labels.amax(dim, keepdim=True)
        level = Level(path, varying[0] - x.ndim, labels.flatten())
        self._now.levels.append((level, settle))
        return level

    def meets(self, level: Level, x: Tensor) -> bool:
        """Whether every element of an activation is of the units of a level, or none of any unit."""
        resolved = self.units.resolve(self.shadows[x].labels).unique()
        inside = self.units.resolve(level.elements)
        return not bool(resolved.any()) or bool((resolved[:, None] == inside).any(dim=1).all())

    def leave(self, path: str, output: Any, by_owners: Callable[[Labels], bool]) -> None:
        """Ends a module's run: unites what it reduced, unless that can be taken by owners.

        Args:
            path: of the module.
            output: what it returns.
            by_owners: leaves the norm to its module; gets the labels of its elements, shaped ``(1, width, 1, ...)`` with
                an axis for the units and one for each behind it.
        """
        taken = self._taken.pop(path, [])
        levels = [level for one in taken for level, _ in one.levels]
        if not levels:
            return
        axis, elements = levels[0].axis, levels[0].elements
        untouched = all(x._version == version for x, version in self._given.get(path, []))  # it can run again on them
        alike = untouched and all(one.levels or axis not in one.dims for one in taken) and all(
            level.axis == axis and self._equal(level.elements, elements) for level in levels
        )
        alike = alike and all(self._returned(x, axis, elements) for x in tree_leaves(output) if isinstance(x, Tensor))
        if not (alike and by_owners(elements.reshape(1, -1, *[1] * (-1 - axis)))):
            for one in taken:
                for _, settle in one.levels:
                    settle()

    def _equal(self, a: Labels, b: Labels) -> bool:
        return a.shape == b.shape and bool((self.units.resolve(a) == self.units.resolve(b)).all())

    def _returned(self, x: Tensor, axis: int, elements: Labels) -> bool:
        """Whether a tensor that a module returns has the norm's units along their axis."""
        if x.ndim < -axis or x.shape[axis] != len(elements) or any(p.level for p in self.shadows[x].pending):
            return False
        labels = self.shadows[x].labels.movedim(axis, -1)
        return bool((self.units.resolve(labels) == self.units.resolve(elements)).all())
