"""Sub-spaces in which units are perturbed, or in which training steps stay.

Begin with :mod:`lightning_cf.subspaces.subspace`.
"""

from lightning_cf.subspaces.subspace import GivenSubspace, LearnedSubspace, RandomSubspace, Subspace

__all__ = ["GivenSubspace", "LearnedSubspace", "RandomSubspace", "Subspace"]
