"""A project of two layers and forty samples, of which much can be got wrong."""

from functools import partial
from itertools import count

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_cf import (
    Classifier,
    Task,
)
from lightning_cf.models import MLP

X, Y = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
STEPS, NUMBERS = [], count()
dataset = TensorDataset(X, Y)
loader = DataLoader(dataset, batch_size=8)
data = {"train": loader, "val": loader, "test": loader}
quiet = partial(
    Trainer,
    accelerator="cpu",
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
    logger=False,
)


class Net(Classifier):
    def optimizer_step(self, *arguments, **options):
        STEPS.append(1)
        return super().optimizer_step(*arguments, **options)


def net(classes=4):
    return Net(MLP(shape=(8,), classes=classes, hidden=(12, 12)))


def task(name="a", **options):
    return Task(name, data, **{"classes": [0, 1], **options})


def over(x, y=Y, name="a"):
    return Task(name, {"train": DataLoader(TensorDataset(x, y[: len(x)]), batch_size=8)}, classes=[0, 1])
