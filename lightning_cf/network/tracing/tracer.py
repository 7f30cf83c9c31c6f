"""Finds the structure of a network by running it once with a label of its unit beside every activation.

Movement operations (views, flatten, concatenation) run on the labels themselves, so index maps are exact by
construction; elementwise operations unite labels; contractions (linear, convolution) create new units and give each
weight entry its pair of target and source unit. The operations are listed in ``operations.py``.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from lightning_cf.errors import StructureError
from lightning_cf.network.forward import Forward, call, eval_mode, named_tensors, plain_forms, same_state, samples
from lightning_cf.network.structure import LAYERS, Role, Structure
from lightning_cf.network.tracing.assembly import Found, Use, assemble
from lightning_cf.network.tracing.labels import NONE, Units, sole_along
from lightning_cf.network.tracing.operations import is_movement, rule_of
from lightning_cf.network.tracing.reaching import WHOLE, Reaching
from lightning_cf.network.tracing.reductions import Reduction
from lightning_cf.network.tracing.rules.call import Call
from lightning_cf.network.tracing.rules.elementwise import pointwise
from lightning_cf.network.tracing.rules.formulas import Formulas
from lightning_cf.network.tracing.rules.norms import by_owners, normalise
from lightning_cf.network.tracing.shadows import Origin, Pending, Shadow, Shadows, laid_out_like
from lightning_cf.network.ways import running_way, ways_of


def trace(
    module: nn.Module, example: Any, forward: Forward = call, *, apart: bool = False, turned: int | None = None
) -> Structure:
    """Traces a network with one forward pass in eval mode; its state stays as it is.

    Lazy layers take their shapes from that pass.

    Args:
        module: the network.
        example: an input whose first axis is the batch; its first two samples are used.
        forward: how to run the network on the example.
        apart: leaves units apart where an operation mixes them, for ``isolation="perturb"``, which cuts nothing.
        turned: which of the decisions that the network takes by its input goes the other way, if any; they are numbered
            in their order, ``Structure.decisions`` of them.

    Raises:
        StructureError: if the network's outputs are not the columns of layers, or its forward pass writes into a
            parameter.
    """
    return _follow(module, example, forward, apart, turned=turned)[0]


@dataclass(frozen=True)
class Step:
    """One result of one operation of a forward pass.

    Attributes:
        module: path of the module that ran it.
        by: the operation and its module.
        units: the unit of each element, ``NO_UNIT`` where none computed it.
        way: number of the way through the network that ran it.
        aside: whether it reaches nothing that the network returns.
    """

    module: str
    by: str
    units: Int64[Tensor, "..."]
    way: int = 0
    aside: bool = False


def steps(module: nn.Module, example: Any, forward: Forward = call) -> list[Step]:
    """Every result of a forward pass with its units, as :func:`trace` sees it; takes memory for all activations."""
    return _follow(module, example, forward, apart=False, log=True)[1]


def _follow(
    module: nn.Module, example: Any, forward: Forward, apart: bool, *, log: bool = False, turned: int | None = None
) -> tuple[Structure, list[Step]]:
    """Traces; several times where norms over slices of different units leave it open what the units are.

    A norm over each slice may take the slices for units, such as attention heads, or the places within them, such as
    the channels of tokens, of which one is a parameter. What comes behind decides: for norms of each shape, what leaves
    more units is kept.
    """
    structure, steps, open_shapes = _follow_once(module, example, forward, apart, log, set(), turned)
    sliced: set[Shape] = set()
    for shape in sorted(open_shapes):
        other, other_steps, _ = _follow_once(module, example, forward, apart, log, sliced | {shape}, turned)
        if other.n_units > structure.n_units:
            structure, steps, sliced = other, other_steps, sliced | {shape}
    return structure, steps


Shape = tuple[int, ...]


def _follow_once(
    module: nn.Module,
    example: Any,
    forward: Forward,
    apart: bool,
    log: bool,
    sliced: Set[Shape],
    turned: int | None,
) -> tuple[Structure, list[Step], Set[Shape]]:
    example = samples(module, example, 2)
    with ExitStack() as stack:
        stack.enter_context(plain_forms(module))
        stack.enter_context(eval_mode(module))
        stack.enter_context(torch.no_grad())
        stack.enter_context(plain_kernels())
        if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
            forward(module, example)
        stack.enter_context(same_state(module))
        recorder = Reaching()
        with torch.random.fork_rng(), same_state(module), recorder.functions, recorder:
            reached = forward(module, example)
        reaching = recorder.operations([x for x in tree_leaves(reached) if isinstance(x, Tensor)])
        tracer = _Tracer(module, tree_leaves(example), apart, log, sliced, reaching)
        for path, layer in module.named_modules():
            if isinstance(layer, LAYERS):
                stack.callback(layer.register_forward_hook(partial(tracer.left, path), prepend=True).remove)
        with following(module, tracer.running, tracer.enter, tracer.leave), _FunctionRules(tracer, turned), tracer:
            outputs = forward(module, example)
        tracer.see_state(module)
    returned = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    structure, numbers = tracer.structure(returned, ways_of(forward, outputs))
    steps = [
        Step(path, by, numbers[tracer.units.resolve(labels)], way, aside) for path, by, labels, way, aside in tracer.log
    ]
    return structure, steps, tracer.slices


@contextmanager
def following(
    module: nn.Module,
    running: list[str],
    entered: Callable[[Any], None] = lambda given: None,
    left: Callable[[Any], None] = lambda output: None,
) -> Iterator[None]:
    """Keeps a stack of the paths of the modules that run, the innermost last, meanwhile.

    Args:
        module: the network.
        running: the stack.
        entered: takes what the innermost module is given, before it runs.
        left: takes what it returns.
    """

    def enter(path: str, child: nn.Module, args: Any, kwargs: Any) -> None:
        running.append(path)
        entered((args, kwargs))

    def leave(child: nn.Module, args: Any, output: Any) -> None:
        left(output)
        running.pop()

    with ExitStack() as stack:
        for path, child in module.named_modules():
            if isinstance(child, torch.jit.ScriptModule):
                continue  # it takes no hooks
            before = child.register_forward_pre_hook(partial(enter, path), prepend=True, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(child.register_forward_hook(leave, always_call=True).remove)
        yield


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Fused kernels off, so that the operations they consist of are seen."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TF32 acceleration")
            with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class _FunctionRules(TorchFunctionMode):
    """Sees functions whose operations would hide what they are: RMSNorm consists of a mean over units."""

    def __init__(self, tracer: _Tracer, turned: int | None) -> None:
        super().__init__()
        self.tracer = tracer
        self.turned = turned

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = len(self.tracer.branches)
        out = self._run(func, args, kwargs or {})
        if isinstance(out, bool) and len(self.tracer.branches) > known:
            return self._decide(out, known)
        return out

    def _decide(self, out: bool, known: int) -> bool:
        """What an ``if`` on the network's input finds, or the opposite, to see what would run then."""
        del self.tracer.branches[known + 1 :]
        self.tracer.branches[known] = replace(self.tracer.branches[known], unknown=False)
        self.tracer.decisions += 1
        return out if self.tracer.decisions - 1 != self.turned else not out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            self.tracer.read(args[0], f"Tensor.{func.__name__}")
        if func not in WHOLE:
            with self.tracer.formulas.function(self.tracer.path, Reduction.of(func, args, kwargs)):
                return func(*args, **kwargs)
        self.tracer.next(func)
        names = ("input", "normalized_shape", "weight", "eps")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        with _disable_current_modes():
            out = func(*args, **kwargs)
            self.tracer.settle([x for x in (given["input"], given.get("weight")) if x is not None])
            normalise(self.tracer, given["input"], len(given["normalized_shape"]), given.get("weight"), None, [out])
        return out


class _Tracer(TorchDispatchMode):
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
        self.tensors = named_tensors(module)
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
        self.units = Units()
        self.uses: list[Use] = []
        self.norms: dict[str, Tensor] = {}
        self.mixings: list[Found] = []
        self.reads: list[Found] = []
        self.branches: list[Found] = []
        self.decisions = 0
        self.computed: dict[str, str] = {}
        self.written: dict[str, str] = {}
        self.made_by: dict[int, str] = {}
        self.made_aside: dict[int, bool] = {}
        self.calls: Counter[tuple[str, int]] = Counter()
        self.idle: set[tuple[str, int, int]] = set()
        self.touched: dict[tuple[str, int], None] = {}
        """Names of tensors that were read, with the way that did."""
        self.running = [""]
        """Paths of the modules that run, the innermost last."""
        self.shadows = Shadows(self.tensors, [x for x in inputs if isinstance(x, Tensor)])
        self.formulas = Formulas(module, self.units, self.shadows)
        self.entry_labels: dict[str, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.next(func)
        out = func(*args, **kwargs)
        this = Call.of(func, args, kwargs, out)
        self.touched |= {(name, running_way()): None for x in this.tensors for name in self.shadows[x].origins}
        rule, transparent = rule_of(func)
        here = named(func, self.path)
        self.made_by |= {id(x): here for x in this.results}
        self.made_aside |= {id(x): self.aside for x in this.results}
        if torch.Tag.dynamic_output_shape in func.tags:
            for x in _shape_makers(this):
                self.read(x, this.name, shape_only=True)
        pending = [mixing for x in this.tensors for mixing in self.shadows[x].pending]
        levels = [mixing.level for mixing in pending]
        stays = all(level is None or Formulas.stays(level, func) for level in levels)
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
        if not is_movement(func):
            trained = [(n, o) for x in this.results if self.is_weight(x) for n, o in self.shadows[x].origins.items()]
            self.computed |= {name: here for name, origin in trained if origin.trained}
        for x in this.written:
            self.written |= {name: here for name, b in self.tensors.items() if x.numel() and _same_memory(x, b)}
        if self.logs:
            where = running_way(), self.aside
            self.log += [(self.path, here, self.shadows[x].labels.clone(), *where) for x in this.results]
        return out

    def next(self, func: Any) -> None:
        """Looks up whether the operation that runs now reaches what the network returns."""
        name, reaches = next(self.reaching, ("", True))
        self.known = self.known and name == str(func)
        self.aside = self.known and not reaches
        self.units.still = self.aside

    def left(self, path: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        """Counts the calls of a layer, and notes those that reach nothing that the network returns."""
        way, results = running_way(), [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if results and all(self.made_aside.get(id(x), False) for x in results):
            self.idle.add((path, way, self.calls[path, way]))
        self.calls[path, way] += 1

    # What the rules use

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
                own = self._labels_of_entries(name, numbers)
                entries = Origin(origin.shape, numbers=numbers)
                self.uses.append(Use(name, "shift", entries, tuple(x.shape), own, None, running_way(), self.aside))
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
        if any(_same_memory(x, self.tensors[name]) for name, origin in shadow.origins.items() if origin.trained):
            raise StructureError(
                f"The network cannot be traced: module '{self.path or 'forward'}' writes into the parameter"
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
            self.reads.append(Found(operation, self.path, found[found != NONE], unknown=True))
        elif self.shadows[x].live:
            self.branches.append(Found(operation, self.path, found, unknown=not shape_only))
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
                self._unite_repeats(origin, target.expand(x.shape))
                if source is not None:
                    self._unite_repeats(origin, source.expand(x.shape))
            own: Role = role if role != "weight" or origin.distinct or not carried else "scale"
            read = source if own == "weight" else None
            self.uses.append(Use(name, own, origin, tuple(x.shape), target, read, running_way(), self.aside))
        if bool(shadow.labels.any()) and not self.apart and not self.aside:
            before = self.units.resolve(target).unique()
            self.units.unite(target, shadow.labels)
            if len(self.units.resolve(before).unique()) < len(before):
                what = "a number computed from a whole weight"
                self.mixings.append(Found(what, self.path, before[before != NONE], unknown=False))

    def mix(self, x: Tensor, dims: Sequence[int], operation: str, *, unknown: bool = False) -> Tensor:
        """Unites the units of ``x`` along dims, which keep size one, and keeps in mind what did it."""
        labels = self.labels(x)
        if self.aside:
            return self.units.unite_along(labels, dims)  # which unites nothing now
        if self.apart:
            return sole_along(self.units.resolve(labels), dims)
        self._note(labels, dims, operation, unknown, self.path)
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
            self._note(labels, dims, operation, False, path)
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

    # Parts

    def _all_uses(self) -> list[Use]:
        """Also of buffers of which all that is known is that the forward pass reads them."""
        used = {use.name for use in self.uses}
        found = [(name, self.tensors[name], way) for name, way in self.touched if name not in used]
        return self.uses + [
            Use(
                name,
                "constant",
                Origin.whole(x),
                tuple(x.shape),
                torch.zeros((1,) * x.ndim, dtype=torch.int64),
                None,
                way,
            )
            for name, x, way in found
            if not isinstance(x, nn.Parameter)
        ]

    def _note(self, labels: Tensor, dims: Sequence[int], operation: str, unknown: bool, path: str) -> None:
        resolved = self.units.resolve(labels)
        top = resolved
        for dim in dims:
            top = top.amax(dim, keepdim=True)
        differ = (resolved != top) & (resolved != NONE)
        if bool(differ.any()):
            for dim in dims:
                differ = differ.any(dim, keepdim=True)
            united = resolved[differ.expand(resolved.shape)].unique()
            self.mixings.append(Found(operation, path, united[united != NONE], unknown))

    def _unite_repeats(self, origin: Origin, labels: Tensor) -> None:
        """Units that one entry computes, or reads, at several places share one fate."""
        assert origin.numbers is not None
        numbers, labels = origin.numbers[origin.numbers >= 0], labels[origin.numbers >= 0]
        first = torch.zeros(origin.shape.numel(), dtype=torch.int64).scatter_reduce(0, numbers, labels, "amax")
        self.units.unite(first[numbers], labels)

    def _labels_of_entries(self, name: str, numbers: Tensor) -> Tensor:
        """A label for each entry of a parameter, the same wherever the entry is met."""
        known = self.entry_labels.setdefault(name, torch.zeros(self.tensors[name].numel() + 1, dtype=torch.int64))
        new = numbers.unique()
        new = new[(new >= 0) & (known[new] == NONE)]
        known[new] = self.units.new(len(new))
        return known[numbers]  # the last one, for -1, stays 0

    def see_state(self, module: nn.Module) -> None:
        """Notes which buffers the forward pass put others in the place of."""
        for name, x in named_tensors(module).items():
            if x is not self.tensors.get(name) and id(x) in self.made_by:
                self.written[name] = self.made_by[id(x)]

    def structure(self, outputs: list[Tensor], ways: list[int]) -> tuple[Structure, Tensor]:
        """Numbers the units and gathers them in groups; also the number of each label."""
        self.aside = self.units.still = False
        labels = []
        for x in outputs:
            self.settle([x], final=True)
            labels.append((self.labels(x), bool(self.shadows[x].pending)))
        structure, numbers = assemble(
            self.tensors,
            self.units,
            self._all_uses(),
            labels,
            self.batch,
            self.norms,
            self.mixings,
            self.reads,
            self.branches,
            self.computed,
            self.written,
            " and ".join(dict.fromkeys(self.made_by[id(x)] for x in outputs if id(x) in self.made_by)) or "nothing",
            ways,
        )
        over_outputs = self.formulas.give_up(structure.norms, structure.head.first)
        if over_outputs:
            self.norms = {path: labels for path, labels in self.norms.items() if path not in over_outputs}
            return self.structure(outputs, ways)
        return replace(structure, decisions=self.decisions, idle=frozenset(self.idle)), numbers


def named(func: Any, path: str) -> str:
    """An operation and the module that runs it, as messages call them."""
    return f"'{func.overloadpacket}' in module '{path or 'forward'}'"


def _shape_makers(this: Call) -> list[Tensor]:
    """The arguments whose values decide how large the result of an operation is."""
    if this.func.overloadpacket is torch.ops.aten.index:
        return [x for x in this.given["indices"] if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
    deciding = [this.given[name] for name in ("mask", "repeats") if isinstance(this.given.get(name), Tensor)]
    return deciding or this.tensors


def _same_memory(x: Tensor, parameter: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
