"""A Transformer tells two kinds of waves apart, and later two others, and forgets neither."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_cf import InvarianceCallback, MaskedGradientCallback, PartitionCallback, Task

OPTIONS = {"gradient_clip_val": 1, "logger": False, "enable_checkpointing": False}
KINDS = ["sine", "square", "sawtooth", "pulse"]
LENGTH, PATCH = 32, 4


def waves(kinds, count, seed):
    """Noisy waves of some kinds, of many lengths and phases, with the number of each one's kind."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(kinds)[torch.randint(len(kinds), (count,), generator=generator)]
    rate = 1.5 + 2 * torch.rand(count, 1, generator=generator)
    phase = (torch.rand(count, 1, generator=generator) + rate * torch.arange(LENGTH) / LENGTH) % 1
    shapes = torch.stack(
        [
            (2 * torch.pi * phase).sin(),
            torch.where(phase < 0.5, 1.0, -1.0),
            2 * phase - 1,
            torch.where(phase < 0.2, 1.0, -1.0),
        ]
    )
    clean = shapes[labels, torch.arange(count)]
    return clean + 0.2 * torch.randn(count, LENGTH, generator=generator), labels


class Waves(LightningModule):
    def __init__(self, width=48):
        super().__init__()
        self.embed = nn.Linear(PATCH, width)
        self.position = nn.Parameter(0.1 * torch.randn(LENGTH // PATCH, width))
        layer = nn.TransformerEncoderLayer(width, 6, 96, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(KINDS))

    def forward(self, x):
        tokens = self.embed(x.unflatten(1, (-1, PATCH)))
        return self.head(self.encoder(tokens + self.position).mean(1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.003)


@torch.no_grad()
def accuracy(model, kinds):
    x, y = waves(kinds, 400, seed=2)
    guess = torch.tensor(kinds)[model.eval()(x)[:, kinds].argmax(1)]
    return (guess == y).float().mean().item()


def main(epochs=10):
    seed_everything(0)
    model, scores = Waves(), []
    tasks = {"smooth": [0, 1], "sharp": [2, 3]}
    for name, kinds in tasks.items():
        train = DataLoader(TensorDataset(*waves(kinds, 960, seed=0)), batch_size=32, shuffle=True)
        ours = [PartitionCallback(after=0.6), InvarianceCallback(), MaskedGradientCallback()]
        trainer = Trainer(max_epochs=epochs, callbacks=ours, **OPTIONS)
        trainer.fit(model.train(), datamodule=Task(name, {"train": train}, classes=kinds))
        scores.append({task: accuracy(model, tasks[task]) for task in tasks})
        print(f"after {name}:", scores[-1])
    return scores


if __name__ == "__main__":
    main()
