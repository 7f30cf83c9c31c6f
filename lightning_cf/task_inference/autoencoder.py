"""A small autoencoder of the input beside the network, a task."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from lightning_cf.task_inference.readout import View
from lightning_cf.task_inference.strategies import ON_TRIAL, Fitted, Strategy
from lightning_cf.utilities.randomness import keyed_generator

BATCH, LR = 128, 0.003


class InputAutoencoder(Strategy):
    """How well an autoencoder with one hidden layer, trained on the task's inputs alone, gives an input back.

    It begins at the mean input. Its first values and its batches come from a generator of its own.

    Args:
        width: of the hidden layer.
        steps: of Adam.
    """

    name, raw, needs, beside = "input_autoencoder", True, "inputs", True

    def __init__(self, width: int = 32, steps: int = 600) -> None:
        self.width, self.steps = width, steps

    def fit(self, view: View, labels: Int64[Tensor, "samples"], classes: int, held_out: View) -> dict[str, Tensor]:
        """Trains an autoencoder on the inputs of the view: its weights, and the mean input."""
        assert view.inputs is not None
        x = view.inputs
        generator = keyed_generator(self.name, x.shape[1], self.width)
        values = {
            "encoder": torch.randn(x.shape[1], self.width, generator=generator) / x.shape[1] ** 0.5,
            "code": torch.zeros(self.width),
            "decoder": torch.randn(self.width, x.shape[1], generator=generator) * 0.1 / self.width**0.5,
            "mean": x.mean(dim=0),
        }
        trained = {name: value.to(x.device, x.dtype).requires_grad_() for name, value in values.items()}
        optimizer = torch.optim.Adam(trained.values(), lr=LR)
        steps = 1 if ON_TRIAL.get() else self.steps
        with torch.enable_grad():
            for step in range(steps):
                chosen = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator).to(x.device)
                optimizer.param_groups[0]["lr"] = LR * (1 - step / steps)
                optimizer.zero_grad()
                _residual(trained, x[chosen]).mean().backward()
                optimizer.step()
        return {name: value.detach() for name, value in trained.items()}

    def score(self, fitted: Fitted, view: View) -> Float[Tensor, "batch"]:
        """Minus the mean squared residual of each input: an input like those of the task is given back well."""
        assert view.inputs is not None
        return -_residual(fitted, view.inputs)


def _residual(fitted: Fitted, x: Float[Tensor, "batch values"]) -> Float[Tensor, "batch"]:
    code = F.relu((x - fitted["mean"]) @ fitted["encoder"] + fitted["code"])
    return (x - code @ fitted["decoder"] - fitted["mean"]).square().mean(dim=1)
