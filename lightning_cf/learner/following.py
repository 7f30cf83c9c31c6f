"""What a network computes with beside its weights may come later than its first trace: it is traced again then."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lightning_cf.errors import ContinualError
from lightning_cf.learner.state import ContinualState
from lightning_cf.network.structure import buffer_shapes


def follow_buffers(module: nn.Module, state: ContinualState) -> None:
    """Takes up buffers that are new, of another shape, or no longer one: from here on they are held as others are.

    Where the network is another one with them, what is known of it stays.
    """
    shapes, known = buffer_shapes(module), state.structure
    if shapes == known.buffers:
        return
    try:
        state.retrace(module)
        state.ledger.owner_of_units(state.structure)
    except (ContinualError, RuntimeError, TypeError):  # the last two are what a forward pass raises
        state.structure = replace(known, buffers=shapes)
