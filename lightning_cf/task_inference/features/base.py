"""Features of an input that no later task changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_cf.errors import ContinualError, check_count
from lightning_cf.task_inference.readout import Readout
from lightning_cf.task_inference.sites import Sites

Fixed = Mapping[str, Tensor]
"""What features keep for good of the first task's data."""

Rows = Float[Tensor, "batch features"]


class Features(ABC):
    """Numbers that describe an input, the same for good from the first seal on.

    Attributes:
        variants: names of the changes of the input (``variants.VARIANTS``) whose readouts they look at too.
        shrinkage: how far to shrink their covariance, where that is known of them.
        beside: whether they look at the input beside the network.
        maps: whether they look at what the network's layers read.
    """

    variants: tuple[str, ...] = ()
    shrinkage: float | None = None
    beside: bool = True
    maps: bool = False

    def begin(self, seen: Readout, sites: Sites, generator: torch.Generator) -> dict[str, Tensor]:
        """What to keep of the first task's data, found once.

        Args:
            seen: what the network shows of some of them.
            sites: where the first task's scores look, and so which units it owns.
            generator: on the CPU, for whatever is drawn.
        """
        return {}

    @abstractmethod
    def of(self, fixed: Fixed, seen: Readout, sites: Sites) -> Rows:
        """The features of a batch, one row a sample.

        Args:
            fixed: what :meth:`begin` kept, on the batch's device.
            seen: what the network shows of it.
            sites: where the first task's scores look.
        """

    def __add__(self, other: Features) -> Features:
        return Joined([self, other])


class Joined(Features):
    """Several kinds of features side by side.

    Args:
        parts: the kinds.
    """

    def __init__(self, parts: Sequence[Features]) -> None:
        self.parts: list[Features] = []
        for part in parts:
            self.parts += part.parts if isinstance(part, Joined) else [part]
        self.variants = tuple(dict.fromkeys(name for part in self.parts for name in part.variants))
        self.beside, self.maps = any(part.beside for part in self.parts), any(part.maps for part in self.parts)
        self.shrinkage = max((part.shrinkage for part in self.parts if part.shrinkage is not None), default=None)

    def begin(self, seen: Readout, sites: Sites, generator: torch.Generator) -> dict[str, Tensor]:
        """What each part keeps, by its number."""
        found = [part.begin(seen, sites, generator) for part in self.parts]
        return {f"{number}.{name}": value for number, kept in enumerate(found) for name, value in kept.items()}

    def of(self, fixed: Fixed, seen: Readout, sites: Sites) -> Rows:
        """The parts' features, one part after the other."""
        return torch.cat([part.of(inner(fixed, number), seen, sites) for number, part in enumerate(self.parts)], dim=1)


def inner(fixed: Fixed, part: int | str) -> dict[str, Tensor]:
    """Of what is kept for several parts, what is of one."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): value for name, value in fixed.items() if name.startswith(prefix)}


def moments(rows: Rows) -> tuple[Float[Tensor, "features"], Float[Tensor, "features"]]:
    """Mean and deviation of each feature, over the samples in which it is finite.

    >>> [x.tolist() for x in moments(torch.tensor([[1.0, 5.0], [3.0, torch.nan]]))]
    [[2.0, 5.0], [1.0, 0.0]]
    """
    fine = rows.isfinite()
    if bool(fine.all()):
        return rows.mean(dim=0), rows.std(dim=0, correction=0)
    count = fine.sum(dim=0).clamp_min(1)
    mean = rows.where(fine, 0).sum(dim=0) / count
    return mean, ((rows - mean).square().where(fine, 0).sum(dim=0) / count).sqrt()


class Custom(Features):
    """Whatever a function of one's own makes of the input, such as a frozen network of another library's.

    Args:
        function: of the network's input; gives one row a sample. Must give the same for good.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        if not callable(function):
            raise ContinualError(
                f"Custom: function must be callable on the network's input, got {type(function).__name__}."
            )
        self.function = function

    def of(self, fixed: Fixed, seen: Readout, sites: Sites) -> Rows:
        """The function's values of the input, one flat row a sample."""
        rows = self.function(seen.x)
        if not isinstance(rows, Tensor) or len(rows) != len(seen.outputs):
            found = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ContinualError(
                f"task_inference: the features' function must give a tensor of one row a sample, {len(seen.outputs)}"
                f" here; it gave {found}."
            )
        return rows.reshape(len(rows), -1).float()


CELLS = 4
"""Where the length of samples varies, their values are averaged over so many parts of it."""


class Values(Features):
    """The values of the input itself, flattened; those of several inputs side by side.

    Args:
        axis: along which samples of one batch may be longer than those of another; 0 for none.
    """

    def __init__(self, axis: int = 0) -> None:
        self.axis = check_count("Values", "axis", axis, least=0)

    def of(self, fixed: Fixed, seen: Readout, sites: Sites) -> Rows:
        """The input's values, one flat row a sample; what is not a number, as where one is missing, is 0."""
        return torch.cat([self._flat(leaf) for leaf in leaves_of(seen)], dim=1)

    def _flat(self, leaf: Tensor) -> Rows:
        leaf = (torch.view_as_real(leaf) if leaf.is_complex() else leaf).float().nan_to_num(0.0, 0.0, 0.0)
        if 0 < self.axis < leaf.ndim:
            leaf = averaged(leaf, self.axis, CELLS)
        return leaf.flatten(1) if leaf.ndim > 1 else leaf[:, None]


def averaged(values: Tensor, axis: int, cells: int) -> Tensor:
    """Means over so many cells along an axis, as even as may be; where there are fewer places, some are used again.

    >>> averaged(torch.tensor([[1.0, 3.0, 8.0]]), 1, 2).tolist(), averaged(torch.tensor([[5.0]]), 1, 2).tolist()
    ([[2.0, 8.0]], [[5.0, 5.0]])
    """
    size = values.shape[axis]
    if size < cells:
        return values.index_select(axis, torch.arange(cells, device=values.device) * size // cells)
    return torch.stack([part.mean(dim=axis) for part in torch.tensor_split(values, cells, dim=axis)], dim=axis)


def leaves_of(seen: Readout) -> list[Tensor]:
    """The tensors of an input.

    Raises:
        ContinualError: where the input is not made of tensors with one row a sample.
    """
    if seen.x is None:
        raise ContinualError(
            "task_inference: the network's input is not made of tensors with one row a sample, so nothing beside the"
            " network can look at it. Use features of the network's units, or a strategy that looks at these."
        )
    leaves: list[Tensor] = tree_leaves(seen.x)
    return leaves


def images_of(seen: Readout) -> Float[Tensor, "batch channels height width"]:
    """An input that is a batch of images.

    Raises:
        ContinualError: for another.
    """
    leaves = leaves_of(seen)
    if len(leaves) != 1 or leaves[0].ndim != 4 or not leaves[0].is_floating_point():
        raise ContinualError(
            "task_inference: patches are cut out of images, a floating-point tensor (batch, channels, height, width);"
            f" the network's input is {', '.join(str(list(leaf.shape)) for leaf in leaves)}."
        )
    return leaves[0].float().nan_to_num(0.0, 0.0, 0.0)
