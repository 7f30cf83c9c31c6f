"""What a network shows of a batch: its input, the hidden units that a task may read, and its raw outputs."""

from __future__ import annotations

import inspect
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
from torch.utils._pytree import tree_map

from lightning_cf.errors import ContinualError
from lightning_cf.network.finite import rows_finite
from lightning_cf.network.forward import eval_mode
from lightning_cf.network.output_heads import column_axis
from lightning_cf.task_inference.sites import Sites

_LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class Readout:
    """What the network shows of one batch.

    Attributes:
        inputs: what its first layer reads, one row a sample; None where no layer reads it.
        read: by weight, what its layer reads: one row a sample, the mean over tokens or positions.
        outputs: raw values of all output columns, one row a sample, the mean over tokens or positions.
        weights: the network's parameters by name.
        others: what it shows of the same batch with its input changed, by the name of the change (see ``variants``);
            without the inputs.
        given: by weight of a linear layer, what it computes, where that is one row a sample.
        missing: paths of output layers that did not run, whose columns are zero.
        x: what the network was given, as it takes it: a tensor, or several in a tuple; None where that is not made of
            tensors with one row a sample.
        maps: by weight, what its layer reads as it stands: samples first, units last, positions or tokens between.
        ragged: of several batches, axes along which samples of one are longer than those of another.
        padding: a token that the network takes for none, if it does (``nn.Embedding(padding_idx=...)``).
        found: by strategy, what it made of all this and may be asked for again; a part or a copy begins without.
    """

    inputs: Float[Tensor, "batch values"] | None
    read: Mapping[str, Float[Tensor, "batch columns"]]
    outputs: Float[Tensor, "batch outputs"]
    weights: Mapping[str, Tensor]
    others: Mapping[str, Readout] = field(default_factory=dict)
    given: Mapping[str, Float[Tensor, "batch rows"]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    x: Any = None
    maps: Mapping[str, Float[Tensor, "batch ..."]] = field(default_factory=dict)
    ragged: tuple[int, ...] = ()
    padding: int | None = None
    found: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def part(self, chosen: Bool[Tensor, "batch"]) -> Readout:
        """What the network shows of some of the samples: input and maps, not its other parts."""
        others = {name: other.part(chosen) for name, other in self.others.items()}
        maps = {name: values[chosen] for name, values in self.maps.items()}
        x = tree_map(lambda leaf: None if leaf is None else leaf[chosen], self.x)
        outputs = self.outputs[chosen]
        return replace(self, inputs=None, read={}, given={}, outputs=outputs, others=others, x=x, maps=maps)


@dataclass(frozen=True)
class View:
    """What a task's scores look at in one batch, in float32.

    Attributes:
        inputs: what the network's first layer reads; None where no layer reads it.
        hidden: for each site the units of this task and of earlier ones.
        logits: raw values of the task's own outputs.
        own: for each site, which of its units are the task's own.
        chain: the parts of weights that lead units back to the input, the first layer's first.
        others: the view of the same samples with their input changed, by the name of the change.
        before: for each site the same units before their activation, where one linear layer computes them.
    """

    inputs: Float[Tensor, "batch values"] | None
    hidden: tuple[Float[Tensor, "batch _"], ...]
    logits: Float[Tensor, "batch classes"]
    own: tuple[Bool[Tensor, "_"], ...] = ()
    chain: tuple[Float[Tensor, "_ _"], ...] = ()
    others: Mapping[str, View] = field(default_factory=dict)
    before: tuple[Float[Tensor, "batch _"], ...] = ()

    @classmethod
    def of(cls, readout: Readout, sites: Sites) -> View:
        """What a task's scores look at in a batch that was read.

        Args:
            readout: of the batch.
            sites: where the task's scores look.

        Raises:
            ContinualError: if a layer that they look at did not run in that forward pass.
        """
        device = readout.outputs.device
        unseen = [site.weight for site in sites.hidden if site.weight not in readout.read]
        if unseen:
            raise ContinualError(
                f"Nothing showed what the layer of '{unseen[0]}' reads in this forward pass, by which a task is"
                " inferred. Run every layer that the task's evaluate= runs, in the way in which it runs it."
            )
        hidden = tuple(taken(readout.read[s.weight], s.columns, 1) for s in sites.hidden)
        chain = tuple(
            taken(taken(readout.weights[link.weight], link.rows, 0), link.columns, 1).float() for link in sites.chain
        )
        own = tuple(site.own.to(device) for site in sites.hidden)
        others = {name: cls.of(other, sites) for name, other in readout.others.items()}
        before = tuple(
            x if s.producer is None or s.producer not in readout.given else taken(readout.given[s.producer], s.rows, 1)
            for s, x in zip(sites.hidden, hidden, strict=True)
        )
        logits = taken(readout.outputs, sites.outputs, 1)
        return cls(readout.inputs, hidden, logits, own, chain, others, before)

    def part(self, chosen: Tensor | slice) -> View:
        """The view of some of its samples, by their places in the batch."""
        inputs = None if self.inputs is None else self.inputs[chosen]
        hidden, before = (tuple(x[chosen] for x in units) for units in (self.hidden, self.before))
        others = {name: view.part(chosen) for name, view in self.others.items()}
        logits = self.logits[chosen]
        return replace(self, inputs=inputs, hidden=hidden, before=before, logits=logits, others=others)

    def finite(self) -> Bool[Tensor, "batch"]:
        """Of which samples everything in it is finite."""
        parts = [self.logits, *self.hidden, *self.before, *([] if self.inputs is None else [self.inputs])]
        fine = rows_finite(parts)
        for view in self.others.values():
            fine = fine & view.finite()
        return fine

    @classmethod
    def joined(cls, views: Iterable[View]) -> View:
        """One view of several batches of a task, their samples one after another."""
        views = list(views)
        given = [view.inputs for view in views if view.inputs is not None]
        hidden = tuple(torch.cat(parts) for parts in zip(*(view.hidden for view in views), strict=True))
        before = tuple(torch.cat(parts) for parts in zip(*(view.before for view in views), strict=True))
        logits = torch.cat([view.logits for view in views])
        others = {name: cls.joined(view.others[name] for view in views) for name in views[0].others}
        alike = bool(given) and len({x.shape[1] for x in given}) == 1  # images of one batch may be larger than others
        inputs = torch.cat(given) if alike else None
        return replace(views[0], inputs=inputs, hidden=hidden, before=before, logits=logits, others=others)


def taken(x: Tensor, places: Int64[Tensor, "_"], axis: int) -> Tensor:
    """Some places along an axis, in their order; the tensor itself where that is all of them.

    Indexing gives the same, but adds up gradients several times as slowly, since a place might be named twice.

    >>> taken(torch.arange(6).reshape(2, 3), torch.tensor([2, 0]), 1).tolist()
    [[2, 0], [5, 3]]
    """
    if len(places) == x.shape[axis] and torch.equal(places, torch.arange(len(places), device=places.device)):
        return x
    return x.index_select(axis, places.to(x.device))


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
    second = {name for sites in tasks for name in sites.second}
    recorder = Recorder(module, {*names, *producers, *([] if first is None else [first])}, tasks[-1].heads, second)
    recorder.behind = tasks[-1].behind
    with ExitStack() as stack:
        if not keep_graph:
            stack.enter_context(torch.no_grad())
            stack.enter_context(eval_mode(module))
        stack.enter_context(recorder.watching())
        run()
    return recorder.readout(first)


class Recorder(TorchFunctionMode):
    """Keeps what layers with some weights read in a forward pass, and the raw outputs."""

    def __init__(
        self,
        module: nn.Module,
        names: Iterable[str],
        heads: Mapping[str, Int64[Tensor, "_"]],
        second: Iterable[str] = (),
    ) -> None:
        super().__init__()
        parameters = dict(module.named_parameters())
        self.module, self.heads, self.parameters, self.second = module, heads, parameters, frozenset(second)
        self.behind = False
        """Whether the output layers compute samples along their second axis, behind tokens."""
        self.names = {id(parameters[name]): name for name in names}
        self.found: dict[str, Tensor] = {}
        self.given: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}

    def watching(self) -> ExitStack:
        """Records while the context that it gives lasts; run the forward pass in it, then ask :meth:`readout`."""
        stack = ExitStack()
        for path in self.heads:
            hook = self.module.get_submodule(path).register_forward_hook(partial(self._keep, path), prepend=True)
            stack.callback(hook.remove)
        stack.enter_context(self)
        return stack

    def _keep(self, path: str, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        columns = output.movedim(column_axis(layer, output), -1)
        self.columns[path] = columns.movedim(1, 0) if self.behind and columns.ndim > 2 else columns

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
        if func is F.multi_head_attention_forward:
            return self._attend(inspect.signature(func).bind(*args, **kwargs).arguments)
        return func(*args, **kwargs)

    def _attend(self, given: dict[str, Any]) -> Any:
        """Runs an attention whose projections are inside one function, tokens first, and keeps what they read.

        One weight projects queries, keys and values: where these are the same units, all its rows read what the values
        are made of.
        """
        for weight, x in (("in_proj", "value"), ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            name = self.names.get(id(given.get(f"{weight}_weight")))
            if name is not None:
                self.found[name] = given[x]
        name = self.names.get(id(given["out_proj_weight"]))
        if name is None:
            return F.multi_head_attention_forward(**given)
        unit = torch.eye(given["query"].shape[-1]).to(given["query"])
        heads, weights = F.multi_head_attention_forward(**{**given, "out_proj_weight": unit, "out_proj_bias": None})
        self.found[name] = heads
        flat = F.linear(heads.flatten(0, -2), given["out_proj_weight"], given["out_proj_bias"])
        return flat.reshape(heads.shape), weights

    def readout(self, first: str | None) -> Readout:
        """What the forward pass showed.

        Args:
            first: name of the weight that reads the network's input, or None where no layer does.

        Raises:
            ContinualError: if no output layer ran.
        """
        if not self.columns:
            raise ContinualError(f"No output layer ran in the forward pass; there are {', '.join(self.heads)}.")
        batch = len(next(iter(self.columns.values())))
        width = 1 + max(int(columns.max()) for columns in self.heads.values())
        parts = {path: _by_sample(x, batch) for path, x in self.columns.items()}
        outputs = next(iter(parts.values())).new_zeros(batch, width)
        for path, columns in self.heads.items():
            if path in parts:
                outputs = outputs.index_copy(1, columns.to(outputs.device), parts[path][:, : len(columns)])
        found = {name: x.movedim(1, 0) if name in self.second else x for name, x in self.found.items()}
        inputs = None if first is None or first not in found else _flat(found[first].float(), batch)
        read = {name: _by_sample(x, batch) for name, x in found.items()}
        given = {name: x.float() for name, x in self.given.items() if len(x) == batch}
        missing = tuple(path for path in self.heads if path not in parts)
        maps = {name: x for name, x in found.items() if x.ndim > 1 and len(x) == batch}
        return Readout(inputs, read, outputs, self.parameters, given=given, missing=missing, maps=maps)


def _flat(x: Tensor, batch: int) -> Float[Tensor, "batch values"]:
    """One row a sample, also of no samples."""
    return x.reshape(batch, x.numel() // batch) if batch else x.flatten(1)


def _by_sample(x: Tensor, batch: int) -> Float[Tensor, "batch columns"]:
    """One row a sample: the mean over whatever lies between the batch and the columns."""
    x = x.float()
    if x.ndim > 2 and len(x) != batch and x.shape[1] == batch:
        x = x.movedim(1, 0)
    return x if x.ndim == 2 and len(x) == batch else x.reshape(batch, -1, x.shape[-1]).mean(1)
