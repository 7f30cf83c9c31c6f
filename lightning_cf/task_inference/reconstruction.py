"""A head that is trained with a task's sub-network and frozen with it: whose input it is, the residual says.

Each class keeps a code of a few numbers, computed from the task's own hidden units, from which the input is computed
back through the network's own weights, transposed. What a sub-network was never trained on it cannot give back, and
since every task's residual is a distance to the same input, the residuals of all tasks compare as they are.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from lightning_cf.task_inference.readout import View
from lightning_cf.task_inference.sites import Sites
from lightning_cf.task_inference.strategies import Fitted, TaskScores
from lightning_cf.task_inference.trained import Trained, own_places, own_units, places

SHARPNESS = 8.0
"""Probabilities fall with this power of the residual."""

LEAK = 0.1
"""Slope below zero in the decoder: without one, its units die for good where the network learns at a high rate."""


class Reconstruction(Trained):
    """The residual of the class that gives the input back best.

    For class ``c``, with ``h`` the task's own units of the first two layers (of the first, where there is one)::

        z = h E_c + e_c                     a code
        u = leaky(z D_c + d_c)              own units of the second layer
        v = leaky(u W2 + b_c)               units of the first layer that the task may read
        y = v W1 + m_c                      the input
        r_c = mean (x - y)² / unit

    ``W1`` and ``W2`` are the network's own weights; ``unit`` is the variance of the first task's input.

    Args:
        name: what to call it.
        logits: how much the task's own outputs count: ``r_c - logits * log p_c`` takes the place of ``r_c``.
        code: how many numbers the code of a class has.
    """

    head, fixed, raw, needs = "reconstruction", ("unit",), True, "chain"

    def __init__(self, name: str = "reconstruction", logits: float = 0.0, code: int = 14) -> None:
        self.name = name  # type: ignore[misc]
        self.logits, self.code = logits, code

    def begin(
        self, view: View, labels: Int64[Tensor, "samples"], classes: int, unit: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Random weights, the mean of each class, zeros, and the unit."""
        assert view.inputs is not None
        own, top = own_units(view, len(view.chain)).shape[1], len(view.chain[-1])

        def drawn(*shape: int) -> Tensor:
            values: Tensor = torch.randn(shape, generator=generator) / shape[-2] ** 0.5
            return values.to(view.logits.device)

        def zeros(*shape: int) -> Tensor:
            return view.logits.new_zeros(shape)

        means = [view.inputs[labels == label].mean(dim=0) for label in range(classes)]
        found = {
            "encoder": drawn(classes, own, self.code),
            "code": zeros(classes, self.code),
            "decoder": drawn(classes, self.code, top),
            "top": zeros(classes, top),
            "mean": torch.stack(means).nan_to_num(),
            "unit": torch.tensor(unit, device=view.logits.device),
        }
        if len(view.chain) > 1:
            found["below"] = zeros(classes, view.chain[1].shape[1])
        return found

    def narrowed(self, fitted: Fitted, before: Sites, after: Sites) -> dict[str, Tensor]:
        """Without what belongs to units that are no more the task's own, or that it may no more read."""
        found = {
            **fitted,
            "encoder": fitted["encoder"][:, own_places(before, after, len(before.chain))],
            "decoder": fitted["decoder"][:, :, places(before.chain[-1].rows, after.chain[-1].rows)],
            "top": fitted["top"][:, places(before.chain[-1].rows, after.chain[-1].rows)],
        }
        if "below" in fitted:
            found["below"] = fitted["below"][:, places(before.chain[0].rows, after.chain[0].rows)]
        return found

    def loss(self, fitted: Fitted, view: View, labels: Int64[Tensor, "samples"]) -> Float[Tensor, ""]:
        """The mean residual of each sample's own class."""
        total = view.logits.new_zeros(())
        for label in range(len(fitted["mean"])):
            chosen = (labels == label).nonzero().flatten()
            if len(chosen):
                total = total + _residual(fitted, view.part(chosen), label).sum()
        return total / max(len(labels), 1)

    def score(self, fitted: Fitted, view: View) -> Float[Tensor, "batch"]:
        """Minus the logarithm of the smallest residual."""
        found = torch.stack([_residual(fitted, view, label) for label in range(len(fitted["mean"]))], dim=1)
        if self.logits:
            found = found - self.logits * view.logits.log_softmax(dim=1)
        return -found.amin(dim=1).clamp_min(1e-12).log()

    def probabilities(
        self, scores: TaskScores, spread: Tensor, threshold: Tensor
    ) -> Float[Tensor, "batch tasks_and_none"]:
        """Tasks by a power of their residual.

        Known is what one task gives back much better than all others, and not much worse than its own held-out data.
        """
        tasks = (SHARPNESS * scores).softmax(dim=1)
        best = scores.argmax(dim=1)
        near = (4 * (scores.amax(dim=1) - threshold[best]) / spread[best] + 4).sigmoid()
        known = near * tasks.amax(dim=1)
        return torch.cat([known[:, None] * tasks, 1 - known[:, None]], dim=1)


def _residual(fitted: Fitted, view: View, label: int) -> Float[Tensor, "batch"]:
    assert view.inputs is not None
    code = own_units(view, len(view.chain)) @ fitted["encoder"][label] + fitted["code"][label]
    x = F.leaky_relu(code @ fitted["decoder"][label] + fitted["top"][label], LEAK)
    if len(view.chain) > 1:
        x = F.leaky_relu(x @ view.chain[1] + fitted["below"][label], LEAK)
    back = x @ view.chain[0] + fitted["mean"][label]
    return (view.inputs - back).square().mean(dim=1) / fitted["unit"]
