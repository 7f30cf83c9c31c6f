"""Whether a forward pass overflows though the weights are finite: zero times infinity is no number.

One step at a rate that is far too high leaves such weights. What free units give is then infinite, and the zeros that
cut them from what earlier tasks own cut nothing any more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_cf.network.finite import stored
from lightning_cf.network.forward import Forward, eval_mode, fresh, same_state, samples
from lightning_cf.network.kept_entries import Snapshot
from lightning_cf.utilities.hooks import takes_hooks
from lightning_cf.utilities.randomness import isolated_generators

WIDE = 1e30
"""Numbers of a type that goes further than this are too large near its end: other inputs give larger ones."""

_OUTPUTS = "(outputs)"


@torch.no_grad()
def overflow(module: nn.Module, example: Any, forward: Forward, before: Snapshot) -> str:
    """In words, the first layer whose outputs overflow for an example, where they did not before; empty if none does.

    What overflows with the earlier weights too, such as masks that hold the lowest number, does so on purpose.

    Args:
        module: the network; its numbers are the same afterwards.
        example: an input whose first axis is the batch; its first samples are used.
        forward: how to run the network on the example.
        before: the earlier numbers.
    """
    with eval_mode(module), same_state(module), isolated_generators():
        example = samples(module, example, 16)
        found = _overflowing(module, example, forward)
        if not found:
            return ""
        now = Snapshot.of(module)
        before.put_back(module)
        try:
            known = _overflowing(module, example, forward)
        finally:
            now.put_back(module)
    path = next((path for path, kind in found if (path, kind) not in known), "")
    return "what the network returns" if path == _OUTPUTS else path and f"layer '{path}'"


def _overflowing(module: nn.Module, example: Any, forward: Forward) -> dict[tuple[str, str], None]:
    """Layers whose outputs are too large or no numbers, and which of both, in the order of the forward pass."""
    found: dict[tuple[str, str], None] = {}

    def note(path: str, output: Any) -> None:
        for x in [stored(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]:
            if (x.is_floating_point() or x.is_complex()) and x.numel():
                largest, end = float(x.abs().max()), torch.finfo(x.dtype).max
                if largest != largest or largest > end:
                    found[path, "no number"] = None
                elif end > WIDE and largest > end ** (5 / 6):
                    found[path, "large"] = None

    handles = [
        layer.register_forward_hook(lambda layer, args, output, path=path: note(path, output), prepend=True)
        for path, layer in module.named_modules()
        if path and takes_hooks(layer)
    ]
    try:
        note(_OUTPUTS, forward(module, fresh(example)))
    finally:
        for handle in handles:
            handle.remove()
    return found
