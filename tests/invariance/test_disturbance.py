import networks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import NETWORKS, Wired, build, flat
from torch import nn
from torch.nn import functional as F

from lightning_cf.invariance.affine import Rotation
from lightning_cf.invariance.disturbance import Disturbance
from lightning_cf.invariance.perturbations import Ablate, Affine, InSubspace, Noise, Resample
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.structure import NO_UNIT
from lightning_cf.network.tracing.trace import trace
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE
from lightning_cf.utilities.randomness import keyed_generator


def tied():
    """An autoencoder whose decoder is its encoder transposed: each entry belongs to a unit of both."""

    def wire(net, x):
        return net.head(torch.relu(F.linear(torch.relu(net.first(x)), net.first.weight.T)))

    return Wired(wire, first=nn.Linear(6, 5), head=nn.Linear(6, 3)), flat()


def one_bias():
    """Two layers of one bias."""

    def wire(net, x):
        return net.head(torch.relu(F.linear(torch.relu(net.first(x)), net.weight, net.first.bias)))

    layers = {"first": nn.Linear(6, 5), "weight": nn.Parameter(torch.randn(5, 5)), "head": nn.Linear(5, 3)}
    return Wired(wire, **layers), flat()


SHARING = [tied, one_bias, networks.shared_transposed]
EVERY = [*NETWORKS, *SHARING[:2]]


def drawn_owners(structure, key=0):
    """A ledger in which about half of the units are claimed, by two tasks, and some outputs are."""
    ledger, generator = NeuronLedger.for_structure(structure), keyed_generator("owners", key)
    for name, owner in ledger.owners.items():
        ledger.owners[name] = torch.randint(-2, 2, owner.shape, generator=generator).clamp_min(FREE)
    ledger.outputs[: len(ledger.outputs) // 2 + 1] = 0
    return ledger


def prepared(make, key=0, dtype=torch.float32):
    network, example = build(make)
    structure = trace(network, example)
    return network.to(dtype), structure, drawn_owners(structure, key)


def bits(module):
    """Every parameter and buffer as bytes, so that -0.0 is not 0.0 and nan is nan."""
    tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(module).items()}
    return {name: tensor.reshape(-1).view(torch.uint8).tolist() for name, tensor in tensors.items()}


def values(module):
    return {name: tensor.detach().clone() for name, tensor in named_tensors(module).items()}


def entry_by_entry(structure, ledger, tensors):
    """For each tensor, whether an entry helps some redundant unit, and no other unit; looked up one by one."""
    owner = [*torch.cat([ledger.owners[group.name] for group in structure.groups]).tolist(), *ledger.outputs.tolist()]
    hidden = structure.head.first
    marks = {}
    for name, tensor in tensors.items():
        uses = [
            (use.target.expand(tensor.shape).flatten().tolist(), use.role) for use in structure.entries.get(name, ())
        ]
        marks[name] = torch.zeros(tensor.numel(), dtype=torch.bool)
        for entry in range(tensor.numel()):
            units = [target[entry] for target, _ in uses if target[entry] != NO_UNIT]
            free = all(owner[unit] == FREE for unit in units) and any(unit < hidden for unit in units)
            marks[name][entry] = free and all(role != "statistic" for _, role in uses)
        marks[name] = marks[name].reshape(tensor.shape)
    return marks


def disturb(network, structure, ledger, perturbation, key=0, bases=None):
    return Disturbance(network, structure, ledger, perturbation, keyed_generator("draw", key), bases)


# What changes


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("key", [0, 1])
def test_all_weights_of_redundant_units_change_and_nothing_else(make, key):
    network, structure, ledger = prepared(make, key)
    before, open_entries = values(network), entry_by_entry(structure, ledger, named_tensors(network))
    disturb(network, structure, ledger, Noise())
    for name, tensor in named_tensors(network).items():
        weight = any(use.role == "weight" for use in structure.entries.get(name, ()))
        changed = tensor != before[name]
        assert torch.equal(changed, open_entries[name] if weight else torch.zeros_like(changed))


@pytest.mark.parametrize("make", EVERY)
def test_silent_units_lose_bias_scale_and_shift(make):
    network, structure, ledger = prepared(make)
    before, open_entries = values(network), entry_by_entry(structure, ledger, named_tensors(network))
    disturb(network, structure, ledger, Ablate())
    for name, tensor in named_tensors(network).items():
        assert torch.equal(tensor[~open_entries[name]], before[name][~open_entries[name]])
        if make is not tied and make is not networks.shared_transposed:  # where no unit is claimed but in part
            assert not tensor[open_entries[name]].any()


def test_units_of_which_a_part_stays_are_not_silent():
    network, structure, ledger = prepared(tied)
    assert ledger.owners.keys() == {"first", "first#2"}
    ledger.owners["first"].fill_(FREE)
    ledger.owners["first#2"].fill_(0)
    before = values(network)
    disturb(network, structure, ledger, Ablate())
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(network).items())


@pytest.mark.parametrize("perturbation", [Resample(), Noise(), Rotation(30.0)], ids=str)
def test_units_that_are_not_silent_keep_bias_scale_and_shift(perturbation):
    network, structure, ledger = prepared(networks.mlp_norm)
    before = values(network)
    disturb(network, structure, ledger, perturbation)
    for name, tensor in named_tensors(network).items():
        assert torch.equal(tensor, before[name]) == (name not in ("0.weight", "3.weight"))


def test_units_that_were_zero_before_are_not_silenced():
    network, structure, ledger = prepared(networks.mlp_norm)
    free = ledger.owners["0"] == FREE
    with torch.no_grad():
        network[0].weight[free] = 0
    before = values(network)
    disturb(network, structure, ledger, Resample())
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert torch.equal(named_tensors(network)[name], before[name])


@pytest.mark.parametrize("make", [networks.mlp_norm, networks.resnet])
@pytest.mark.parametrize("perturbation", [Ablate(), Noise()], ids=str)
def test_running_statistics_stay(make, perturbation):
    network, structure, ledger = prepared(make)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    assert before
    disturb(network, structure, ledger, perturbation)
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())


def test_a_network_without_its_redundant_units_is_the_ablated_one():
    network, structure, ledger = prepared(networks.mlp)
    _, example = build(networks.mlp)
    smaller, _, _ = prepared(networks.mlp)
    with torch.no_grad():  # what reads a redundant unit, cut
        for name, parameter in smaller.named_parameters():
            for use in structure.entries[name]:
                source = use.source.expand(parameter.shape)
                owner = torch.cat([*ledger.owners.values(), ledger.outputs, torch.tensor([0])])
                parameter[(source >= 0) & (owner[source] == FREE)] = 0
    disturb(network, structure, ledger, Ablate())
    torch.testing.assert_close(network(example), smaller(example))


@pytest.mark.parametrize("free", [True, False])
def test_every_unit_free_and_none(free):
    network, structure, ledger = prepared(networks.cnn)
    for owner in ledger.owners.values():
        owner.fill_(FREE if free else 0)
    before, generator = values(network), keyed_generator(0)
    state = generator.get_state()
    disturbance = Disturbance(network, structure, ledger, Noise(), generator)
    vectors = {rows.tensor for group in structure.groups for rows in group.rows if rows.role == "weight"}
    for name, tensor in named_tensors(network).items():
        assert torch.equal(tensor, before[name]) == (not free or name not in vectors)
    assert torch.equal(generator.get_state(), state) != free
    disturbance.undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(network).items())


def test_parameters_that_need_no_gradient_are_perturbed_too():
    network, structure, ledger = prepared(networks.mlp)
    _, example = build(networks.mlp)
    plain, _, _ = prepared(networks.mlp)
    for parameter in list(network.parameters())[:2]:
        parameter.requires_grad_(False)
    for n in (network, plain):
        disturb(n, structure, ledger, Noise())
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), plain.parameters(), strict=True))
    network(example).sum().backward()
    assert [parameter.requires_grad for parameter in network.parameters()] == [False] * 2 + [True] * 4


# Undo


@given(st.sampled_from(EVERY), st.sampled_from([Ablate(), Noise(), Resample(), Rotation(90.0)]), st.integers(0, 99))
def test_undo_is_bitwise(make, perturbation, key):
    network, structure, ledger = prepared(make, key)
    before = bits(network)
    disturbance = disturb(network, structure, ledger, perturbation, key)
    disturbance.undo()
    assert bits(network) == before
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    disturbance.undo()  # nothing is left to put back
    assert not any(parameter.any() for parameter in network.parameters())


@pytest.mark.parametrize("make", EVERY)
def test_a_pause_shows_the_undisturbed_network_and_ends_in_the_same_perturbation(make):
    network, structure, ledger = prepared(make)
    before = bits(network)
    disturbance = disturb(network, structure, ledger, Noise())
    during = bits(network)
    with disturbance.paused():
        assert bits(network) == before
    assert bits(network) == during != before
    assert disturbance.lasts
    disturbance.undo()
    assert bits(network) == before
    assert not disturbance.lasts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("make", [networks.resnet, networks.transposed_grouped, tied])
@pytest.mark.parametrize("perturbation", [Ablate(), Rotation(90.0)], ids=str)
def test_undo_is_bitwise_in_any_precision(make, dtype, perturbation):
    network, structure, ledger = prepared(make, dtype=dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.flatten()[::3] = -0.0
    before = bits(network)
    disturbance = disturb(network, structure, ledger, perturbation)
    assert bits(network) != before
    assert all(tensor.dtype in (dtype, torch.int64) for tensor in named_tensors(network).values())
    disturbance.undo()
    assert bits(network) == before


@pytest.mark.parametrize("make", EVERY)
def test_what_others_learn_meanwhile_stays(make):
    network, structure, ledger = prepared(make)
    before, open_entries = values(network), entry_by_entry(structure, ledger, named_tensors(network))
    disturbance = disturb(network, structure, ledger, Ablate())
    with torch.no_grad():
        for tensor in named_tensors(network).values():
            tensor.add_(1)
    disturbance.undo()
    for name, tensor in named_tensors(network).items():
        redundant = open_entries[name]
        assert torch.equal(tensor[redundant], before[name][redundant])
        assert torch.equal(tensor[~redundant], before[name][~redundant] + 1)


@pytest.mark.parametrize("make", [networks.mlp, networks.resnet, tied])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_perturbation_that_fails_leaves_nothing_perturbed(make, failing):
    network, structure, ledger = prepared(make)
    for owner in ledger.owners.values():
        owner.fill_(FREE)
    before, calls = bits(network), []

    def fails(vectors, generator):
        calls.append(len(vectors))
        if len(calls) > failing:
            raise KeyError
        return torch.zeros_like(vectors)

    with pytest.raises(KeyError):
        disturb(network, structure, ledger, fails)
    assert len(calls) == failing + 1
    assert bits(network) == before


# Sub-spaces and draws


@given(st.sampled_from([networks.cnn, networks.resnet, networks.two_inputs, networks.transposed]), st.integers(0, 99))
def test_perturbations_stay_in_the_sub_spaces_of_the_groups_that_have_one(make, key):
    network, structure, ledger = prepared(make, key, torch.float64)
    before, bases = values(network), {}
    for group in structure.groups[1:]:
        inputs = group.weights(before).shape[1]
        drawn = torch.randn(inputs, max(1, inputs // 3), generator=keyed_generator("basis", group.name, key))
        bases[group.name] = torch.linalg.qr(drawn.double()).Q
    disturb(network, structure, ledger, Noise(), key, bases)
    for group in structure.groups:
        free = ledger.owners[group.name] == FREE
        moved = (group.weights(named_tensors(network)) - group.weights(before))[free]
        basis = bases.get(group.name, torch.zeros(moved.shape[1], 0).double())
        inside = (moved @ basis @ basis.T).norm()
        assert inside <= (1 + 1e-9) * moved.norm()
        if group.name in bases:
            assert (moved - moved @ basis @ basis.T).norm() <= 1e-9 * moved.norm()
        if bool(free.any()):
            assert moved.norm() > 0


def test_units_ablated_in_a_sub_space_are_silent_only_if_all_of_them_lies_there():
    network, structure, ledger = prepared(networks.mlp)
    first, second = (group.name for group in structure.groups)
    bases = {first: torch.eye(6)[:, :3], second: torch.eye(8)}
    before = values(network)
    disturb(network, structure, ledger, Ablate(), bases=bases)
    for name, silent in ((first, False), (second, True)):
        free = ledger.owners[name] == FREE
        assert bool(free.any())
        weight, bias = (named_tensors(network)[f"{name}.{kind}"] for kind in ("weight", "bias"))
        assert torch.equal(bias[free], torch.zeros(int(free.sum())) if silent else before[f"{name}.bias"][free])
        if not silent:
            assert not weight[free][:, :3].any()
            assert torch.equal(weight[free][:, 3:], before[f"{name}.weight"][free][:, 3:])


def test_what_is_drawn_goes_from_group_to_group():
    network, structure, ledger = prepared(networks.cnn)
    before, generator = values(network), keyed_generator(5)
    basis = torch.eye(structure.groups[1].weights(before).shape[1])[:, :2]
    bases = {structure.groups[1].name: basis}
    Disturbance(network, structure, ledger, Resample(), keyed_generator(5), bases)
    for group in structure.groups:
        free = ledger.owners[group.name] == FREE
        perturb = InSubspace(Resample(), basis) if group.name in bases else Resample()
        expected = perturb(group.weights(before)[free], generator)
        assert torch.equal(group.weights(named_tensors(network))[free], expected)


def test_the_generator_alone_decides():
    state, seen = torch.get_rng_state(), []
    for key in (0, 0, 1):
        network, structure, ledger = prepared(networks.cnn)
        before = torch.get_rng_state()
        disturb(network, structure, ledger, Noise(), key)
        assert torch.equal(torch.get_rng_state(), before)
        seen.append(bits(network))
    assert seen[0] == seen[1] != seen[2]
    torch.set_rng_state(state)


def test_claimed_units_are_not_even_seen():
    network, structure, ledger = prepared(networks.mlp)
    with torch.no_grad():
        for group in structure.groups:
            named_tensors(network)[f"{group.name}.weight"][ledger.owners[group.name] != FREE] = float("nan")
    before = values(network)
    disturb(network, structure, ledger, Affine(shift=lambda inputs, _: torch.ones(inputs)))
    for group in structure.groups:
        free, name = ledger.owners[group.name] == FREE, f"{group.name}.weight"
        now = named_tensors(network)[name]
        torch.testing.assert_close(now[free], before[name][free] + 1)
        assert now[~free].isnan().all()


@pytest.mark.parametrize("make", EVERY)
def test_a_perturbation_may_write_into_what_it_gets(make):
    network, structure, ledger = prepared(make)
    before = bits(network)
    disturbance = disturb(network, structure, ledger, lambda vectors, generator: vectors.mul_(0.0).add_(3.0))
    assert all(
        (group.weights(named_tensors(network))[ledger.owners[group.name] == FREE] == 3).any()
        for group in structure.groups
        if bool((ledger.owners[group.name] == FREE).any())
    )
    disturbance.undo()
    assert bits(network) == before
