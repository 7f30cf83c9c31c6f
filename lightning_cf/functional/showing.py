"""A task sees its own outputs only, in any loop."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_cf.errors import ContinualError
from lightning_cf.functional.belonging import check_parts
from lightning_cf.network.output_heads import head_of, heads_of
from lightning_cf.network.structure import Structure
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.output_view import OutputView
from lightning_cf.ownership.owner_aware_norms import make_owner_aware


def show(
    module: nn.Module,
    structure: Structure,
    ledger: NeuronLedger,
    task: str | None = None,
    *,
    classes: Sequence[int] | None = None,
) -> OutputView:
    """A context in which the network shows one task's outputs; the others hold the lowest number.

    So an unchanged loss and metric over all classes are the task's own.

    Args:
        module: the network.
        structure: as :func:`~lightning_cf.functional.trace` found it.
        ledger: knows the task's outputs.
        task: its name; default the task that is being learned.
        classes: the position at which each of its outputs is shown, such as labels in its data; default the output's
            own.

    Raises:
        ContinualError: if there is no such task, or the output layer cannot show single columns.
    """
    check_parts("show", module, structure, ledger)
    make_owner_aware(module, ledger.norm_owners())
    if task is None:
        if ledger.current is None:
            raise ContinualError("show: no task is being learned; name one that was: show(..., task=...).")
        task = ledger.current.name
    outputs = ledger.outputs_of(task)
    positions = outputs if classes is None else [int(c) for c in classes]
    if len(positions) != len(outputs) or any(not 0 <= c < ledger.width for c in positions):
        raise ContinualError(
            f"show: task '{task}' has {len(outputs)} outputs, which classes={positions} cannot place among"
            f" {ledger.width} positions; give one class for each, from 0 to {ledger.width - 1}."
        )
    return view_of(module, structure, ledger, [list(zip(positions, outputs, strict=True))])


def view_of(
    module: nn.Module, structure: Structure, ledger: NeuronLedger, views: Sequence[Sequence[tuple[int, int]]]
) -> OutputView:
    """A view on the network's output layer, or layers, with pairs (position, column) of one task or of several."""
    head = heads_of(module, structure) if len(structure.head.layers) > 1 else head_of(module, structure)
    return OutputView(head, width=ledger.width, views=views)
