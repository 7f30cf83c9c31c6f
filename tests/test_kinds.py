"""Tasks of different kinds in one network: classes, numbers, pixels; each with a loss and a metric of its own."""

import pytest
import torch
from learning import images, quiet_trainer
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import JaccardIndex, MeanSquaredError
from torchmetrics.classification import MultilabelF1Score

from lightning_cf import MaskedGradientCallback, PartitionCallback, SequentialTaskRunner, Task
from lightning_cf.state import state_of

pytestmark = pytest.mark.filterwarnings("ignore:.*no claim within the budget")


def loaders(target, classes=range(10)):
    """Images of some classes with a target computed from image and label."""
    chosen = images().map(lambda part: part.of_classes(list(classes)))
    parts = {"train": chosen.train, "val": chosen.val, "test": chosen.test}
    return {
        stage: DataLoader(TensorDataset(part.images, target(part.images, part.labels)), 32, shuffle=stage == "train")
        for stage, part in parts.items()
    }


COLUMNS = {"classes": [0, 1], "mean": [2, 3], "halves": [4, 5, 6]}


class ManyKinds(LightningModule):
    """One body; the loss follows from the task: its name tells columns and kind."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU())
        self.head = nn.Linear(96, 7)

    def forward(self, x):
        return self.head(self.net(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        name = self.trainer.datamodule.name
        outputs = self(x)[:, COLUMNS[name]]
        if name == "classes":
            return F.cross_entropy(outputs, y)
        if name == "mean":
            return F.mse_loss(outputs, y)
        return F.binary_cross_entropy_with_logits(outputs, y.float())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.003, weight_decay=0.01)


def column_reader(columns, change=lambda outputs: outputs):
    def evaluate(module, batch):
        x, y = batch
        return change(module(x)[:, columns]), y

    return evaluate


def halves(x, y):
    """Three labels that do not exclude one another."""
    ink = x.flatten(2).squeeze(1).reshape(-1, 8, 8)
    return torch.stack([ink[:, :4].sum((1, 2)) > 10, ink[:, :, :4].sum((1, 2)) > 9.6, y % 2 == 0], dim=1).long()


def many_kinds():
    return [
        Task("classes", loaders(lambda x, y: y, (0, 1)), outputs=COLUMNS["classes"], evaluate=column_reader([0, 1])),
        Task(
            "mean",
            loaders(lambda x, y: torch.stack([x.mean((1, 2, 3)), x[:, 0, :4].mean((1, 2))], dim=1)),
            outputs=COLUMNS["mean"],
            metric=MeanSquaredError(),
            evaluate=column_reader([2, 3]),
        ),
        Task(
            "halves",
            loaders(halves),
            outputs=COLUMNS["halves"],
            metric=MultilabelF1Score(3),
            evaluate=column_reader([4, 5, 6], torch.sigmoid),
        ),
    ]


def test_classification_regression_and_many_labels_follow_one_another(tmp_path):
    torch.manual_seed(0)
    module, sequence = ManyKinds(), many_kinds()
    result = SequentialTaskRunner(
        module,
        sequence,
        trainer=quiet_trainer,
        epochs=12,
        invariance_epochs=8,
        partition=PartitionCallback(tolerance=0.01),
        masking=MaskedGradientCallback(mask_outputs=False),
        root=tmp_path,
    ).run()
    matrix, initial = result.accuracy.matrix, result.accuracy.initial
    for task in range(3):
        assert bool((matrix[task:, task] == matrix[task, task]).all())
    assert matrix[2, 0] > 0.97
    # The score of a metric of which less is better is its negative.
    spread = torch.cat([y for _, y in sequence[1].test_dataloader()]).var(dim=0).mean()
    assert -matrix[2, 1] < 0.3 * float(spread) < -float(initial[1])
    assert matrix[2, 2] > 0.9 > float(initial[2])
    assert result.constant_predictor == [None] * 3
    owners = {int(owner) for owners in state_of(module).ledger.owners.values() for owner in owners}
    assert owners == {-1, 0, 1, 2}


class Pixels(LightningModule):
    """A class for every pixel."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Conv2d(24, 4, 1)

    def forward(self, x):
        return self.head(self.net(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def ink(x, y):
    return (x[:, 0] > 0.5).long()


def edge(x, y):
    """Ink above a pixel without."""
    dark = x[:, 0] > 0.5
    return 2 + (dark & ~F.pad(dark[:, 1:], (0, 0, 0, 1))).long()


def test_segmentation_with_classes_of_its_own_for_each_task(tmp_path):
    torch.manual_seed(0)
    sequence = [
        Task(name, loaders(target), classes=classes, metric=JaccardIndex(task="multiclass", num_classes=4))
        for name, target, classes in (("ink", ink, [0, 1]), ("edge", edge, [2, 3]))
    ]
    for task in sequence:
        task.metric.average = "weighted"  # classes that a task does not have count nothing
    result = SequentialTaskRunner(
        Pixels(), sequence, trainer=quiet_trainer, epochs=4, invariance_epochs=3, root=tmp_path
    ).run()
    assert result.accuracy.forgetting == 0.0
    assert float(result.accuracy.matrix[-1].min()) > 0.9
    assert max(result.constant_predictor) < 0.85
