"""A small ResNet learns the digits 0 to 4, and later the digits 5 to 9, and forgets none."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_cf import InvarianceCallback, MaskedGradientCallback, PartitionCallback, Task


class Digits(LightningDataModule):
    def __init__(self, classes, batch_size=32):
        super().__init__()
        self.classes, self.batch_size = classes, batch_size

    def setup(self, stage):
        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
        labels = torch.tensor(data.target)
        mine = torch.isin(labels, torch.tensor(self.classes))
        images, labels = images[mine], labels[mine]
        self.train_set = TensorDataset(images[200:], labels[200:])
        self.val_set = TensorDataset(images[:200], labels[:200])

    def train_dataloader(self):
        return DataLoader(self.train_set, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val_set, 200)


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet(LightningModule):
    def __init__(self, lr=0.05):
        super().__init__()
        self.save_hyperparameters()
        self.blocks = nn.Sequential(Block(1, 24, 1), Block(24, 32, 2), Block(32, 48, 2))
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        return self.head(self.blocks(x).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def accuracy(model, classes):
    data = Digits(classes)
    data.setup("validate")
    x, y = data.val_set.tensors
    guess = torch.tensor(classes)[model.eval()(x)[:, classes].argmax(1)]
    return (guess == y).float().mean().item()


def main(epochs=8):
    seed_everything(0)
    model, scores = ResNet(), []
    tasks = {"low": [0, 1, 2, 3, 4], "high": [5, 6, 7, 8, 9]}
    for name, classes in tasks.items():
        ours = [PartitionCallback(after=0.6), InvarianceCallback(), MaskedGradientCallback()]
        trainer = Trainer(max_epochs=epochs, callbacks=ours, logger=False, enable_checkpointing=False)
        trainer.fit(model.train(), datamodule=Task(name, Digits(classes), classes=classes))
        scores.append({task: accuracy(model, tasks[task]) for task in tasks})
        print(f"after {name}:", scores[-1])
    return scores


if __name__ == "__main__":
    main()
