"""The ways through a network: how each task runs it, one after another within one trace or one probe."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_cf.network.forward import Forward

_RUNNING: ContextVar[int] = ContextVar("way", default=0)


def running_way() -> int:
    """The number of the way that runs now; 0 where there is only one."""
    return _RUNNING.get()


class Ways:
    """Runs a network in several ways, each on an example of its own; to be given as the ``forward`` of a trace.

    Args:
        forwards: how to run the network in each way.
    """

    def __init__(self, forwards: Sequence[Forward]) -> None:
        self.forwards = tuple(forwards)

    def __call__(self, module: nn.Module, examples: Sequence[Any]) -> tuple[Any, ...]:
        """Runs the network in each way on the example of that way; a tuple of what each returns."""
        found = []
        for number, (forward, example) in enumerate(zip(self.forwards, examples, strict=True)):
            token = _RUNNING.set(number)
            try:
                found.append(forward(module, example))
            finally:
                _RUNNING.reset(token)
        return tuple(found)


def ways_of(forward: Forward, outputs: Any) -> list[int]:
    """The number of the way that returned each tensor."""
    several = outputs if isinstance(forward, Ways) else (outputs,)
    return [number for number, out in enumerate(several) for x in tree_leaves(out) if isinstance(x, Tensor)]
