"""The state of one trace: labels beside every tensor, and what the rules of operations note of them."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lightning_cf.errors import StructureError
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.structure import OUTSIDE, Role, Structure, module_at
from lightning_cf.network.tracing.assembly import assemble
from lightning_cf.network.tracing.findings import Findings, Found, Use, same_memory
from lightning_cf.network.tracing.labels import NO_LABEL, Units, sole_along
from lightning_cf.network.tracing.operations import is_movement, rule_of
from lightning_cf.network.tracing.reaching import IdleCalls
from lightning_cf.network.tracing.rules.call import Call, named
from lightning_cf.network.tracing.rules.elementwise import pointwise
from lightning_cf.network.tracing.rules.formulas import Formulas
from lightning_cf.network.tracing.rules.norms import by_owners
from lightning_cf.network.tracing.shadows import Origin, Pending, Shadow, Shadows, laid_out_like
from lightning_cf.network.ways import running_way

Shape = tuple[int, ...]


class LabelTracer(TorchDispatchMode):
    """The state of one trace, and what the rules in ``operations.py`` may ask of it."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Sequence[Any],
        apart: bool,
        logs: bool,
        sliced: Set[Shape],
        reaching: Sequence[tuple[str, bool]],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = Findings(named_tensors(module))
        self.apart, self.logs, self.sliced = apart, logs, sliced
        self.slices: set[Shape] = set()
        """Shapes of slices that norms take together and that are of different units."""
        self.reaching = iter(reaching)
        self.aside = False
        """Whether the operation that runs reaches nothing that the network returns, so that it binds no units."""
        self.known = True
        """Whether the operations were so far those that were recorded before."""
        self.log: list[tuple[str, str, Tensor, int, bool]] = []
        self.batch = next((len(x) for x in inputs if isinstance(x, Tensor) and x.ndim), 0)
        self.decisions = 0
        self.idle = IdleCalls()
        self.running = [OUTSIDE]
        """Paths of the modules that run, the innermost last."""
        self.shadows = Shadows(self.found.tensors, [x for x in inputs if isinstance(x, Tensor)])
        self.formulas = Formulas(module, self.units, self.shadows)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.next(func)
        out = func(*args, **kwargs)
        this, here = Call.of(func, args, kwargs, out), named(func, self.path)
        self.found.touched |= {(name, running_way()): None for x in this.tensors for name in self.shadows[x].origins}
        self.found.made_by |= {id(x): here for x in this.results}
        self.idle.note(this.results, self.aside)
        if torch.Tag.dynamic_output_shape in func.tags:
            for x in this.shape_makers:
                self.read(x, this.name, shape_only=True)
        self._apply_rule(this)
        if not is_movement(func):
            trained = [(n, o) for x in this.results if self.is_weight(x) for n, o in self.shadows[x].origins.items()]
            self.found.note_computed([name for name, origin in trained if origin.trained], here)
        for x in this.written:
            self.found.note_written(x, here)
        if self.logs:
            where = running_way(), self.aside
            self.log += [(self.path, here, self.shadows[x].labels.clone(), *where) for x in this.results]
        return out

    def _apply_rule(self, this: Call) -> None:
        """Labels what an operation gave, by its rule; what was put off is done first, unless it may wait on."""
        rule, transparent = rule_of(this.func)
        pending = [mixing for x in this.tensors for mixing in self.shadows[x].pending]
        levels = [mixing.level for mixing in pending]
        stays = all(level is None or Formulas.stays(level, this.func) for level in levels)
        if transparent and stays and len({id(x) for x in this.tensors}) == 1:
            rule(self, this)
            for x in this.results:
                self.shadows[x].pending = pending
        elif (
            rule is pointwise
            and levels
            and all(
                level is not None and level.module == self.path and self.formulas.meets(level, this.tensors)
                for level in levels
            )
        ):
            rule(self, this)
            for x in this.results:
                self.shadows[x].pending = [] if bool(self.shadows[x].labels.any()) else pending
        else:
            self.settle(this.tensors)
            rule(self, this)

    def next(self, func: Any) -> None:
        """Looks up whether the operation that runs now reaches what the network returns."""
        name, reaches = next(self.reaching, ("", True))
        self.known = self.known and name == str(func)
        self.aside = self.known and not reaches
        self.units.still = self.aside

    # What the rules use

    @property
    def units(self) -> Units:
        """Which labels are one: those of units that must share one fate."""
        return self.found.units

    @property
    def norms(self) -> dict[str, Tensor]:
        """For modules by path, labels of the elements that each normalises together."""
        return self.found.norms

    @property
    def path(self) -> str:
        """Path of the innermost module that runs now."""
        return self.running[-1]

    def labels(self, x: Tensor) -> Tensor:
        """Unit labels of an activation, 0 where no unit computed it; entries of a parameter are units of their own."""
        shadow = self.shadows[x]
        labels = shadow.labels
        for name, origin in shadow.origins.items():
            if origin.trained:
                numbers = origin.of(tuple(x.shape))
                own = self.found.labels_of_entries(name, numbers)
                entries = Origin(origin.shape, numbers=numbers)
                self.found.uses.append(
                    Use(name, "shift", entries, tuple(x.shape), own, None, running_way(), self.aside)
                )
                labels = self.units.unite(labels, own)
        return labels

    def is_weight(self, x: Any) -> bool:
        """Whether ``x`` is a parameter, or entry by entry made from parameters alone."""
        return isinstance(x, Tensor) and self.shadows[x].weight

    def is_constant(self, x: Tensor) -> bool:
        """Whether ``x`` depends on neither the network's input nor on anything that trains."""
        shadow = self.shadows[x]
        return not (shadow.weight or shadow.live or bool(shadow.labels.any()))

    def by_slices(self, shape: tuple[int, ...]) -> bool:
        """Whether a norm over slices of this shape takes each for one unit; asked where they are of different units."""
        self.slices.add(shape)
        return shape in self.sliced

    def own(self, x: Tensor) -> None:
        """Gives a constant that is written to labels of its own.

        Raises:
            StructureError: if it is a parameter.
        """
        shadow = self.shadows[x]
        if not shadow.origins:
            return
        if any(same_memory(x, self.found.tensors[name]) for name, origin in shadow.origins.items() if origin.trained):
            raise StructureError(
                f"The network cannot be traced: {module_at(self.path)} writes into the parameter"
                f" '{next(iter(shadow.origins))}' in its forward pass. Take that out of it."
            )
        self.shadows[x] = Shadow(x, laid_out_like(x, self.labels(x)), live=shadow.live)

    def write(self, out: Tensor, labels: Tensor, *, live: bool = True) -> None:
        """Puts labels beside a result, into the existing ones where the operation worked in place."""
        labels = labels.expand(out.shape)
        if self.shadows.get(out) is None:
            self.shadows[out] = Shadow(out, laid_out_like(out, labels), live=live)
        else:
            self.own(out)
            self.shadows[out].labels.copy_(labels)
            self.shadows[out].live |= live

    def read(self, x: Tensor, operation: str, *, shape_only: bool = False) -> None:
        """Notes that a value became a number in Python, or a shape, where what it does cannot be seen."""
        if self.is_weight(x):
            return self.use(x, "scale", torch.zeros(x.shape, dtype=torch.int64))
        found = self.units.resolve(self.shadows[x].labels).unique()
        if bool(found.any()):
            self.found.reads.append(Found(operation, self.path, found[found != NO_LABEL], unknown=True))
        elif self.shadows[x].live:
            self.found.branches.append(Found(operation, self.path, found, unknown=not shape_only))
        return None

    def use(self, x: Tensor | None, role: Role, target: Tensor, source: Tensor | None = None) -> None:
        """Notes that the entries behind ``x`` write to ``target`` and read ``source``.

        Both broadcast with ``x``. A target that is larger than ``x`` names every unit that an entry meets.
        """
        if x is None:
            return
        shadow = self.shadows[x]
        carried = role != "weight" or any(origin.distinct for origin in shadow.origins.values())
        for name, origin in shadow.origins.items():
            if not carried:
                origin.unite_repeats(self.units, target.expand(x.shape))
                if source is not None:
                    origin.unite_repeats(self.units, source.expand(x.shape))
            own: Role = role if role != "weight" or origin.distinct or not carried else "scale"
            read = source if own == "weight" else None
            self.found.uses.append(Use(name, own, origin, tuple(x.shape), target, read, running_way(), self.aside))
        if bool(shadow.labels.any()) and not self.apart and not self.aside:
            before = self.units.resolve(target).unique()
            self.units.unite(target, shadow.labels)
            if len(self.units.resolve(before).unique()) < len(before):
                what = "a number computed from a whole weight"
                self.found.mixings.append(Found(what, self.path, before[before != NO_LABEL], unknown=False))

    def mix(self, x: Tensor, dims: Sequence[int], operation: str, *, unknown: bool = False) -> Tensor:
        """Unites the units of ``x`` along dims, which keep size one, and keeps in mind what did it."""
        labels = self.labels(x)
        if self.aside:
            return self.units.unite_along(labels, dims)  # which unites nothing now
        if self.apart:
            return sole_along(self.units.resolve(labels), dims)
        self.found.note_mixing(labels, dims, operation, unknown, self.path)
        return self.units.unite_along(labels, dims)

    def mix_later(self, x: Tensor, result: Tensor, dims: Sequence[int], operation: str, *, final: bool = False) -> None:
        """As :meth:`mix`, once a later operation reads ``result``; with ``final`` also where the network returns it.

        So that what nobody reads, such as the mean over heads that ``nn.MultiheadAttention`` returns beside its
        outputs, unites nothing; nor what can be taken by owners (see ``rules/formulas.py``), which has no label then.
        """
        path = self.path
        if self.apart or self.aside:
            return

        def settle() -> Tensor:
            labels = self.labels(x)
            self.found.note_mixing(labels, dims, operation, False, path)
            return self.units.unite_along(labels, dims).amax()

        level = self.formulas.level(path, x, result, self.labels(x), dims, settle) if final else None
        if level is not None:
            self.shadows[result].labels = torch.zeros_like(self.shadows[result].labels)
        self.shadows[result].pending = [*self.shadows[result].pending, Pending(settle, final, level)]

    def settle(self, tensors: Sequence[Tensor], *, final: bool = False) -> None:
        """Does what :meth:`mix_later` put off; with ``final`` what the network returns asks for only."""
        if self.aside:
            return
        for x in tensors:
            pending = self.shadows[x].pending
            self.shadows[x].pending = [mixing for mixing in pending if final and not mixing.final]
            for mixing in pending:
                if final and not mixing.final:
                    continue
                label = mixing.settle()
                if mixing.level is not None:
                    self.shadows[x].labels = laid_out_like(x, self.units.unite(self.shadows[x].labels, label))

    def enter(self, given: Any) -> None:
        """Takes note of what a module is given."""
        self.formulas.enter(self.path, given)

    def leave(self, output: Any) -> None:
        """Decides of a module that ends whether the norm that it writes out is taken by owners."""
        self.aside = self.units.still = False  # whatever its last operation was; the next one says it anew
        with _disable_current_modes():
            self.formulas.leave(self.path, output, partial(by_owners, self))

    def structure(self, outputs: list[Tensor], ways: list[int]) -> tuple[Structure, Tensor]:
        """Numbers the units and gathers them in groups; also the number of each label."""
        self.aside = self.units.still = False
        labels = []
        for x in outputs:
            self.settle([x], final=True)
            labels.append((self.labels(x), bool(self.shadows[x].pending)))
        structure, numbers = assemble(self.found, labels, ways, self.batch, self.found.makers_of(outputs))
        over_outputs = self.formulas.give_up(structure.norms, structure.head.first)
        if over_outputs:
            for path in over_outputs:
                self.norms.pop(path, None)
            return self.structure(outputs, ways)
        return replace(structure, decisions=self.decisions, idle=frozenset(self.idle.found)), numbers
