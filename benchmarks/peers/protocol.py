"""What every peer goes through: five tasks of two digits, scores after each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from statistics import mean
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_cf.data import TensorImages, mnist

CLASSES = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
BATCH = 128
HIDDEN = 400


@dataclass(frozen=True)
class Job:
    """One training of one peer.

    Attributes:
        method: which.
        scenario: "task" where the training may use the task's name, "class" where it may not.
        options: of the method.
        optimizer: Adam or SGD.
        lr: learning rate.
        epochs: a task.
        seed: of everything.
        judge: "val" or "test", the images that are scored.
        limit: learn from the first so many images only.
        data_dir: folder that holds MNIST/raw.
    """

    method: str
    scenario: str
    options: dict[str, Any]
    optimizer: str
    lr: float
    epochs: int
    seed: int
    judge: str
    limit: int | None
    data_dir: str

    def make_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """A fresh one."""
        if self.optimizer == "SGD":
            return torch.optim.SGD(parameters, lr=self.lr)
        return torch.optim.Adam(parameters, lr=self.lr, fused=True)


class Peer(Protocol):
    """A method of another library."""

    def learn(self, task: int) -> None:
        """Trains on a task."""

    def told(self, images: Tensor, task: int) -> Tensor:
        """Scores of the task's own two classes."""

    def untold(self, images: Tensor) -> Tensor | None:
        """Scores of all ten classes, or nothing where the method needs the task."""

    def kept(self) -> int:
        """Numbers kept beside the network after the last task."""


def run(job: Job, make: Callable[[Job, list[TensorImages]], Peer], package: str) -> dict[str, Any]:
    """The result of one job."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    splits = mnist(job.data_dir, limit=job.limit)
    judged = [getattr(splits, job.judge).of_classes(classes) for classes in CLASSES]
    start = time.process_time()
    peer = make(job, [splits.train.of_classes(classes) for classes in CLASSES])
    seconds, matrix = time.process_time() - start, []
    for task in range(len(CLASSES)):
        start = time.process_time()
        peer.learn(task)
        seconds += time.process_time() - start
        matrix.append([_told(peer, data, seen) for seen, data in enumerate(judged[: task + 1])])
    untold = [_untold(peer, data) for data in judged]
    return {
        "told": mean(matrix[-1]),
        "untold": None if None in untold else mean(untold),
        "forgetting": mean(max(row[t] for row in matrix[t:]) - matrix[-1][t] for t in range(len(CLASSES) - 1)),
        "kept": peer.kept(),
        "seconds": seconds,
        "versions": {name: version(name) for name in (package, "torch", "torchvision")},
    }


def _told(peer: Peer, data: TensorImages, task: int) -> float:
    with torch.no_grad():
        found = peer.told(data.images, task).argmax(1)
    return _share(found == data.labels - CLASSES[task][0])


def _untold(peer: Peer, data: TensorImages) -> float | None:
    with torch.no_grad():
        scores = peer.untold(data.images)
    return None if scores is None else _share(scores.argmax(1) == data.labels)


def _share(right: Tensor) -> float:
    return right.double().mean().item()
