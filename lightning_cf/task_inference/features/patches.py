"""A bank of patches of the first task's images, as filters."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lightning_cf.errors import check_count, check_flag, check_number
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

AT_ONCE = 2**26
"""So many matches are computed at a time: those of a batch of large images would not fit into memory."""

Images = Float[Tensor, "batch channels height width"]


class PatchBank(Features):
    """How well patches of an image match some of the first task's, whitened, on a coarse grid (Coates and Ng 2012).

    Patches are centred, divided by their own deviation and whitened; a filter is such a patch, of unit length. A match
    counts where it exceeds a threshold, and likewise its opposite; matches are averaged over the cells of a grid.

    Args:
        filters: how many patches.
        size: of a patch, in pixels.
        grid: cells along each side of the image.
        threshold: of a match.
        mirrored: whether to average over the image and its mirror image.
    """

    def __init__(
        self, filters: int = 200, *, size: int = 6, grid: int = 2, threshold: float = 0.25, mirrored: bool = True
    ) -> None:
        self.filters = check_count("PatchBank", "filters", filters)
        self.size = check_count("PatchBank", "size", size)
        self.grid = check_count("PatchBank", "grid", grid)
        self.threshold = check_number("PatchBank", "threshold", threshold, least=0.0)
        self.mirrored = check_flag("PatchBank", "mirrored", mirrored)

    def begin(self, seen: Readout, sites: Sites, generator: torch.Generator) -> dict[str, Tensor]:
        """The filters, as a convolution's weight and bias over patches that are centred and scaled."""
        images = images_of(seen)
        size = min(self.size, *images.shape[2:])
        patches = _drawn(images.cpu(), size, generator)
        centre, whitening = _whitening(patches)
        chosen = (patches - centre)[: self.filters] @ whitening
        chosen = whitening @ (chosen / chosen.norm(dim=1, keepdim=True).clamp_min(1e-6)).T
        return {"weight": chosen.T.reshape(-1, images.shape[1], size, size), "bias": -(centre @ chosen)}

    def of(self, fixed: Fixed, seen: Readout, sites: Sites) -> Rows:
        """Both halves of the matches with each filter in each cell."""
        images = images_of(seen)
        few = max(1, AT_ONCE // max(1, 2 * self.filters * images[0].numel() // images.shape[1])) if len(images) else 1
        return torch.cat([self._of(fixed, part) for part in images.split(few)])

    def _of(self, fixed: Fixed, images: Images) -> Rows:
        found = self._pooled(fixed, images)
        return (found + self._pooled(fixed, images.flip(3))) / 2 if self.mirrored else found

    def _pooled(self, fixed: Fixed, images: Images) -> Rows:
        matches = _matches(images, fixed["weight"], fixed["bias"])
        both = torch.cat([matches - self.threshold, -self.threshold - matches], dim=1).relu_()
        return F.adaptive_avg_pool2d(both, self.grid).flatten(1)


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
    """Each filter's product with each patch, centred and divided by its deviation."""
    values = weight[0].numel()
    averaging = torch.full_like(weight[:1], 1 / values)
    mean = F.conv2d(images, averaging)
    variance = (F.conv2d(images.square(), averaging) - mean.square()).clamp_min(0) * values / (values - 1)
    sums = weight.sum(dim=(1, 2, 3))[:, None, None]
    return (F.conv2d(images, weight) - mean * sums) * (variance + NOISE).rsqrt() + bias[:, None, None]
