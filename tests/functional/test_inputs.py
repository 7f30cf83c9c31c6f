"""Batches as they are given to a claim, and what the network is run on: as many inputs as it was traced with."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_cf.functional as cf
from lightning_cf import ContinualError


class Masked(nn.Module):
    """Reads what its mask, if there is one, leaves of its input; remembers what it was called with."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(6, 20), nn.Linear(20, 4)
        self.seen = []

    def forward(self, x, mask=None):
        self.seen.append((x, mask))
        return self.head(self.first(x if mask is None else x * mask).relu())


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=generator)
    return x, (torch.rand(64, 6, generator=generator) < 0.5).float(), torch.randint(2, (64,), generator=generator)


def claimed(batches, example, forward=None):
    """Claims on batches; gives the weights afterwards, and whether each forward pass of the claim had a mask."""
    net, run = Masked(), {} if forward is None else {"forward": forward}
    units = cf.trace(net, example, **run)
    ledger = cf.new_ledger(units)
    ledger.begin("a", outputs=[0, 1])
    net.seen.clear()
    cf.claim(net, units, ledger, batches=batches, score=lambda: 1.0, **run)
    return {name: value.clone() for name, value in net.state_dict().items()}, {m is not None for _, m in net.seen}


X, MASK, Y = data()

ONE, TWO = X[:16], (X[:16], MASK[:16])


def pairs_of_inputs(dataset):
    return [((x, mask), y) for x, mask, y in dataset]


@pytest.mark.parametrize(
    "batches",
    [
        [((X, MASK), Y)],
        [[[X, MASK], Y]],
        [[X, MASK]],
        DataLoader(TensorDataset(X, MASK), 64),
        DataLoader(pairs_of_inputs(TensorDataset(X, MASK, Y)), 64),
        iter([(X, MASK)]),
    ],
    ids=["with target", "lists with target", "list", "loader", "loader with target", "iterator"],
)
def test_two_inputs_are_given_as_trace_takes_them(batches):
    found, masked = claimed(batches, TWO)
    expected, _ = claimed([(X, MASK)], TWO)
    unmasked, _ = claimed([X], ONE)
    assert masked == {True}
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert not torch.equal(found["head.weight"], unmasked["head.weight"])


@pytest.mark.parametrize("batches", [[X], [(X, Y)], [[X, Y]], [(X,)], [[X]]])
@pytest.mark.parametrize("example", [ONE, (ONE,)], ids=["tensor", "tuple"])
def test_one_input_is_given_alone_or_with_its_target(batches, example):
    found, masked = claimed(batches, example)
    expected, _ = claimed([X], ONE)
    assert masked == {False}
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("parts", [2, 3])
def test_a_batch_of_the_kind_that_was_traced_goes_whole_to_a_forward_of_its_own(kind, parts):
    def forward(net, batch):
        assert len(batch) == parts
        return net(batch[0], batch[1])

    whole = (X, MASK, Y)[:parts]
    found, masked = claimed([kind(whole)], kind(part[:16] for part in whole), forward)
    expected, _ = claimed([(X, MASK)], TWO)
    assert masked == {True}
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("batches", "example", "message"),
    [
        (
            [(X, MASK, Y)],
            TWO,
            r"with 2 inputs, and a batch is a tuple of 3\. .* batches=\[\(x1, x2\), \.\.\.\], or with",
        ),
        ([X], TWO, r"with 2 inputs, and a batch is a Tensor\. .* batches=\[\(\(x1, x2\), y\),"),
        ([(X, MASK, Y)], ONE, r"with 1 input, and a batch is a tuple of 3\. .* batches=\[x, .* batches=\[\(x, y\),"),
        ([((X, MASK), Y)], ONE, r"with 1 input, and a batch is a tuple of 2\. .*say forward= there and here"),
    ],
)
def test_another_number_of_inputs_than_was_traced_is_refused_with_how_to_give_them(batches, example, message):
    with pytest.raises(ContinualError, match=f"claim: the network was traced {message}"):
        claimed(batches, example)


def test_a_list_of_any_length_is_one_input():
    def forward(net, texts):
        return net(torch.stack([torch.full((6,), float(len(text))) for text in texts]))

    found = partial(claimed, example=["a", "b"] * 8, forward=forward)
    words, _ = found([["one", "three"], ["two"] * 30])
    with_targets, _ = found([(["one", "three"], Y[:2]), (["two"] * 30, Y[:30])])
    assert all(torch.equal(value, with_targets[name]) for name, value in words.items())
