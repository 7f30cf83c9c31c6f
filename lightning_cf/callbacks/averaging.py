"""Averages of weights that other callbacks keep, brought in line with what a partition or a seal does to the weights.

Lightning's ``WeightAveraging``, ``EMAWeightAveraging`` and ``StochasticWeightAveraging`` put an average over training
steps in the network's place at the end of a fit. An average over steps before and after a partition would bring back
weights that the partition cut; so the average becomes the network before a partition or a seal, and starts anew from
what that leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_cf.errors import ContinualError
from lightning_cf.lightning_api import LightningModule, StochasticWeightAveraging, Trainer, WeightAveraging
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.kept_entries import KeptEntries


def check_averaging(trainer: Trainer, module: LightningModule) -> None:
    """Raises ContinualError for an average that cannot leave owned units alone."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging) and any(isinstance(m, _BatchNorm) for m in module.modules()):
            raise ContinualError(
                "StochasticWeightAveraging computes all BatchNorm statistics anew in an epoch of its own, those of"
                " owned channels too. Use EMAWeightAveraging or WeightAveraging, which average the statistics."
            )


@contextmanager
def exact_averages(
    trainer: Trainer, frozen: Mapping[str, Bool[Tensor, "..."]], valid: Callable[[], bool]
) -> Iterator[None]:
    """Keeps frozen entries in averages what they are, meanwhile.

    A weighted mean of a number with itself differs from it in the last bit now and then.

    Args:
        trainer: whose callbacks average.
        frozen: these entries, for each tensor by name.
        valid: whether these entries are still frozen: a partition changes that.
    """
    averages = [
        callback._average_model
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None
    ]
    for average in averages:
        tensors = named_tensors(average.module)
        held = [
            KeptEntries(tensors[name], mask)
            for name, mask in frozen.items()
            if bool(mask.any()) and tensors[name].is_floating_point()
        ]
        for entries in held:
            entries.save()
        average.__dict__["update_parameters"] = _Restoring(average, held, valid)
    try:
        yield
    finally:
        for average in averages:
            del average.__dict__["update_parameters"]


class _Restoring:
    """What updates an average meanwhile; a copy of the average, or one that was stored, has its class's own."""

    def __init__(self, average: nn.Module, held: Sequence[KeptEntries], valid: Callable[[], bool]) -> None:
        self.average, self.update, self.held, self.valid = average, average.update_parameters, held, valid

    def __call__(self, module: nn.Module) -> None:
        """Takes the module in, and puts frozen entries back."""
        assert callable(self.update)
        self.update(module)
        if self.valid():
            for entries in self.held:
                entries.restore()

    def __reduce__(self) -> Any:
        return getattr, (self.average, "update_parameters")


@torch.no_grad()
def take_averages(trainer: Trainer, module: LightningModule) -> None:
    """Puts the average in the network's place, where one was begun."""
    for average in _averages(trainer):
        if average.count is not None and int(average.count):
            for mine, theirs in average.pairs(module):
                mine.detach().copy_(theirs.detach())


@torch.no_grad()
def restart_averages(trainer: Trainer, module: LightningModule) -> None:
    """Starts averages anew from the network as it is."""
    for average in _averages(trainer):
        for mine, theirs in average.pairs(module):
            theirs.detach().copy_(mine.detach())
        if average.count is not None:
            average.count.zero_()


@dataclass(frozen=True)
class _Average:
    """What a callback keeps.

    Attributes:
        network: the average.
        count: how many networks are in it; None before the first.
        buffers: whether it holds buffers too; ``StochasticWeightAveraging`` leaves them as they were at the start.
    """

    network: nn.Module
    count: Tensor | None
    buffers: bool

    def pairs(self, module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor of the module with its average."""
        yield from zip(module.parameters(), self.network.parameters(), strict=True)
        if self.buffers:
            yield from zip(module.buffers(), self.network.buffers(), strict=True)


def _averages(trainer: Trainer) -> Iterator[_Average]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            count, network = callback._average_model.n_averaged, callback._average_model.module
            assert isinstance(count, Tensor) and isinstance(network, nn.Module)
            yield _Average(network, count, buffers=True)
        elif isinstance(callback, StochasticWeightAveraging) and callback._average_model is not None:
            yield _Average(callback._average_model, callback.n_averaged, buffers=False)
