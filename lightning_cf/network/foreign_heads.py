"""Whether what output layers give is one column a row of their weight, of whatever class they are, and runs at all."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from lightning_cf.errors import ContinualError
from lightning_cf.network.forward import Forward, call, eval_mode, fresh, same_state, samples
from lightning_cf.network.output_heads import column_axis, head_columns, is_known
from lightning_cf.network.structure import Structure
from lightning_cf.network.tracing.trace import traced_results
from lightning_cf.utilities.randomness import isolated_generators


def check_foreign_heads(module: nn.Module, structure: Structure, example: Any, forward: Forward = call) -> None:
    """Looks at what output layers of other classes than torch's own compute; does nothing where there are none.

    Args:
        module: the network.
        structure: of it.
        example: an input to run it with.
        forward: how to run it.

    Raises:
        ContinualError: for a layer of whose output not every column is that of a row of its weight, in their order.
    """
    layers = dict(module.named_modules())
    foreign = {p: c for p, c in head_columns(structure).items() if p in layers and not is_known(layers[p])}
    if not foreign:
        return
    results = traced_results(module, example, forward)
    for path, columns in foreign.items():
        inside = [each.units for each in results if each.module == path or each.module.startswith(f"{path}.")]
        units = inside[-1] if inside else columns.new_empty(0)
        own = columns + structure.head.first
        axis = column_axis(layers[path], units)
        fits = units.ndim > max(axis, 1) and units.shape[axis] == len(own)
        if not fits or not bool((units.movedim(axis, -1) == own).all()):
            raise ContinualError(
                f"The output head '{path}' is a {type(layers[path]).__name__}, which gives something else than one"
                " column for each row of its weight, so the outputs of one task cannot be shown alone. Let it end in a"
                " Linear or a convolution, or do without: MaskedGradientCallback(mask_outputs=False), in a loop of your"
                " own no show(...)."
            )


@torch.no_grad()
def idle_heads(module: nn.Module, structure: Structure, example: Any, forward: Forward = call) -> list[str]:
    """Output layers that do not run themselves: something else reads their weight, so nothing can be shown of them.

    Args:
        module: the network.
        structure: of it.
        example: an input to run it with.
        forward: how to run it.
    """
    layers = {path: layer for path, layer in module.named_modules() if path in structure.head.layers}
    ran: set[str] = set()
    with ExitStack() as hooks, isolated_generators(), eval_mode(module), same_state(module):
        for path, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(lambda *_, path=path: ran.add(path)))
        forward(module, fresh(samples(module, example, 2)))
    return [path for path in layers if path not in ran]


def of_idle(head: str) -> str:
    """Why nothing can be shown of an output layer that does not run itself, and what to do; for messages."""
    return (
        f"the output layer '{head}' does not run itself, since something else reads its weight. Let the forward pass"
        f" call it, as self.{head}(x), or a layer of your own that holds the weight."
    )


def check_unmoved(head: str, views: Sequence[Sequence[tuple[int, int]]]) -> str:
    """What it means for views of outputs that their layer does not run itself; for a warning.

    Args:
        head: the layer's path.
        views: pairs (class, column).

    Raises:
        ContinualError: for a class that is to be seen where another column stands.
    """
    if any(at != column for view in views for at, column in view):
        raise ContinualError(f"No column can be shown as another class: {of_idle(head)}")
    return f"Outputs of other tasks are not masked: {of_idle(head)}"
