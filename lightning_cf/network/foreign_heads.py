"""Output layers of classes that are not torch's own: whether what they give is one column a row of their weight."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_cf.errors import ContinualError
from lightning_cf.network.forward import Forward, call
from lightning_cf.network.output_heads import column_axis, head_columns, is_known
from lightning_cf.network.structure import Structure
from lightning_cf.network.tracing.trace import traced_results


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
