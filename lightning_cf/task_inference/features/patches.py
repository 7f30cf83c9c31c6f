"""A bank of patches of the first task's images, as filters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lightning_cf.errors import ContinualError, check_count, check_flag, check_number
from lightning_cf.task_inference.features.base import Features, Fixed, Rows, images_of
from lightning_cf.task_inference.readout import Readout
from lightning_cf.task_inference.sites import Sites

DRAWN = 40_000
"""From so many patches their covariance is taken."""

FLAT = 0.02
"""Patches whose values deviate by less hold nothing to compare."""

NOISE = 10 / 255**2
"""Added to a patch's variance, so that what is nearly flat is not blown up."""

WHITENING = 0.1
"""Added to the variances of patches' principal components, likewise."""

AT_ONCE = 2**22
"""So many matches are computed at a time: more would not fit into a processor's cache, or those of large images into
memory."""

Images = Float[Tensor, "batch channels height width"]


class PatchBank(Features):
    """How well patches of an image match some of the first task's, whitened, on a coarse grid (Coates and Ng 2012).

    Patches are centred, divided by their own deviation and whitened; a filter is such a patch, of unit length. A match
    counts where it exceeds a threshold, and likewise its opposite; matches are averaged over the cells of a grid.

    Args:
        filters: how many patches.
        size: of a patch, in pixels.
        grid: cells along each side of the image, or along its height and along its width.
        threshold: of a match.
        mirrored: whether to average over the image and its mirror image.
        power: to which the averages are raised; below 1, a few strong matches count for less (Perronnin et al. 2010).
    """

    def __init__(
        self,
        filters: int = 200,
        *,
        size: int = 6,
        grid: int | tuple[int, int] = 2,
        threshold: float = 0.25,
        mirrored: bool = True,
        power: float = 1.0,
    ) -> None:
        self.filters = check_count("PatchBank", "filters", filters)
        self.size = check_count("PatchBank", "size", size, least=2)
        sides = grid if isinstance(grid, Sequence) and len(grid) == 2 else (grid, grid)
        self.grid = tuple(check_count("PatchBank", "grid", cells) for cells in sides)
        self.threshold = check_number("PatchBank", "threshold", threshold, least=0.0)
        self.mirrored = check_flag("PatchBank", "mirrored", mirrored)
        self.power = check_number("PatchBank", "power", power, above=0.0)

    def begin(self, seen: Readout, sites: Sites, generator: torch.Generator) -> dict[str, Tensor]:
        """The filters, as a convolution's weight and bias over patches that are centred and scaled."""
        images = images_of(seen)
        size = min(self.size, *images.shape[2:])
        if images.shape[1] * size**2 == 1:
            raise ContinualError(
                f"task_inference: patches of images of {images.shape[2]} x {images.shape[3]} pixels are single values,"
                " which hold nothing to compare. Use RandomFeatures, which take the values as they are."
            )
        patches = _drawn(images.cpu(), size, generator)
        centre, whitening = _whitening(patches)
        chosen = (patches - centre)[: self.filters] @ whitening
        chosen = whitening @ (chosen / chosen.norm(dim=1, keepdim=True).clamp_min(1e-6)).T
        bias = -(centre @ chosen)
        chosen = chosen - chosen.mean(dim=0)  # so that a patch need not be centred
        return {"weight": chosen.T.reshape(-1, images.shape[1], size, size), "bias": bias}

    def of(self, fixed: Fixed, seen: Readout, sites: Sites) -> Rows:
        """Both halves of the matches with each filter in each cell."""
        images = images_of(seen)
        few = max(1, AT_ONCE // max(1, self.filters * images[0].numel() // images.shape[1])) if len(images) else 1
        found = torch.cat([self._of(fixed, part) for part in images.split(few)])
        return found if self.power == 1 else found.clamp_min_(0).pow_(self.power)

    def _of(self, fixed: Fixed, images: Images) -> Rows:
        found = self._pooled(fixed, images)
        return (found + self._pooled(fixed, images.flip(3))) / 2 if self.mirrored else found

    def _pooled(self, fixed: Fixed, images: Images) -> Rows:
        matches = F.softshrink(_matches(images, fixed["weight"], fixed["bias"]), self.threshold)
        signed = _means(matches, self.grid)
        either = _means(matches.abs_(), self.grid)
        return torch.cat([either + signed, either - signed], dim=1).flatten(1) / 2


def _drawn(images: Images, size: int, generator: torch.Generator) -> Float[Tensor, "patches values"]:
    """Patches from anywhere, centred and divided by their deviation; those that are flat are left out."""
    windows = images.unfold(2, size, 1).unfold(3, size, 1)
    count, _, rows, columns = windows.shape[:4]
    places = [torch.randint(limit, (DRAWN,), generator=generator) for limit in (count, rows, columns)]
    patches = windows[places[0], :, places[1], places[2]].reshape(DRAWN, -1)
    patches = patches - patches.mean(dim=1, keepdim=True)
    lively = patches.std(dim=1) > FLAT
    patches = patches[lively] if bool(lively.any()) else patches
    return patches / (patches.var(dim=1, keepdim=True) + NOISE).sqrt()


def _whitening(patches: Float[Tensor, "patches values"]) -> tuple[Float[Tensor, "values"], Float[Tensor, "values _"]]:
    """The mean, and what makes the covariance the identity, symmetrically (ZCA)."""
    centre = patches.mean(dim=0)
    centred = (patches - centre).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(patches))
    return centre, (vectors @ torch.diag((values.clamp_min(0) + WHITENING).rsqrt()) @ vectors.T).float()


def _matches(
    images: Images, weight: Float[Tensor, "filters channels size size"], bias: Float[Tensor, "filters"]
) -> Float[Tensor, "batch filters rows columns"]:
    """Each filter's product with each patch, divided by the patch's deviation; filters are such that sum to nothing."""
    values = weight[0].numel()
    averaging = torch.full_like(weight[:1], 1 / values)
    mean = F.conv2d(images, averaging)
    variance = (F.conv2d(images.square(), averaging) - mean.square()).clamp_min(0) * values / (values - 1)
    return F.conv2d(images, weight).mul_((variance + NOISE).rsqrt()).add_(bias[:, None, None])


def _means(
    values: Float[Tensor, "batch filters rows columns"], grid: tuple[int, ...]
) -> Float[Tensor, "batch filters _ _"]:
    """Over the cells of a grid, as ``adaptive_avg_pool2d`` has them, which takes longer."""
    sides = zip(values.shape[2:], grid, strict=True)
    rows, columns = (F.adaptive_avg_pool1d(torch.eye(size).to(values), cells) for size, cells in sides)
    found: Tensor = rows.T @ (values @ columns)
    return found
