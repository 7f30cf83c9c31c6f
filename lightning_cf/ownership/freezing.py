"""Entries that may not move do not move, bitwise, whatever optimiser runs; knows no Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from lightning_cf.utilities.hooks import Hook


@runtime_checkable
class Passing(Protocol):
    """What changes frozen entries for a while, such as a perturbation, and puts them back itself."""

    @property
    def lasts(self) -> bool:
        """Whether they are changed now."""
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
    channels are normalised by their running statistics in train mode too, and these do not move. Buffers that a
    forward pass changes, such as the vectors of spectral_norm, are put back with each step.

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
    """

    def __init__(self, module: nn.Module, masks: Mapping[str, Bool[Tensor, "..."]]) -> None:
        parameters = dict(module.named_parameters())
        self.entries = [
            FrozenEntries(parameter, masks[name])
            for name, parameter in parameters.items()
            if name in masks and bool(masks[name].any())
        ]
        self.norms = [
            _FrozenStatistics(norm, masks[name])
            for path, norm in module.named_modules()
            if isinstance(norm, (_BatchNorm, _InstanceNorm)) and norm.running_mean is not None
            if (name := f"{path}.running_mean" if path else "running_mean") in masks
        ]
        statistics = {id(buffer) for norm in self.norms for buffer in norm.module.buffers(recurse=False)}
        self.buffers = [
            FrozenEntries(buffer, masks[name])
            for name, buffer in module.named_buffers()
            if name in masks and id(buffer) not in statistics and buffer.is_floating_point() and bool(masks[name].any())
        ]
        self.optimizers: list[Optimizer] = []
        self.handles: list[RemovableHandle] = []
        self._passing: Passing | None = None
        self._meanwhile: dict[FrozenEntries, Tensor] = {}

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
        for entries in (*self.entries, *self.buffers):
            entries.restore(self._meanwhile.get(entries))

    def detach(self) -> None:
        """Removes every hook; buffers that a forward pass changed since the last step are put back."""
        if self.handles:
            for entries in self.buffers:
                entries.restore()
        while self.handles:
            self.handles.pop().remove()

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


def _storages(tensors: Iterable[Tensor]) -> set[tuple[torch.device, int]]:
    return {(x.device, x.untyped_storage().data_ptr()) for x in tensors if x.layout == torch.strided and x.numel()}


def _hook_gradient(entries: FrozenEntries) -> RemovableHandle:
    """Hooks into a parameter's gradient, also of one that needs none yet: it may be unfrozen during the fit."""
    parameter = entries.parameter
    needed = parameter.requires_grad
    parameter.requires_grad_(True)
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(entries.zero_gradient)
    parameter.requires_grad_(needed)
    return handle


class FrozenEntries:
    """The frozen entries of one tensor: all of it, whole rows along an axis, or any mask; rows cost least."""

    saved: Shaped[Tensor, "..."]

    def __init__(self, parameter: Tensor, mask: Bool[Tensor, "..."]) -> None:
        self.parameter = parameter
        self.saved = parameter.detach()[:0] if parameter.ndim else parameter.detach()
        self.axis = 0
        self.index: Tensor | None = None
        self.mask: Tensor | None = None
        mask = mask.reshape((1,) * (parameter.ndim - mask.ndim) + mask.shape)
        self.broadcast = mask
        wide = [axis for axis, size in enumerate(mask.shape) if size > 1]
        if not bool(mask.all()):
            if len(wide) == 1:
                self.axis, self.index = wide[0], mask.flatten().nonzero().flatten().to(parameter.device)
            else:
                self.mask = mask.to(parameter.device)

    def follow(self) -> None:
        """Goes where the parameter is: a Trainer takes a module off its GPU before the last hooks of a fit run."""
        device = self.parameter.device
        self.index = None if self.index is None else self.index.to(device)
        self.mask = None if self.mask is None else self.mask.to(device)
        self.saved = self.saved.to(device)

    def fill_zero(self, tensor: Tensor) -> None:
        """Fills the frozen entries of a tensor of the parameter's shape."""
        if self.index is not None:
            tensor.index_fill_(self.axis, self.index, 0)
        elif self.mask is not None:
            tensor.masked_fill_(self.mask, 0)
        else:
            tensor.zero_()

    def zero_gradient(self, parameter: Tensor) -> None:
        """Fills the frozen entries of the gradient with zero."""
        if parameter.grad is None:
            return
        if parameter.grad.is_sparse:
            gradient = parameter.grad.coalesce()
            there = self.broadcast.to(gradient.device).expand(parameter.shape)[tuple(gradient.indices())]
            gradient.values().masked_fill_(there, 0)
            parameter.grad = gradient
        else:
            self.fill_zero(parameter.grad)

    def save(self) -> None:
        """Remembers the frozen entries as they are now."""
        self.saved = self.now()

    def now(self) -> Shaped[Tensor, "..."]:
        """A copy of them, as :meth:`restore` takes it."""
        self.follow()
        data = self.parameter.detach()
        return data.clone() if self.index is None else data.index_select(self.axis, self.index)

    def moved(self) -> bool:
        """Whether some of them are not what they were, bit for bit."""
        self.follow()
        data = self.parameter.detach()
        if self.mask is not None:
            there = self.mask.expand(data.shape)
            return not _same_bits(data[there], self.saved[there])
        return not _same_bits(data if self.index is None else data.index_select(self.axis, self.index), self.saved)

    @torch.no_grad()
    def restore(self, values: Shaped[Tensor, "..."] | None = None) -> None:
        """Puts them back, or other values in their place."""
        self.follow()
        values = self.saved if values is None else values
        if self.index is not None:
            self.parameter.index_copy_(self.axis, self.index, values)
        elif self.mask is not None:
            self.parameter.copy_(torch.where(self.mask, values, self.parameter))
        else:
            self.parameter.copy_(values)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):
        return True
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


class _FrozenStatistics:
    """The frozen channels of one BatchNorm layer, or InstanceNorm layer with running statistics."""

    def __init__(self, module: _BatchNorm | _InstanceNorm, channels: Bool[Tensor, "..."]) -> None:
        assert module.running_mean is not None
        self.module = module
        self.channels = channels.expand(module.running_mean.shape).to(module.running_mean.device)

    def save(self) -> None:
        """Remembers the statistics as they are now."""
        assert self.module.running_mean is not None and self.module.running_var is not None
        self.mean, self.variance = self.module.running_mean.clone(), self.module.running_var.clone()

    mean: Shaped[Tensor, "channels"]
    variance: Shaped[Tensor, "channels"]

    def forward_hook(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor | None:
        """Replaces the frozen channels of a train-mode output by their eval-mode output; undoes their statistics."""
        norm = self.module
        if not norm.training:
            return None
        assert norm.running_mean is not None and norm.running_var is not None
        # Through .data, as the layer's own update does: backward checks the buffers' versions but never reads them.
        norm.running_mean.data.copy_(torch.where(self.channels, self.mean, norm.running_mean))
        norm.running_var.data.copy_(torch.where(self.channels, self.variance, norm.running_var))
        evaluated = self._evaluated(args, kwargs)
        shape = [1, -1] + [1] * (output.ndim - 2)
        return torch.where(self.channels.reshape(shape), evaluated, output)

    def _evaluated(self, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
        """What the layer's own forward gives in eval mode: layers of other libraries do more there than normalise."""
        norm = self.module
        statistics = norm.running_mean, norm.running_var
        norm.running_mean, norm.running_var = self.mean, self.variance
        norm.training = False
        try:
            output: Tensor = norm.forward(*args, **kwargs)
        finally:
            norm.running_mean, norm.running_var = statistics
            norm.training = True
        return output
