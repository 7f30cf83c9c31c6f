"""Linear classifiers in closed form from sums over features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_cf.task_inference.accumulated.sums import STEP, Sums


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


def discriminant(sums: Sums, shrinkage: float) -> Linear:
    """Linear discriminant analysis: Gaussian classes of one covariance, each as likely as the others.

    ``S`` is the covariance within classes, shrunk towards a multiple of the identity: ``S + shrinkage * mean(diag S)``
    on its diagonal. An output is the log-density of its class, less what all classes share (Hayes and Kanan 2020,
    SLDA, update such statistics sample by sample).
    """
    _, means, mean = _means(sums)
    centred = means - mean
    weight = _solved(_within(sums), shrinkage, centred.T)
    bias = -mean @ weight - 0.5 * (centred.T * weight).sum(dim=0)
    return Linear(torch.tensor(sums.classes), weight.float(), bias.float())


def ridge(sums: Sums, shrinkage: float) -> Linear:
    """Ridge regression onto one-hot labels, each class weighed alike (Zhuang et al. 2022, ACIL)."""
    number, means, mean = _means(sums)
    covariance = sums.square() * STEP**2 / number - torch.outer(mean, mean)
    share = 1 / len(sums.classes)
    weight = _solved(covariance, shrinkage, (means - mean).T) * share
    return Linear(torch.tensor(sums.classes), weight.float(), (-mean @ weight + share).float())


def _means(sums: Sums) -> tuple[float, Float[Tensor, "classes features"], Float[Tensor, "features"]]:
    """How many samples there are, the mean of each class and that of all samples."""
    number = float(sums.counts.sum())
    totals = sums.totals.double() * STEP
    return number, totals / sums.counts.double()[:, None], totals.sum(dim=0) / number


def _within(sums: Sums) -> Float[Tensor, "features features"]:
    """The covariance within classes, about the mean of each."""
    number, means, _ = _means(sums)
    return (sums.square() * STEP**2 - (means * sums.counts.double()[:, None]).T @ means) / number


def _solved(
    covariance: Float[Tensor, "features features"], shrinkage: float, wanted: Float[Tensor, "features classes"]
) -> Float[Tensor, "features classes"]:
    size = covariance.diagonal().mean().clamp_min(1e-12)
    covariance.diagonal().add_(shrinkage * size)
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(covariance))


@dataclass(frozen=True)
class Familiarity:
    """How much better a sample suits its nearest class than the Gaussian over all classes together.

    The relative Mahalanobis distance (Ren et al. 2021) within the directions that part the classes, where it depends on
    the outputs of :func:`discriminant` alone.

    Attributes:
        mixing: of these outputs, the classes' share in the overall covariance.
        half: what their biases hold of each class's own size.
        middle: for samples of each class, what is to be expected.
        deviation: likewise.
    """

    mixing: Float[Tensor, "classes classes"]
    half: Float[Tensor, "classes"]
    middle: Float[Tensor, "classes"]
    deviation: Float[Tensor, "classes"]

    @classmethod
    def of(cls, sums: Sums, shrinkage: float) -> Familiarity:
        """From the sums alone, less what a classifier owes to the very samples that were summed.

        With ``df`` effective parameters (Hastie et al. 2009, 5.4) deviations of further samples are larger by about
        ``1 / (1 - df / samples)``, and a class's own output is smaller by about ``df`` over its samples.
        """
        number, means, mean = _means(sums)
        centred, counts, within = means - mean, sums.counts.double(), _within(sums)
        added = shrinkage * float(within.diagonal().mean().clamp_min(1e-12))
        shrunk = within + added * torch.eye(len(within), dtype=torch.float64)
        lower = torch.linalg.cholesky(shrunk)
        weight = torch.cholesky_solve(centred.T, lower)
        inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=torch.float64), upper=False)
        effective = float(len(within) - added * inverse.square().sum())
        own = centred @ weight
        half = own.diagonal() / 2
        mixing = torch.linalg.inv(torch.diag(number / counts) + own)
        between = weight.T @ within @ weight / max(1 - effective / number, 0.1) ** 2
        middle = 2 * (own.diagonal() - half - effective / counts) - ((own @ mixing) * own).sum(dim=1)
        slope = 2 * torch.eye(len(own), dtype=torch.float64) - 2 * own @ mixing
        curved = mixing @ between
        variance = ((slope @ between) * slope).sum(dim=1) + 2 * (curved @ curved).trace()
        found = mixing, half, middle - curved.trace(), variance.clamp_min(1e-12).sqrt()
        return cls(*(each.float() for each in found))

    def __call__(self, outputs: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch"]:
        """For outputs of the discriminant; in deviations from what is to be expected of the nearest class."""
        largest, best = outputs.max(dim=1)
        along = outputs + self.half
        found: Tensor = 2 * largest - ((along @ self.mixing) * along).sum(dim=1)
        return (found - self.middle[best]) / self.deviation[best]
