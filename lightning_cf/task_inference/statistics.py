"""Scores from statistics of the hidden units that a task owns and may read, and from statistics of its input."""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_cf.task_inference.readout import View
from lightning_cf.task_inference.strategies import Fitted, Strategy

Samples = Float[Tensor, "samples features"]


def _hidden(view: View) -> Samples:
    """The units that the task may read, before their activation where one linear layer computes them."""
    return torch.cat(view.before or view.hidden, dim=1)


class Mahalanobis(Strategy):
    """Distance to the nearest class mean, in the metric of the covariance within classes (Lee et al. 2018).

    Kept: a mean a class, the covariance's leading directions, and one variance for all that lies beside them, as in
    probabilistic principal components (Tipping and Bishop 1999).

    Args:
        rank: how many directions to keep.
    """

    name, needs = "mahalanobis", "hidden"

    def __init__(self, rank: int = 32) -> None:
        self.rank = rank

    def fit(self, view: View, labels: Int64[Tensor, "samples"], classes: int, held_out: View) -> dict[str, Tensor]:
        """Class means, and the covariance within classes: leading directions, their variances, the rest's."""
        return _gaussian(self.units(view), labels, classes, self.rank)

    def score(self, fitted: Fitted, view: View) -> Float[Tensor, "batch"]:
        """Minus the squared distance to the nearest mean."""
        return -_distance(self.units(view), fitted).amin(dim=1)

    def units(self, view: View) -> Samples:
        """The units in which the distance is taken, one row a sample."""
        return _hidden(view)


class FirstLayer(Mahalanobis):
    """As :class:`Mahalanobis`, over the first layer's units before their activation, which are linear in the input.

    What no class of the task has, such as pixels in another order, leaves the few directions in which these units vary
    together; behind an activation, and a layer further, that shows less.
    """

    name, needs = "first_layer", "first"

    def units(self, view: View) -> Samples:
        """The first layer's units before their activation, one row a sample."""
        return view.before[0]


def _gaussian(x: Samples, labels: Int64[Tensor, "samples"], classes: int, rank: int) -> dict[str, Tensor]:
    means = torch.stack([x[labels == label].mean(dim=0) for label in range(classes)])
    centred = (x - means[labels]).double()
    means = means[~means.isnan().any(dim=1)]  # a class without samples has none
    covariance = centred.T @ centred / len(x)
    values, vectors = torch.linalg.eigh(covariance)
    rank = min(rank, max(1, len(values) - 1))
    rest = values[:-rank].clamp_min(0).mean() if len(values) > rank else values.new_zeros(())
    floor = (values.mean() * 1e-4).clamp_min(1e-12)
    return {
        "means": means,
        "directions": vectors[:, -rank:].float(),
        "variances": values[-rank:].clamp_min(floor).float(),
        "rest": rest.clamp_min(floor).float(),
    }


def _distance(x: Float[Tensor, "batch features"], fitted: Fitted) -> Float[Tensor, "batch classes"]:
    found = []
    for mean in fitted["means"]:
        centred = x - mean
        along = centred @ fitted["directions"]
        beside = (centred.square().sum(dim=1) - along.square().sum(dim=1)).clamp_min(0)
        found.append((along.square() / fitted["variances"]).sum(dim=1) + beside / fitted["rest"])
    return torch.stack(found, dim=1)


class LocalSubspaces(Strategy):
    """Distance of the hidden units to the nearest of a few small sub-spaces a class.

    Each class's samples are put in clusters (k-means); a cluster keeps its centre and its leading directions.

    Args:
        clusters: of each class.
        rank: directions of each cluster.
    """

    name, needs = "subspaces", "hidden"

    def __init__(self, clusters: int = 2, rank: int = 8) -> None:
        self.clusters, self.rank = clusters, rank

    def fit(self, view: View, labels: Int64[Tensor, "samples"], classes: int, held_out: View) -> dict[str, Tensor]:
        """Scales of the units, centres and directions."""
        return _local(_hidden(view), labels, classes, self.clusters, self.rank)

    def score(self, fitted: Fitted, view: View) -> Float[Tensor, "batch"]:
        """Minus the squared distance to the nearest sub-space."""
        return -_residual(_hidden(view), fitted).amin(dim=1)


_ROUNDING = 1e-10
"""Directions with less than this share of the largest variance are what rounding makes of none."""


def _local(
    x: Samples, labels: Int64[Tensor, "samples"], classes: int, clusters: int, rank: int, *, scaled: bool = True
) -> dict[str, Tensor]:
    spread = x.std(dim=0, correction=0)
    scale = spread.clamp_min(max(0.1 * float(spread.mean()), 1e-6)) if scaled else x.new_ones(1)
    x = x / scale
    varying = _varying(x)
    centres, directions = [], []
    for label in (label for label in range(classes) if bool((labels == label).any())):
        own = x[labels == label]
        for part in _clusters(own, max(1, min(clusters, len(own) // (4 * rank)))):
            centre = part.mean(dim=0)
            _, vectors = torch.linalg.eigh(((part - centre).T @ (part - centre)).double())
            centres.append(centre)
            kept = min(rank, len(part) - 1, varying // 2)  # not all of them: what lies beside is the score
            directions.append(vectors[:, x.shape[1] - kept :].float())
    width = max(found.shape[1] for found in directions)
    padded = [torch.nn.functional.pad(found, (width - found.shape[1], 0)) for found in directions]
    return {"scale": scale, "centres": torch.stack(centres), "directions": torch.stack(padded)}


def _varying(x: Samples) -> int:
    """In how many directions samples vary by more than rounding; in all, as far as these few tell."""
    centred = (x - x.mean(dim=0)).double()
    values = torch.linalg.eigvalsh(centred.T @ centred)
    found = int((values > _ROUNDING * values[-1]).sum())
    return found if found < min(len(x) - 1, x.shape[1]) else x.shape[1]


def _residual(x: Float[Tensor, "batch features"], fitted: Fitted) -> Float[Tensor, "batch clusters"]:
    x = x / fitted["scale"]
    found = []
    for centre, directions in zip(fitted["centres"], fitted["directions"], strict=True):
        centred = x - centre
        found.append((centred - centred @ directions @ directions.T).square().sum(dim=1))  # no difference of squares
    return torch.stack(found, dim=1)


def _clusters(x: Samples, count: int) -> list[Float[Tensor, "_ features"]]:
    """k-means; clusters of a single sample are left out."""
    if count == 1:
        return [x]
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # units that never vary: fewer clusters will do
        found = KMeans(count, n_init=1, random_state=0).fit_predict(x.cpu().numpy())
    parts = [x[torch.from_numpy(found == number).to(x.device)] for number in range(count)]
    return [part for part in parts if len(part) > 1] or [x]


class InputGaussian(Strategy):
    """A Gaussian with a diagonal covariance over the network's input, a task: a model beside the network."""

    name: ClassVar[str] = "input_gaussian"
    raw: ClassVar[bool] = True
    beside: ClassVar[bool] = True
    needs = "inputs"

    def fit(self, view: View, labels: Int64[Tensor, "samples"], classes: int, held_out: View) -> dict[str, Tensor]:
        """Mean and variance of each of the input's values over the training data."""
        assert view.inputs is not None
        variance = view.inputs.var(dim=0)
        return {"mean": view.inputs.mean(dim=0), "variance": variance + 0.05 * variance.mean().clamp_min(1e-6)}

    def score(self, fitted: Fitted, view: View) -> Float[Tensor, "batch"]:
        """The log-density of each input, divided by how many values it has."""
        assert view.inputs is not None
        terms = (view.inputs - fitted["mean"]).square() / fitted["variance"] + fitted["variance"].log()
        return -terms.mean(dim=1) / 2


class InputSubspaces(Strategy):
    """Local principal components of each class's inputs: a model beside the network.

    Args:
        clusters: of each class.
        rank: directions of each cluster.
    """

    name, raw, needs, beside = "input_subspaces", True, "inputs", True

    def __init__(self, clusters: int = 1, rank: int = 16) -> None:
        self.clusters, self.rank = clusters, rank

    def fit(self, view: View, labels: Int64[Tensor, "samples"], classes: int, held_out: View) -> dict[str, Tensor]:
        """For each class the centres of its clusters of inputs, and the leading directions around each."""
        assert view.inputs is not None
        return _local(view.inputs, labels, classes, self.clusters, self.rank, scaled=False)

    def score(self, fitted: Fitted, view: View) -> Float[Tensor, "batch"]:
        """Minus the mean squared distance to the nearest sub-space."""
        assert view.inputs is not None
        return -_residual(view.inputs, fitted).amin(dim=1) / view.inputs.shape[1]
