"""A run of two tasks that takes no time, and what may happen to it."""

import io
import random
from functools import partial

import torch
from learning import quiet_trainer
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cf import SequentialTaskRunner, Task

FEW = 40


class Net(LightningModule):
    """As somebody's project has it."""

    def __init__(self, lr=0.01, activation=nn.ReLU, hidden=8):
        super().__init__()
        self.lr = lr
        self.body = nn.Sequential(nn.Linear(6, hidden), activation())
        self.head = nn.Linear(hidden, 4)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def net(seed=0, kind=Net, **options):
    torch.manual_seed(seed)
    return kind(**options)


def data(classes, seed=0, batch_size=20):
    generator = torch.Generator().manual_seed(seed + 10 * classes[0])
    y = torch.tensor(classes)[torch.arange(FEW) % 2]
    x = torch.randn(FEW, 6, generator=generator) + y[:, None]
    sets = TensorDataset(x, y)
    return {
        "train": DataLoader(sets, batch_size, shuffle=True),
        "val": DataLoader(sets, FEW),
        "test": DataLoader(sets, FEW),
    }


def pair(seed=0, batch_size=20, **options):
    return [
        Task("a", data([0, 1], seed, batch_size), classes=[0, 1], **options),
        Task("b", data([2, 3], seed, batch_size), classes=[2, 3], **options),
    ]


def run_of(root, *, module=None, sequence=None, **options):
    options = {"trainer": quiet_trainer, "epochs": 1, "invariance_epochs": 1, "task_inference": None, **options}
    return SequentialTaskRunner(
        net() if module is None else module, pair() if sequence is None else sequence, root=root, **options
    )


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    """One bit of what the file holds; of a zip file, of the first tensor's numbers."""
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    if content[:2] == b"PK":
        numbers = io.BytesIO()
        first = next(t for t in _tensors(torch.load(path, weights_only=True)) if t.numel() > 8)
        numbers.write(first.contiguous().numpy().tobytes())
        place = bytes(content).index(numbers.getvalue()) + 3
    content[place] ^= 1 << random.Random(0).randrange(3)
    path.write_bytes(bytes(content))


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def delete(path):
    path.unlink()


def swap(path, other):
    path.write_bytes(other.read_bytes())


HARMS = {"truncate": truncate, "zero": zero, "flip": flip, "delete": delete}
joint = partial(run_of, method="joint")
