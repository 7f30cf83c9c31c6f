"""Whether numbers that a forward pass reads into Python decide anything: it runs with others in their place."""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_cf.network.forward import Forward, eval_mode, fresh, same_state
from lightning_cf.utilities.randomness import isolated_generators, seed_all

_READS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.is_nonzero, torch.is_nonzero),
    *(Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__),
}

OPERATIONS = {"aten._local_scalar_dense", "Tensor.tolist", "Tensor.numpy", "Tensor.__array__"}
"""What a trace calls these; other ways to read values, such as the length of what ``nonzero`` finds, are not tried."""

_OTHERS = (1e6, -1e6, math.nan, -1.0, *map(float, range(17)))
"""What is read instead, beside the opposite: also numbers of kinds, from 0 on. A trial, no proof: others may decide."""


@torch.no_grad()
def decides_nothing(module: nn.Module, example: Any, forward: Forward) -> bool:
    """Whether outputs stay the same, bit for bit, where other numbers are read into Python, such as to be logged.

    Args:
        module: the network; its weights, buffers and generators are left as they are.
        example: an input whose first axis is the batch.
        forward: how to run the network on it.
    """
    with isolated_generators(), eval_mode(module), same_state(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            plain = _outputs(_run(forward, module, example, nullcontext()))
            others = map(_Otherwise, (None, *_OTHERS))
            return all(_same(plain, _outputs(_run(forward, module, example, other))) for other in others)
        except Exception:  # whatever a forward pass raises for such numbers: then they decide
            return False


def _run(forward: Forward, module: nn.Module, example: Any, reading: AbstractContextManager[Any]) -> Any:
    example = fresh(example)
    seed_all(0)
    with reading:
        return forward(module, example)


class _Otherwise(TorchFunctionMode):
    """Gives other numbers wherever a tensor's are read."""

    def __init__(self, other: float | None) -> None:
        super().__init__()
        self.other = other

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        return self._instead(out) if func in _READS else out

    def _instead(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._instead(each) for each in value]
        plain = np.asarray(value)
        if self.other is None:
            other = ~plain if plain.dtype == bool else -plain - 1
        else:
            whole = np.issubdtype(plain.dtype, np.integer) and math.isnan(self.other)
            other = np.full_like(plain, 1 if whole else self.other)
        return other if isinstance(value, np.ndarray) else other.item()


def _outputs(found: Any) -> list[Tensor]:
    return [x.clone() for x in tree_leaves(found) if isinstance(x, Tensor)]


def _same(found: list[Tensor], others: list[Tensor]) -> bool:
    return len(found) == len(others) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, others, strict=True)
    )
