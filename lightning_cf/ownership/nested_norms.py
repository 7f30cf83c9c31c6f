"""Norms that are nested by owner: an element is normalised with those of its owner and of earlier ones.

The mathematics alone, as functions of tensors; which modules compute so is decided in ``owner_aware_norms``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_cf.ownership.levels import FREE


class Nesting:
    """Who owns the elements of a norm, from those that read least to those that read most.

    Attributes:
        owners: of each element.
        order: the elements, those of one owner after those of another: no unit, task 0, task 1 and so on, free.
        sizes: how many elements each owner has, in that order.
    """

    def __init__(self, owners: Int64[Tensor, "..."]) -> None:
        self.owners = owners.clone()
        rank = self.owners.flatten()
        rank = torch.where(rank == FREE, torch.iinfo(torch.int64).max, rank)
        self.order = rank.argsort(stable=True)
        ranks, counts = rank.unique(return_counts=True)
        self.sizes: list[int] = counts.tolist()
        self.level: Tensor = (rank[:, None] > ranks).sum(dim=1)  # of each element
        self.inverse = self.order.argsort()

    @property
    def by_hand(self) -> bool:
        """Whether the norm is written out in a module's forward pass, with its elements along one axis."""
        return self.owners.ndim > 1 and len(self.owners) == 1

    @property
    def inline(self) -> bool:
        """Whether it is written out among other things, so that the module is to run once."""
        return self.owners.ndim > 2 and self.owners.shape[:2] == (1, 1)

    @property
    def axis(self) -> int:
        """The axis along which the elements of a norm written by hand lie, counted from the last one, -1."""
        return (2 if self.inline else 1) - self.owners.ndim

    def to(self, device: torch.device) -> Nesting:
        """The same on a device, in place."""
        if self.order.device != device:
            self.order, self.inverse, self.level = (x.to(device) for x in (self.order, self.inverse, self.level))
        return self


def nested_layer_norm(
    x: Float[Tensor, "..."],
    nesting: Nesting,
    weight: Float[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "..."]:
    """LayerNorm over the last dims, owner-aware.

    The moments of each owner's elements are joined to those of the owners before it (Chan, Golub and LeVeque 1979),
    so that what is computed for an owner does not depend on later ones, not in the last bit.

    Args:
        x: of any shape that ends in that of ``nesting.owners``.
        nesting: who owns which element.
        weight: scale of each element, or None.
        bias: shift of each element, or None.
        eps: added to the variances.
    """
    done = []
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for part in _parts(x, nesting):
        n = part.shape[-1]
        own = part.mean(dim=-1, keepdim=True)
        spread = (part - own).square().sum(dim=-1, keepdim=True)
        if count:
            apart, total = own - mean, count + n
            mean = mean + apart * (n / total)
            squares = squares + spread + apart.square() * (count * n / total)
        else:
            mean, squares = own, spread
        count += n
        done.append((part - mean) * (squares / count + eps).rsqrt())
    return _affine(_joined(done, nesting, x), weight, bias, x)


def nested_rms_norm(
    x: Float[Tensor, "..."], nesting: Nesting, weight: Float[Tensor, "..."] | None = None, eps: float | None = None
) -> Float[Tensor, "..."]:
    """RMSNorm over the last dims, owner-aware; arguments as in ``nested_layer_norm``."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    parts = _parts(x, nesting)
    squares = accumulate(part.square().sum(dim=-1, keepdim=True) for part in parts)
    counts = accumulate(nesting.sizes)
    done = [part * (s / n + eps).rsqrt() for part, s, n in zip(parts, squares, counts, strict=True)]
    return _affine(_joined(done, nesting, x), weight, None, x)


def nested_group_norm(
    x: Float[Tensor, "batch channels ..."],
    groups: int,
    nesting: Nesting,
    weight: Float[Tensor, "channels"] | None = None,
    bias: Float[Tensor, "channels"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "batch channels ..."]:
    """GroupNorm, owner-aware within each group of channels.

    Args:
        x: the input.
        groups: how many groups.
        nesting: who owns which channel.
        weight: scale of each channel, or None.
        bias: shift of each channel, or None.
        eps: added to the variances.
    """
    nesting.to(x.device)
    wide = _wide(x).reshape(x.shape[0], groups, x.shape[1] // groups, -1)
    mean = wide.mean(dim=-1)
    variance = (wide - mean[..., None]).square().mean(dim=-1)
    level = nesting.level.reshape(groups, -1)
    means, variances = torch.zeros_like(mean), torch.ones_like(variance)
    for number in range(len(nesting.sizes)):
        inside = level <= number
        count = inside.sum(dim=-1, keepdim=True).clamp_min(1)
        joint = torch.where(inside, mean, 0).sum(dim=-1, keepdim=True) / count
        apart = torch.where(inside, mean - joint, 0)
        spread = (torch.where(inside, variance, 0) + apart.square()).sum(dim=-1, keepdim=True) / count
        means = torch.where(level == number, joint, means)
        variances = torch.where(level == number, spread, variances)
    normalised = (wide - means[..., None]) * (variances[..., None] + eps).rsqrt()
    shape = (-1, *[1] * (x.ndim - 2))
    scale, shift = (None if p is None else p.reshape(shape) for p in (weight, bias))
    return _affine(normalised.reshape(x.shape), scale, shift, x)


def _wide(x: Tensor) -> Tensor:
    """Statistics are taken in single precision at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _parts(x: Tensor, nesting: Nesting) -> Sequence[Tensor]:
    """The elements of each owner, owner after owner."""
    nesting.to(x.device)
    flat = _wide(x).flatten(x.ndim - nesting.owners.ndim)
    return list(flat.index_select(-1, nesting.order).split(nesting.sizes, dim=-1))


def _joined(parts: Sequence[Tensor], nesting: Nesting, x: Tensor) -> Tensor:
    return torch.cat(list(parts), dim=-1).index_select(-1, nesting.inverse).reshape(x.shape)


def _affine(out: Tensor, weight: Tensor | None, bias: Tensor | None, x: Tensor) -> Tensor:
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    return out if torch.is_autocast_enabled(x.device.type) else out.to(x.dtype)  # autocast norms in single precision
