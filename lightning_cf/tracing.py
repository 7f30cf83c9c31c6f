"""Finds the structure of a network by running it once with a label of its unit beside every activation.

Movement operations (views, flatten, concatenation) run on the labels themselves, so index maps are exact by
construction; elementwise operations unite labels; contractions (linear, convolution) create new units and give each
weight entry its pair of target and source unit. The operations are listed in ``operations.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.module_tracker import ModuleTracker

from lightning_cf.errors import StructureError
from lightning_cf.operations import INDEXED, MOVEMENT, RULES
from lightning_cf.structure import (
    NO_UNIT,
    Entries,
    Forward,
    Role,
    Rows,
    Structure,
    UnitGroup,
    call,
    eval_mode,
    named_tensors,
    samples,
)

aten = torch.ops.aten


def trace(module: nn.Module, example: Any, forward: Forward = call) -> Structure:
    """Traces a network with one forward pass in eval mode; its state stays as it is.

    Args:
        module: the network.
        example: an input whose first axis is the batch; its first sample is used.
        forward: how to run the network on the example.

    Raises:
        StructureError: names the operation and the module when an operation has no rule, or the layers found when
            the outputs are not the columns of one layer.
    """
    example = samples(module, example, 1)
    tracer = _Tracer(module)
    with eval_mode(module), torch.no_grad(), tracer.modules, tracer:
        outputs = forward(module, example)
    return tracer.structure([x for x in tree_leaves(outputs) if isinstance(x, Tensor)])


class _Units:
    """Disjoint sets of unit labels; label 0 means "no unit"."""

    def __init__(self) -> None:
        self.parent = [0]

    def new(self, count: int) -> Tensor:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def root(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def unite(self, a: Tensor, b: Tensor) -> Tensor:
        """Unites labels pair by pair; returns the labels, the other side's where one side has none."""
        a, b = torch.broadcast_tensors(a, b)
        both = (a != 0) & (b != 0) & (a != b)
        if bool(both.any()):
            for pair in torch.stack([a[both], b[both]]).unique(dim=1).T.tolist():
                x, y = sorted((self.root(pair[0]), self.root(pair[1])))
                self.parent[y] = x
        return torch.where(a != 0, a, b)

    def unite_along(self, labels: Tensor, dims: Iterable[int]) -> Tensor:
        """Unites labels that differ only in their position along ``dims``; those dims keep size one."""
        for dim in dims:
            united = labels.amax(dim, keepdim=True)
            self.unite(united, labels)
            labels = united
        return labels

    def resolve(self, labels: Tensor) -> Tensor:
        return torch.tensor([self.root(label) for label in range(len(self.parent))])[labels]


@dataclass
class _Use:
    """One use of a tensor: labels of each of its entries, flat."""

    role: Role
    target: Tensor
    source: Tensor


@dataclass
class _Shadow:
    """What travels beside a tensor: labels of units or, for a parameter and its views, numbers of their entries."""

    tensor: Tensor
    values: Tensor
    parameter: str | None = None


class _Tracer(TorchDispatchMode):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors = named_tensors(module)
        self.units = _Units()
        self.uses: dict[str, list[_Use]] = {}
        self.modules = ModuleTracker()
        self.shadows = {
            id(tensor): _Shadow(tensor, torch.arange(tensor.numel()).reshape(tensor.shape), name)
            for name, tensor in self.tensors.items()
        }
        self.mixed: dict[int, tuple[str, int]] = {}
        """Results whose units were mixed along a dim, with the operation: fine at the very end, nowhere else."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in inputs:
            if id(x) in self.mixed:
                self._check_mixed(x, *self.mixed.pop(id(x)))
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        operation = func.overloadpacket
        if operation in RULES:
            RULES[operation](self, args, kwargs, results)
        elif operation in MOVEMENT or func.is_view:
            self._move(func, args, kwargs, inputs, results)
        elif torch.Tag.pointwise in func.tags:
            self._elementwise(operation, inputs, results)
        elif any(self._carries(x) for x in inputs):
            self.refuse(str(operation))
        return out

    # What the rules in operations.py use

    def refuse(self, operation: str) -> NoReturn:
        """Gives up, naming the operation and the module that ran it."""
        paths = self.modules.parents - {"Global"}
        module = max(paths, key=lambda path: path.count("."), default="").partition(".")[2]
        raise StructureError(
            f"The network cannot be traced: no rule for the operation '{operation}' in module '{module or 'forward'}'."
            " Write it with linear layers, convolutions, BatchNorm, pooling, views, sums and activation functions."
        )

    def labels(self, x: Tensor) -> Tensor:
        """Unit labels of an activation, 0 where no unit computed it."""
        shadow = self._shadow(x)
        return torch.zeros(x.shape, dtype=torch.int64) if shadow.parameter is not None else shadow.values

    def write(self, out: Tensor, labels: Tensor) -> None:
        """Puts labels beside a result, into the existing ones where the operation worked in place."""
        shadow = self._shadow(out)
        if shadow.parameter is not None:
            self.refuse("writing into a parameter or buffer")
        if shadow.values.shape == labels.shape:
            shadow.values.copy_(labels)
        else:
            shadow.values = labels.expand(out.shape).clone()

    def is_entries(self, x: Any) -> bool:
        """Whether ``x`` is a parameter, a buffer or a view of one."""
        return isinstance(x, Tensor) and self._shadow(x).parameter is not None

    def use(self, x: Tensor | None, role: Role, target: Tensor, source: Tensor | None = None) -> None:
        """Notes that the entries of a parameter write to ``target`` and read ``source``, both in its view's shape."""
        if x is None:
            return
        if not self.is_entries(x):
            if bool(self.labels(x).any()):
                self.refuse("a layer whose weights are activations")
            return
        shadow = self._shadow(x)
        assert shadow.parameter is not None
        size = self.tensors[shadow.parameter].numel()
        numbers = shadow.values.flatten()
        use = _Use(role, torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64))
        use.target[numbers] = target.expand(x.shape).flatten()
        if source is not None:
            use.source[numbers] = source.expand(x.shape).flatten()
        self.uses.setdefault(shadow.parameter, []).append(use)

    # Kinds of operation that need no rule of their own

    def _check_mixed(self, x: Tensor, operation: str, dim: int) -> None:
        labels = self.units.resolve(self.labels(x))
        if not torch.equal(labels.amax(dim), labels.amin(dim)):
            self.refuse(f"{operation} over units, read by a later operation")

    def _shadow(self, x: Tensor) -> _Shadow:
        if id(x) not in self.shadows:
            self.shadows[id(x)] = _Shadow(x, torch.zeros(x.shape, dtype=torch.int64))
        return self.shadows[id(x)]

    def _carries(self, x: Tensor) -> bool:
        """Whether units or trained parameters stand behind ``x``."""
        shadow = self._shadow(x)
        if shadow.parameter is None:
            return bool(shadow.values.any())
        return isinstance(self.tensors[shadow.parameter], nn.Parameter)

    def _move(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], results: list[Tensor]) -> None:
        indices = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor)] if func.overloadpacket in INDEXED else []
        if any(self._carries(x) for x in indices):
            self.refuse(f"{func.overloadpacket} at places that units decide")
        inputs = [x for x in inputs if all(x is not index for index in indices)]
        parameters = {self._shadow(x).parameter for x in inputs}
        if len(parameters) > 1:
            self.refuse(f"{func.overloadpacket} of parameters together with other tensors")

        def values(x: Tensor) -> Tensor:
            return x if any(x is index for index in indices) else self._shadow(x).values

        args, kwargs = tree_map_only(Tensor, values, (args, kwargs))
        if func.overloadpacket is aten._to_copy:
            moved = args[0].clone()
        elif func.overloadpacket is aten.constant_pad_nd:
            moved = func(*args[:2])
        else:
            moved = func(*args, **kwargs)
        moved = [x for x in tree_leaves(moved) if isinstance(x, Tensor)]
        for result, labels in zip(results, moved, strict=True):
            if all(result is not x for x in inputs):
                self.shadows[id(result)] = _Shadow(result, labels, next(iter(parameters)))

    def _elementwise(self, operation: Any, inputs: list[Tensor], results: list[Tensor]) -> None:
        parameters = [x for x in inputs if self.is_entries(x)]
        activations = [x for x in inputs if not self.is_entries(x)]
        if not activations and any(self._carries(x) for x in parameters):
            self.refuse(f"{operation} on parameters alone")
        joined = torch.zeros(results[0].shape, dtype=torch.int64)
        for x in activations:
            joined = self.units.unite(joined, self.labels(x))
        for x in parameters:
            self.use(
                x,
                "shift" if operation in (aten.add, aten.add_, aten.sub, aten.sub_) else "scale",
                self._sole_label(x, joined),
            )
        for result in results:
            self.write(result, joined)

    def _sole_label(self, x: Tensor, labels: Tensor) -> Tensor:
        """For each entry of ``x`` the unit that it meets when it is broadcast; 0 where it meets several."""
        labels = self.units.resolve(labels)
        while labels.ndim > x.ndim:
            labels = labels.amax(0) * (labels.amax(0) == labels.amin(0))
        for dim in range(x.ndim):
            if x.shape[dim] == 1 and labels.shape[dim] != 1:
                top = labels.amax(dim, keepdim=True)
                labels = top * (top == labels.amin(dim, keepdim=True))
        return labels

    # The result

    def structure(self, outputs: list[Tensor]) -> Structure:
        """Numbers the units and gathers them in groups."""
        self._unite_shared_layers()
        found = {
            name: [(use.role, self.units.resolve(use.target), self.units.resolve(use.source)) for use in uses]
            for name, uses in self.uses.items()
        }
        producers: dict[int, dict[str, list[int]]] = {}
        layouts: dict[tuple[int, str], tuple[int, ...]] = {}
        for name, uses in found.items():
            for role, target, _ in uses:
                if role == "weight":
                    places = _compress(target.reshape(self.tensors[name].shape))
                    for row, label in enumerate(places.flatten().tolist()):
                        layouts[label, name] = tuple(places.shape)
                        rows = producers.setdefault(label, {}).setdefault(name, [])
                        if row not in rows:
                            rows.append(row)
        head = self._head(outputs, producers)
        signatures: dict[tuple[object, ...], list[int]] = {}
        for label in sorted(producers.keys() - set(head)):
            signature = tuple((name, layouts[label, name], len(rows)) for name, rows in producers[label].items())
            signatures.setdefault(signature, []).append(label)
        members = [*signatures.values(), head]

        numbers = torch.full((len(self.units.parent),), NO_UNIT)
        numbers[torch.tensor([label for labels in members for label in labels])] = torch.arange(sum(map(len, members)))
        entries = {
            name: tuple(
                Entries(
                    _compress(numbers[target].reshape(self.tensors[name].shape)),
                    _compress(numbers[source].reshape(self.tensors[name].shape)),
                    role,
                )
                for role, target, source in uses
            )
            for name, uses in found.items()
        }
        groups: list[UnitGroup] = []
        for labels in members:
            first = groups[-1].first + groups[-1].size if groups else 0
            sites = _rows(entries, self.tensors, first, len(labels))
            layers = tuple(dict.fromkeys(_layer(r.tensor) for r in sites if r.role == "weight"))
            taken = sum(group.name.partition("#")[0] == layers[0] for group in groups)
            name = f"{layers[0]}#{taken + 1}" if taken else layers[0]
            groups.append(UnitGroup(name, first, len(labels), layers, sites))
        output_units = tuple(numbers[self.units.resolve(self.labels(x))] for x in outputs)
        return Structure(tuple(groups[:-1]), groups[-1], output_units, entries)

    def _unite_shared_layers(self) -> None:
        """A layer that is used at several places computes the same units at each of them."""
        for name, uses in self.uses.items():
            targets = [_compress(use.target.reshape(self.tensors[name].shape)) for use in uses if use.role == "weight"]
            for other in targets[1:]:
                if other.shape == targets[0].shape:
                    self.units.unite(targets[0], other)

    def _head(self, outputs: list[Tensor], producers: Mapping[int, Mapping[str, list[int]]]) -> list[int]:
        """Labels of the output columns, in the order of the rows of the layer that computes them."""
        columns = {label for x in outputs for label in self.units.resolve(self.labels(x)).flatten().tolist() if label}
        if not columns:
            raise StructureError("The network cannot be traced: no layer with weights computes its output.")
        weights = {name for label in columns for name in producers[label]}
        if len(weights) > 1 or any(len(rows) > 1 for label in columns for rows in producers[label].values()):
            layers = ", ".join(f"'{_layer(name)}'" for name in sorted(weights))
            raise StructureError(
                f"The network cannot be traced: its outputs mix the columns of {layers}."
                " Let the forward pass end in one layer that computes one column an output."
            )
        weight = next(iter(weights))
        return sorted((label for label in producers if weight in producers[label]), key=lambda i: producers[i][weight])


def _layer(tensor: str) -> str:
    """Path of the module that holds a tensor."""
    return tensor.rpartition(".")[0] or tensor


def _compress(labels: Tensor) -> Tensor:
    """The same labels with size one along every axis on which they are constant."""
    for axis in range(labels.ndim):
        first = labels.narrow(axis, 0, 1)
        if bool((labels == first).all()):
            labels = first
    return labels.clone()


def _rows(
    entries: Mapping[str, tuple[Entries, ...]], tensors: Mapping[str, Tensor], first: int, size: int
) -> tuple[Rows, ...]:
    """Where the units ``first`` to ``first + size - 1`` sit."""
    found: dict[tuple[str, Role], Rows] = {}
    for name, uses in entries.items():
        for use in uses:
            axes = [axis for axis, length in enumerate(use.target.shape) if length > 1] or [0]
            target = use.target if len(axes) == 1 else use.target.expand(tensors[name].shape)
            inside = ((target >= first) & (target < first + size)).flatten()
            if use.role == "statistic" or (name, use.role) in found or not bool(inside.any()):
                continue
            positions = inside.nonzero().flatten()
            by_unit = positions[target.flatten()[positions].argsort(stable=True)]
            found[name, use.role] = Rows(name, axes[0] if len(axes) == 1 else None, by_unit.reshape(size, -1), use.role)
    return tuple(found.values())
