"""What a traced network consists of: its unit groups, and which unit every weight entry writes to and reads from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_cf.network.forward import Example

NO_UNIT = -1
"""Stands for the network's input where a source is named, and for "not part of any unit" where a target is."""

OUTSIDE = "(outside)"
"""Stands for the path of a module where none runs: in what ``evaluate=``, or a method other than forward, computes."""

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
"""Layers whose outputs the leak probe watches."""

Role = Literal["weight", "bias", "scale", "shift", "statistic", "constant"]


@dataclass(frozen=True)
class Entries:
    """Which unit each entry of one tensor writes to and reads from, at one place where the network uses it.

    Attributes:
        target: unit that the entry helps to compute; broadcastable to the tensor's shape.
        source: unit that the entry reads; broadcastable to the tensor's shape.
        role: what the tensor is there.
        ways: numbers of the ways through the network that have this use (see ``ways.py``).
        used: which entries these ways use; None where they use all.
    """

    target: Int64[Tensor, "..."]
    source: Int64[Tensor, "..."]
    role: Role
    ways: frozenset[int] = frozenset({0})
    used: Bool[Tensor, "..."] | None = None


@dataclass(frozen=True)
class Rows:
    """Where the units of a group sit in one tensor.

    Attributes:
        tensor: the tensor's name.
        axis: the axis along which units lie (0 for a Linear, 1 for a transposed convolution), or None where they lie
            along none (a transposed convolution in groups).
        index: positions along that axis, or among all entries of the tensor, one row a unit.
        role: what the tensor is there.
    """

    tensor: str
    axis: int | None
    index: Int64[Tensor, "units rows"]
    role: Role

    def read(self, tensor: Tensor) -> Shaped[Tensor, "units values"]:
        """Copies each unit's entries out of the tensor, one row a unit."""
        lines, places = self._lines(tensor), self.index.flatten().to(tensor.device)
        found = lines[torch.unravel_index(places, lines.shape)] if self.axis is None else lines.index_select(0, places)
        return found.reshape(self.index.shape[0], -1)

    def write(self, tensor: Tensor, values: Shaped[Tensor, "units values"], units: Int64[Tensor, "some"]) -> None:
        """Writes the rows ``values[units]`` into the tensor, in place; the other units' entries stay."""
        self.among(units).fill(tensor, values[units.to(values.device)])

    def among(self, units: Int64[Tensor, "some"]) -> Rows:
        """Where some units of the group sit in the tensor."""
        return replace(self, index=self.index[units.cpu()])

    def fill(self, tensor: Tensor, values: Shaped[Tensor, "units values"]) -> None:
        """Writes each unit's entries into the tensor, in place, as :meth:`read` gives them."""
        lines, places = self._lines(tensor), self.index.flatten().to(tensor.device)
        if self.axis is None:
            lines[torch.unravel_index(places, lines.shape)] = values.flatten().to(lines)
        else:
            lines.index_copy_(0, places, values.reshape(len(places), *lines.shape[1:]).to(lines))

    def width(self, tensor: Tensor) -> int:
        """How many of the tensor's entries each unit has."""
        return self.index.shape[1] * (1 if self.axis is None else tensor.numel() // tensor.shape[self.axis])

    def _lines(self, tensor: Tensor) -> Tensor:
        """A view of the tensor with the units' axis first, where there is one."""
        return tensor.detach() if self.axis is None else tensor.detach().movedim(self.axis, 0)


@dataclass(frozen=True)
class UnitGroup:
    """Units that share one fate because the network adds or normalises their layers index by index.

    Attributes:
        name: path of the layer that the forward pass met first; reports call the group by it.
        first: number of its first unit.
        size: how many units it has, numbered ``first`` to ``first + size - 1``.
        layers: paths of all layers whose weight rows belong to it.
        rows: where its units sit in which tensor.
    """

    name: str
    first: int
    size: int
    layers: tuple[str, ...]
    rows: tuple[Rows, ...]

    @property
    def units(self) -> slice:
        """Where the group stands in a vector over all units."""
        return slice(self.first, self.first + self.size)

    def weights(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "units inputs"]:
        """Incoming weight vector of each unit: the rows of all layers of the group, joined."""
        return torch.cat([rows.read(tensors[rows.tensor]) for rows in self.rows if rows.role == "weight"], dim=1)

    def vectors(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "units inputs"]:
        """As :meth:`weights`, but a view of the tensor where the units are its rows in their order: to read only."""
        sites = [rows for rows in self.rows if rows.role == "weight"]
        if len(sites) == 1 and sites[0].axis == 0:
            tensor = tensors[sites[0].tensor].detach()
            if torch.equal(sites[0].index.flatten(), torch.arange(len(tensor))) and sites[0].index.shape[1] == 1:
                return tensor.flatten(1)
        return self.weights(tensors)

    def biases(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "units"]:
        """Bias of each unit: the layer's, else the shift of the norm behind it, else zero."""
        for role in ("bias", "shift"):
            for rows in self.rows:
                if rows.role == role:
                    return rows.read(tensors[rows.tensor]).mean(dim=1)
        weight = next(rows.tensor for rows in self.rows if rows.role == "weight")
        return tensors[weight].new_zeros(self.size)

    def write_weights(
        self, tensors: Mapping[str, Tensor], vectors: Float[Tensor, "units inputs"], units: Int64[Tensor, "some"]
    ) -> None:
        """Writes the incoming vectors of ``units`` (numbered within the group) into the layers, in place."""
        start = 0
        for rows in self.rows:
            if rows.role == "weight":
                width = rows.width(tensors[rows.tensor])
                rows.write(tensors[rows.tensor], vectors[:, start : start + width], units)
                start += width


@dataclass(frozen=True)
class Mixing:
    """An operation that makes units share one fate, or that takes their values out of the network's sight.

    Attributes:
        operation: the operator.
        module: path of the module that ran it.
        count: how many units met there.
        layers: the hidden layers that they are in now.
        unknown: whether nothing is known of the operator, so that its units were united to be safe.
        collapsed: those layers of which one unit is left.
    """

    operation: str
    module: str
    count: int
    layers: tuple[str, ...]
    unknown: bool
    collapsed: tuple[str, ...]

    def message(self) -> str:
        """What a user should know of it."""
        of = ", ".join(f"'{layer}'" for layer in self.layers) or "the outputs"
        why = "cannot be followed" if self.unknown else "mixes units"
        text = f"'{self.operation}' in {module_at(self.module)} {why}: {self.count} units of {of} share one fate."
        if self.collapsed:
            layers = ", ".join(f"'{layer}'" for layer in self.collapsed)
            text += f" Of {layers} one unit is left, which the first task owns whole."
        return text


@dataclass(frozen=True)
class Structure:
    """The units of a network, numbered 0 to ``n_units - 1``, group after group, the outputs last.

    Attributes:
        groups: groups of hidden units, in the order of the forward pass.
        head: the group of the network's outputs: its unit ``c`` is output column ``c``.
        output_units: for each tensor that the network returns, the unit of each element, for one sample.
        returned: for each tensor that the network returns, the output columns that it holds, in ascending order.
        entries: for each parameter and buffer that the forward pass uses, where it does.
        norms: for each module that normalises several units together, the unit of each element; ``NO_UNIT`` for the
            network's input.
        mixings: where units were united because an operation mixes them.
        reads: where values of units became numbers in Python.
        branches: where values of the network's input became numbers in Python, or decided a shape or an ``if`` (not
            ``unknown``).
        decisions: how many ``if`` of the forward pass were decided by the network's input.
        computed: for parameters that an operation changes before they are used, that operation and its module.
        written: for buffers that the forward pass writes in eval mode, the same.
        ways: how many ways through the network there are that differ in what they use.
        rides: for tasks by name, the number of the way in which they run it; the first where it is not said.
        output_ways: for each tensor that the network returns, the way that returns it.
        idle: calls of layers that reach nothing that the network returns: path, way, and which call it is from 0 on.
        infinite: names of tensors that held infinite numbers when the network was traced, and may: masks, bounds.
        buffers: shapes of all buffers when it was traced.
        example: how many inputs it was traced with, where that is known.
    """

    groups: tuple[UnitGroup, ...]
    head: UnitGroup
    output_units: tuple[Int64[Tensor, "..."], ...]
    entries: Mapping[str, tuple[Entries, ...]]
    returned: tuple[Int64[Tensor, "_"], ...] = ()
    norms: Mapping[str, Int64[Tensor, "..."]] = field(default_factory=dict)
    mixings: tuple[Mixing, ...] = ()
    reads: tuple[Mixing, ...] = ()
    branches: tuple[Mixing, ...] = ()
    decisions: int = 0
    computed: Mapping[str, str] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)
    ways: int = 1
    rides: Mapping[str, int] = field(default_factory=dict)
    output_ways: tuple[int, ...] = ()
    idle: frozenset[tuple[str, int, int]] = frozenset()
    infinite: frozenset[str] = frozenset()
    buffers: Mapping[str, torch.Size] = field(default_factory=dict)
    example: Example | None = None

    def way_of(self, task: str) -> int:
        """The way in which a task runs the network."""
        return self.rides.get(task, 0) if self.ways > 1 else 0

    def uses_on(self, name: str, way: int) -> tuple[Entries, ...]:
        """Where one way through the network uses a tensor, by the tensor's name; empty where it does not."""
        return tuple(use for use in self.entries.get(name, ()) if way in use.ways)

    def groups_on(self, way: int) -> tuple[UnitGroup, ...]:
        """The groups whose units one way computes, told of the tensors that it uses for that."""
        if self.ways == 1:
            return self.groups
        met = {name: torch.zeros(self.n_units + 1, dtype=torch.bool) for name in self.entries}
        for name in self.entries:
            for use in self.uses_on(name, way):
                known, used = torch.broadcast_tensors(use.target, torch.tensor(True) if use.used is None else use.used)
                met[name][known[used]] = True
        found = [
            replace(group, rows=tuple(rows for rows in group.rows if bool(met[rows.tensor][group.units].any())))
            for group in self.groups
        ]
        return tuple(group for group in found if any(rows.role == "weight" for rows in group.rows))

    def only_on(self, task: str) -> str | None:
        """A tensor that computes hidden units in a task's way as it does not in the first one, if there is one."""
        way = self.way_of(task)
        for name in self.entries:
            for use in self.uses_on(name, way):
                if 0 not in use.ways and bool(((use.target >= 0) & (use.target < self.head.first)).any()):
                    return name
        return None

    def as_one_way(self) -> Structure:
        """The same where every task runs the network in all of these ways."""
        entries = {
            name: tuple(replace(use, ways=frozenset({0})) for use in uses) for name, uses in self.entries.items()
        }
        return replace(self, entries=entries, ways=1, output_ways=(0,) * len(self.output_ways))

    @property
    def n_units(self) -> int:
        """How many units the network has, its output columns included: the length of a vector over all units."""
        return self.head.first + self.head.size

    @property
    def head_layer(self) -> str:
        """Path of the layer whose outputs are the network's outputs."""
        return self.head.name


def buffer_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """The shape of each buffer that has one, by name; one that is shared appears once, under its first name."""
    return {name: x.shape for name, x in module.named_buffers() if not is_lazy(x)}


def lookup(index: Int64[Tensor, "..."], values: Shaped[Tensor, "units"], *, none: int) -> Shaped[Tensor, "..."]:
    """``values[index]``, with ``none`` where the index says ``NO_UNIT``."""
    return torch.cat([values, values.new_full((1,), none)])[index]


def module_at(path: str) -> str:
    """The module at a path, as messages call what runs there."""
    return "code outside of a module's forward" if path == OUTSIDE else f"module '{path or 'forward'}'"


def layer_of(tensor: str) -> str:
    """Path of the module whose weight, bias or norm entry a tensor is."""
    layer = tensor.rpartition(".")[0].partition("parametrizations.")[0].rstrip(".")
    return layer or (tensor if "." not in tensor else "")
