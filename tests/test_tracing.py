from copy import deepcopy
from dataclasses import replace

import networks
import pytest
import torch
from networks import NETWORKS, Wired, build
from torch import nn
from torch.func import functional_call

from lightning_cf.errors import LeakError, StructureError
from lightning_cf.ledger import FREE, NeuronLedger
from lightning_cf.probe import probe
from lightning_cf.structure import named_tensors
from lightning_cf.tracing import trace


def half_owned(structure, seed):
    """About half of the units free, the others owned by two tasks."""
    ledger, generator = NeuronLedger.for_structure(structure), torch.Generator().manual_seed(seed)
    for owner in (*ledger.owners.values(), ledger.outputs):
        owner.copy_(torch.tensor([FREE, FREE, 0, 1])[torch.randint(4, owner.shape, generator=generator)])
    return ledger


def cut(network, structure, ledger):
    """The network's tensors, without the entries from free or later units into owned ones."""
    tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(network).items()}
    for name, uses in structure.entries.items():
        tensors[name][ledger.cut(structure, uses).expand(tensors[name].shape)] = 0
    return tensors


def run(network, tensors, example):
    with torch.no_grad():
        return functional_call(network.eval(), tensors, example if isinstance(example, tuple) else (example,))


def randomised(structure, tensors, may_move, seed):
    """Random numbers in all entries whose units may move wherever they are used."""
    generator, result = torch.Generator().manual_seed(seed), dict(tensors)
    for name, uses in structure.entries.items():
        movable = torch.ones(tensors[name].shape, dtype=torch.bool)
        for use in uses:
            movable &= torch.cat([may_move, torch.tensor([False])])[use.target].expand(movable.shape)
        if tensors[name].is_floating_point():
            noise = torch.rand(movable.shape, generator=generator) + 0.5
            result[name] = torch.where(movable, noise, tensors[name])
    return result


@pytest.mark.parametrize("make", NETWORKS)
def test_owned_outputs_do_not_depend_on_free_or_later_units(make):
    network, example = build(make)
    structure = trace(network, example)
    for seed in range(5):
        ledger = half_owned(structure, seed)
        owner = ledger.owner_of_units(structure)
        tensors = cut(network, structure, ledger)
        before = run(network, tensors, example)
        for task in (0, 1):
            after = run(network, randomised(structure, tensors, (owner == FREE) | (owner > task), seed), example)
            owned = (ledger.outputs >= 0) & (ledger.outputs <= task)
            assert torch.equal(after[:, owned], before[:, owned])


@pytest.mark.parametrize("make", NETWORKS)
def test_the_probe_finds_no_leak(make):
    network, example = build(make)
    structure = trace(network, example)
    for seed in range(5):
        ledger, isolated = half_owned(structure, seed), deepcopy(network)
        for name, tensor in cut(network, structure, ledger).items():
            named_tensors(isolated)[name].data.copy_(tensor)
        probe(isolated, structure, ledger, example)


@pytest.mark.parametrize("make", NETWORKS)
def test_free_units_do_reach_free_outputs(make):
    network, example = build(make)
    structure = trace(network, example)
    tensors = cut(network, structure, NeuronLedger.for_structure(structure))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in named_tensors(network).items())
    hidden = torch.arange(structure.n_units) < structure.head.first
    moved = run(network, randomised(structure, tensors, hidden, 0), example)
    assert (moved != run(network, tensors, example)).any()


@pytest.mark.parametrize("make", NETWORKS)
def test_every_weight_row_belongs_to_one_unit(make):
    network, example = build(make)
    structure, tensors = trace(network, example), named_tensors(network)
    numbers = [unit for group in (*structure.groups, structure.head) for unit in range(*group.units.indices(10**9))]
    assert numbers == list(range(structure.n_units))
    for name in structure.entries:
        places = [rows for group in (*structure.groups, structure.head) for rows in group.rows if rows.tensor == name]
        if places and places[0].role == "weight":
            for axis in {rows.axis for rows in places}:
                positions = torch.cat([rows.index.flatten() for rows in places if rows.axis == axis])
                size = tensors[name].numel() if axis is None else tensors[name].shape[axis]
                assert sorted(positions.tolist()) == list(range(size))


@pytest.mark.parametrize("make", NETWORKS)
def test_tracing_leaves_the_network_as_it_was(make):
    network, example = build(make)
    network.train()
    for position, module in enumerate(network.modules()):
        module.training = position % 2 == 0
    state, modes = deepcopy(network.state_dict()), [module.training for module in network.modules()]
    trace(network, example)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in network.modules())


def test_a_failed_trace_leaves_the_modes_as_they_were():
    network = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).train()
    network[0].eval()
    with pytest.raises(StructureError):
        trace(network, torch.ones(1, 6))
    assert [module.training for module in network.modules()] == [True, False, True, True]


def test_a_transposed_index_map_is_a_leak():
    network, example = build(networks.mlp)
    structure = trace(network, example)
    (square,) = structure.entries["3.weight"]
    wrong = replace(square, target=square.target.T, source=square.source.T)
    broken = replace(structure, entries={**structure.entries, "3.weight": (wrong,)})
    for seed in range(5):
        ledger = half_owned(structure, seed)
        for name, tensor in cut(network, broken, ledger).items():
            named_tensors(network)[name].data.copy_(tensor)
        with pytest.raises(LeakError, match=r"layer '3': .* Use isolation='perturb'"):
            probe(network, broken, ledger, example)


def test_an_uncut_network_leaks():
    network, example = build(networks.cnn)
    structure = trace(network, example)
    with pytest.raises(LeakError, match=r"does not hold in layer 'features\.4'"):
        probe(network, structure, half_owned(structure, 1), example)


# Which units unite


def members(make):
    structure = trace(*build(make))
    return {group.name: (group.size, set(group.layers)) for group in structure.groups}, structure


def test_layers_in_a_row_stay_apart():
    groups, structure = members(networks.mlp)
    assert groups == {"1": (8, {"1"}), "3": (8, {"3"})}
    assert (structure.head.name, structure.head.size, structure.n_units) == ("5", 3, 19)


def test_residual_sums_unite_and_the_layers_inside_a_block_do_not():
    groups, _ = members(networks.resnet)
    stages = [f"stages.{block}" for block in range(4)]
    assert groups == {
        "stem.0": (5, {"stem.0", "stages.0.second", "stages.1.second"}),
        **{f"{stage}.first": (5 if stage < "stages.2" else 6, {f"{stage}.first"}) for stage in stages},
        "stages.2.second": (6, {"stages.2.second", "stages.2.shortcut.0", "stages.3.second"}),
    }


def test_a_padded_shortcut_unites_the_channels_that_meet():
    groups, _ = members(networks.padded_shortcut)
    assert groups == {"stem": (4, {"stem", "conv"}), "conv": (3, {"conv"})}


def test_concatenation_keeps_units_apart():
    groups, _ = members(networks.concatenated)
    assert groups == {"left": (4, {"left"}), "right": (5, {"right"})}


@pytest.mark.parametrize("make", [networks.hard_gated, networks.two_inputs])
def test_units_that_meet_elementwise_unite(make):
    groups, _ = members(make)
    (size, layers) = next(iter(groups.values()))
    assert (len(groups), size, layers) == (1, 5, {"left", "right"})


def test_units_that_meet_in_another_order_unite_in_that_order():
    _, structure = members(networks.masked)
    places = {rows.tensor: rows.index.flatten().tolist() for rows in structure.groups[0].rows if rows.role == "weight"}
    assert [i + j for i, j in zip(places["left.weight"], places["right.weight"], strict=True)] == [4] * 5


def test_a_gate_and_its_value_are_one_unit():
    groups, structure = members(networks.gated)
    assert groups == {"first": (5, {"first"})}
    assert structure.groups[0].rows[0].index.tolist() == [[i, i + 5] for i in range(5)]


def test_depthwise_and_grouped_convolutions_have_units_of_their_own():
    groups, structure = members(networks.grouped)
    assert groups == {"0": (4, {"0"}), "2": (6, {"2"}), "4": (6, {"4"})}
    (use,) = structure.entries["2.weight"]
    first = structure.groups[0].first
    assert use.source[:, :, 0, 0].tolist() == [[first, first + 1]] * 3 + [[first + 2, first + 3]] * 3


def test_a_flattened_feature_reads_its_channel():
    _, structure = members(networks.cnn)
    (use,) = structure.entries["classifier.0.weight"]
    channels = structure.groups[1]
    assert use.source.flatten().tolist() == [channels.first + c for c in range(6) for _ in range(16)]


def test_units_of_a_transposed_convolution_lie_on_its_second_axis():
    _, structure = members(networks.transposed)
    (rows,) = [rows for rows in structure.groups[1].rows if rows.role == "weight"]
    assert (rows.tensor, rows.axis, rows.index.flatten().tolist()) == ("2.weight", 1, list(range(6)))


def test_a_norm_belongs_to_the_units_before_it():
    _, structure = members(networks.mlp_norm)
    roles = {(rows.tensor, rows.role) for rows in structure.groups[0].rows}
    assert roles == {("0.weight", "weight"), ("0.bias", "bias"), ("1.weight", "scale"), ("1.bias", "shift")}
    for name in ("1.running_mean", "1.running_var"):
        (use,) = structure.entries[name]
        assert use.role == "statistic"
        assert torch.equal(use.target, torch.arange(8))


@pytest.mark.parametrize(("make", "tensor"), [(networks.bare_weights, "bias"), (networks.InPlaceBias, "bias")])
def test_an_added_parameter_is_a_shift(make, tensor):
    network = build(make)[0] if make is networks.bare_weights else make()
    structure = trace(network, networks.flat())
    assert [rows.role for rows in structure.groups[0].rows if rows.tensor == tensor] == ["shift"]


def test_inputs_come_in_a_tuple():
    groups, structure = members(networks.two_inputs)
    assert groups == {"left": (5, {"left", "right"})}
    assert structure.groups[0].weights(named_tensors(build(networks.two_inputs)[0])).shape == (5, 6 + 7)


def test_the_forward_pass_may_be_given():
    network, x = build(networks.mlp)
    structure = trace(network, {"x": x}, lambda net, batch: net(batch["x"]))
    assert structure.n_units == 19


# What cannot be traced


def routed(net, x):
    return net.head(net.first(x)[:, net.first(x)[0].argsort()])


def selected(net, x):
    return net.head(torch.index_select(net.first(x), 1, net.first(x)[0].abs().long().clamp(max=4)))


def recurrent(net, x):
    return net.head(net.lstm(x[:, None])[0][:, -1])


def spectrum(net, x):
    return net.head(torch.fft.rfft(net.first(x)).real)


@pytest.mark.parametrize(
    ("network", "operation", "module"),
    [
        (nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)), "native_layer_norm", "1"),
        (nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Softmax(1)), nn.Linear(5, 3)), "softmax over units", "2"),
        (Wired(recurrent, lstm=nn.LSTM(6, 4, batch_first=True), head=nn.Linear(4, 3)), "rnn|lstm", "lstm"),
        (
            nn.Sequential(nn.Identity(), Wired(spectrum, first=nn.Linear(6, 8), head=nn.Linear(5, 3))),
            "_fft_r2c",
            "1",
        ),
        (
            Wired(lambda net, x: net.head(net.head(x) @ torch.eye(3, 6)), head=nn.Linear(6, 3)),
            "two activations",
            "forward",
        ),
        (Wired(lambda net, x: net.head(x * net.head(x).max().item()), head=nn.Linear(6, 3)), "aten.max", "forward"),
        (Wired(routed, first=nn.Linear(6, 5), head=nn.Linear(5, 3)), "sort", "forward"),
        (Wired(selected, first=nn.Linear(6, 5), head=nn.Linear(5, 3)), "index", "forward"),
    ],
    ids=["LayerNorm", "softmax", "LSTM", "fft", "product", "item", "sort", "index"],
)
def test_an_operation_without_a_rule_is_named_with_its_module(network, operation, module):
    with pytest.raises(StructureError, match=rf"'[^']*({operation})[^']*' in module '{module}'.* Write it with"):
        trace(network, torch.randn(2, 6))


@pytest.mark.parametrize("last", [nn.LogSoftmax(1), nn.Softmax(1), nn.Sigmoid(), nn.Flatten(0)])
def test_an_activation_may_end_the_network(last):
    structure = trace(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), last), torch.randn(2, 6))
    assert structure.head.name == "2"


def test_a_softmax_over_positions_mixes_no_units():
    network = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Softmax(2), nn.Flatten(), nn.Linear(20, 3))
    assert [group.size for group in trace(network, torch.randn(2, 2, 5)).groups] == [4]


def test_outputs_of_several_layers_are_refused():
    network = Wired(lambda net, x: (net.one(x), net.two(x)), one=nn.Linear(6, 3), two=nn.Linear(6, 2))
    with pytest.raises(StructureError, match=r"mix the columns of 'one', 'two'\. Let the forward pass end"):
        trace(network, torch.randn(2, 6))


def test_outputs_without_a_layer_are_refused():
    with pytest.raises(StructureError, match="no layer with weights computes its output"):
        trace(nn.ReLU(), torch.randn(2, 6))
