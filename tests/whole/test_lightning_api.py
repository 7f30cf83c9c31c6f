"""Lightning goes by two names, ``lightning.pytorch`` and ``pytorch_lightning``: either works, a mixture is refused."""

import ast
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import pytest
import pytorch_lightning
import torch
from learning import classifier, tasks
from lightning.pytorch import Trainer

import lightning_cf
from lightning_cf import ContinualError, ContinualModule, MaskedGradientCallback, SequentialTaskRunner, Task
from lightning_cf.lightning_api import NAME

OTHER = {"lightning.pytorch": "pytorch_lightning", "pytorch_lightning": "lightning.pytorch"}[NAME]

pytestmark = pytest.mark.skipif(NAME != "lightning.pytorch", reason="compares with the other Lightning itself")

PROJECT = """
import {name} as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cf import *
from lightning_cf.lightning_api import NAME
from lightning_cf.learner.steps import weights_sha256

assert NAME == "{name}", NAME


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU())
        self.head = nn.Linear(40, 4)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Data(pl.LightningDataModule):
    def __init__(self, first):
        super().__init__()
        generator = torch.Generator().manual_seed(first)
        y = torch.arange(64) % 2
        x = torch.randn(64, 6, generator=generator) + 4 * y[:, None]
        self.data = TensorDataset(x, y + first)

    def train_dataloader(self):
        return DataLoader(self.data, 16)

    val_dataloader = test_dataloader = train_dataloader


torch.manual_seed(0)
net, sequence = Net(), [Task(f"from {{first}}", Data(first), classes=[first, first + 1]) for first in (0, 2)]
quiet = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
for task in sequence:
    ours = [PartitionCallback(after=0.5), InvarianceCallback(), MaskedGradientCallback(), TaskInferenceCallback()]
    pl.Trainer(max_epochs=4, callbacks=ours, enable_checkpointing=False, **quiet).fit(net, datamodule=task)
assert all(entry.phase == "sealed" for entry in ContinualModule(net).ledger.tasks)
print(weights_sha256(net))

torch.manual_seed(1)
runner = SequentialTaskRunner(
    Net(), sequence, trainer=lambda **options: pl.Trainer(**quiet, **options), epochs=2, invariance_epochs=1, root="run"
)
print(runner.run().weights_sha256)
"""


@pytest.mark.slow
def test_a_project_gives_the_same_weights_under_either_name(tmp_path):
    found = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        folder = tmp_path / name
        folder.mkdir()
        line = [sys.executable, "-W", "ignore", "-c", PROJECT.format(name=name)]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append([word for word in done.stdout.split() if len(word) == 64])
    assert len(found[0]) == 2
    assert found[0] == found[1]


class Data(pytorch_lightning.LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("mixture", "who"),
    [
        (lambda: Task("a", Data(), classes=[0]), "Task 'a': Data"),
        (lambda: ContinualModule(pytorch_lightning.LightningModule()), "ContinualModule: LightningModule"),
        (
            lambda: MaskedGradientCallback().setup(pytorch_lightning.Trainer(logger=False), classifier(), "fit"),
            "MaskedGradientCallback: Trainer",
        ),
        (
            lambda: MaskedGradientCallback().setup(Trainer(logger=False), pytorch_lightning.LightningModule(), "fit"),
            "MaskedGradientCallback: LightningModule",
        ),
        (
            lambda: SequentialTaskRunner(
                classifier(), tasks(1), trainer=partial(pytorch_lightning.Trainer, logger=False), root=mkdtemp()
            ).run(),
            "runner: Trainer",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_mixture_is_refused_by_name(mixture, who, unchecked):
    with pytest.raises(ContinualError, match=f"{who} comes from {OTHER}, but lightning_cf works with {NAME} here"):
        mixture()


def test_one_file_of_the_package_imports_lightning():
    found = set()
    for path in Path(lightning_cf.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.partition(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric") for name in names):
                found.add(path.name)
    assert found == {"lightning_api.py"}
