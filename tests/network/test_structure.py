import contextlib

import networks
import pytest
import torch
from networks import NETWORKS, build
from torch import nn

from lightning_cf.network.forward import eval_mode, named_tensors, samples
from lightning_cf.network.structure import NO_UNIT, Rows, lookup
from lightning_cf.network.tracing.trace import trace


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_are_read_along_their_axis(axis):
    tensor = torch.arange(24.0).reshape(4, 6).movedim(0, axis)
    rows = Rows("weight", axis, torch.tensor([[2, 0], [3, 1]]), "weight")
    assert rows.read(tensor).tolist() == [[*range(12, 18), *range(6)], [*range(18, 24), *range(6, 12)]]


@pytest.mark.parametrize("axis", [0, 1])
def test_only_the_rows_of_the_units_named_are_written(axis):
    tensor = torch.zeros(4, 6).movedim(0, axis)
    rows = Rows("weight", axis, torch.tensor([[2, 0], [3, 1]]), "weight")
    rows.write(tensor, torch.arange(24.0).reshape(2, 12), torch.tensor([1]))
    assert rows.read(tensor).tolist() == [[0.0] * 12, list(range(12, 24))]


@pytest.mark.parametrize("make", NETWORKS)
def test_weights_written_back_are_the_weights_read(make):
    network, example = build(make)
    structure, tensors = trace(network, example), named_tensors(network)
    for group in structure.groups:
        before = group.weights(tensors)
        units = torch.arange(0, group.size, 2)
        group.write_weights(tensors, before + 1, units)
        after = group.weights(tensors)
        changed = torch.zeros(group.size, dtype=torch.bool)
        changed[units] = True
        assert torch.equal(after[changed], before[changed] + 1)
        assert torch.equal(after[~changed], before[~changed])


def test_biases_are_the_layers_else_the_norms_shift_else_zero():
    first, norm, second, other = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5)
    network = nn.Sequential(first, norm, second, other, nn.Linear(5, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
    for layer in (norm, other):
        nn.init.normal_(layer.bias)
    groups = trace(network, torch.ones(1, 6)).groups
    tensors = named_tensors(network)
    assert torch.equal(groups[0].biases(tensors), first.bias)
    assert torch.equal(groups[1].biases(tensors), other.bias)
    assert groups[2].biases(tensors).tolist() == [0, 0, 0]


def test_vectors_of_united_layers_are_joined():
    network, example = build(networks.two_inputs)
    (group,) = trace(network, example).groups
    assert torch.equal(
        group.weights(named_tensors(network)), torch.cat([network.left.weight, network.right.weight], dim=1)
    )


def test_lookup_has_a_value_for_no_unit():
    assert lookup(torch.tensor([[2, NO_UNIT], [0, 1]]), torch.tensor([5, 6, 7]), none=9).tolist() == [[7, 9], [5, 6]]


def test_a_shared_tensor_has_one_name():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    assert list(named_tensors(network)) == ["0.weight", "0.bias", "1.bias"]


def test_eval_mode_gives_each_module_its_own_mode_back():
    network = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    network[1].eval()
    with contextlib.suppress(KeyError), eval_mode(network):
        assert not any(module.training for module in network.modules())
        raise KeyError
    assert [module.training for module in network.modules()] == [True, True, False, False]


def test_the_first_samples_are_taken_of_every_tensor():
    sample = samples(nn.Linear(1, 1), {"x": torch.ones(4, 2), "more": (torch.zeros(4), "text")}, 1)
    assert sample["x"].shape == (1, 2)
    assert sample["more"][0].shape == (1,)
    assert sample["more"][1] == "text"
