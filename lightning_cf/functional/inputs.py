"""What a user hands to a claim: batches of any kind, and a score."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_cf.errors import ContinualError
from lightning_cf.network.forward import Example, Forward, call, eval_mode, in_precision_of, same_state

FOLD_SAMPLES = 4096
"""From how many inputs of the task the regression learns what to fold."""


class Inputs:
    """The inputs of some batches, on the network's device and in its precision, as often as they are asked for.

    Args:
        module: the network.
        batches: inputs, or (input, target) pairs.
        example: what the network was traced with, where that is known: it tells two inputs from such a pair.
        forward: how the network is run on an input.
    """

    def __init__(
        self, module: nn.Module, batches: Iterable[Any], example: Example | None = None, forward: Forward = call
    ) -> None:
        self.module, self.batches = module, batches
        self.example = example if example is not None and example.called == (forward is call) else None
        if not isinstance(batches, Iterable) or isinstance(batches, (Tensor, str, bytes)):
            raise ContinualError(
                f"claim: batches must be an iterable of batches, such as [x] or a DataLoader, got a"
                f" {type(batches).__name__}."
            )
        if isinstance(batches, tuple) and len(batches) == 2 and all(isinstance(x, Tensor) for x in batches):
            raise ContinualError("claim: batches is one pair of tensors; a list of pairs is meant: batches=[(x, y)].")
        if iter(batches) is batches:  # it can be read once only
            self.batches = list(self._enough(batches))
        self.first = next(iter(self), None)
        if self.first is None:
            raise ContinualError("claim: batches gives no samples; give the task's training data.")

    def __iter__(self) -> Iterator[Any]:
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        for batch in self._enough(self.batches):
            x = _input_of(batch, self.example)
            yield tree_map_only(Tensor, lambda t: t.to(device), in_precision_of(self.module, x))

    @staticmethod
    def _enough(batches: Iterable[Any]) -> Iterator[Any]:
        seen = 0
        for batch in batches:
            count = next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim), 1)
            if count:
                yield batch
            seen += count
            if seen >= FOLD_SAMPLES:
                return


def _input_of(batch: Any, example: Example | None) -> Any:
    """The input of a batch, which may have a target behind it.

    Raises:
        ContinualError: for a batch of another kind than what the network was traced with.
    """
    several = isinstance(batch, (tuple, list))
    if example is None or example.inputs == "any":
        alike = example is not None and isinstance(batch, list) and not any(isinstance(x, (tuple, list)) for x in batch)
        return batch[0] if several and len(batch) == 2 and not alike else batch
    for candidate in (batch, batch[0] if several and len(batch) in (1, 2) else None):
        found = None if candidate is None else example.like(candidate)
        if found is not None:
            return found
    given = f"{type(batch).__name__} of {len(batch)}" if several else type(batch).__name__
    names = [f"x{number}" for number in range(1, example.count + 1)]
    x, inputs = ("x", "1 input") if example.count == 1 else (f"({', '.join(names)})", f"{example.count} inputs")
    raise ContinualError(
        f"claim: the network was traced with {inputs}, and a batch is a {given}. Give inputs as trace(net,"
        f" example) got them, batches=[{x}, ...], or with their targets, batches=[({x}, y), ...]; or trace with"
        " an example like the batches, and say forward= there and here."
    )


def number_of(module: nn.Module, score: Callable[[], float]) -> float:
    """What a user's score says, which may put the network into another mode; its buffers stay what they are."""
    with eval_mode(module), same_state(module), torch.no_grad():
        found: Any = score()
    value = found.item() if isinstance(found, Tensor) and found.numel() == 1 else found
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ContinualError(f"claim: score must give one number, such as an accuracy; got {found!r}.")
    return float(value)
