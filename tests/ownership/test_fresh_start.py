from copy import deepcopy

import networks
import pytest
import torch
from networks import build
from torch import nn

from lightning_cf.network.tracing.trace import trace
from lightning_cf.ownership.fresh_start import reinitialise_free
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE


def test_an_average_over_all_batches_begins_anew():
    """momentum=None: batches before the fresh start are none of the free channels' own."""
    torch.manual_seed(0)
    norm, x = nn.BatchNorm1d(6, momentum=None), torch.randn(8, 1, 12)
    network = nn.Sequential(nn.Conv1d(1, 6, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(60, 4))
    structure = trace(network.eval(), x)
    ledger = NeuronLedger.for_structure(structure)
    ledger.owners["0"][::2] = 0
    network.train()
    for _ in range(5):
        network(x + 3)
    held = norm.running_mean[::2].clone()
    reinitialise_free(network, structure, ledger, 0, "a")
    assert torch.equal(norm.running_mean[::2], held) and not bool(norm.running_mean[1::2].any())
    network(x)
    mean = network[0](x).mean(dim=(0, 2))
    torch.testing.assert_close(norm.running_mean[1::2], mean[1::2])


def prepared(make):
    """A network, its structure, and a ledger with every other unit and the first output owned."""
    network, example = build(make)
    structure = trace(network, example)
    ledger = NeuronLedger.for_structure(structure)
    for owner in ledger.owners.values():
        owner[::2] = 0
    ledger.outputs[0] = 0
    return network, structure, ledger


def free_entries(network, structure, ledger):
    """Which entries of each tensor belong to a free hidden unit, and to it alone."""
    owner = ledger.owner_of_units(structure)
    masks = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in network.state_dict().items()}
    for name, uses in structure.entries.items():
        parts = [
            torch.tensor([u >= 0 and u < structure.head.first and owner[u] == FREE for u in use.target.flatten()])
            .reshape(use.target.shape)
            .expand(masks[name].shape)
            for use in uses
        ]
        masks[name] = torch.stack(parts).all(dim=0)
    return masks


MAKERS = [networks.mlp, networks.cnn, networks.resnet, networks.transposed, networks.shuffled, networks.gated]


@pytest.mark.parametrize("make", MAKERS)
def test_only_entries_of_free_units_change(make):
    network, structure, ledger = prepared(make)
    before = deepcopy(network.state_dict())
    reinitialise_free(network, structure, ledger, 0, "a")
    for name, free in free_entries(network, structure, ledger).items():
        after = network.state_dict()[name]
        assert torch.equal(after[~free], before[name][~free])
        assert free.sum() == 0 or (after[free] != before[name][free]).all()


def test_free_entries_are_drawn_as_the_layers_do():
    network, structure, ledger = prepared(networks.cnn)
    reinitialise_free(network, structure, ledger, 0)
    conv, norm = network.features[:2]
    assert norm.weight[1::2].tolist() == norm.running_var[1::2].tolist() == [1, 1]
    assert norm.bias[1::2].tolist() == norm.running_mean[1::2].tolist() == [0, 0]
    bound = conv.weight[0].numel() ** -0.5
    assert 0.8 * bound < conv.weight[1::2].abs().max() <= bound


def test_the_key_alone_decides():
    states = []
    for key in [(0, "a"), (0, "a"), (0, "b"), (1, "a")]:
        network, structure, ledger = prepared(networks.mlp)
        torch.rand(len(states))
        reinitialise_free(network, structure, ledger, *key)
        states.append(network[1].weight)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[3])


def test_layers_of_one_shape_get_numbers_of_their_own():
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    structure = trace(network, torch.ones(1, 4))
    reinitialise_free(network, structure, NeuronLedger.for_structure(structure), 0)
    assert not torch.equal(network[0].weight, network[2].weight)


def test_the_global_generator_is_left_as_it_was():
    network, structure, ledger = prepared(networks.mlp)
    state = torch.get_rng_state()
    reinitialise_free(network, structure, ledger, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_changes_where_no_unit_is_free():
    network, structure, ledger = prepared(networks.cnn)
    for owner in ledger.owners.values():
        owner.fill_(0)
    before = deepcopy(network.state_dict())
    reinitialise_free(network, structure, ledger, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_modes_and_gradients_are_left_as_they_were():
    network, structure, ledger = prepared(networks.cnn)
    network.train()
    parameters = list(network.parameters())
    reinitialise_free(network, structure, ledger, 0)
    assert all(a is b and a.requires_grad for a, b in zip(network.parameters(), parameters, strict=True))
    assert all(module.training for module in network.modules())


class Resets(nn.Module):
    """Two layers, and a method as published models have it: it starts all of them afresh."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.randn(8))
        self.how = how

    def forward(self, x):
        return self.second((self.first(x) * self.scale).relu())

    def reset_parameters(self):
        getattr(self, self.how)()

    def in_place(self):
        for layer in (self.first, self.second):
            layer.reset_parameters()
            nn.init.constant_(layer.bias, 0.0)
        nn.init.constant_(self.scale, 3.0)

    def anew(self):
        self.scale = nn.Parameter(torch.full((8,), 3.0))
        self.first.weight = nn.Parameter(torch.zeros(8, 6))
        self.second = nn.Linear(8, 4)


@pytest.mark.parametrize("how", ["in_place", "anew"])
def test_a_layer_that_resets_its_children_leaves_what_tasks_own(how):
    torch.manual_seed(0)
    network = Resets(how)
    structure = trace(network, torch.ones(1, 6))
    ledger = NeuronLedger.for_structure(structure)
    for owner in ledger.owners.values():
        owner[::2] = 0
    ledger.outputs[0] = 0
    before, parameters = deepcopy(network.state_dict()), list(network.parameters())
    reinitialise_free(network, structure, ledger, 0, "a")
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    for name, free in free_entries(network, structure, ledger).items():
        assert torch.equal(network.state_dict()[name][~free], before[name][~free]), name
    assert network.scale[1::2].tolist() == [3.0] * 4
    assert not torch.equal(network.first.weight[1::2], before["first.weight"][1::2])
    assert network.first.bias[1::2].abs().min() > 0  # as the layer itself draws it, not as the one around it


def test_attention_that_other_code_gave_the_method_keeps_what_tasks_own(monkeypatch):
    """Lightning's own demos do, and so does code for sharded training."""
    attention = nn.MultiheadAttention
    monkeypatch.setattr(attention, "reset_parameters", attention._reset_parameters, raising=False)

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.c = attention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.c(self.attention(x, x, x, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    network = Attends()
    nn.init.normal_(network.attention.out_proj.bias)
    structure = trace(network, torch.randn(2, 3, 8))
    ledger = NeuronLedger.for_structure(structure)
    for owner in ledger.owners.values():
        owner[::2] = 0
    before = deepcopy(network.state_dict())
    reinitialise_free(network, structure, ledger, 0, "a")
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"attention.in_proj_weight", "attention.out_proj.bias"} <= changed
    for name, free in free_entries(network, structure, ledger).items():
        assert torch.equal(network.state_dict()[name][~free], before[name][~free]), name
