"""Output heads that have more columns than the ledger knows: the user widened them, or a task brings new classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_cf.errors import ContinualError
from lightning_cf.learner.inferring import inference_of, keep_inference
from lightning_cf.learner.state import ContinualState
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.output_heads import check_growth, fit_head, grow_head, head_columns, head_of
from lightning_cf.network.structure import Structure, layer_of
from lightning_cf.ownership.fingerprints import differences
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE
from lightning_cf.ownership.owner_aware_norms import make_owner_aware


def follow_head(module: nn.Module, state: ContinualState) -> None:
    """Traces the module again if its tensors have other shapes now, and takes note of columns that the head gained.

    Raises:
        ContinualError: if a head lost columns, or its older rows are not what they were.
    """
    if not _is_of(state.structure, named_tensors(module)):
        state.retrace(module)
    ledger, heads = state.ledger, _lists(state.structure)
    known = ledger.heads or ({ledger.head: list(range(len(ledger.outputs)))} if len(heads) == 1 else {})
    same_layers = known.keys() == heads.keys()
    if same_layers and any(len(heads[layer]) < len(columns) for layer, columns in known.items()):
        layer = next(layer for layer, columns in known.items() if len(heads[layer]) < len(columns))
        raise ContinualError(
            f"The output head '{layer}' has {len(heads[layer])} columns, but the module's ledger knows"
            f" {len(known[layer])} of it. Build the module with as many as it was trained with; a head may gain"
            " columns, not lose any."
        )
    if same_layers and heads != known:
        _take_note(module, state, known, heads)
    note_heads(state)


def note_heads(state: ContinualState) -> None:
    """Keeps in the ledger which layer computes which columns, where the module has all layers that the ledger knows."""
    if state.structure.head.size == len(state.ledger.outputs):
        state.ledger.heads = _lists(state.structure)


def add_classes(module: nn.Module, state: ContinualState, labels: Sequence[int]) -> list[int]:
    """Columns for the classes of a task some of which are beyond those that the module shows: the head grows.

    Returns:
        a column for each class: its own number, as long as no classes returned.

    Raises:
        ContinualError: if the head cannot grow.
    """
    ledger = state.ledger
    taken = {column for others in ledger.reserved.values() for column in others}
    if ledger.width == len(ledger.outputs) and taken.isdisjoint(labels):
        columns = list(labels)
    else:
        free = [column for column in range(ledger.width, len(ledger.outputs)) if column not in taken]
        columns = [*free, *range(len(ledger.outputs), len(ledger.outputs) + len(labels))][: len(labels)]
    width = max(*labels, ledger.width - 1) + 1
    grow(module, state, max(columns) + 1 - len(ledger.outputs))
    ledger.width = width
    return columns


def grow(module: nn.Module, state: ContinualState, count: int) -> list[int]:
    """Adds columns to the head; gives their numbers.

    Raises:
        ContinualError: if the network cannot run with them; its head is then as it was.
    """
    if count <= 0:
        return []
    head, known = head_of(module, state.structure), state.ledger.outputs
    check_growth(head, len(known))
    grow_head(head, len(known) + count)
    added = state.ledger.add_outputs(count)
    try:
        state.retrace(module)
    except Exception as error:
        fit_head(head, len(known))
        state.ledger.outputs = known
        if isinstance(error, ContinualError):
            raise
        raise ContinualError(
            f"ContinualModule adds columns to '{state.structure.head.name}' for a further task, but"
            f" {type(module).__name__} cannot run with {len(known) + count} of them: {str(error).rstrip('.')}. Give the"
            " head as many columns as all tasks need, and each task outputs=[...] of its own; or let evaluate= of each"
            " task return a head of its own alone."
        ) from error
    note_heads(state)
    return added


def fit_heads(module: nn.Module, ledger: NeuronLedger, known: Mapping[str, Sequence[int]]) -> None:
    """Gives the heads of a module that loads a ledger, before it loads its weights, as many columns as that has.

    Args:
        module: in place.
        ledger: that it loads.
        known: by layer, the columns of its heads so far, as far as they are known.
    """
    grown = {ledger.head: range(len(ledger.outputs))} if len(ledger.outputs) > ledger.width else {}
    for layer, columns in (ledger.heads or grown).items():  # without heads: from an earlier version
        head = dict(module.named_modules()).get(layer)
        if head is not None and isinstance(getattr(head, "weight", None), Tensor):
            rows = len(head.weight)
            if rows < len(columns) or (rows > len(columns) and rows == len(known.get(layer, ()))):
                fit_head(head, len(columns))


def _is_of(structure: Structure, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a structure's index maps fit the tensors."""
    return all(
        name in tensors
        and use.target.ndim == tensors[name].ndim
        and all(n in (1, m) for n, m in zip(use.target.shape, tensors[name].shape, strict=True))
        for name, uses in structure.entries.items()
        for use in uses
    )


def _lists(structure: Structure) -> dict[str, list[int]]:
    """The columns of each layer that computes outputs with all rows of its weight, along its first axis."""
    whole = {
        layer_of(name)
        for name, uses in structure.entries.items()
        if uses[0].role == "weight" and uses[0].target.numel() == uses[0].target.shape[0]
    }
    found = {layer: columns.tolist() for layer, columns in head_columns(structure).items() if layer in whole}
    return found if sum(map(len, found.values())) == structure.head.size else {}


def _take_note(
    module: nn.Module, state: ContinualState, before: Mapping[str, list[int]], now: Mapping[str, list[int]]
) -> None:
    """Renumbers the columns that the ledger knows, and adds those that are new, free."""
    ledger, tensors = state.ledger, named_tensors(module)
    own = {name for name in tensors if layer_of(name) in now}
    other = differences(ledger, {name: tensors[name] for name in own}, bitwise=own)
    if other:
        raise ContinualError(
            f"The output head '{layer_of(other[0].tensors[0])}' was widened, but rows that task '{other[0].task}' owns"
            f" are not what they were: {', '.join(map(repr, other[0].tensors))} differ. Copy the old rows first:"
            " new.weight.data[:len(old.weight)] = old.weight.data, and the bias alike."
        )
    at = {column: now[layer][row] for layer, columns in before.items() for row, column in enumerate(columns)}
    inference = inference_of(ledger)
    if inference is not None:
        inference.renumber(at, now)
        keep_inference(ledger, inference)
    size = sum(map(len, now.values()))
    outputs = torch.full((size,), FREE)
    for old, new in at.items():
        outputs[new] = ledger.outputs[old]
    if ledger.width == len(ledger.outputs):
        ledger.width = size  # none were added by us, so all columns are the user's
    ledger.outputs = outputs
    _renumber(ledger, at)
    ledger.norms = dict(state.structure.norms)
    ledger.revision += 1
    make_owner_aware(module, ledger.norm_owners())


def _renumber(ledger: NeuronLedger, at: Mapping[int, int]) -> None:
    def moved(columns: Sequence[int]) -> list[int]:
        return [at.get(column, column) for column in columns]

    ledger.reserved = {name: moved(columns) for name, columns in ledger.reserved.items()}
    ledger.positions = {name: moved(columns) for name, columns in ledger.positions.items()}
    for task in ledger.tasks:
        task.outputs = moved(task.outputs)
