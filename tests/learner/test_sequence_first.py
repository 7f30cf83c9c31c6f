"""Inputs whose samples lie behind their tokens, as recurrent networks of torch take them: (time, batch, features)."""

import pytest
import torch
from clouds import INPUTS, Net, learned, points
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cf import Task
from lightning_cf.learner.inferring import inference_of
from lightning_cf.task_inference import TaskInference

TIME = 4
STRATEGIES = ["energy", "lda_units"]


class Recurrent(Net):
    def __init__(self, batch_first):
        super().__init__()
        self.a = nn.LSTM(INPUTS // TIME, 16, batch_first=batch_first)
        self.b, self.c, self.batch_first = nn.Identity(), nn.Linear(16, 4), batch_first

    def forward(self, x):
        found = self.a(x)[0]
        return self.c(found[:, -1] if self.batch_first else found[-1])


def sequences(x, batch_first):
    return x.view(-1, TIME, INPUTS // TIME) if batch_first else x.view(-1, TIME, INPUTS // TIME).transpose(0, 1)


def task(name, classes, size, batch_first):
    def collate(samples):
        x, y = map(torch.stack, zip(*samples, strict=True))
        return sequences(x, batch_first), y

    loader = DataLoader(TensorDataset(*points(classes, 32)), size, collate_fn=collate)
    return Task(name, {"train": loader, "val": loader}, classes=classes)


@pytest.fixture(scope="module", params=[16, TIME], ids=["batches", "as many samples as tokens"])
def both(request):
    """The same network after the same two tasks: samples first, and tokens first."""
    found = []
    for batch_first in (True, False):
        two = [task(name, classes, request.param, batch_first) for name, classes in (("a", [0, 1]), ("b", [2, 3]))]
        found.append(learned(Recurrent(batch_first), two, STRATEGIES, epochs=2))
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("count", [TIME, 6, 16])
def test_predictions_are_those_of_the_network_that_takes_samples_first(both, strategy, count):
    x = points([0, 1, 2, 3], 16)[0][:count]
    expected, found = (m.predict_any(sequences(x, m.batch_first), strategy) for m in both)
    assert torch.equal(expected.classes, found.classes)
    torch.testing.assert_close(expected.probabilities, found.probabilities, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("count", [TIME, 6])
def test_a_sample_that_is_not_finite_is_none_and_the_others_are_as_without(both, count, value):
    module, x = both[1], points([0, 1, 2, 3], 16)[0][:count].clone()
    expected = module.predict_any(sequences(x, False))
    x[2, 4] = value  # at its second token
    found, rows = module.predict_any(sequences(x, False)), torch.arange(count) == 2
    assert found.classes[2] == found.tasks[2] == -1
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a[~rows], b[~rows])


def test_where_the_samples_lie_is_kept(both):
    for module in both:
        sites = TaskInference.from_state_dict(inference_of(module.ledger).state_dict()).tasks[-1].sites
        assert sites.turned is not module.batch_first


class Averaged(Recurrent):
    """Averages over tokens what its output layer gives, which has the samples behind tokens."""

    def forward(self, x):
        found = self.a(x)[0]
        return self.c(found.transpose(0, 1) if self.batch_first else found).mean(dim=0)


@pytest.mark.parametrize("size", [16, TIME])
def test_an_output_layer_may_compute_samples_behind_tokens(size):
    x, found = points([0, 1, 2, 3], 16)[0], []
    for batch_first in (True, False):
        two = [task(name, classes, size, batch_first) for name, classes in (("a", [0, 1]), ("b", [2, 3]))]
        module = learned(Averaged(batch_first), two, ["lda_units"], epochs=2)
        found.append(module.predict_any(sequences(x, batch_first)))
    assert torch.equal(found[0].classes, found[1].classes)
    torch.testing.assert_close(found[0].probabilities, found[1].probabilities, rtol=1e-3, atol=1e-4)
    assert (found[0].tasks == torch.arange(16) % 4 // 2).double().mean() > 0.7
