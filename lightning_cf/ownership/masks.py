"""Which entries may move, which no phase moves, and which must be zero: what follows from who owns which unit.

Every mask broadcasts to its tensor. :class:`NeuronLedger` gives them by name (``frozen``, ``sealed``, ``cut``,
``needed``); here they are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from lightning_cf.network.structure import NO_UNIT, Entries, Structure, lookup
from lightning_cf.ownership.levels import FREE, NO_OWNER, Levels
from lightning_cf.ownership.phases import Phase


@dataclass(frozen=True)
class Masks:
    """Masks for the entries of a network's tensors, as its ledger stands.

    Attributes:
        before: levels of the entries when the tasks before the latest one count.
        now: levels when all tasks count that were begun.
        task: number of the latest task, -1 where none was begun.
        phase: the latest task's; "sealed" too where none was begun.
        exact: whether isolation is exact, so that entries are cut.
    """

    before: Levels
    now: Levels
    task: int
    phase: Phase
    exact: bool

    @property
    def structure(self) -> Structure:
        """The network's structure, whose entries the masks are for."""
        return self.now.structure

    def frozen(self, tensors: Mapping[str, Tensor]) -> dict[str, Bool[Tensor, "..."]]:
        """For each tensor by name, the entries that may not move now; see :meth:`NeuronLedger.frozen`."""
        masks = {}
        for name in tensors:
            uses = self.structure.entries.get(name)
            if self.phase == "sealed" or uses is None:
                held = self.phase == "sealed" or self.task > 0
                masks[name] = torch.tensor(held).reshape((1,) * tensors[name].ndim)
            else:
                masks[name] = self._held(uses)
                if self.exact:
                    masks[name] = masks[name] | self.cut(uses)
        return masks

    def _held(self, uses: Sequence[Entries]) -> Bool[Tensor, "..."]:
        """Entries that the current task may not move, by the levels before it and with it."""
        masks, own = [], False
        for use in uses:
            outputs = use.target >= self.structure.head.first
            rides = self.task in self.now.riders(use)
            own |= rides
            held = self.before.of(use) >= 0
            if rides and self.phase != "learn":
                held = held | (self.now.of(use) != self.task)
            if use.used is not None:
                held = held & use.used
            held = torch.where(outputs, self.now.owners(use) != self.task, held)
            first = self.now.first(use)
            unowned = first != self.task if first >= 0 else self.task > 0
            masks.append(torch.where(use.target == NO_UNIT, unowned, held))
        return _any(masks) if own or self.phase == "learn" else torch.ones((), dtype=torch.bool)

    def sealed(self, tensors: Iterable[str]) -> dict[str, Bool[Tensor, "..."]]:
        """For each tensor that the network uses, the entries of earlier tasks, which no phase moves."""
        levels = self.now if self.phase == "sealed" else self.before
        masks = {}
        for name in tensors:
            if name in self.structure.entries:
                uses = self.structure.entries[name]
                masks[name] = _any(
                    torch.where(use.target == NO_UNIT, levels.first(use) >= 0, levels.owners(use) >= 0)
                    & (True if use.used is None else use.used)
                    for use in uses
                )
        return masks

    def cut(self, uses: Iterable[Entries]) -> Bool[Tensor, "..."]:
        """Entries that must be zero under exact isolation: from a free or later unit into an owned one.

        Args:
            uses: all uses of one tensor.
        """
        return cut_by(uses, self.before if self.phase == "learn" else self.now)

    def needed(self, tensors: Mapping[str, Tensor], way: int) -> Bool[Tensor, "units"]:
        """Units that the current task must claim, since what reads them cannot be cut.

        A layer that tasks share and that each feeds from a layer of its own: what earlier tasks own there connects
        units that they own, by entries that are not zero; in the current task's way, the same entries read units of
        its own.

        Args:
            tensors: the network's parameters by name.
            way: in which the current task runs the network.
        """
        needed = torch.zeros(self.structure.n_units + 1, dtype=torch.bool)
        owner = self.now.owner
        free = torch.cat([(owner == FREE) | (owner == self.task), torch.tensor([False])])
        sealed = self.sealed(tensors)
        for name, tensor in tensors.items():
            for use in self.structure.uses_on(name, way):
                there = free[use.source] & (self.now.of(use) == self.task) & sealed[name]
                if bool(there.any()):
                    there = there & (tensor.detach() != 0).cpu()
                    needed[use.source.expand(there.shape)[there]] = True
        return needed[:-1]


def cut_by(uses: Iterable[Entries], levels: Levels) -> Bool[Tensor, "..."]:
    """Entries from a free or later unit into an owned one.

    Args:
        uses: all uses of one tensor.
        levels: who owns what.
    """
    masks = []
    for use in uses:
        target, source = levels.of(use), lookup(use.source, levels.owner, none=NO_OWNER)
        masks.append((target >= 0) & ((source == FREE) | (source > target)))
    return _any(masks)


def _any(masks: Iterable[Bool[Tensor, "..."]]) -> Bool[Tensor, "..."]:
    first, *others = [*masks] or [torch.zeros((), dtype=torch.bool)]
    for mask in others:
        first = first | mask
    return first
