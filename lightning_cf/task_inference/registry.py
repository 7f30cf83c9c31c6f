"""All strategies of task inference by name, the user's own among them."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_cf.errors import ContinualError, check_choice
from lightning_cf.task_inference.accumulated.strategy import Accumulated
from lightning_cf.task_inference.autoencoder import InputAutoencoder
from lightning_cf.task_inference.combined import Aided, Sum
from lightning_cf.task_inference.neither import Neither
from lightning_cf.task_inference.reconstruction import Reconstruction
from lightning_cf.task_inference.rotations import Rotations
from lightning_cf.task_inference.statistics import (
    FirstLayer,
    InputGaussian,
    InputSubspaces,
    LocalSubspaces,
    Mahalanobis,
)
from lightning_cf.task_inference.strategies import (
    CHOICES,
    NEEDS,
    Energy,
    Joint,
    MaxSoftmax,
    Plain,
    Strategy,
)

STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Plain(),
        Joint(),
        Energy(),
        MaxSoftmax(),
        Mahalanobis(),
        FirstLayer(),
        LocalSubspaces(),
        Sum("mahalanobis_energy", [Mahalanobis(), Energy()]),
        Sum("subspaces_energy", [LocalSubspaces(), Energy()]),
        Reconstruction(),
        Reconstruction("reconstruction_logits", 0.02),
        Aided("reconstruction_subspaces", Reconstruction("reconstruction_logits", 0.02), LocalSubspaces(), share=0.1),
        Neither(),
        Sum("neither_mahalanobis", [Neither(), Mahalanobis()]),
        Rotations(),
        Rotations("rotations_once", ensemble=False),
        Accumulated("lda_units", within=True),
        Accumulated("lda"),
        Accumulated("ridge", form="ridge"),
        InputGaussian(),
        InputSubspaces(),
        InputAutoencoder(),
    )
}
"""All strategies by name; the last five stand beside the network. Registered ones follow."""


_OURS = frozenset(STRATEGIES)


def register(strategy: Strategy) -> Strategy:
    """Makes a strategy known by its name, in this process: to fit it, and to load what was fitted with it.

    Args:
        strategy: with a name of its own; takes the place of an earlier one of that name.

    Raises:
        ContinualError: for a name that one of this package's strategies has, or needs that there are not.
    """
    name = getattr(strategy, "name", None)
    if not isinstance(name, str) or not name or name in (*CHOICES, *_OURS):
        raise ContinualError(f"task_inference: {type(strategy).__name__} needs a name of its own, got {name!r}.")
    check_choice(f"task_inference: {name}", "needs", strategy.needs, ("", *NEEDS))
    STRATEGIES[name] = strategy
    return strategy


def check_strategies(names: Sequence[str]) -> None:
    """Raises ContinualError for a strategy that there is not."""
    for name in names:
        if name not in STRATEGIES:
            raise ContinualError(
                f"task_inference must be one of {', '.join((*CHOICES, *STRATEGIES))}; got {name!r}; a strategy of your"
                " own has to be registered first: lightning_cf.task_inference.register."
            )
