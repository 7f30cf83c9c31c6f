import inspect
import re
from copy import deepcopy
from dataclasses import replace

import networks
import pytest
import torch
from halves import cut, half_owned
from networks import NETWORKS, Wired, build
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from lightning_cf.errors import LeakError, StructureError
from lightning_cf.exactness.probe import probe
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.structure import NO_UNIT
from lightning_cf.network.tracing.trace import trace
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE


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
    network = nn.Sequential(nn.Linear(6, 5), nn.Identity(), nn.Linear(5, 3)).train()
    network[0].eval()
    with pytest.raises(RuntimeError):
        trace(network, torch.ones(1, 7))
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


# What units share one fate because of an operation


def routed(net, x):
    return net.head(net.first(x)[:, net.first(x)[0].argsort()])


def selected(net, x):
    return net.head(torch.index_select(net.first(x), 1, net.first(x)[0].abs().long().clamp(max=4)))


def spectrum(net, x):
    return net.head(torch.fft.rfft(net.first(x)).real)


def scattered(net, x):
    first = net.first(x)
    return net.head(torch.zeros(len(x), 5).scatter(1, torch.tensor([[4, 3, 2, 1, 0]] * len(x)), first))


def fixed_product(net, x):
    return net.head(net.first(x) @ torch.ones(5, 5))


def layers(wire, hidden=5, read=5):
    return Wired(wire, first=nn.Linear(6, hidden), head=nn.Linear(read, 3))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Softmax(1)), nn.Linear(5, 3)),
            r"'aten\._softmax' in module '1\.0' mixes units: 5 units of '0' share one fate\. Of '0' one unit is left",
        ),
        (layers(spectrum, 8), "_fft_r2c' in module 'forward' mixes units: 8 units of 'first'"),
        (layers(routed), "aten.sort' in module 'forward' mixes units: 5 units of 'first'"),
        (layers(selected), "index_select' in module 'forward' cannot be followed: 5 units of 'first'"),
        (layers(scattered), "scatter' in module 'forward' cannot be followed: 5 units of 'first'"),
        (nn.Sequential(nn.Identity(), layers(scattered)), "scatter' in module '1' cannot be followed"),
        (
            nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Linear(5, 3)),
            "a number computed from a whole weight' in module '0' mixes units: 5 units of '0'",
        ),
    ],
    ids=["softmax", "fft", "sort", "index", "scatter", "inner module", "spectral norm"],
)
def test_units_that_an_operation_mixes_are_one_and_the_structure_says_why(network, message):
    structure = trace(network, torch.randn(2, 6))
    assert any(re.search(message, found.message()) for found in structure.mixings)
    assert [group.size for group in structure.groups] == [1]
    for draw in range(3):
        ledger = half_owned(structure, draw)
        for name, tensor in cut(network, structure, ledger).items():
            named_tensors(network)[name].data.copy_(tensor)
        probe(network, structure, ledger, torch.randn(4, 6))


@pytest.mark.parametrize("wire", [spectrum, routed, selected, scattered])
def test_without_isolation_units_stay_apart(wire):
    structure = trace(layers(wire, 8, 8 if wire in (routed, selected) else 5), torch.randn(2, 6), apart=True)
    assert [group.size for group in structure.groups] == [8]
    assert structure.mixings == ()


def test_a_fixed_matrix_unites_what_it_adds_up_and_says_nothing_where_layers_are_left():
    structure = trace(layers(fixed_product), torch.randn(2, 6))
    assert [group.size for group in structure.groups] == [1]


def test_values_read_into_python_are_listed():
    def wire(net, x):
        return net.head(net.second(x) * net.first(x)[0, 0].item())

    network = Wired(wire, first=nn.Linear(6, 5), second=nn.Linear(6, 4), head=nn.Linear(4, 3))
    (found,) = trace(network, torch.randn(2, 6)).reads
    assert (found.operation, found.layers) == ("aten._local_scalar_dense", ("first",))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_has_its_state_as_units(kind):
    network = Wired(
        lambda net, x: net.head(net.layer(x)[0][:, -1]), layer=kind(6, 4, batch_first=True), head=nn.Linear(4, 3)
    )
    (group,) = trace(network, torch.randn(2, 5, 6)).groups
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    assert (group.name, group.size) == ("layer", 4)
    assert {(rows.tensor, rows.index.shape) for rows in group.rows if rows.role == "weight"} == {
        ("layer.weight_ih_l0", (4, gates)),
        ("layer.weight_hh_l0", (4, gates)),
    }


@pytest.mark.parametrize(
    ("norm", "size"), [(nn.LayerNorm(8), 8), (nn.RMSNorm(8), 8), (nn.GroupNorm(2, 8), 8), (nn.GroupNorm(8, 8), None)]
)
def test_units_that_a_norm_takes_together_stay_apart_and_are_listed(norm, size):
    structure = trace(nn.Sequential(nn.Linear(6, 8), norm, nn.Linear(8, 3)), torch.randn(2, 6))
    assert [group.size for group in structure.groups] == [8]
    assert {path: units.tolist() for path, units in structure.norms.items()} == ({"1": [*range(8)]} if size else {})


def test_heads_and_the_feed_forward_layer_are_units_of_a_transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = nn.Sequential(nn.Linear(6, 8), layer, nn.Flatten(), nn.Linear(24, 3))
    groups = {group.name: (group.size, group.layers) for group in trace(network, torch.randn(2, 3, 6)).groups}
    assert groups == {
        "0": (8, ("0", "1.self_attn.out_proj", "1.linear2")),
        "1.self_attn": (2, ("1.self_attn",)),
        "1.linear1": (16, ("1.linear1",)),
    }


def test_a_weight_that_is_used_in_slices_belongs_to_the_units_of_each():
    network = Wired(
        lambda net, x: net.head(torch.cat([x @ part.T for part in net.first.weight.chunk(2)], dim=1)),
        first=nn.Linear(6, 8),
        head=nn.Linear(8, 3),
    )
    structure = trace(network, torch.randn(2, 6))
    (use,) = structure.entries["first.weight"]
    assert (structure.groups[0].size, use.target.flatten().tolist()) == (8, [*range(8)])


def test_lazy_layers_take_their_shapes_from_the_example():
    network = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3))
    structure = trace(network, torch.randn(2, 6))
    assert [group.size for group in structure.groups] == [5]
    assert network[0].weight.shape == (5, 6)


def test_a_token_that_is_learned_belongs_to_the_units_that_it_meets():
    def wire(net, x):
        x = torch.cat([net.token.expand(len(x), -1, -1), net.embed(x)], dim=1)
        return net.head(net.mix(x)[:, 0])

    network = Wired(
        wire, token=nn.Parameter(torch.randn(1, 1, 5)), embed=nn.Linear(6, 5), mix=nn.Linear(5, 5), head=nn.Linear(5, 3)
    )
    structure = trace(network, torch.randn(2, 4, 6))
    (use,) = structure.entries["token"]
    assert use.target.flatten().tolist() == [*range(*structure.groups[0].units.indices(99))]


def test_what_spans_several_units_has_none():
    network = nn.Sequential(nn.Linear(6, 5), nn.PReLU(), nn.Linear(5, 3))
    (use,) = trace(network, torch.randn(2, 6)).entries["1.weight"]
    assert use.target.flatten().tolist() == [NO_UNIT]


# What cannot be traced


def test_a_forward_pass_that_writes_into_a_parameter_is_refused():
    def wire(net, x):
        net.first.weight.mul_(0.5)
        return net.head(net.first(x))

    with pytest.raises(StructureError, match=r"module 'forward' writes into the parameter 'first\.weight'"):
        trace(layers(wire), torch.randn(2, 6))


def test_heads_whose_outputs_are_added_up_are_one_head():
    network = Wired(
        lambda net, x: (net.one(x) + net.two(x.relu())) / 2, one=nn.Linear(6, 3), two=nn.Linear(6, 3, bias=False)
    )
    head = trace(network, torch.randn(2, 6)).head
    assert (head.size, head.layers) == (3, ("one", "two"))
    assert [(rows.tensor, rows.index.tolist()) for rows in head.rows] == [
        (name, [[0], [1], [2]]) for name in ("one.weight", "one.bias", "two.weight")
    ]


def test_a_head_that_another_head_reads_is_refused():
    network = Wired(lambda net, x: net.one(x) + net.two(net.one(x)), one=nn.Linear(6, 3), two=nn.Linear(3, 3))
    message = r"mix the columns of 'one', 'two'; 'aten\.add' in module 'forward' gives them\. Let the forward pass end"
    with pytest.raises(StructureError, match=message):
        trace(network, torch.randn(2, 6))


def test_features_that_are_returned_beside_the_outputs_are_hidden():
    network = Wired(
        lambda net, x: {"features": net.hidden(x), "logits": net.head(net.hidden(x).relu())},
        hidden=nn.Linear(6, 5),
        head=nn.Linear(5, 3),
    )
    structure = trace(network, torch.randn(2, 6))
    assert ([group.name for group in structure.groups], structure.head.name) == (["hidden"], "head")


def test_a_mean_over_attention_heads_that_nobody_reads_unites_none():
    network = Wired(
        lambda net, x: net.head(net.attention(x, x, x)[0].relu()),
        attention=nn.MultiheadAttention(8, 4, batch_first=True),
        head=nn.Linear(8, 3),
    )
    assert [group.size for group in trace(network, torch.randn(2, 5, 8)).groups] == [4, 8]
    both = Wired(
        lambda net, x: (lambda y, shares: (net.head(y.relu()), shares))(*net.attention(x, x, x)),
        attention=nn.MultiheadAttention(8, 4, batch_first=True),
        head=nn.Linear(8, 3),
    )
    assert [group.size for group in trace(both, torch.randn(2, 5, 8)).groups] == [1, 8]


def test_what_units_compute_from_parameters_alone_is_an_activation():
    network = Wired(
        lambda net, x: net.head(net.attention(net.query.expand(len(x), -1, -1), x, x)[0].relu()),
        query=nn.Parameter(torch.randn(1, 3, 8)),
        attention=nn.MultiheadAttention(8, 4, batch_first=True),
        head=nn.Linear(8, 3),
    )
    assert [group.size for group in trace(network, torch.randn(2, 5, 8)).groups] == [4, 8]


@pytest.mark.parametrize("reduce", [torch.mean, torch.sum, torch.amax])
def test_outputs_reduced_over_several_heads_are_one_head_and_over_columns_refused(reduce):
    def network(dim):
        return Wired(
            lambda net, x: reduce(torch.stack([net.one(x), net.two(x)]), dim), one=nn.Linear(6, 3), two=nn.Linear(6, 3)
        )

    structure = trace(network(0), torch.randn(2, 6))
    assert (structure.head.size, structure.head.layers) == (3, ("one", "two"))
    assert structure.output_units[0].tolist() == [[0, 1, 2]]
    with pytest.raises(StructureError, match=r"mix the columns of 'one'; 'aten\.\w+' in module 'forward' gives them"):
        trace(network(2), torch.randn(2, 6))


@pytest.mark.parametrize("join", [tuple, lambda outputs: torch.cat(outputs, dim=1)], ids=["apart", "joined"])
def test_several_heads_are_one_group_of_outputs(join):
    network = Wired(lambda net, x: join([net.one(x), net.two(x)]), one=nn.Linear(6, 3), two=nn.Linear(6, 2))
    structure = trace(network, torch.randn(2, 6))
    assert (structure.head.size, structure.head.layers) == (5, ("one", "two"))
    assert structure.entries["two.weight"][0].target.flatten().tolist() == [3, 4]


@pytest.mark.parametrize("last", [nn.LogSoftmax(1), nn.Softmax(1), nn.Sigmoid(), nn.Flatten(0)])
def test_an_activation_may_end_the_network(last):
    structure = trace(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), last), torch.randn(2, 6))
    assert structure.head.name == "2"


def test_a_softmax_over_positions_mixes_no_units():
    network = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Softmax(2), nn.Flatten(), nn.Linear(20, 3))
    assert [group.size for group in trace(network, torch.randn(2, 2, 5)).groups] == [4]


def test_outputs_without_a_layer_are_refused():
    with pytest.raises(StructureError, match="no layer with weights computes its output"):
        trace(nn.ReLU(), torch.randn(2, 6))


class Paired(nn.Module):
    """Takes two inputs, of which a caller may look how many it needs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x, y, scale=1.0):
        return self.b(torch.relu(self.a(x + y))) * scale


def test_a_forward_pass_that_is_followed_has_its_own_signature():
    network, seen = Paired(), []

    def run(network, batch):
        seen.append(inspect.signature(network.forward))
        return network(*batch)

    structure = trace(network, (torch.randn(4, 4), torch.randn(4, 4)), run)
    assert seen
    assert set(seen) == {inspect.signature(network.forward)}
    assert {group.size for group in structure.groups} == {6}
    assert "forward" not in vars(network)
