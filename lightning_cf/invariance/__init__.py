"""Redundant units are perturbed while the claimed ones train on, so that the task stops depending on them.

Begin with :mod:`lightning_cf.invariance.perturbations`; ``disturbance`` applies one to a live network and takes it
back.
"""

from lightning_cf.invariance.affine import Rotation, Scaling, Shear, Translation
from lightning_cf.invariance.disturbance import Disturbance
from lightning_cf.invariance.perturbations import (
    Ablate,
    Affine,
    Compose,
    InSubspace,
    Mixture,
    Noise,
    Perturbation,
    Resample,
)

__all__ = [
    "Ablate",
    "Affine",
    "Compose",
    "Disturbance",
    "InSubspace",
    "Mixture",
    "Noise",
    "Perturbation",
    "Resample",
    "Rotation",
    "Scaling",
    "Shear",
    "Translation",
]
