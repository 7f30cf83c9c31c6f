"""Small random changes of training images."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lightning_cf.errors import ContinualError, check_number

Images = Float[Tensor, "batch channels height width"]


class RandomAffine:
    """Rotates, scales, shears and shifts each image a little, as drawn from the global generator.

    >>> RandomAffine(degrees=0, scale=0, shear=0, translate=0)(torch.ones(2, 1, 4, 4)).sum().item()
    32.0

    Args:
        degrees: at most this far in either direction.
        scale: width and height change by at most this share.
        shear: a line is shifted by at most this share of its distance from the middle.
        translate: shifts by at most this share of the image's size.
    """

    def __init__(
        self, *, degrees: float = 5.0, scale: float = 0.05, shear: float = 0.07, translate: float = 0.015
    ) -> None:
        self.degrees, self.scale, self.shear, self.translate = degrees, scale, shear, translate
        for name in ("degrees", "scale", "shear", "translate"):
            value = getattr(self, name)
            if check_number("RandomAffine", name, value, least=0.0) >= 180:
                raise ContinualError(f"RandomAffine: {name} must be below 180, got {value!r}.")

    def __call__(self, images: Images) -> Images:
        """The images changed, black where nothing was."""

        def drawn(size: float) -> Tensor:
            return (2 * torch.rand(len(images)) - 1) * size

        angle, shear = torch.deg2rad(drawn(self.degrees)), drawn(self.shear)
        cos, sin, wide, high = angle.cos(), angle.sin(), 1 + drawn(self.scale), 1 + drawn(self.scale)
        across, down = drawn(2 * self.translate), drawn(2 * self.translate)
        rows = [torch.stack([cos * wide, shear - sin, across], 1), torch.stack([sin, cos * high, down], 1)]
        matrix = torch.stack(rows, 1).to(images)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)
