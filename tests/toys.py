"""Tiny tasks on numbers, and a module that learns them, for tests that ask how data are read."""

import warnings

import torch
from learning import quiet_trainer
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_cf import InvarianceCallback, MaskedGradientCallback, PartitionCallback
from lightning_cf.partition.cost import PartitionWarning


def numbers(size=64, classes=(0, 1), seed=0):
    """Samples around the centre of their class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor(classes)[torch.arange(size) % len(classes)]
    x = torch.randn(size, 6, generator=generator) + 3 * F.one_hot(y, 6)
    return x, y


def loader(size=64, classes=(0, 1), batch_size=16, **options):
    return DataLoader(TensorDataset(*numbers(size, classes)), batch_size, **options)


class Net(LightningModule):
    """Two layers; counts its steps."""

    def __init__(self, norm=False, loss=F.cross_entropy):
        super().__init__()
        torch.manual_seed(0)
        middle = [nn.BatchNorm1d(16)] if norm else []
        self.net = nn.Sequential(nn.Linear(6, 16), *middle, nn.ReLU(), nn.Linear(16, 4))
        self.loss, self.steps = loss, 0

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val", self.loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Counted(IterableDataset):
    """Samples one by one, which counts them, with its copies: endless, or so many."""

    def __init__(self, size=None, classes=(0, 1)):
        self.data, self.size, self.counter = numbers(64, classes), size, torch.zeros(1, dtype=torch.long)

    @property
    def read(self):
        return int(self.counter)

    @read.setter
    def read(self, count):
        self.counter.fill_(count)

    def __iter__(self):
        at = 0
        while self.size is None or at < self.size:
            self.read += 1
            yield self.data[0][at % 64], self.data[1][at % 64]
            at += 1


def fit(net, task, callbacks=None, **options):
    """A fit with the three callbacks, whatever Lightning says about its loaders."""
    callbacks = (
        [PartitionCallback(), InvarianceCallback(), MaskedGradientCallback()] if callbacks is None else callbacks
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning\\.")
        warnings.simplefilter("ignore", PartitionWarning)
        quiet_trainer(**{"max_epochs": 1, "callbacks": three if callbacks is None else callbacks, **options}).fit(
            net, datamodule=task
        )
    return net
