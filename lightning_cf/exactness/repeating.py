"""Whether a network gives the same outputs for the same input again: else nothing that a task computes can stay."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_cf.network.finite import stored
from lightning_cf.network.forward import Forward, eval_mode, fresh, same_state, samples
from lightning_cf.network.kept_entries import same_bits
from lightning_cf.network.tracing.watching import following
from lightning_cf.utilities.randomness import isolated_generators, seed_all

Given = tuple[str, list[Tensor]]
"""Tensors, and the path of the module that gives them."""


@torch.no_grad()
def first_unlike(module: nn.Module, example: Any, forward: Forward) -> str | None:
    """The first module that gives something else for the same samples once others came in between, in eval mode.

    Weights are the same, and so is what the global generators draw. Buffers are put back.

    Args:
        module: the network.
        example: an input whose first axis is the batch; its first samples are used.
        forward: how to run the network on it.

    Returns:
        its path, "forward" where it is no module; None where the network's outputs stay the same, bit for bit.
    """
    count = next((len(x) for x in tree_leaves(example) if isinstance(x, Tensor) and x.ndim), 1)
    size = max(1, min(8, count // 2))
    first, others = (samples(module, example, size, start) for start in (0, size if count > 1 else 0))

    def again(run: Callable[[Any], list[Given]]) -> tuple[list[Given], list[Given]]:
        with eval_mode(module), same_state(module), isolated_generators():
            before = run(first)
            with suppress(Exception):  # whatever a forward pass raises for other samples
                run(others)
            return before, run(first)

    outputs = partial(_given, module, forward, deep=False)
    if all(starmap(_same, zip(*again(outputs), strict=True))):
        return None
    pairs = zip(*again(partial(_given, module, forward, deep=True)), strict=False)
    return next((old[0] for old, new in pairs if not _same(old, new)), "") or "forward"


def _given(module: nn.Module, forward: Forward, example: Any, *, deep: bool) -> list[Given]:
    """What the network gives, and before it, where that is wanted, what each module is given and gives in its turn."""
    found: list[Given] = []
    running = [""]

    def note(by: int, values: Any) -> None:
        leaves = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
        found.append((running[by], [stored(x).clone() for x in leaves]))

    example = fresh(example)
    seed_all(0)
    with ExitStack() as stack:
        if deep:
            stack.enter_context(following(module, running, entered=partial(note, -2), left=partial(note, -1)))
        outputs = forward(module, example)
    note(-1, outputs)
    return found


def _same(old: Given, new: Given) -> bool:
    return len(old[1]) == len(new[1]) and all(map(same_bits, old[1], new[1]))
