"""The leak probe: randomise everything that may still move and see whether a claimed output moves with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from lightning_cf.errors import LeakError
from lightning_cf.ledger import FREE, NeuronLedger
from lightning_cf.randomness import keyed_generator
from lightning_cf.structure import Forward, Structure, call, eval_mode, lookup, named_tensors, samples


def probe(module: nn.Module, structure: Structure, ledger: NeuronLedger, example: Any, forward: Forward = call) -> None:
    """Checks that every owned unit and output stays bitwise equal while all free entries take random values.

    The module's own weights are not touched.

    Args:
        module: the network.
        structure: its structure, as traced.
        ledger: whose claims to check.
        example: an input whose first axis is the batch; its first samples are used.
        forward: how to run the network on the example.

    Raises:
        LeakError: names the first layer whose owned outputs moved.
    """
    owner = ledger.owner_of_units(structure)
    tensors = {name: tensor.detach() for name, tensor in named_tensors(module).items()}
    run = _Run(module, forward, samples(module, example, 8))
    before = _owned_outputs(run, structure, owner, tensors)
    for draw in range(2):
        after = _owned_outputs(run, structure, owner, _randomised(structure, owner, tensors, draw))
        for layer, values in before.items():
            if torch.equal(values, after[layer]):
                continue
            raise LeakError(
                f"Exact isolation does not hold in layer '{layer}': its owned outputs change when only free weights"
                " change. Use isolation='perturb', or report the layer's kind."
            )


_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def _randomised(structure: Structure, owner: Tensor, tensors: Mapping[str, Tensor], draw: int) -> dict[str, Tensor]:
    """The tensors with random numbers in every entry that belongs to a free unit at all of its uses."""
    generator = keyed_generator("probe", draw)
    result = dict(tensors)
    for name, uses in structure.entries.items():
        tensor = tensors[name]
        free = torch.stack([(lookup(use.target, owner, none=0) == FREE).expand(tensor.shape) for use in uses]).all(
            dim=0
        )
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            if uses[0].role == "statistic":
                noise = noise.abs() + 0.5  # a variance
            result[name] = torch.where(free.to(tensor.device), noise.to(tensor), tensor)
    return result


class _Run(nn.Module):
    """One forward pass as a module, so that ``functional_call`` can put other weights in."""

    def __init__(self, module: nn.Module, forward: Forward, example: Any) -> None:
        super().__init__()
        self.module, self.run, self.example = module, forward, example

    def forward(self) -> Any:
        return self.run(self.module, self.example)


@torch.no_grad()
def _owned_outputs(run: _Run, structure: Structure, owner: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of the owned units, layer by layer in the order of the forward pass, and last the network's own."""
    found: dict[str, Tensor] = {}
    handles = []
    for group in (*structure.groups, structure.head):
        owned = owner[group.units] >= 0
        for rows in group.rows:
            path = rows.tensor.rpartition(".")[0]
            layer = run.module.get_submodule(path)
            by_channel = isinstance(layer, _LAYERS) and rows.axis == int(getattr(layer, "transposed", False))
            if rows.role == "weight" and rows.index.shape[1] == 1 and by_channel and bool(owned.any()):
                channels = rows.index[owned].flatten()

                def hook(
                    layer: nn.Module, args: Any, output: Any, path: str = path, channels: Tensor = channels
                ) -> None:
                    values = tree_leaves(output)[0]
                    axis = values.ndim - 1 if isinstance(layer, nn.Linear) else min(1, values.ndim - 1)
                    found[path] = values.index_select(axis, channels.to(values.device)).clone()

                handles.append(layer.register_forward_hook(hook, prepend=True))
    try:
        with eval_mode(run):
            outputs = functional_call(run, {f"module.{name}": tensor for name, tensor in tensors.items()}, ())
    finally:
        for handle in handles:
            handle.remove()
    returned = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    for values, units in zip(returned, structure.output_units, strict=True):
        if values.shape[1:] == units.shape[1:]:  # else the outputs are shown through a task's view
            owned = (lookup(units, owner, none=FREE) >= 0).expand(values.shape)
            found.setdefault("(outputs)", values.new_empty(0))
            found["(outputs)"] = torch.cat([found["(outputs)"], values[owned.to(values.device)]])
    return found
