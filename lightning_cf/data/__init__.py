"""Task sequences from labelled images, and two sources of those."""

from lightning_cf.data.augmentation import RandomAffine
from lightning_cf.data.images import ImageSplits, TensorImages
from lightning_cf.data.sequences import permuted_tasks, rotated_tasks, split_tasks
from lightning_cf.data.sources import digits, mnist

__all__ = [
    "ImageSplits",
    "RandomAffine",
    "TensorImages",
    "digits",
    "mnist",
    "permuted_tasks",
    "rotated_tasks",
    "split_tasks",
]
