"""Entries that may not move do not move, bitwise, whatever optimiser runs; knows no Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from lightning_cf.network.kept_entries import KeptEntries
from lightning_cf.ownership.frozen_statistics import FrozenStatistics
from lightning_cf.utilities.hooks import Hook


@runtime_checkable
class Passing(Protocol):
    """What changes frozen entries for a while, such as a perturbation, and puts them back itself."""

    @property
    def lasts(self) -> bool:
        """Whether the entries are changed at this moment; once it is over, the frozen values count again."""
        ...

    def changes(self, tensor: Tensor) -> bool:
        """Whether it changes entries of this tensor."""
        ...


class Freezer:
    """Holds the marked entries of a module's parameters and buffers still.

    Two hooks do it. A post-accumulate-grad hook fills the frozen entries of each gradient with zero, so that clipping
    and gradient scaling see only live gradients; filling, not multiplying, since 0 times inf is NaN. A step hook
    copies the frozen entries back after each step of an optimiser, since weight decay, momentum and second-order
    methods move entries whose gradient is zero. It is there for optimisers too that nobody told of, if they step what
    is held; others of the process, such as those of a second network, are left alone. Frozen BatchNorm
    channels are normalised by their running statistics in train mode too, and these do not move. Buffers that training
    changes, or puts another tensor in the place of, such as the vectors of spectral_norm, are put back with each step.

    >>> layer = nn.Linear(2, 2)
    >>> before = layer.weight.detach().clone()
    >>> optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=1.0)
    >>> with Freezer(layer, {"weight": torch.tensor([[True], [False]])}).attach([optimizer]):
    ...     layer(torch.ones(1, 2)).sum().backward()
    ...     _ = optimizer.step()
    >>> (layer.weight == before).all(dim=1).tolist()
    [True, False]

    Args:
        module: whose entries to freeze.
        masks: for parameters and buffers by name, which entries stay; each mask broadcasts to its tensor.

    Attributes:
        written: names of buffers that something wrote and that were put back, in order.
    """

    def __init__(self, module: nn.Module, masks: Mapping[str, Bool[Tensor, "..."]]) -> None:
        parameters = dict(module.named_parameters())
        self.entries = [
            KeptEntries(parameter, masks[name])
            for name, parameter in parameters.items()
            if name in masks and bool(masks[name].any())
        ]
        self.norms = [
            FrozenStatistics(norm, masks[name])
            for path, norm in module.named_modules()
            if isinstance(norm, (_BatchNorm, _InstanceNorm)) and norm.running_mean is not None
            if (name := f"{path}.running_mean" if path else "running_mean") in masks
        ]
        statistics = {id(buffer) for norm in self.norms for buffer in norm.module.buffers(recurse=False)}
        self.buffers = {
            KeptEntries(buffer, masks[name]): (*place_of(module, name), name)
            for name, buffer in module.named_buffers()
            if name in masks and id(buffer) not in statistics and bool(masks[name].any())
        }
        self.written: dict[str, None] = {}
        self.optimizers: list[Optimizer] = []
        self.handles: list[RemovableHandle] = []
        self._passing: Passing | None = None
        self._meanwhile: dict[KeptEntries, Tensor] = {}

    def attach(self, optimizers: Iterable[Optimizer]) -> Freezer:
        """Starts holding: remembers the frozen entries as they are now and hooks into backward, step and forward."""
        self.optimizers = list(optimizers)
        self.save()
        for entries in self.entries:
            if entries.parameter.is_floating_point() or entries.parameter.is_complex():
                self.handles.append(_hook_gradient(entries))
        self.handles.append(register_optimizer_step_post_hook(self._after_step))
        for norm in self.norms:
            if bool(norm.channels.any()):
                norm.save()
                self.handles.append(norm.module.register_forward_hook(Hook(norm.forward_hook), with_kwargs=True))
        return self

    def save(self) -> None:
        """Remembers the frozen entries of parameters and buffers as they are now."""
        for entries in (*self.entries, *self.buffers):
            entries.save()

    def save_meanwhile(self, passing: Passing) -> None:
        """Remembers what something passing made of the frozen entries: while it lasts, that is what is put back."""
        held = [entries for entries in (*self.entries, *self.buffers) if passing.changes(entries.parameter)]
        self._passing, self._meanwhile = passing, {entries: entries.now() for entries in held}

    def restore(self) -> None:
        """Puts the frozen entries of parameters and buffers back."""
        if self._passing is not None and not self._passing.lasts:
            self._passing, self._meanwhile = None, {}
        self._follow_buffers()
        for entries in self.entries:
            entries.restore(self._meanwhile.get(entries))
        for entries, (holder, _, name) in self.buffers.items():
            if entries in self._meanwhile or not entries.moved():
                entries.restore(self._meanwhile.get(entries))
                continue
            entries.restore()
            if not type(holder).__module__.startswith("torch."):  # whose layers know what they write
                self.written[name] = None

    def detach(self) -> None:
        """Removes every hook; buffers that a forward pass changed since the last step are put back."""
        if self.handles:
            self._follow_buffers()
            for entries in self.buffers:
                entries.restore()
        while self.handles:
            self.handles.pop().remove()

    def _follow_buffers(self) -> None:
        """Holds what stands in a buffer's place now: ``self.mean = ...`` puts another tensor there."""
        for entries, (holder, name, _) in self.buffers.items():
            now = dict(holder._buffers.items()).get(name)  # those of scripted layers have no get
            if now is not None and now is not entries.parameter and now.shape == entries.parameter.shape:
                now = holder._buffers[name] = now.detach().clone()  # it may be somebody's data
                entries.parameter = now

    def __enter__(self) -> Freezer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def zero_gradients(self) -> None:
        """Fills the frozen entries of all gradients once more (after a reduction over processes wrote them anew)."""
        for entries in self.entries:
            entries.zero_gradient(entries.parameter)

    def zero_optimizer_state(self) -> None:
        """Fills the frozen entries of the optimisers' state with zero, after masks changed within a fit."""
        for optimizer in self.optimizers:
            for entries in self.entries:
                for value in optimizer.state.get(entries.parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == entries.parameter.shape:
                        entries.fill_zero(value)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(optimizer is known for known in self.optimizers) or self._steps_held(optimizer):
            self.restore()

    def _steps_held(self, optimizer: Optimizer) -> bool:
        """Whether an optimiser that nobody told of steps what is held: the parameters themselves, or views of them."""
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        held = [entries.parameter for entries in self.entries]
        if not {id(parameter) for parameter in held}.isdisjoint(map(id, stepped)):
            return True
        return not _storages(held).isdisjoint(_storages(stepped))


def place_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The part of a module that has a tensor of that name, and how the part calls it."""
    path, _, own = name.rpartition(".")
    return module.get_submodule(path), own


def _storages(tensors: Iterable[Tensor]) -> set[tuple[torch.device, int]]:
    return {(x.device, x.untyped_storage().data_ptr()) for x in tensors if x.layout == torch.strided and x.numel()}


def _hook_gradient(entries: KeptEntries) -> RemovableHandle:
    """Hooks into a parameter's gradient, also of one that needs none yet: it may be unfrozen during the fit."""
    parameter = entries.parameter
    needed = parameter.requires_grad
    parameter.requires_grad_(True)
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(entries.zero_gradient)
    parameter.requires_grad_(needed)
    return handle
