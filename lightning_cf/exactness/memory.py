"""Whether what earlier tasks own still gives what it gave: also where no weight moved, but something else did."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_cf.exactness.probe import owned_outputs
from lightning_cf.network.forward import Forward
from lightning_cf.network.kept_entries import same_bits
from lightning_cf.network.structure import Structure
from lightning_cf.ownership.ledger import NeuronLedger

CLOSE = 1e-3
"""Off the CPU a sum may be taken in another order: there a difference counts from this share of the largest number."""


class Memory:
    """What the units and outputs of earlier tasks give for an example, to be compared with what they give later.

    Args:
        module: the network.
        structure: its structure, as traced.
        ledger: says what tasks that are sealed own.
        example: an input whose first axis is the batch; its first samples are used.
        forward: how to run the network on the example.
    """

    def __init__(
        self, module: nn.Module, structure: Structure, ledger: NeuronLedger, example: Any, forward: Forward
    ) -> None:
        self.module, self.structure, self.example, self.forward = module, structure, example, forward
        self.levels = ledger.levels(structure, len(ledger.tasks) - (ledger.current is not None))
        self.device = _device(module)
        self._before = self._now()

    def lost(self) -> str:
        """The first layer of which units of earlier tasks give something else now; empty where there is none.

        Nothing can be said where the network was moved to another device meanwhile.
        """
        if _device(self.module) != self.device:
            return ""
        now = self._now()
        return next((place[0] for place, values in self._before.items() if not self._same(values, now[place])), "")

    def _now(self) -> dict[tuple[str, str, int], torch.Tensor]:
        return owned_outputs(self.module, self.structure, self.levels, self.example, self.forward)

    def _same(self, before: torch.Tensor, now: torch.Tensor) -> bool:
        if self.device.type == "cpu" or before.shape != now.shape:
            return same_bits(before, now)
        largest = float(before.abs().nan_to_num().max()) if before.numel() else 0.0
        return torch.allclose(now, before, rtol=0, atol=CLOSE * largest, equal_nan=True)


def _device(module: nn.Module) -> torch.device:
    return next((x.device for x in module.parameters()), torch.device("cpu"))
