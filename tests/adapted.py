"""The networks of the architecture tests as classifiers of digits."""

from functools import partial

import torch
from torch import nn

from lightning_cf import Classifier


class Adapted(nn.Module):
    """A network that gets what it takes, from images."""

    def __init__(self, architecture):
        super().__init__()
        self.net = architecture.build()
        self.inputs = architecture.inputs

    def forward(self, x):
        given = self.inputs(x)
        return self.net(*given) if isinstance(given, tuple) else self.net(given)


def classifier(architecture):
    torch.manual_seed(0)
    return Classifier(
        Adapted(architecture), optimizer=partial(torch.optim.AdamW, lr=0.003, weight_decay=0.1), cosine=False
    )
