"""Steps of training beside plain Lightning's, turn by turn in one process: medians of CPU time over turns."""

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from common import QUIET, markdown, write_section
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_cf as cf
from lightning_cf.models import CNN, MLP, ResNet

BATCH = 128
STEPS = 32
"""Of a turn; the first ones warm up and are not counted."""
WARM = 2
CLASSES = 10


class Transformer(nn.Module):
    """Two encoder layers over 16 tokens."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Linear(32, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)).mean(dim=1))


def mlp(inputs: int, *hidden: int) -> Callable[[], nn.Module]:
    return lambda: MLP(shape=[inputs], classes=CLASSES, hidden=hidden)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "784-400-400": (mlp(784, 400, 400), (784,)),
    "1024-4096-4096-1024": (mlp(1024, 4096, 4096, 1024), (1024,)),
    "conv 64-128-128": (lambda: CNN(shape=[3, 32, 32], classes=CLASSES, channels=[64, 128, 128]), (3, 32, 32)),
    "ResNet": (lambda: ResNet(shape=[3, 32, 32], classes=CLASSES), (3, 32, 32)),
    "Transformer, width 64": (Transformer, (16, 32)),
    "Transformer, width 512": (partial(Transformer, 512), (16, 32)),
}
"""A network and the shape of its inputs."""


class Clock(Callback):
    """CPU seconds of a step, from the start of one batch to that of a later one, so that all hooks are in it."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: object, batch: object, batch_idx: int) -> None:
        if batch_idx == WARM:
            self.start = time.process_time()
        if batch_idx == STEPS - 1:
            self.seconds = (time.process_time() - self.start) / (STEPS - 1 - WARM)


def fit(module: object, data: object, callbacks: list[Callback] = ()) -> float:
    """One epoch; seconds of a step."""
    clock = Clock()
    trainer = Trainer(**QUIET, max_epochs=1, num_sanity_val_steps=0, callbacks=[clock, *callbacks])
    trainer.fit(module, **({"datamodule": data} if isinstance(data, cf.Task) else {"train_dataloaders": data}))
    return clock.seconds


def by_hand(network: nn.Module, loader: DataLoader) -> float:
    """The same steps in a plain loop."""
    optimizer = torch.optim.Adam(network.parameters())
    for number, (x, y) in enumerate(loader):
        if number == WARM:
            start = time.process_time()
        if number == STEPS - 1:
            return (time.process_time() - start) / (STEPS - 1 - WARM)
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    raise AssertionError


def ways(make: Callable[[], nn.Module], shape: tuple[int, ...], share: float) -> dict[str, Callable[[], float]]:
    """What is timed: by name, what trains one epoch and gives the seconds of a step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH * STEPS, *shape, generator=generator)
    y = torch.arange(len(x)) % 2

    def loader(first: int) -> DataLoader:
        return DataLoader(TensorDataset(x, y + first), BATCH)

    def task(name: str, first: int) -> cf.Task:
        judge = DataLoader(TensorDataset(x[:BATCH], y[:BATCH] + first), BATCH)
        return cf.Task(name, {"train": loader(first), "val": judge}, classes=[first, first + 1])

    def masked() -> Callback:
        return cf.MaskedGradientCallback()

    def module(isolation: str = "exact", claimed: bool = True) -> tuple[cf.Classifier, cf.Task]:
        torch.manual_seed(0)
        made, first = cf.Classifier(make(), cosine=False), task("first", 0)
        if claimed:
            partition = cf.PartitionCallback(isolation=isolation, min_claim=share, max_claim=share)
            fit(made, first, [partition, masked()])
        return made, first

    torch.manual_seed(0)
    plain, loop = cf.Classifier(make(), cosine=False), make()
    fresh, fresh_task = module(claimed=False)
    retrained, retrained_task = module()
    perturbed, perturbed_task = module("perturb")
    learning, _ = module()
    inferring, _ = module()
    begun, begun_task = module(claimed=False)
    second, third = task("second", 2), task("second", 2)
    return {
        "loop by hand": lambda: by_hand(loop, loader(0)),
        "plain": lambda: fit(plain, loader(0)),
        "first task": lambda: fit(fresh, fresh_task, [masked()]),
        "LEARN": lambda: fit(learning, second, [masked()]),
        "INVARIANCE": lambda: fit(retrained, retrained_task, [masked(), cf.InvarianceCallback()]),
        "perturbed": lambda: fit(perturbed, perturbed_task, [masked(), cf.InvarianceCallback()]),
        "first task, task inference": lambda: fit(begun, begun_task, [masked(), cf.TaskInferenceCallback()]),
        "LEARN, task inference": lambda: fit(inferring, third, [masked(), cf.TaskInferenceCallback()]),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--ways", nargs="+", help="beside plain Lightning, default all")
    parser.add_argument("--share", type=float, default=0.5, help="of the units that the first task owns")
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows, names = [], []
    for name in options.networks:
        turns = ways(*NETWORKS[name], options.share)
        names = [way for way in turns if way != "plain" and (options.ways is None or way in options.ways)]
        found: dict[str, list[float]] = {way: [] for way in ("plain", *names)}
        for _ in range(options.turns):
            for way, seconds in found.items():
                seconds.append(turns[way]())
        ratios = {way: [a / b for a, b in zip(found[way], found["plain"], strict=True)] for way in names}
        cells = [f"{median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios.values()]
        rows.append([name, f"{1000 * median(found['plain']):.1f}", *cells])
        print(rows[-1], flush=True)
    owned = f"the first task owns {options.share:.0%} of the units"
    caption = f"Batches of {BATCH}, one thread, {options.turns} turns, {owned}."
    write_section("speed", f"{caption}\n\n{markdown(['network', 'plain, ms', *names], rows)}")


if __name__ == "__main__":
    main()
