"""What is held still of one norm's running statistics."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


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
