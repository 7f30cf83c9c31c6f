"""Buffers in whose place something else stands than when the network was traced: a tensor, nothing, another shape."""

import warnings

import pytest
import torch
from clouds import INPUTS, Net, clouds, fit, outputs
from torch import nn

from lightning_cf import (
    ContinualError,
    FrozenWarning,
    LedgerWarning,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no claim within the budget", "ignore:You passed in a `val_dataloader`"
)


class Shifted(Net):
    """Shifts its input by a buffer that is there, or is not."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", None)

    def forward(self, x):
        mean = getattr(self, "mean", None)
        return super().forward(x if mean is None else x - mean)

    @property
    def data(self):
        return self.trainer.datamodule.train_dataloader().dataset.tensors[0]

    @property
    def second(self):
        return self.trainer.datamodule.name == "b"


class NothingAtFirst(Shifted):
    def on_train_start(self):
        self.mean = self.data.mean(dim=0)


class NewInTheFit(Shifted):
    def __init__(self):
        super().__init__()
        del self.mean

    def on_fit_start(self):
        if "mean" in self._buffers:
            self.mean = self.data.mean(dim=0)
        else:
            self.register_buffer("mean", self.data.mean(dim=0))


class AnotherShape(Shifted):
    def __init__(self):
        super().__init__()
        self.mean = torch.ones(1)

    def on_train_start(self):
        if self.second:
            self.mean = self.data.mean(dim=0)


class TwoNames(Shifted):
    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(INPUTS)
        self.register_buffer("again", self.mean)

    def forward(self, x):
        return super().forward(x - self.again)

    def training_step(self, batch, batch_idx):
        self.mean = self.again = 0.9 * self.mean + 0.1 * batch[0].mean(dim=0)
        return super().training_step(batch, batch_idx)


class Gone(Shifted):
    def __init__(self):
        super().__init__()
        self.mean = torch.ones(INPUTS)

    def on_fit_end(self):
        self.mean = None if self.second else self.mean


class GoneOnTheWay(Gone):
    def on_train_start(self):
        if self.second:
            del self.mean

    def on_fit_end(self):
        pass


@pytest.mark.parametrize("kind", [NothingAtFirst, NewInTheFit, AnotherShape, TwoNames, Gone, GoneOnTheWay])
def test_what_stands_in_a_buffers_place_stays_as_the_first_task_left_it(kind):
    module = kind()
    fit(module, clouds("a", [0, 1]), epochs=2)
    before, left = outputs(module), module.mean.clone()
    with pytest.warns(FrozenWarning, match="'(mean|again)'.* Let a task write what only it computes with"):
        fit(module, clouds("b", [2, 3]), epochs=2)
    assert torch.equal(outputs(module), before)
    assert torch.equal(module.mean, left)


@pytest.mark.parametrize("kind", [NothingAtFirst, Gone])
def test_another_one_between_fits_is_refused(kind):
    module = kind()
    fit(module, clouds("a", [0, 1]), epochs=2)
    module.mean = module.mean + 0.1 if kind is NothingAtFirst else None
    with pytest.raises(ContinualError, match=r"'mean' of .* changed since the last fit"):
        fit(module, clouds("b", [2, 3]), epochs=2)


class Built(Shifted):
    """Builds its buffer at the first pass."""

    def forward(self, x):
        if self.mean is None:
            self.mean = x.mean(dim=0)
        return super().forward(x)

    def training_step(self, batch, batch_idx):
        self.first = vars(self).get("first", batch[0].mean(dim=0))
        return super().training_step(batch, batch_idx)


def test_a_buffer_that_is_nothing_at_first_is_built_in_training():
    module = Built()
    fit(module, clouds("a", [0, 1]), epochs=2)
    assert torch.equal(module.mean, module.first)


class Causal(Net):
    """Attention under a mask of -inf, an empty buffer at first, that is built for the length of what comes."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 16)
        self.b = nn.MultiheadAttention(16, 4, batch_first=True)
        self.c = nn.Linear(16, 10)
        self.register_buffer("mask", torch.zeros(0, 0), persistent=False)

    def forward(self, x):
        h = self.a(x.reshape(len(x), -1, 3))
        if len(self.mask) != h.shape[1]:
            self.mask = torch.full((h.shape[1], h.shape[1]), float("-inf")).triu(1)
        return self.c(self.b(h, h, h, attn_mask=self.mask)[0].mean(dim=1))


def test_a_mask_of_infinities_that_is_built_for_each_length_is_none_of_divergence():
    module = Causal()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FrozenWarning)
        fit(module, clouds("a", [0, 1]), epochs=2)
        before = outputs(module)
        fit(module, clouds("b", [2, 3]), epochs=2)
    assert torch.equal(outputs(module), before)
    assert bool(module.mask.isinf().any())


class Counting(Net):
    """What it gives hangs on the Trainer's counters."""

    def forward(self, x):
        return super().forward(x) * (1 + self.current_epoch / 10 + self.global_step / 100)


class Warming(Net):
    """What it gives hangs on an attribute that moves with the epochs."""

    warmth = 1.0

    def forward(self, x):
        return super().forward(x) * self.warmth

    def on_train_epoch_end(self):
        self.warmth += 0.1


def test_the_trainers_counters_are_none_of_what_a_task_gave():
    module = Counting()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FrozenWarning)
        warnings.simplefilter("error", LedgerWarning)
        fit(module, clouds("a", [0, 1]), epochs=2)
        fit(module, clouds("b", [2, 3]), epochs=4)
    module = Warming()
    fit(module, clouds("a", [0, 1]), epochs=2)
    with pytest.warns(FrozenWarning, match=r"^Now outputs of earlier tasks give something else"):
        fit(module, clouds("b", [2, 3]), epochs=2)
