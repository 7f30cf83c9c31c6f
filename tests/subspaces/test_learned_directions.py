import math

import networks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import NETWORKS, FixedFeatures, build
from torch import nn

from lightning_cf.network.forward import named_tensors
from lightning_cf.network.tracing.trace import trace
from lightning_cf.ownership.freezing import Freezer
from lightning_cf.subspaces.learned_directions import DirectionLearner
from lightning_cf.subspaces.subspace import LearnedSubspace
from lightning_cf.utilities.randomness import keyed_generator

NAN = float("nan")


def drawn(*shape, key=0):
    return torch.randn(shape, generator=keyed_generator("drawn", key))


def traced(make):
    network, example = build(make)
    return network, trace(network, example)


def every_unit(structure):
    return {group.name: torch.arange(group.size) for group in structure.groups}


def watch(network, structure, units=None, **options):
    learner = DirectionLearner(LearnedSubspace(**options), every_unit(structure) if units is None else units)
    return learner.attach(network, structure.groups)


def give(network, gradients):
    """A backward pass that gives parameters these gradients."""
    parameters = dict(network.named_parameters())
    sum((parameters[name] * gradient).sum() for name, gradient in gradients.items()).backward()


def gradients_of(network, group, vectors):
    """Gradients whose rows, for the units of a group, are ``vectors``."""
    gradients = {rows.tensor: torch.zeros_like(named_tensors(network)[rows.tensor]) for rows in group.rows}
    group.write_weights(gradients, vectors, torch.arange(group.size))
    return {name: g for name, g in gradients.items() if named_tensors(network)[name].requires_grad}


def assert_spans(basis, vectors):
    """The basis is orthonormal and spans the rows of ``vectors``, no less and no more."""
    rank = int(torch.linalg.matrix_rank(vectors.double(), rtol=1e-5))
    assert basis.shape == (vectors.shape[1], rank)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), rtol=0, atol=1e-5)
    left = vectors - vectors @ basis @ basis.T
    assert left.norm() <= 1e-4 * vectors.norm()


# Which directions


@pytest.mark.parametrize("make", NETWORKS)
def test_gradients_that_span_few_dimensions_are_spanned_exactly(make):
    """Rows in several tensors, along any axis or none: random combinations lie where what they combine lies."""
    network, structure = traced(make)
    learner = watch(network, structure, dimensions=1.0, steps=10)
    sums = {}
    for step in range(3):
        gradients = {name: torch.zeros_like(tensor) for name, tensor in named_tensors(network).items()}
        for group in structure.groups:
            vectors = drawn(group.size, 1, key=step) * drawn(1, group.weights(gradients).shape[1], key=step + 10)
            group.write_weights(gradients, vectors, torch.arange(group.size))
        for group in structure.groups:  # groups may share a tensor: what came out, not what was put in
            sums.setdefault(group.name, []).append(group.weights(gradients))
        give(network, {name: gradients[name] for name, _ in network.named_parameters()})
        learner.end_step(None)
    found = learner.directions(structure.groups)
    assert found.keys() == {group.name for group in structure.groups}
    for name, basis in found.items():
        assert_spans(basis, torch.cat(sums[name]))


@given(st.integers(0, 99), st.integers(1, 4))
def test_leading_directions_are_those_of_all_gradients_kept_whole(key, dimensions):
    """Against the singular vectors of every row of every step."""
    network, structure = traced(networks.mlp)
    group = structure.groups[1]
    learner = watch(network, structure, dimensions=dimensions, steps=60, seed=key)
    turned = torch.linalg.qr(drawn(8, 8, key=key)).Q
    kept = []
    for step in range(60):
        vectors = drawn(8, 8, key=100 * key + step) * 0.3 ** torch.arange(8.0) @ turned
        kept.append(vectors)
        give(network, gradients_of(network, group, vectors))
        learner.end_step(None)
    basis = learner.directions((group,))[group.name]
    everything = torch.cat(kept)
    _, s, vh = torch.linalg.svd(everything, full_matrices=False)
    assert basis.shape == (8, dimensions)
    assert (everything @ basis).norm() >= 0.99 * s[:dimensions].norm()
    assert torch.linalg.svdvals(vh[:dimensions] @ basis).min() > 0.97


def test_steps_with_larger_gradients_count_more():
    network, structure = traced(networks.mlp)
    group = structure.groups[0]
    learner = watch(network, structure, dimensions=1, steps=40)
    for step in range(40):
        axis = torch.eye(6)[step % 2]
        give(network, gradients_of(network, group, drawn(8, 1, key=step) * axis * (10 if step % 2 else 1)))
        learner.end_step(None)
    assert abs(float(learner.directions((group,))[group.name][1, 0])) > 0.99


@pytest.mark.parametrize(("dimensions", "expected"), [(1, 1), (4, 4), (9, 6), (0.5, 3), (0.4, 3), (1.0, 6)])
def test_as_many_directions_as_asked_for(dimensions, expected):
    network, group, learner = one_layer(dimensions=dimensions, steps=5)
    for step in range(5):
        give(network, gradients_of(network, group, drawn(8, 6, key=step)))
        learner.end_step(None)
    assert learner.directions((group,))[group.name].shape == (6, expected)


def test_enough_is_kept_of_one_step_for_many_directions():
    network = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 2))
    structure = trace(network, drawn(1, 30))
    learner = watch(network, structure, dimensions=30, steps=2)
    vectors = []
    for step in range(2):
        vectors.append(drawn(40, 30, key=step))
        give(network, {"0.weight": vectors[-1]})
        learner.end_step(None)
    assert_spans(learner.directions(structure.groups)["0"], torch.cat(vectors))


# Which gradients


def one_layer(units=None, **options):
    network, structure = traced(networks.mlp)
    (group, *_) = structure.groups
    chosen = {} if units is None else {group.name: units}
    return network, group, watch(network, structure, {**every_unit(structure), **chosen}, **options)


def test_backward_passes_of_a_step_add_up():
    network, group, learner = one_layer(dimensions=1.0, steps=5)
    first, total = drawn(8, 6, key=1), drawn(8, 1, key=2) * drawn(1, 6, key=3)
    for part in (first, total - first):
        give(network, gradients_of(network, group, part))
    learner.end_step(None)
    assert_spans(learner.directions((group,))[group.name], total)


def test_steps_do_not_add_up():
    network, group, learner = one_layer(dimensions=1.0, steps=5)
    first, second = (drawn(8, 1, key=i) * drawn(1, 6, key=i + 2) for i in (1, 2))
    for part in (first, second):
        give(network, gradients_of(network, group, part))
        learner.end_step(None)
    assert_spans(learner.directions((group,))[group.name], torch.cat([first, second]))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_window_holds_the_last_steps(steps):
    network, group, learner = one_layer(dimensions=1.0, steps=steps)
    axes = torch.eye(6)
    for step in range(6):
        give(network, gradients_of(network, group, drawn(8, 1, key=step) * axes[step]))
        learner.end_step(None)
        assert_spans(learner.directions((group,))[group.name], axes[max(0, step + 1 - steps) : step + 1])


def test_only_the_units_named_count():
    vectors = drawn(8, 6)
    network, group, learner = one_layer(torch.tensor([1, 4]), dimensions=1.0, steps=5)
    give(network, gradients_of(network, group, vectors))
    learner.end_step(None)
    assert_spans(learner.directions((group,))[group.name], vectors[[1, 4]])


def test_other_units_count_from_when_they_are_named():
    vectors = drawn(8, 6)
    network, group, learner = one_layer(torch.tensor([1, 4]), dimensions=1.0, steps=5)
    for units in (torch.tensor([1, 4]), torch.tensor([2])):
        learner.units[group.name] = units
        give(network, gradients_of(network, group, vectors))
        learner.end_step(None)
    assert_spans(learner.directions((group,))[group.name], vectors[[1, 4, 2]])


def test_groups_without_units_or_gradients_learn_nothing():
    network, structure = traced(networks.mlp)
    first, second = structure.groups
    learner = watch(network, structure, {first.name: torch.zeros(0, dtype=torch.int64), second.name: torch.arange(8)})
    give(network, gradients_of(network, first, drawn(8, 6)))
    learner.end_step(None)
    assert learner.directions(structure.groups) == {}
    give(network, gradients_of(network, second, torch.zeros(8, 8)))
    learner.end_step(None)
    assert learner.directions(structure.groups) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_gradients_of_any_type(dtype):
    network, structure = traced(networks.mlp)
    network.to(dtype)
    group = structure.groups[0]
    learner = watch(network, structure, dimensions=1.0)
    vectors = torch.tensor([[1.0], [2.0]]).repeat(4, 1) * torch.arange(6.0)
    give(network, gradients_of(network, group, vectors.to(dtype)))
    learner.end_step(None)
    basis = learner.directions((group,))[group.name]
    assert basis.dtype == torch.float32
    assert_spans(basis, vectors)


def test_gradients_under_autocast_are_combined_in_full():
    network, group, learner = one_layer(dimensions=1.0)
    vectors = drawn(8, 1) * drawn(1, 6, key=1)
    with torch.autocast("cpu", torch.bfloat16):
        give(network, gradients_of(network, group, vectors))
    learner.end_step(None)
    assert_spans(learner.directions((group,))[group.name], vectors)


@pytest.mark.parametrize("make", [networks.transposed_grouped, networks.transposed, networks.cnn])
def test_gradients_may_be_laid_out_in_any_way(make):
    network, structure = traced(make)
    group = structure.groups[1]
    learner = watch(network, structure, dimensions=1.0)
    vectors = drawn(group.size, 1) * drawn(1, group.weights(named_tensors(network)).shape[1], key=1)
    for name, gradient in gradients_of(network, group, vectors).items():
        (network.get_parameter(name).movedim(0, -1) * gradient.movedim(0, -1).contiguous()).sum().backward()
    learner.end_step(None)
    assert_spans(learner.directions((group,))[group.name], vectors)


# Gradients that are not finite, and tensors without


def joined(step):
    """A gradient of both producers of ``two_inputs`` that spans one dimension."""
    return drawn(5, 1, key=step) * drawn(1, 13, key=step + 50)


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("tensor", ["left.weight", "right.weight"])
def test_a_step_that_is_not_finite_is_left_out_and_later_ones_are_not(value, tensor):
    network, structure = traced(networks.two_inputs)
    (group,) = structure.groups
    learner = watch(network, structure, dimensions=1.0, steps=3)
    seen = []
    for step in range(7):
        gradients = gradients_of(network, group, joined(step))
        if step in (1, 5):
            gradients[tensor][2, 3] = value
        else:
            seen.append(joined(step))
        give(network, gradients)
        learner.end_step(None)
        assert_spans(learner.directions((group,))[group.name], torch.cat(seen[-3:]))


def test_a_backward_pass_that_is_not_finite_takes_its_step_with_it():
    network, group, learner = one_layer(dimensions=1.0)
    give(network, gradients_of(network, group, drawn(8, 6)))
    give(network, gradients_of(network, group, torch.full((8, 6), NAN)))
    learner.end_step(None)
    assert learner.directions((group,)) == {}


def test_units_that_do_not_count_need_no_finite_gradient():
    vectors = drawn(8, 6)
    network, group, learner = one_layer(torch.tensor([1, 4]), dimensions=1.0)
    vectors[2] = float("inf")
    give(network, gradients_of(network, group, vectors))
    learner.end_step(None)
    assert_spans(learner.directions((group,))[group.name], vectors[[1, 4]])


def test_a_tensor_without_a_gradient_in_a_step_counts_as_zero():
    network, structure = traced(networks.two_inputs)
    (group,) = structure.groups
    learner = watch(network, structure, dimensions=1.0, steps=3)
    vectors = [joined(step) for step in range(4)]
    vectors[1][:, :6] = 0
    vectors[2][:, 6:] = 0
    for step in range(4):
        gradients = gradients_of(network, group, vectors[step])
        give(network, {name: gradient for name, gradient in gradients.items() if bool(gradient.any())})
        learner.end_step(None)
    assert_spans(learner.directions((group,))[group.name], torch.cat(vectors[1:]))


def test_a_tensor_that_needs_no_gradient_is_in_no_direction():
    network, structure = traced(networks.two_inputs)
    network.left.requires_grad_(False)
    (group,) = structure.groups
    learner = watch(network, structure, dimensions=1.0)
    vectors = joined(0)
    give(network, gradients_of(network, group, vectors))
    learner.end_step(None)
    vectors[:, :6] = 0
    assert_spans(learner.directions((group,))[group.name], vectors)


def test_a_weight_that_is_a_buffer_is_in_no_direction():
    network = FixedFeatures()
    structure = trace(network, drawn(1, 6))
    learner = watch(network, structure, dimensions=1.0)
    network(drawn(4, 6)).square().sum().backward()
    learner.end_step(None)
    (group,) = structure.groups
    gradients = {"left.weight": network.left.weight.grad, "fixed": torch.zeros(5, 6)}
    assert_spans(learner.directions((group,))[group.name], group.weights(gradients))


# Beside others


def test_gradients_are_seen_before_they_are_masked_and_stay_as_they_are():
    plain, structure = traced(networks.cnn)
    network, masked = (traced(networks.cnn)[0] for _ in range(2))
    x = build(networks.cnn)[1]
    plain(x).square().sum().backward()
    learner = watch(network, structure, dimensions=1.0)
    network(x).square().sum().backward()
    learner.end_step(None)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(network.parameters(), plain.parameters(), strict=True))
    behind_masks = watch(masked, structure, dimensions=1.0)
    with Freezer(masked, {name: torch.tensor(True) for name, _ in masked.named_parameters()}).attach([]):
        masked(x).square().sum().backward()
    assert not any(parameter.grad.any() for parameter in masked.parameters())
    behind_masks.end_step(None)
    seen, found = (each.directions(structure.groups) for each in (learner, behind_masks))
    assert seen.keys() == found.keys() == {group.name for group in structure.groups}
    assert all(torch.equal(found[name], seen[name]) for name in seen)


def test_the_seed_alone_decides():
    found = []
    for seed in (0, 0, 1):
        network, group, learner = one_layer(dimensions=1, steps=4, seed=seed)
        for step in range(4):
            give(network, gradients_of(network, group, drawn(8, 6, key=step)))
            learner.end_step(None)
        found.append(learner.directions((group,))[group.name])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    network, group, learner = one_layer()
    state = torch.get_rng_state()
    give(network, gradients_of(network, group, drawn(8, 6)))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_hook_is_left_and_no_graph_is_kept():
    network, structure = traced(networks.cnn)
    learner = watch(network, structure)
    assert sum(bool(parameter._backward_hooks) for parameter in network.parameters()) == 3
    loss = network(build(networks.cnn)[1]).square().sum()
    torch.autograd.grad(loss, list(network.parameters()), create_graph=True)
    learner.end_step(loss)
    assert not learner.losses[0].requires_grad
    found = learner.directions(structure.groups)
    assert found
    assert not any(basis.requires_grad for basis in found.values())
    learner.detach()
    learner.detach()
    assert not any(parameter._backward_hooks for parameter in network.parameters())


# Whether the loss fell


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([[1.0]], [True]),
        ([[1.0], [0.5], [0.7], [0.5], [0.4]], [True, True, False, False, True]),
        ([[1.0, 3.0], [0.0, 3.9], [0.0, 0.0, 5.9]], [True, True, False]),  # means, of as many as there are
        ([[], []], [True, True]),
        ([[2.0], [], [3.0], [1.0]], [True, True, False, True]),
        ([[], [2.0], [1.0], [1.5]], [True, True, True, False]),
        ([[2.0], [NAN], [3.0], [1.0]], [True, False, False, True]),
        ([[2.0], [NAN, 0.0], [1.0]], [True, False, True]),
        ([[NAN], [2.0], [1.0]], [False, True, True]),
        ([[math.inf], [2.0], [-math.inf], [-math.inf], [0.0]], [False, True, True, False, False]),
        ([[-1.0], [-2.0], [-1.5]], [True, True, False]),
    ],
)
def test_the_loss_fell_where_its_mean_is_the_lowest_so_far(windows, expected):
    learner = DirectionLearner(LearnedSubspace(), {})
    fell = []
    for window in windows:
        for loss in window:
            learner.end_step(torch.tensor(loss))
        if not window:
            learner.end_step(None)
        fell.append(learner.loss_fell())
    assert fell == expected


def test_losses_of_any_shape_and_type_count_by_their_mean():
    learner = DirectionLearner(LearnedSubspace(), {})
    for loss in (torch.tensor([1.0, 3.0]), torch.tensor([[2.0]], dtype=torch.float64), torch.tensor(2.0).bfloat16()):
        learner.end_step(loss)
    assert learner.loss_fell()
    assert learner.best == 2.0


def test_losses_are_remembered_as_they_were():
    learner, loss = DirectionLearner(LearnedSubspace(), {}), torch.tensor(1.0)
    learner.end_step(loss)
    loss.fill_(5.0)
    assert learner.loss_fell()
    assert learner.best == 1.0
