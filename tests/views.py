"""What a network shows of random data."""

import torch

from lightning_cf.task_inference import View


def view(samples=40, inputs=6, hidden=(5, 4), classes=2, seed=0):
    """A task's view of random data, through a network of two hidden layers all of whose units are its own."""
    g = torch.Generator().manual_seed(seed)
    return View(
        torch.randn(samples, inputs, generator=g),
        tuple(torch.randn(samples, width, generator=g).relu() for width in hidden),
        torch.randn(samples, classes, generator=g),
        tuple(torch.ones(width, dtype=torch.bool) for width in hidden),
        (torch.randn(hidden[0], inputs, generator=g), torch.randn(hidden[1], hidden[0], generator=g)),
    )


def labels(samples=40, classes=2):
    return torch.arange(samples) % classes
