"""Clouds of points around a centre a class, as tasks, and a network of a user's own that learns them."""

import torch
from learning import inferred
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_cf import (
    InvarianceCallback,
    MaskedGradientCallback,
    PartitionCallback,
    Task,
)

INPUTS = 12


def points(classes, count=200, seed=0, inputs=INPUTS):
    """Clouds around a centre a class."""
    g = torch.Generator().manual_seed(seed)
    y = torch.tensor(classes)[torch.arange(count) % len(classes)]
    centres = 3 * torch.randn(10, inputs, generator=torch.Generator().manual_seed(99))
    return centres[y] + torch.randn(count, inputs, generator=g), y


def loaders(x, y, **options):
    data = TensorDataset(x, y)
    judging = DataLoader(data, 50, shuffle=True, **options)
    return {"train": DataLoader(data, 32, shuffle=True, **options), "val": judging, "test": judging}


def clouds(name, classes, **options):
    return Task(name, loaders(*points(classes)), classes=classes, **options)


class Net(LightningModule):
    """A user's own."""

    def __init__(self, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(INPUTS, width), nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.006)


def learned(module, sequence, strategy="auto", epochs=8, **options):
    return inferred(module, sequence, strategy, epochs, **options)


def pair():
    return [clouds("a", [0, 1]), clouds("b", [7, 3])]


QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def fit(module, task, epochs=3):
    """Fits a task with the three callbacks; what is warned of meanwhile reaches the test."""
    callbacks = [PartitionCallback(after=0.5), InvarianceCallback(), MaskedGradientCallback()]
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, callbacks=callbacks, **QUIET)
    trainer.fit(module.train(), datamodule=task)
    module.eval()


@torch.no_grad()
def outputs(module):
    """The outputs of a first task over classes 0 and 1, for its data."""
    return module(points([0, 1])[0])[:, :2].clone()
