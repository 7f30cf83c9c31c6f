"""A task that is forgotten on purpose in a loop of one's own."""

import pytest
import torch
from test_functional import accuracy, digits, network, train

import lightning_cf.functional as cf
from lightning_cf import ContinualError


def learned(*names):
    """A network that learned pairs of digits, what belongs to it, and the data."""
    net = network()
    units = cf.trace(net, torch.randn(8, 64))
    ledger = cf.new_ledger(units)
    data = {name: (*digits([2 * k, 2 * k + 1]), [2 * k, 2 * k + 1]) for k, name in enumerate(names)}
    for name in names:
        learn(net, units, ledger, name, *data[name])
    return net, units, ledger, data


def learn(net, units, ledger, name, batches, test, columns):
    ledger.begin(name, outputs=columns)
    for _ in range(2):
        with cf.hold(net, units, ledger):
            train(net, batches, columns, torch.optim.Adam(net.parameters(), lr=0.003), epochs=4)
        if ledger.phase == "learn":
            score = lambda: accuracy(net, test, columns)  # noqa: E731
            cf.claim(net, units, ledger, batches=batches, score=score)
    cf.seal(net, units, ledger)


def shown(net, data, name):
    with torch.no_grad():
        return net(data[name][1][0])[:, data[name][2]]


def test_the_others_stay_bitwise_and_it_can_be_learned_again():
    net, units, ledger, data = learned("a", "b", "c")
    before = {name: shown(net, data, name) for name in "abc"}
    cf.forget(net, units, ledger, "b")
    assert all(torch.equal(shown(net, data, name), before[name]) for name in "ac")
    assert not torch.allclose(shown(net, data, "b"), before["b"])
    free = ledger.capacity()
    cf.forget(net, units, ledger, "c")
    assert all(share > free[group] for group, share in ledger.capacity().items())
    for name in "cb":
        learn(net, units, ledger, name, *data[name])
    assert torch.equal(shown(net, data, "a"), before["a"])
    assert all(accuracy(net, *data[name][1:]) > 0.9 for name in "abc")


def test_what_cannot_be_forgotten_is_said_and_nothing_changes():
    net, units, ledger, _data = learned("a", "b")
    before = ledger.state_dict()
    for given, message in (
        ({"task": "z"}, "forget: no task 'z' is known that could be forgotten; known: a, b."),
        ({"task": "a", "seed": -1}, "forget: seed must be"),
        ({"task": ["a"]}, "forget: no task"),
    ):
        with pytest.raises(ContinualError) as error:
            cf.forget(net, units, ledger, **given)
        assert message in str(error.value)
    with pytest.raises(ContinualError, match="forget: structure must be what trace"):
        cf.forget(net, ledger, units, "a")
    with torch.no_grad():
        net[0].weight += 1.0
    with pytest.raises(ContinualError, match="not what task 'a' was sealed with"):
        cf.forget(net, units, ledger, "b")
    assert repr(ledger.state_dict()) == repr(before)
