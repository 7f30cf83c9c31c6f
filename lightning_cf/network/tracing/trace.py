"""Finds the structure of a network by running it once with a label of its unit beside every activation.

Movement operations (views, flatten, concatenation) run on the labels themselves, so index maps are exact by
construction; elementwise operations unite labels; contractions (linear, convolution) create new units and give each
weight entry its pair of target and source unit. The operations are listed in ``operations.py``.
"""

from __future__ import annotations

from collections.abc import Set
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from lightning_cf.network.forward import Forward, call, eval_mode, fresh, plain_forms, same_state, samples
from lightning_cf.network.structure import LAYERS, Structure
from lightning_cf.network.tracing.functions import FunctionRules
from lightning_cf.network.tracing.reaching import Reaching
from lightning_cf.network.tracing.tracer import LabelTracer, Shape
from lightning_cf.network.tracing.watching import following, plain_kernels
from lightning_cf.network.ways import ways_of
from lightning_cf.utilities.randomness import isolated_generators


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
class TracedResult:
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


def traced_results(module: nn.Module, example: Any, forward: Forward = call) -> list[TracedResult]:
    """Every result of a forward pass with its units, as :func:`trace` sees it; takes memory for all activations."""
    return _follow(module, example, forward, apart=False, log=True)[1]


def _follow(
    module: nn.Module, example: Any, forward: Forward, apart: bool, *, log: bool = False, turned: int | None = None
) -> tuple[Structure, list[TracedResult]]:
    """Traces; several times where norms over slices of different units leave it open what the units are.

    A norm over each slice may take the slices for units, such as attention heads, or the places within them, such as
    the channels of tokens, of which one is a parameter. What comes behind decides: for norms of each shape, what leaves
    more units is kept.
    """
    structure, results, open_shapes = _follow_once(module, example, forward, apart, log, set(), turned)
    sliced: set[Shape] = set()
    for shape in sorted(open_shapes):
        other, other_results, _ = _follow_once(module, example, forward, apart, log, sliced | {shape}, turned)
        if other.n_units > structure.n_units:
            structure, results, sliced = other, other_results, sliced | {shape}
    return structure, results


def _follow_once(
    module: nn.Module,
    example: Any,
    forward: Forward,
    apart: bool,
    log: bool,
    sliced: Set[Shape],
    turned: int | None,
) -> tuple[Structure, list[TracedResult], Set[Shape]]:
    inputs = samples(module, example, 2)
    example, again = fresh(inputs), fresh(inputs)
    with ExitStack() as stack:
        stack.enter_context(plain_forms(module))
        stack.enter_context(eval_mode(module))
        stack.enter_context(torch.no_grad())
        stack.enter_context(plain_kernels())
        if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
            forward(module, fresh(inputs))
        stack.enter_context(same_state(module))
        recorder = Reaching()
        with isolated_generators(), same_state(module), recorder.functions, recorder:
            reached = forward(module, again)
        reaching = recorder.operations([x for x in tree_leaves(reached) if isinstance(x, Tensor)])
        tracer = LabelTracer(module, tree_leaves(example), apart, log, sliced, reaching)
        for path, layer in module.named_modules():
            if isinstance(layer, LAYERS):
                stack.callback(layer.register_forward_hook(partial(tracer.idle.left, path), prepend=True).remove)
        with following(module, tracer.running, tracer.enter, tracer.leave), FunctionRules(tracer, turned), tracer:
            outputs = forward(module, example)
        tracer.found.note_replaced(module)
    returned = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    structure, numbers = tracer.structure(returned, ways_of(forward, outputs))
    results = [
        TracedResult(path, by, numbers[tracer.units.resolve(labels)], way, aside)
        for path, by, labels, way, aside in tracer.log
    ]
    return structure, results, tracer.slices
