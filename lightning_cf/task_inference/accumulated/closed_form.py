"""Linear classifiers in closed form from sums over features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_cf.task_inference.accumulated.sums import STEP, Sums

OUTPUTS_TO = 1e-5
"""How exact outputs are as a share of their size: sums of many products in float32, in whatever order."""

LEAST = STEP**2 / 12
"""The least variance that a mean variance is taken for: what rounding to whole steps makes of values."""


@dataclass(frozen=True)
class Linear:
    """A linear classifier over features.

    Attributes:
        classes: the class of each of its outputs.
        weight: of each output.
        bias: likewise.
    """

    classes: Int64[Tensor, "classes"]
    weight: Float[Tensor, "features classes"]
    bias: Float[Tensor, "classes"]

    def __call__(self, rounded: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """The outputs for features as whole numbers of steps."""
        outputs: Tensor = (rounded * STEP) @ self.weight + self.bias
        return outputs


@dataclass(frozen=True)
class Separation:
    """What parts the classes: solved once for a discriminant and for what is familiar to it.

    ``S`` is the covariance within classes, shrunk towards a multiple of the identity: ``S + shrinkage * mean(diag S)``
    on its diagonal.

    Attributes:
        sums: of the features.
        centred: the mean of each class, less that of all samples.
        mean: of all samples.
        within: the covariance within classes.
        added: to its diagonal.
        lower: the Cholesky factor of that.
        weight: of each class.
    """

    sums: Sums
    centred: Float[Tensor, "classes features"]
    mean: Float[Tensor, "features"]
    within: Float[Tensor, "features features"]
    added: float
    lower: Float[Tensor, "features features"]
    weight: Float[Tensor, "features classes"]

    @classmethod
    def of(cls, sums: Sums, shrinkage: float) -> Separation:
        """From the sums of all classes, in float64."""
        number, means, mean = _means(sums)
        within = (sums.square() * STEP**2 - (means * sums.counts.double()[:, None]).T @ means) / number
        added = shrinkage * float(within.diagonal().mean().clamp_min(LEAST))
        lower = torch.linalg.cholesky(within + added * torch.eye(len(within), dtype=torch.float64))
        centred = means - mean
        return cls(sums, centred, mean, within, added, lower, torch.cholesky_solve(centred.T, lower))


def discriminant(found: Separation) -> Linear:
    """Linear discriminant analysis: Gaussian classes of one covariance, each as likely as the others.

    An output is the log-density of its class, less what all classes share (Hayes and Kanan 2020, SLDA, update such
    statistics sample by sample).
    """
    bias = -found.mean @ found.weight - 0.5 * (found.centred.T * found.weight).sum(dim=0)
    return Linear(torch.tensor(found.sums.classes), found.weight.float(), bias.float())


def ridge(sums: Sums, shrinkage: float) -> Linear:
    """Ridge regression onto one-hot labels, each class weighed alike (Zhuang et al. 2022, ACIL)."""
    number, means, mean = _means(sums)
    covariance = sums.square() * STEP**2 / number - torch.outer(mean, mean)
    share = 1 / len(sums.classes)
    covariance.diagonal().add_(shrinkage * covariance.diagonal().mean().clamp_min(LEAST))
    weight = torch.cholesky_solve((means - mean).T, torch.linalg.cholesky(covariance)) * share
    return Linear(torch.tensor(sums.classes), weight.float(), (-mean @ weight + share).float())


def _means(sums: Sums) -> tuple[float, Float[Tensor, "classes features"], Float[Tensor, "features"]]:
    """How many samples there are, the mean of each class and that of all samples."""
    number = float(sums.counts.sum())
    totals = sums.totals.double() * STEP
    return number, totals / sums.counts.double()[:, None], totals.sum(dim=0) / number


@dataclass(frozen=True)
class Familiarity:
    """How well a sample suits its nearest class: by itself, and against the Gaussian over all classes together.

    The lower of two, each in deviations from what is to be expected of samples of that class: the largest output of
    :func:`discriminant`; and the relative Mahalanobis distance (Ren et al. 2021) within the directions that part the
    classes, where it depends on these outputs alone. Either finds strange what the other does not.

    In float64: the distance is a small difference of squares, which are large where classes lie far apart.

    Attributes:
        mixing: of the outputs, the classes' share in the overall covariance.
        half: what their biases hold of each class's own size.
        middle: for samples of each class, what is to be expected of the two.
        deviation: likewise; at least what the outputs' own rounding makes of it.
    """

    mixing: Float[Tensor, "classes classes"]
    half: Float[Tensor, "classes"]
    middle: Float[Tensor, "2 classes"]
    deviation: Float[Tensor, "2 classes"]

    @classmethod
    def of(cls, found: Separation) -> Familiarity:
        """From the sums alone, less what a classifier owes to the very samples that were summed.

        With ``df`` effective parameters (Hastie et al. 2009, 5.4) deviations of further samples are larger by about
        ``1 / (1 - df / samples)``, and a class's own output is smaller by about ``df`` over its samples.
        """
        counts, within, weight = found.sums.counts.double(), found.within, found.weight
        number, unit = float(counts.sum()), torch.eye(len(within), dtype=torch.float64)
        inverse = torch.linalg.solve_triangular(found.lower, unit, upper=False)
        effective = float(len(within) - found.added * inverse.square().sum())
        own = found.centred @ weight
        half = own.diagonal() / 2
        largest = own.diagonal() - half - effective / counts
        mixing = torch.linalg.inv(torch.diag(number / counts) + own)
        between = weight.T @ within @ weight / max(1 - effective / number, 0.1) ** 2
        slope = 2 * torch.eye(len(own), dtype=torch.float64) - 2 * own @ mixing
        curved = mixing @ between
        middle = torch.stack([largest, 2 * largest - ((own @ mixing) * own).sum(dim=1) - curved.trace()])
        spread = ((slope @ between) * slope).sum(dim=1) + 2 * (curved @ curved).trace()
        deviation = torch.stack([between.diagonal(), spread]).clamp_min(1e-12).sqrt()
        rounding = OUTPUTS_TO * torch.stack([own.diagonal(), (slope * own).abs().sum(dim=1)])
        return cls(mixing, half, middle, torch.maximum(deviation, rounding))

    def __call__(self, outputs: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch"]:
        """For outputs of the discriminant; in deviations from what is to be expected of the nearest class."""
        exact = outputs.to(self.half)
        largest, best = exact.max(dim=1)
        along = exact + self.half
        found = torch.stack([largest, 2 * largest - ((along @ self.mixing) * along).sum(dim=1)])
        deviations: Tensor = (found - self.middle[:, best]) / self.deviation[:, best]
        return deviations.amin(dim=0).to(outputs)
