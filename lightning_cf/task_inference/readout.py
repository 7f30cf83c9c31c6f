"""What a network shows of a batch: its input, the hidden units that a task may read, and its raw outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_cf.claim_folding import consumers, input_units
from lightning_cf.ledger import FREE, NeuronLedger
from lightning_cf.structure import NO_UNIT, Structure, eval_mode, layer_of

_LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class Site:
    """Where a task sees hidden units: in what the layer with some weight reads.

    Attributes:
        weight: name of that weight.
        columns: the input columns (Linear) or channels (convolution) that hold units of this task or of earlier ones.
        own: which of these are the task's own.
        producer: name of the weight of the only layer that computes these units, where it is linear; else None.
        rows: rows of that layer that hold units of this task or of earlier ones.
    """

    weight: str
    columns: Int64[Tensor, "columns"]
    own: Bool[Tensor, "columns"]
    producer: str | None
    rows: Int64[Tensor, "rows"]


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
class Sites:
    """Everything that a task's scores may look at.

    Attributes:
        inputs: name of the first layer's weight, which reads the network's input itself; None where no linear layer
            or convolution does.
        hidden: one a group of units, in the order of the forward pass.
        heads: path of each output layer, with the output columns that it computes.
        outputs: the task's own output columns, one a class.
        chain: linear layers from the input on, each of which reads the units of the one before and nothing else.
    """

    inputs: str | None
    hidden: tuple[Site, ...]
    heads: Mapping[str, Int64[Tensor, "_"]]
    outputs: Int64[Tensor, "classes"]
    chain: tuple[Link, ...] = ()

    @classmethod
    def of(cls, module: nn.Module, structure: Structure, ledger: NeuronLedger, task: str) -> Sites:
        """Finds them for a task that has its claim, or that learns: then all free units are its own."""
        number, owner = ledger.index(task), ledger.owner_of_units(structure)
        if ledger.tasks[number].phase == "learn":
            owner = torch.where(owner == FREE, number, owner)
        readers = consumers(module, structure)
        hidden = []
        for group in structure.groups:
            for name, use in readers:
                source = input_units(use)
                inside = (source >= group.first) & (source < group.first + group.size)
                if len(source[inside].unique()) == group.size:
                    owners = owner[source.clamp_min(0)]
                    columns = (inside & (owners >= 0) & (owners <= number)).nonzero().flatten()
                    producer, rows = _producer(module, structure, group.first, group.size)
                    held = owner[rows]
                    rows = ((held >= 0) & (held <= number)).nonzero().flatten()
                    hidden.append(Site(name, columns, owners[columns] == number, producer, rows))
                    break
        heads = cls.output_layers(structure)
        first, outputs = _first_layer(module, structure), torch.tensor(ledger.reserved[task])
        return cls(first, tuple(hidden), heads, outputs, _chain(module, structure, owner, number, first))

    @staticmethod
    def output_layers(structure: Structure) -> dict[str, Int64[Tensor, "_"]]:
        """Path of each layer that computes outputs, with its output columns."""
        found = {}
        for layer in structure.head.layers:
            columns = structure.entries[f"{layer}.weight"][0].target.flatten() - structure.head.first
            found[layer] = columns[columns >= 0]
        return found

    def state_dict(self) -> dict[str, Any]:
        """As plain containers and tensors."""
        return {
            "inputs": self.inputs,
            "hidden": [(s.weight, s.columns, s.own, s.producer, s.rows) for s in self.hidden],
            "heads": dict(self.heads),
            "outputs": self.outputs,
            "chain": [(link.weight, link.rows, link.columns) for link in self.chain],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Sites:
        """What :meth:`state_dict` described."""
        hidden = tuple(
            Site(weight, columns.cpu(), own.cpu(), producer, rows.cpu())
            for weight, columns, own, producer, rows in state["hidden"]
        )
        heads = {path: columns.cpu() for path, columns in state["heads"].items()}
        chain = tuple(Link(weight, rows.cpu(), columns.cpu()) for weight, rows, columns in state["chain"])
        return cls(state["inputs"], hidden, heads, state["outputs"].cpu(), chain)


def _first_layer(module: nn.Module, structure: Structure) -> str | None:
    """The weight of the first layer that reads the network's input and nothing else."""
    parameters = dict(module.named_parameters())
    for name, uses in structure.entries.items():
        use = uses[0]
        if name in parameters and len(uses) == 1 and use.role == "weight" and parameters[name].ndim > 1:
            rows = use.target.numel() == use.target.shape[0]
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
    for name in names:
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


DEPTH = 2
"""How many layers of a chain are kept."""


@dataclass(frozen=True)
class Readout:
    """What the network shows of one batch.

    Attributes:
        inputs: what its first layer reads, one row a sample; None where no layer reads it.
        read: by weight, what its layer reads: one row a sample, the mean over tokens or positions.
        given: by weight of a linear layer, what it computes, where that is one row a sample.
        outputs: raw values of all output columns, one row a sample, the mean over tokens or positions.
        weights: the network's parameters by name.
    """

    inputs: Float[Tensor, "batch values"] | None
    read: Mapping[str, Float[Tensor, "batch columns"]]
    outputs: Float[Tensor, "batch outputs"]
    weights: Mapping[str, Tensor]
    given: Mapping[str, Float[Tensor, "batch rows"]] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """What a task's scores look at in one batch, in float32.

    Attributes:
        inputs: what the network's first layer reads; None where no layer reads it.
        hidden: for each site the units of this task and of earlier ones.
        logits: raw values of the task's own outputs.
        own: for each site, which of its units are the task's own.
        chain: the parts of weights that lead units back to the input, the first layer's first.
        before: for each site the same units before their activation, where one linear layer computes them.
    """

    inputs: Float[Tensor, "batch values"] | None
    hidden: tuple[Float[Tensor, "batch _"], ...]
    logits: Float[Tensor, "batch classes"]
    own: tuple[Bool[Tensor, "_"], ...] = ()
    chain: tuple[Float[Tensor, "_ _"], ...] = ()
    before: tuple[Float[Tensor, "batch _"], ...] = ()

    @classmethod
    def of(cls, readout: Readout, sites: Sites) -> View:
        """A task's view of a batch."""
        device = readout.outputs.device
        hidden = tuple(readout.read[s.weight][:, s.columns.to(device)] for s in sites.hidden)
        chain = tuple(
            readout.weights[link.weight][link.rows.to(device)][:, link.columns.to(device)].float()
            for link in sites.chain
        )
        own = tuple(site.own.to(device) for site in sites.hidden)
        before = tuple(
            readout.given[s.producer][:, s.rows.to(device)] if s.producer in readout.given else x
            for s, x in zip(sites.hidden, hidden, strict=True)
        )
        return cls(readout.inputs, hidden, readout.outputs[:, sites.outputs.to(device)], own, chain, before)

    def part(self, chosen: Tensor) -> View:
        """Some samples of it."""
        inputs = None if self.inputs is None else self.inputs[chosen]
        hidden, before = (tuple(x[chosen] for x in units) for units in (self.hidden, self.before))
        return replace(self, inputs=inputs, hidden=hidden, before=before, logits=self.logits[chosen])

    @classmethod
    def joined(cls, views: Iterable[View]) -> View:
        """Several batches as one."""
        views = list(views)
        given = [view.inputs for view in views if view.inputs is not None]
        hidden = tuple(torch.cat(parts) for parts in zip(*(view.hidden for view in views), strict=True))
        before = tuple(torch.cat(parts) for parts in zip(*(view.before for view in views), strict=True))
        logits = torch.cat([view.logits for view in views])
        inputs = torch.cat(given) if given else None
        return replace(views[0], inputs=inputs, hidden=hidden, before=before, logits=logits)


def read(module: nn.Module, tasks: Iterable[Sites], run: Callable[[], Any], *, keep_graph: bool = False) -> Readout:
    """Runs a forward pass in eval mode and reads what some tasks look at.

    Args:
        module: the network.
        tasks: what to look at.
        run: runs the network on a batch.
        keep_graph: leaves the network in its mode, and gradients flow.
    """
    tasks = list(tasks)
    names = {site.weight for sites in tasks for site in sites.hidden}
    first = next((sites.inputs for sites in tasks if sites.inputs is not None), None)
    producers = {site.producer for sites in tasks for site in sites.hidden if site.producer is not None}
    recorder = Recorder(module, {*names, *producers, *([] if first is None else [first])}, tasks[-1].heads)
    with ExitStack() as stack:
        if not keep_graph:
            stack.enter_context(torch.no_grad())
            stack.enter_context(eval_mode(module))
        stack.enter_context(recorder.watching())
        run()
    return recorder.readout(first)


class Recorder(TorchFunctionMode):
    """Keeps what layers with some weights read in a forward pass, and the raw outputs."""

    def __init__(self, module: nn.Module, names: Iterable[str], heads: Mapping[str, Int64[Tensor, "_"]]) -> None:
        super().__init__()
        parameters = dict(module.named_parameters())
        self.module, self.heads, self.parameters = module, heads, parameters
        self.names = {id(parameters[name]): name for name in names}
        self.found: dict[str, Tensor] = {}
        self.given: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}

    def watching(self) -> ExitStack:
        """Watches meanwhile."""
        stack = ExitStack()
        for path in self.heads:
            hook = self.module.get_submodule(path).register_forward_hook(partial(self._keep, path), prepend=True)
            stack.callback(hook.remove)
        stack.enter_context(self)
        return stack

    def _keep(self, path: str, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self.columns[path] = output if isinstance(layer, nn.Linear) else output.movedim(1, -1)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LAYERS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            name = self.names.get(id(weight))
            if name is not None:
                x = args[0] if args else kwargs["input"]
                self.found[name] = x if func is F.linear else x.movedim(1, -1)
                result = func(*args, **kwargs)
                if func is F.linear and result.ndim == 2:
                    self.given[name] = result
                return result
        return func(*args, **kwargs)

    def readout(self, first: str | None) -> Readout:
        """What was seen."""
        batch = len(next(iter(self.columns.values())))
        width = 1 + max(int(columns.max()) for columns in self.heads.values())
        parts = {path: _by_sample(x, batch) for path, x in self.columns.items()}
        outputs = next(iter(parts.values())).new_zeros(batch, width)
        for path, columns in self.heads.items():
            if path in parts:
                outputs = outputs.index_copy(1, columns.to(outputs.device), parts[path][:, : len(columns)])
        inputs = None if first is None else self.found[first].float().reshape(batch, -1)
        read = {name: _by_sample(x, batch) for name, x in self.found.items()}
        given = {name: x.float() for name, x in self.given.items() if len(x) == batch}
        return Readout(inputs, read, outputs, self.parameters, given)


def _by_sample(x: Tensor, batch: int) -> Float[Tensor, "batch columns"]:
    """One row a sample: the mean over whatever lies between the batch and the columns."""
    x = x.float()
    if x.ndim > 2 and len(x) != batch and x.shape[1] == batch:
        x = x.movedim(1, 0)
    return x if x.ndim == 2 else x.reshape(batch, -1, x.shape[-1]).mean(1)
