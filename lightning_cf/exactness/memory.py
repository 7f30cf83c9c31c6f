"""Whether what earlier tasks own still gives what it gave: also where no weight moved, but something else did."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_cf.exactness.probe import OUTPUTS, owned_outputs
from lightning_cf.network.forward import Forward, named_tensors
from lightning_cf.network.kept_entries import same_bits
from lightning_cf.network.structure import NO_UNIT, Structure
from lightning_cf.ownership.buffer_places import BufferPlaces
from lightning_cf.ownership.ledger import NeuronLedger

CLOSE = 1e-3
"""Off the CPU, and where nothing says what changed, a difference counts from this share of the largest number: sums may
be taken in another order."""


class Memory:
    """What the units and outputs of earlier tasks give for an example, to be compared with what they give later.

    Args:
        module: the network.
        structure: its structure, as traced.
        ledger: says what tasks that are sealed own.
        example: an input whose first axis is the batch; its first samples are used.
        forward: how to run the network on the example.
        claimed: whether the current task counts too, where it has claimed its units.

    Attributes:
        loose: tensors that are part of no unit, by name, as they were.
    """

    def __init__(
        self,
        module: nn.Module,
        structure: Structure,
        ledger: NeuronLedger,
        example: Any,
        forward: Forward,
        *,
        claimed: bool = False,
    ) -> None:
        self.module, self.structure, self.example, self.forward = module, structure, example, forward
        open_ = ledger.phase == "learn" if claimed else ledger.current is not None
        self.levels = ledger.levels(structure, len(ledger.tasks) - open_)
        self.loose = {
            name: x.detach().cpu().clone()
            for name, x in named_tensors(module).items()
            if any(bool((use.target == NO_UNIT).any()) for use in structure.entries.get(name, ()))
        }
        self.device, self._places = _device(module), BufferPlaces(module)
        self._before = self._now()

    @property
    def here(self) -> bool:
        """Whether the network is where it was; on another device nothing can be said of it."""
        return _device(self.module) == self.device

    def lost(self, *, exactly: bool = True, outputs: bool = True) -> str:
        """In words, the first layer of which units of earlier tasks give something else now; empty where there is none.

        Args:
            exactly: whether every bit counts.
            outputs: whether the outputs count, which stand elsewhere once the output layer was made wider.
        """
        if not self.here:
            return ""
        now, exactly = self._now(), exactly and self.device.type == "cpu"
        left_out = set() if outputs else {*self.structure.head.layers, OUTPUTS}
        places = (place for place in self._before if place[0] not in left_out)
        moved = (p for p in places if p not in now or not _same(self._before[p], now[p], exactly))
        layer = next((place[0] for place in moved), "")
        return (
            "outputs of earlier tasks" if layer == OUTPUTS else layer and f"units of earlier tasks in layer '{layer}'"
        )

    def bring_back(self) -> list[str]:
        """Where units give something else, puts back what stood in buffers' places, as far as that helps.

        Returns:
            names of the places; none, and nothing is put back, where that does not help.
        """
        return self._places.bring_back(self.lost, self.structure.entries)

    def changed(self) -> list[str]:
        """Names of the tensors that are part of no unit and hold something else now."""
        now = named_tensors(self.module)
        return [n for n, x in self.loose.items() if n not in now or not same_bits(now[n].detach().cpu(), x)]

    def _now(self) -> dict[tuple[str, str, int], torch.Tensor]:
        return owned_outputs(self.module, self.structure, self.levels, self.example, self.forward)


def _same(before: torch.Tensor, now: torch.Tensor, exactly: bool) -> bool:
    if exactly or before.shape != now.shape:
        return same_bits(before, now)
    largest = float(before.abs().nan_to_num().max()) if before.numel() else 0.0
    return torch.allclose(now, before, rtol=0, atol=CLOSE * largest, equal_nan=True)


def _device(module: nn.Module) -> torch.device:
    return next((x.device for x in module.parameters()), torch.device("cpu"))
