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
    weight = _solved(covariance, shrinkage, (means - mean).T) / len(sums.classes)
    return Linear(torch.tensor(sums.classes), weight.float(), (-mean @ weight + 1 / len(sums.classes)).float())


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


def spread(linear: Linear, sums: Sums) -> tuple[Float[Tensor, "classes"], Float[Tensor, "classes"]]:
    """Mean and deviation of each class's output over the samples of that class, from the sums alone.

    The deviation is that of the covariance within classes, which all share.
    """
    means = _means(sums)[1]
    weight = linear.weight.double()
    middle = (means * weight.T).sum(dim=1) + linear.bias.double()
    deviation = ((_within(sums) @ weight) * weight).sum(dim=0).clamp_min(1e-12).sqrt()
    return middle.float(), deviation.float()
