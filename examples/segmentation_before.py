"""A U-Net finds discs in noisy images, and later crosses."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

SIZE = 24


def draw(shape, count, seed):
    """Images with one shape each on a noisy ground, and for each pixel whether it belongs to the shape."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    centre = torch.randint(6, SIZE - 6, (2, count, 1, 1), generator=generator)
    radius = torch.randint(3, 6, (count, 1, 1), generator=generator)
    down, across = (rows - centre[0]).abs(), (columns - centre[1]).abs()
    if shape == "disc":
        mask = down**2 + across**2 <= radius**2
    else:
        mask = (torch.minimum(down, across) <= 1) & (torch.maximum(down, across) <= radius)
    images = 0.6 * mask[:, None] + 0.3 * torch.randn(count, 1, SIZE, SIZE, generator=generator)
    return images, mask.long()


def loader(shape, ground, count, seed, **options):
    images, mask = draw(shape, count, seed)
    return DataLoader(TensorDataset(images, ground + mask), **options)


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.second = block(1, 16), block(16, 32)
        self.middle = block(32, 32)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.last = block(32, 16)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        first = self.first(x)
        deep = self.middle(self.second(F.max_pool2d(first, 2)))
        return self.head(self.last(torch.cat([first, self.up(deep)], dim=1)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@torch.no_grad()
def overlap(model, shape, ground):
    """Intersection over union of the shape's pixels."""
    images, mask = draw(shape, 128, seed=2)
    found = model.eval()(images)[:, ground : ground + 2].argmax(1)
    return (found & mask).sum().item() / (found | mask).sum().item()


def main(epochs=6):
    seed_everything(0)
    model, scores = UNet(), []
    shapes = {"disc": 0, "cross": 2}
    for shape, ground in shapes.items():
        train = loader(shape, ground, 384, seed=0, batch_size=32, shuffle=True)
        trainer = Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False)
        trainer.fit(model.train(), train)
        scores.append({name: overlap(model, name, shapes[name]) for name in shapes})
        print(f"after {shape}:", scores[-1])
    return scores


if __name__ == "__main__":
    main()
