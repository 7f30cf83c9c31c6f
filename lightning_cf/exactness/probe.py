"""The leak probe: randomise everything that may still move and see whether a claimed output moves with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_cf.errors import LeakError
from lightning_cf.exactness.blame import first_moved
from lightning_cf.network.forward import Forward, call, eval_mode, fresh, named_tensors, same_state, samples
from lightning_cf.network.kept_entries import replaced, same_bits
from lightning_cf.network.structure import LAYERS, Structure, layer_of, lookup
from lightning_cf.network.ways import running_way
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE, Levels
from lightning_cf.utilities.randomness import isolated_generators, keyed_generator, seed_all

FEW = 8
"""So many samples of an example are run."""

OUTPUTS = "(outputs)"
"""Stands for a layer where the network's own outputs are meant."""

SHAKEN = 2**24
"""How many entries of one tensor are randomised at once, whole rows of it; bounds the memory that a probe takes."""


def probe(module: nn.Module, structure: Structure, ledger: NeuronLedger, example: Any, forward: Forward = call) -> None:
    """Checks that every owned unit and output stays bitwise equal while free entries take random values.

    The module's weights are put back, bitwise.

    Args:
        module: the network.
        structure: its structure, as traced.
        ledger: whose claims to check.
        example: an input whose first axis is the batch; its first samples are used.
        forward: how to run the network on the example.

    Raises:
        LeakError: names the first layer whose owned outputs moved.
    """
    leak = first_leak(module, structure, ledger, example, forward)
    if leak is not None:
        raise LeakError(
            f"Exact isolation does not hold in layer '{leak.layer}': its owned outputs change when only free weights"
            f" change{leak.where}. Use isolation='perturb', or leave the layer to the first task:"
            f" exclude=['{leak.layer}']."
        )


@dataclass(frozen=True)
class Leak:
    """A place where what is owned moves with what is free.

    Attributes:
        layer: path of the first layer whose owned outputs move; "(outputs)" for the network's own.
        by: the first operation whose owned results move, and its module; None where that cannot be said.
    """

    layer: str
    by: str | None

    @property
    def where(self) -> str:
        """Where it is first seen, as messages go on; empty where that cannot be said."""
        return "" if self.by is None else f", first in the results of {self.by}"


@torch.no_grad()
def first_leak(
    module: nn.Module, structure: Structure, ledger: NeuronLedger, example: Any, forward: Forward = call
) -> Leak | None:
    """The first layer whose owned outputs move when free entries do, None where there is none (see ``probe``)."""
    levels = ledger.levels(structure)
    example = samples(module, example, FEW)
    run = partial(_run, module, example, forward)
    with eval_mode(module), same_state(module):
        before = _owned_outputs(module, structure, levels, run)
        for draw in range(2):
            for size in (1.0, 0.1, 0.01):
                with _shaken(module, structure, levels, draw, size):
                    after = _owned_outputs(module, structure, levels, run)
                if all(bool(values.isfinite().all()) for values in after.values()):
                    break  # else activations overflowed, and zero times infinity is a number no more
            for place, values in before.items():
                if not same_bits(values, after[place]):
                    shaken = _shaken(module, structure, levels, draw, size)
                    return Leak(place[0], first_moved(module, structure, levels, example, forward, shaken))
    return None


@torch.no_grad()
def owned_outputs(
    module: nn.Module, structure: Structure, levels: Levels, example: Any, forward: Forward = call
) -> dict[tuple[str, str, int], Tensor]:
    """What owned units of each layer give for an example, and what the network returns of owned outputs.

    Args:
        module: the network.
        structure: its structure, as traced.
        levels: say which units are owned, in each way through the network.
        example: an input whose first axis is the batch; its first samples are used.
        forward: how to run the network on the example.

    Returns:
        values by layer, group of units and way; in the order of the forward pass, the network's own last.
    """
    run = partial(_run, module, samples(module, example, FEW), forward)
    with eval_mode(module), same_state(module):
        return _owned_outputs(module, structure, levels, run)


def _run(module: nn.Module, example: Any, forward: Forward) -> Any:
    with isolated_generators():
        seed_all(0)  # for networks that draw random numbers in eval mode too
        return forward(module, fresh(example))


@contextmanager
def _shaken(module: nn.Module, structure: Structure, levels: Levels, draw: int, size: float) -> Iterator[None]:
    """Random numbers, as large as the tensor's own, in what belongs to free units at all uses, meanwhile."""
    generator = keyed_generator("probe", draw)
    tensors = named_tensors(module)
    with ExitStack() as stack:
        for name, uses in structure.entries.items():
            tensor = tensors.get(name)  # a buffer may have gone since the trace
            if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            mask = torch.ones((), dtype=torch.bool)
            for use in uses:
                mask = mask & (levels.owners(use, none=0) == FREE)
            if tensor.numel() > SHAKEN:
                rows = torch.rand(len(tensor), generator=generator) < SHAKEN / tensor.numel()
                mask = mask & rows.reshape(-1, *[1] * (tensor.ndim - 1))
            positive = any(use.role in ("scale", "statistic") for use in uses)  # of which some are variances
            real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach().float()
            spread = size * max(float(real.std(correction=0)), 0.01)

            def noise(shape: torch.Size, positive: bool = positive, spread: float = spread) -> Tensor:
                drawn = torch.randn(shape, generator=generator)
                return drawn.abs() + 0.5 if positive else drawn * spread

            stack.enter_context(replaced(tensor, mask, noise))
        yield


def _owned_outputs(
    module: nn.Module, structure: Structure, levels: Levels, run: Callable[[], Any]
) -> dict[tuple[str, str, int], Tensor]:
    """Outputs of the owned units, layer by layer in the order of the forward pass, and last the network's own.

    In each way through the network those that its tasks' levels hold.
    """
    found: dict[tuple[str, str, int], Tensor] = {}
    layers = dict(module.named_modules())
    held = [levels.of_units(frozenset({way})) >= 0 for way in range(structure.ways)]
    handles = []
    calls: Counter[tuple[str, str, int]] = Counter()
    for group in (*structure.groups, structure.head):
        owned = [units[group.units] for units in held]
        for rows in group.rows:
            path = layer_of(rows.tensor)
            layer = layers.get(path)
            if rows.role == "weight" and isinstance(layer, LAYERS) and any(bool(units.any()) for units in owned):
                if rows.axis != int(getattr(layer, "transposed", False)):
                    continue  # units lie among the layer's inputs, or in groups
                channels = [rows.index[units].flatten() for units in owned]

                def hook(
                    layer: nn.Module,
                    args: Any,
                    output: Any,
                    key: tuple[str, str] = (path, group.name),
                    channels: list[Tensor] = channels,
                ) -> None:
                    way = running_way()
                    calls[*key, way] += 1
                    if (key[0], way, calls[*key, way] - 1) in structure.idle:
                        return
                    values, own = tree_leaves(output)[0], channels[way if structure.ways > 1 else 0]
                    axis = values.ndim - 1 if isinstance(layer, nn.Linear) else min(1, values.ndim - 1)
                    found[*key, way] = values.index_select(axis, own.to(values.device)).clone()

                handles.append(layer.register_forward_hook(hook, prepend=True))
    try:
        outputs = run()
    finally:
        for handle in handles:
            handle.remove()
    return found | _owned_returned(structure, held, outputs)


def _owned_returned(structure: Structure, held: list[Tensor], outputs: Any) -> dict[tuple[str, str, int], Tensor]:
    """What a forward pass returns of owned outputs, in each way of those that are held there."""
    found = {}
    returned = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    ways = structure.output_ways or (0,) * len(returned)
    for number, (values, units, way) in enumerate(zip(returned, structure.output_units, ways, strict=True)):
        if values.shape[1:] == units.shape[1:]:  # else the outputs are shown through a task's view
            owned_values = lookup(units, held[way], none=False).expand(values.shape)
            found[OUTPUTS, str(number), way] = values[owned_values.to(values.device)]
    return found
