"""What is held still of one tensor, or of one norm's running statistics: remembered, compared, put back."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


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
        values = (self.saved if values is None else values).to(self.parameter.dtype)
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


class FrozenStatistics:
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
