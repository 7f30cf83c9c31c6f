"""Features of an input that no later task changes, which accumulated classifiers look at.

Begin with :mod:`lightning_cf.task_inference.features.base`, what features are; ``by_medium`` chooses them where nobody
does.
"""

from lightning_cf.task_inference.features.base import Custom, Features, Joined, Values
from lightning_cf.task_inference.features.by_medium import by_medium
from lightning_cf.task_inference.features.ngrams import HashedNgrams
from lightning_cf.task_inference.features.patches import PatchBank
from lightning_cf.task_inference.features.random_layer import RandomFeatures
from lightning_cf.task_inference.features.units import FirstUnits, Pretrained

__all__ = [
    "Custom",
    "Features",
    "FirstUnits",
    "HashedNgrams",
    "Joined",
    "PatchBank",
    "Pretrained",
    "RandomFeatures",
    "Values",
    "by_medium",
]
