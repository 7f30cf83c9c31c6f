"""A LightningModule that trains any network that returns logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_cf.errors import ContinualError, check_flag, check_kind
from lightning_cf.lightning_api import LightningModule


class Classifier(LightningModule):
    """Cross-entropy training of a network that returns logits.

    Args:
        network: maps inputs to logits.
        optimizer: makes an optimiser from parameters; default Adam with learning rate 0.001.
        cosine: whether the learning rate falls to zero along a cosine within each fit.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = torch.optim.Adam,
        cosine: bool = True,
    ) -> None:
        super().__init__()
        check_kind("Classifier", "network", network, nn.Module, "a network that maps inputs to logits")
        if not callable(optimizer):
            raise ContinualError(
                "Classifier: optimizer must make an optimiser from parameters, such as"
                f" partial(torch.optim.Adam, lr=0.001); got a {type(optimizer).__name__}."
            )
        self.network = network
        self.make_optimizer = optimizer
        self.cosine = check_flag("Classifier", "cosine", cosine)
        parameters = list(network.parameters())
        if parameters and not any(map(is_lazy, parameters)):
            self._optimizer()  # one that cannot be made is refused before anything is begun

    def forward(self, x: Tensor) -> Tensor:  # plain types: TorchScript reads them
        """Logits of a batch, one column a class."""
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of a batch (inputs, labels), logged as ``train_loss``."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """The optimiser, with a schedule over the fit's steps."""
        optimizer = self._optimizer()
        if not self.cosine:
            return optimizer
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _optimizer(self) -> Optimizer:
        try:
            optimizer = self.make_optimizer(self.parameters())
        except (TypeError, ValueError) as error:
            raise ContinualError(f"Classifier: the optimizer cannot be made: {error}.") from error
        if not isinstance(optimizer, Optimizer):
            raise ContinualError(
                f"Classifier: optimizer must make an optimiser, but made a {type(optimizer).__name__}."
            )
        return optimizer
