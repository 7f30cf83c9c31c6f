"""Which operation lets free units reach owned ones: for the message of a refusal."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_cf.network.forward import Forward, fresh, samples
from lightning_cf.network.structure import OUTSIDE, Structure, lookup
from lightning_cf.network.tracing.rules.call import named
from lightning_cf.network.tracing.trace import traced_results
from lightning_cf.network.tracing.watching import following, plain_kernels
from lightning_cf.ownership.levels import FREE, Levels
from lightning_cf.utilities.randomness import isolated_generators, seed_all


@torch.no_grad()
def first_moved(
    module: nn.Module,
    structure: Structure,
    levels: Levels,
    example: Any,
    forward: Forward,
    shaken: AbstractContextManager[None],
) -> str | None:
    """The first operation whose results move at owned elements while free weights are others.

    What runs inside normalisations by owners is passed over: its operations are others than those that were traced.

    Args:
        module: in eval mode.
        structure: its structure.
        levels: of each unit in each way through the network.
        example: an input whose first axis is the batch; its first two samples are used.
        forward: how to run the network on it.
        shaken: gives free weights other values meanwhile.

    Returns:
        the operation and its module, None where the traced forward pass cannot be laid beside the one that runs.
    """
    example = samples(module, example, 2)
    traced = [step for step in traced_results(module, example, forward) if step.module not in structure.norms]
    before = _results(module, structure, example, forward)
    with shaken:
        after = _results(module, structure, example, forward)
    if [step.by for step in traced] != [by for by, _ in before]:
        return None
    for step, (_, old), (by, new) in zip(traced, before, after, strict=False):
        if by != step.by or old.shape != new.shape:
            return step.by
        if step.aside:
            continue
        way = frozenset({step.way if structure.ways > 1 else 0})
        owned = lookup(step.units, levels.of_units(way), none=FREE).expand(old.shape) >= 0
        if bool((old[owned] != new[owned]).any()):
            return step.by
    return None


def _results(module: nn.Module, structure: Structure, example: Any, forward: Forward) -> list[tuple[str, Tensor]]:
    recorder, example = _Recorder(), fresh(example)
    with plain_kernels(), isolated_generators(), following(module, recorder.running), recorder:
        seed_all(0)
        forward(module, example)
    return [(by, values) for path, by, values in recorder.found if path not in structure.norms]


class _Recorder(TorchDispatchMode):
    """Keeps what every operation gives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running = [OUTSIDE]
        self.found: list[tuple[str, str, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        path = self.running[-1]
        self.found += [(path, named(func, path), x.clone()) for x in tree_leaves(out) if isinstance(x, Tensor)]
        return out
