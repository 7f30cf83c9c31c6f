"""Where a task's scores may look: its input, the hidden units that it may read, its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from lightning_cf.network.consumers import consumers, input_units
from lightning_cf.network.structure import NO_UNIT, Structure, layer_of
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE

DEPTH = 2
"""How many layers of a chain are kept."""


@dataclass(frozen=True)
class Site:
    """Where a task sees hidden units: in what the layer with some weight reads.

    Attributes:
        weight: name of that weight.
        columns: the input columns (Linear) or channels (convolution) that hold units of this task or of earlier ones.
        own: which of these are the task's own.
        units: the unit that each of these columns holds: several hold one where its positions are laid out in a row.
        producer: name of the weight of the only layer that computes these units, where it is linear; else None.
        rows: rows of that layer that hold units of this task or of earlier ones.
    """

    weight: str
    columns: Int64[Tensor, "columns"]
    own: Bool[Tensor, "columns"]
    producer: str | None
    rows: Int64[Tensor, "rows"]
    units: Int64[Tensor, "columns"] | None = None

    def state(self) -> tuple[Any, ...]:
        """Its fields in their order, as tensors and plain values for a checkpoint."""
        return tuple(kept(x) if isinstance(x, Tensor) else x for x in vars(self).values())

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> Site:
        """The site again, on the CPU, that :meth:`state` described; older versions described one field less."""
        fields: list[Any] = [x.cpu() if isinstance(x, Tensor) else x for x in state]
        return cls(*fields)


@dataclass(frozen=True)
class Link:
    """A part of a linear layer's weight, by which its units can be led back to what they read.

    Attributes:
        weight: its name.
        rows: those of units that the task may read; of the last layer in a chain, of its own.
        columns: those that hold units which the task may read, or the network's input.
    """

    weight: str
    rows: Int64[Tensor, "rows"]
    columns: Int64[Tensor, "columns"]


@dataclass(frozen=True)
class Watched:
    """What a trial showed of a network.

    Attributes:
        weights: names of the weights of those layers whose input was seen and has the samples along an axis.
        second: those of them whose input has the samples along its second axis, behind tokens.
        hooked: those whose input their module's hooks see too.
        whole: whether every output layer ran.
        turned: whether the network's input has the samples along its second axis, behind tokens.
        behind: whether what the output layers compute has.
        unread: places of the tensors, among those that the forward pass is given, on which no prediction hangs.
    """

    weights: frozenset[str]
    second: frozenset[str] = frozenset()
    hooked: frozenset[str] = frozenset()
    whole: bool = True
    turned: bool = False
    behind: bool = False
    unread: frozenset[str] = frozenset()

    def both(self, other: Watched) -> Watched:
        """What held in this trial and in another one: only that is taken for a property of the network."""
        apart = self.second ^ other.second
        weights = (self.weights & other.weights) - apart
        turned = self.turned or other.turned
        return Watched(weights, self.second & weights, self.hooked & other.hooked, self.whole, turned, self.behind)


@dataclass(frozen=True)
class Sites:
    """Everything that a task's scores may look at.

    Attributes:
        inputs: name of the first layer's weight, which reads the network's input itself; None where no linear layer
            or convolution does.
        hidden: one a group of units, in the order of the forward pass.
        heads: path of each output layer, with the output columns that it computes.
        outputs: the task's own output columns, one a class.
        chain: linear layers from the input on, each of which reads the units of the one before and nothing else.
        second: the weights among these whose layers read the samples along their input's second axis, behind tokens.
        turned: whether the network's input has them there too.
        behind: whether what the output layers compute has them there too.
        unread: places of the tensors, among those that the forward pass is given, of which no feature is made.
    """

    inputs: str | None
    hidden: tuple[Site, ...]
    heads: Mapping[str, Int64[Tensor, "_"]]
    outputs: Int64[Tensor, "classes"]
    chain: tuple[Link, ...] = ()
    second: frozenset[str] = frozenset()
    turned: bool = False
    behind: bool = False
    unread: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        module: nn.Module,
        structure: Structure,
        ledger: NeuronLedger,
        task: str,
        watched: Watched | None = None,
    ) -> Sites:
        """Finds them for a task that has its claim, or that learns: then all free units are its own.

        Args:
            module: the network.
            structure: its structure.
            ledger: who owns what.
            task: its name.
            watched: of which layers one can see what they read, where that was tried; others are left out.
        """
        number, owner = ledger.index(task), ledger.owner_of_units(structure)
        if ledger.tasks[number].phase == "learn":
            owner = torch.where(owner == FREE, number, owner)
        seen = partial(_is_seen, module) if watched is None else watched.weights.__contains__
        readers = [(name, use) for name, use in consumers(module, structure, trained=False) if seen(name)]
        hidden = []
        for group in structure.groups:
            for name, use in readers:
                source = input_units(use)
                inside = (source >= group.first) & (source < group.first + group.size)
                if len(source[inside].unique()) == group.size:
                    owners = owner[source.clamp_min(0)]
                    columns = (inside & (owners >= 0) & (owners <= number)).nonzero().flatten()
                    producer, rows = _producer(module, structure, group.first, group.size)
                    if watched is not None and producer not in watched.weights:
                        producer, rows = None, rows[:0]
                    held = owner[rows]
                    rows = ((held >= 0) & (held <= number)).nonzero().flatten()
                    hidden.append(Site(name, columns, owners[columns] == number, producer, rows, source[columns]))
                    break
        heads = cls.output_layers(structure)
        first, outputs = _first_layer(module, structure, seen), torch.tensor(ledger.reserved[task])
        chain = _chain(module, structure, owner, number, first)
        used = {first, *(site.weight for site in hidden)}
        second = frozenset() if watched is None else watched.second & used
        trial = Watched(frozenset()) if watched is None else watched
        return cls(first, tuple(hidden), heads, outputs, chain, second, trial.turned, trial.behind, trial.unread)

    @staticmethod
    def output_layers(structure: Structure) -> dict[str, Int64[Tensor, "_"]]:
        """Path of each layer that computes outputs, with its output columns."""
        found = {}
        for layer in structure.head.layers:
            columns = structure.entries[f"{layer}.weight"][0].target.flatten() - structure.head.first
            found[layer] = columns[columns >= 0]
        return found

    def renumbered(self, at: Mapping[int, int], heads: Mapping[str, Sequence[int]]) -> Sites:
        """The same where outputs have other numbers now.

        Args:
            at: by number so far, the number of each output that has another now.
            heads: by path of each output layer, the outputs that it computes now.
        """
        outputs = torch.tensor([at.get(column, column) for column in self.outputs.tolist()], dtype=torch.long)
        return replace(self, outputs=outputs, heads={path: torch.tensor(heads[path]) for path in self.heads})

    def state_dict(self) -> dict[str, Any]:
        """Where scores look, as tensors and plain containers for a checkpoint."""
        return {
            "inputs": self.inputs,
            "hidden": [site.state() for site in self.hidden],
            "heads": {path: kept(columns) for path, columns in self.heads.items()},
            "outputs": kept(self.outputs),
            "chain": [(link.weight, kept(link.rows), kept(link.columns)) for link in self.chain],
            "second": sorted(self.second),
            "turned": self.turned,
            "behind": self.behind,
            "unread": sorted(self.unread),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Sites:
        """Makes the sites again, on the CPU, that :meth:`state_dict` described."""
        hidden = tuple(map(Site.from_state, state["hidden"]))
        heads = {path: columns.cpu() for path, columns in state["heads"].items()}
        chain = tuple(Link(weight, rows.cpu(), columns.cpu()) for weight, rows, columns in state["chain"])
        second, unread = frozenset(state.get("second", ())), frozenset(state.get("unread", ()))
        turned, behind = bool(state.get("turned")), bool(state.get("behind"))
        return cls(state["inputs"], hidden, heads, state["outputs"].cpu(), chain, second, turned, behind, unread)


def kept(value: Tensor) -> Tensor:
    """A tensor to keep: without its history, in memory of its own, whatever it was a part of."""
    value = value.detach().cpu()
    own = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
    return value if own else value.clone(memory_format=torch.contiguous_format)


def _is_seen(module: nn.Module, name: str) -> bool:
    """Whether what a weight's layer reads can be watched: not within a recurrent layer, nor where it is computed."""
    layer = dict(module.named_modules()).get(layer_of(name))
    if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return layer.weight is dict(module.named_parameters()).get(name)
    return not isinstance(layer, (nn.RNNBase, nn.RNNCellBase)) and ".parametrizations." not in name


def _first_layer(module: nn.Module, structure: Structure, seen: Callable[[str], bool]) -> str | None:
    """The weight of the first layer that reads the network's input and nothing else."""
    parameters = dict(module.named_parameters())
    for name, uses in structure.entries.items():
        use = uses[0]
        if name in parameters and len(uses) == 1 and use.role == "weight" and parameters[name].ndim > 1:
            rows = use.target.numel() == use.target.shape[0] and seen(name)
            if rows and bool((use.source == NO_UNIT).all()) and bool((use.target != NO_UNIT).any()):
                return name
    return None


def _producer(
    module: nn.Module, structure: Structure, first: int, size: int
) -> tuple[str | None, Int64[Tensor, "rows"]]:
    """The only layer that computes a group's units, if it is linear, and the unit of each of its rows."""
    layers, found = dict(module.named_modules()), []
    for name, uses in structure.entries.items():
        target = uses[0].target.flatten()
        if uses[0].role == "weight" and bool(((target >= first) & (target < first + size)).any()):
            found.append((name, target))
    if len(found) == 1:
        ((name, target),) = found
        units = torch.arange(first, first + size)
        if isinstance(layers.get(layer_of(name)), nn.Linear) and torch.equal(target.sort().values, units):
            return name, target
    return None, torch.empty(0, dtype=torch.long)


def _chain(
    module: nn.Module, structure: Structure, owner: Int64[Tensor, "units"], number: int, first: str | None
) -> tuple[Link, ...]:
    """The first layer and the one behind it, where both are linear."""
    layers = dict(module.named_modules())
    links: list[Link] = []
    rows_before: Tensor | None = None
    names = [] if first is None else [first, *(name for name, _ in consumers(module, structure))]
    for name in names if structure.groups else ():  # a network may be its output layer alone
        use = structure.entries[name][0]
        target, source = use.target.flatten(), use.source.flatten()
        plain = isinstance(layers.get(layer_of(name)), nn.Linear) and len(structure.entries[name]) == 1
        group = structure.groups[min(len(links), len(structure.groups) - 1)]
        hidden = set(target.tolist()) == set(range(group.first, group.first + group.size))
        reads = bool((source == NO_UNIT).all()) if rows_before is None else torch.equal(source, rows_before)
        if not (plain and hidden and reads and len(links) < DEPTH):
            continue
        owners = owner[target]
        rows = ((owners >= 0) & (owners <= number)).nonzero().flatten()
        columns = torch.arange(module.get_parameter(name).shape[1]) if rows_before is None else links[-1].rows
        links.append(Link(name, rows, columns))
        rows_before = target
    if links:
        last = links[-1]
        owners = owner[structure.entries[last.weight][0].target.flatten()]
        links[-1] = Link(last.weight, (owners == number).nonzero().flatten(), last.columns)
    return tuple(links)
