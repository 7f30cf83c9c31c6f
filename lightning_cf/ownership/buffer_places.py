"""What stands in the places of a network's buffers: another tensor, or nothing, may stand there later."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_cf.network.kept_entries import same_bits


@dataclass(frozen=True)
class Place:
    """What stands in the place of one buffer.

    Attributes:
        part: the module that has it.
        tensor: that stands there; None where nothing does.
        values: a copy of its values.
    """

    part: nn.Module
    tensor: Tensor | None
    values: Tensor | None


class BufferPlaces:
    """What stands in the place of each buffer now, remembered so that it can be put back there.

    >>> import torch
    >>> net = torch.nn.Module()
    >>> net.register_buffer("mean", None)
    >>> places = BufferPlaces(net)
    >>> net.mean = torch.ones(2)
    >>> places.bring_back(lambda: net.mean is not None), net.mean
    (['mean'], None)

    Args:
        module: the network.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._stood = self._now()

    def bring_back(self, lost: Callable[[], object], held: Container[str] = ()) -> list[str]:
        """Puts back what stood in the places, as far as that brings back what is lost.

        Args:
            lost: whether anything is.
            held: names of buffers whose values are held: there only what is of another shape counts.

        Returns:
            names of the places; none, and nothing is put back, where that does not help.
        """
        now, needed = self._now(), []
        changed = [n for n in {**self._stood, **now} if not _alike(self._stood.get(n), now.get(n), n in held)]
        for name in changed:
            _put(name, now.get(name), self._stood.get(name))
        helps = bool(changed) and not lost()
        for name in changed:
            _put(name, self._stood.get(name), now.get(name))
            if helps and lost():
                _put(name, now.get(name), self._stood.get(name))
                needed.append(name)
        return needed

    def _now(self) -> dict[str, Place]:
        return {
            f"{path}.{name}" if path else name: Place(part, x, None if x is None else x.detach().to("cpu", copy=True))
            for path, part in self.module.named_modules()
            for name, x in part._buffers.items()
            if x is None or not is_lazy(x)
        }


def _alike(before: Place | None, now: Place | None, held: bool) -> bool:
    if before is None or now is None or before.values is None or now.values is None:
        return before is not None and now is not None and before.values is now.values
    return before.values.shape == now.values.shape if held else same_bits(before.values, now.values)


def _put(name: str, old: Place | None, new: Place | None) -> None:
    """Puts what stood at another time into a place, from which it takes what is not to be there."""
    own = name.rpartition(".")[2]
    if new is None:
        assert old is not None
        old.part._buffers.pop(own, None)
        return
    new.part._buffers[own] = new.tensor
    if new.tensor is not None and new.values is not None:
        new.tensor.detach().copy_(new.values)
