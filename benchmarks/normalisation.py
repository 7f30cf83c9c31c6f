"""What owner-aware normalisation costs: accuracy on Split-Digits with it and without, time beside the plain norm."""

import logging
import statistics
import time
import warnings
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import torch
from common import percent, write_section
from lightning.pytorch import Trainer, seed_everything
from torch import nn

from lightning_cf import Classifier, InvarianceCallback, MaskedGradientCallback, PartitionCallback
from lightning_cf.data import digits, split_tasks
from lightning_cf.learner.keeping import state_of
from lightning_cf.ownership.levels import FREE
from lightning_cf.ownership.nested_norms import Nesting, nested_layer_norm
from lightning_cf.tasks.evaluation import evaluate

SEEDS = (0, 1, 2)


class Tokens(nn.Module):
    """A Transformer encoder over the rows of an image."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, width), nn.Parameter(0.1 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, 8, 64, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(x[:, 0]) + self.position).flatten(1))


def perceptron() -> nn.Module:
    hidden = [layer for n in (64, 48) for layer in (nn.Linear(n, 48), nn.LayerNorm(48), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(48, 10))


def convolutions() -> nn.Module:
    first = nn.Conv2d(1, 24, 3, padding=1), nn.GroupNorm(4, 24), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(24, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(128, 10))


NETWORKS = {
    "MLP 64-48-48, LayerNorm": perceptron,
    "CNN 24-32, GroupNorm": convolutions,
    "Transformer, 2 layers of 32, LayerNorm": Tokens,
}


def run(make, seed: int, *, aware: bool) -> tuple[float, float]:
    """Accuracy of the first task once it is sealed, and the mean over all five in the end."""
    seed_everything(seed, verbose=False)
    module = Classifier(make(), optimizer=partial(torch.optim.Adam, lr=0.003), cosine=False)
    tasks = split_tasks(digits(), batch_size=32)
    with ExitStack() as stack:
        if not aware:  # norms stay plain: what is claimed goes on depending on what is free, and nobody looks
            stack.enter_context(patch("lightning_cf.partition.claim.make_owner_aware", lambda *_: None))
            stack.enter_context(patch("lightning_cf.functional.phases.probe", lambda *_: None))
        first = 0.0
        for task in tasks:
            callbacks = [PartitionCallback(after=0.5, reserve_tasks=5), InvarianceCallback(), MaskedGradientCallback()]
            trainer = Trainer(
                max_epochs=16, callbacks=callbacks, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
            )  # fmt: skip
            trainer.fit(module, datamodule=task)
            first = first or score(module, task)
        return first, statistics.mean(score(module, task) for task in tasks)


def score(module, task) -> float:
    with state_of(module).showing(module, [task]):
        return evaluate(module, task, task.test_dataloader())


def ratio(owners: int) -> float:
    """Time of an owner-aware LayerNorm, forward and backward, over a plain one's; medians, taken in turn."""
    x = torch.randn(16 * 197, 768, requires_grad=True)
    plain = nn.LayerNorm(768)
    owner = torch.arange(768) * (owners + 1) // 768
    nesting = Nesting(torch.where(owner == owners, FREE, owner))
    ways = {
        "plain": lambda: plain(x),
        "aware": lambda: nested_layer_norm(x, nesting, plain.weight, plain.bias, plain.eps),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(25):
        for name, way in ways.items():
            began = time.perf_counter()
            way().sum().backward()
            seconds[name].append(time.perf_counter() - began)
    return statistics.median(seconds["aware"]) / statistics.median(seconds["plain"])


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    lines = [
        "| network | first task, by owners | first task, plain norms | all tasks in the end, by owners | plain norms |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, make in NETWORKS.items():
        found = {aware: [run(make, seed, aware=aware) for seed in SEEDS] for aware in (True, False)}
        cells = [percent([pair[part] for pair in found[aware]]) for part in (0, 1) for aware in (True, False)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    times = ", ".join(f"{ratio(owners):.1f} times a plain one with {owners} owners" for owners in (1, 2, 5))
    lines += ["", f"LayerNorm of 3,152 tokens of width 768, forward and backward: {times} and free elements."]
    write_section("normalisation", "\n".join(lines))


if __name__ == "__main__":
    main()
