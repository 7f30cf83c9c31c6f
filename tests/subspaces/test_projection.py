from functools import partial

import networks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import FixedFeatures, build
from torch import nn

from lightning_cf.errors import ContinualError
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.tracing.trace import trace
from lightning_cf.ownership.freezing import Freezer
from lightning_cf.subspaces.projection import Projection
from lightning_cf.utilities.randomness import keyed_generator

ELEMENTWISE = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.5, foreach=False),
    "adamw foreach": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.5, foreach=True),
    "adamw fused": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.5, fused=True),
}
OPTIMIZERS = {**ELEMENTWISE, "lbfgs": partial(torch.optim.LBFGS, lr=0.1, max_iter=4)}
NETWORKS = [
    networks.mlp_norm,
    networks.cnn,
    networks.resnet,  # residual sums: rows of a unit in several tensors
    networks.tokens,
    networks.two_inputs,
    networks.transposed,  # units along axis 1
    networks.transposed_grouped,  # units along no axis
    networks.shuffled,  # several groups in one tensor
    networks.one_unit,
]


def drawn(*shape, key=0):
    return torch.randn(shape, generator=keyed_generator("drawn", *shape, key), dtype=torch.float64)


def basis_of(inputs, dimensions, key=0):
    return torch.linalg.qr(drawn(inputs, dimensions, key=key)).Q.float()


def some_units(group, key=0):
    """Half of a group's units, rounded up, in order."""
    chosen = torch.randperm(group.size, generator=keyed_generator("units", group.name, key))
    return chosen[: (group.size + 1) // 2].sort().values


def network_of(make, dtype=torch.float64):
    network, example = build(make)
    return network.to(dtype), trace(build(make)[0], example)


def holding(network, structure, key=0):
    """Each group with half of its units, and a basis of about a third of their directions."""
    tensors = named_tensors(network)
    held = []
    for group in structure.groups:
        inputs = group.weights(tensors).shape[1]
        held.append((group, some_units(group, key), basis_of(inputs, max(1, inputs // 3), key)))
    return held


def pull(network, dtype=torch.float64):
    """A loss under which each entry is pulled to a number of its own, whatever the others do."""
    return sum(
        ((parameter - drawn(*parameter.shape, key=i).to(parameter.dtype)) ** 2).sum().to(dtype)
        for i, parameter in enumerate(network.parameters())
    )


def train(network, *optimizers, steps=5, loss=pull):
    for _ in range(steps):
        for optimizer in optimizers:

            def closure(optimizer=optimizer):
                optimizer.zero_grad()
                value = loss(network)
                value.backward()
                return value

            optimizer.step(closure)


def copies(network):
    return {name: tensor.detach().clone() for name, tensor in named_tensors(network).items()}


def assert_in_span(held, before, after, tolerance):
    """What was added to the held units lies in the span, up to a share of its length; and something was added."""
    for group, units, basis in held:
        added = (group.weights(after).double() - group.weights(before).double())[units]
        span = torch.linalg.qr(basis.double()).Q
        assert added.norm() > 1e-3
        assert (added - added @ span @ span.T).norm() <= tolerance * added.norm()


def entries_of(held, tensors, roles):
    """The entries of the held units, by their role."""
    marks = {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}
    for group, units, _ in held:
        for rows in group.rows:
            if rows.role in roles:
                rows.write(marks[rows.tensor], torch.ones_like(rows.read(marks[rows.tensor])), units)
    return {name: mark.bool() for name, mark in marks.items()}


CASES = [
    *((make, kind, torch.float64, 1e-9) for make in NETWORKS for kind in OPTIMIZERS),
    *((make, "adamw fused", torch.float32, 1e-5) for make in NETWORKS),
    *((NETWORKS[0], kind, torch.float32, 1e-5) for kind in OPTIMIZERS if kind != "adamw fused"),
]


@pytest.mark.parametrize(("make", "kind", "dtype", "tolerance"), CASES)
def test_what_steps_add_lies_in_the_sub_space(make, kind, dtype, tolerance):
    network, structure = network_of(make, dtype)
    plain, _ = network_of(make, dtype)
    held, before = holding(network, structure), copies(network)
    optimizer, reference = (OPTIMIZERS[kind](n.parameters()) for n in (network, plain))
    Projection(named_tensors(network), held).attach([optimizer])
    train(network, optimizer)
    train(plain, reference)
    assert_in_span(held, before, named_tensors(network), tolerance)
    vectors = entries_of(held, before, ["weight"])
    others = entries_of(held, before, ["bias", "scale", "shift"])
    for name, tensor in named_tensors(network).items():
        assert torch.equal(tensor[others[name]], before[name][others[name]])
        if kind in ELEMENTWISE:
            alone = ~vectors[name] & ~others[name]
            assert torch.equal(tensor[alone], named_tensors(plain)[name][alone])


@given(
    units=st.integers(1, 5),
    inputs=st.integers(1, 6),
    dimensions=st.integers(1, 6),
    key=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_steps_are_those_of_projected_descent(units, inputs, dimensions, key, dtype):
    """Against a loop over steps and units in Python."""
    layer, goal, rate = nn.Linear(inputs, units, bias=False), drawn(units, inputs, key=key), 0.1
    network = nn.Sequential(layer, nn.ReLU(), nn.Linear(units, 2)).to(dtype)
    basis = basis_of(inputs, min(dimensions, inputs), key)
    structure = trace(
        nn.Sequential(nn.Linear(inputs, units, bias=False), nn.ReLU(), nn.Linear(units, 2)), drawn(1, inputs).float()
    )
    held = torch.arange(0, units, 2)
    start = layer.weight.detach().clone().double()
    optimizer = torch.optim.SGD([layer.weight], lr=rate)
    Projection(named_tensors(network), [(structure.groups[0], held, basis)]).attach([optimizer])
    train(network, optimizer, steps=6, loss=lambda _: ((layer.weight - goal.to(dtype)) ** 2).sum())
    projector = basis.double() @ torch.linalg.pinv(basis.double())
    for unit in range(units):
        vector = start[unit].clone()
        for _ in range(6):
            vector = vector - rate * 2 * (vector - goal[unit])
            if unit in held:
                vector = start[unit] + projector @ (vector - start[unit])
        torch.testing.assert_close(layer.weight[unit].double(), vector, rtol=1e-5, atol=1e-5)


def test_a_whole_basis_holds_nothing_but_biases():
    network, structure = network_of(networks.mlp_norm)
    plain, _ = network_of(networks.mlp_norm)
    tensors = named_tensors(network)
    held = [(g, torch.arange(g.size), torch.eye(g.weights(tensors).shape[1])) for g in structure.groups]
    optimizers = [ELEMENTWISE["adamw"](n.parameters()) for n in (network, plain)]
    Projection(tensors, held).attach(optimizers[:1])
    for n, optimizer in zip((network, plain), optimizers, strict=True):
        train(n, optimizer)
    for name, tensor in tensors.items():
        if name in ("0.weight", "3.weight", "6.weight", "6.bias"):
            torch.testing.assert_close(tensor, named_tensors(plain)[name], rtol=1e-12, atol=1e-12)
        elif name.endswith(("weight", "bias")):
            assert not torch.equal(tensor, named_tensors(plain)[name])


# Optimisers that share a group


def two_producers(dtype=torch.float64):
    """Two layers whose outputs are added: a unit's vector has entries of both."""
    network, structure = network_of(networks.two_inputs, dtype)
    (group,) = structure.groups
    assert group.layers == ("left", "right")
    return network, [(group, torch.tensor([0, 2, 3]), basis_of(13, 4))]


@pytest.mark.parametrize("kinds", [("sgd", "adamw"), ("adamw", "lbfgs"), ("lbfgs", "sgd")], ids=" ".join)
def test_optimizers_that_hold_a_part_of_a_group_each(kinds):
    network, held = two_producers()
    before = copies(network)
    parts = [[*network.left.parameters()], [*network.right.parameters(), *network.head.parameters()]]
    optimizers = [OPTIMIZERS[kind](part) for kind, part in zip(kinds, parts, strict=True)]
    Projection(named_tensors(network), held).attach(optimizers)
    for _ in range(4):
        train(network, *optimizers, steps=1)
        assert_in_span(held, before, named_tensors(network), 1e-9)
    train(network, optimizers[1], steps=1)
    assert_in_span(held, before, named_tensors(network), 1e-9)


def test_parameter_groups_without_a_rate():
    network, held = two_producers()
    before = copies(network)
    rest = [*network.right.parameters(), *network.head.parameters()]
    optimizer = torch.optim.SGD([{"params": [*network.left.parameters()], "lr": 0.0}, {"params": rest}], lr=0.1)
    Projection(named_tensors(network), held).attach([optimizer])
    train(network, optimizer)
    assert_in_span(held, before, named_tensors(network), 1e-9)
    others = torch.tensor([1, 4])
    assert torch.equal(network.left.weight[others], before["left.weight"][others])
    assert torch.equal(network.left.bias, before["left.bias"])


def test_accumulated_gradients_step_once():
    network, held = two_producers()
    before = copies(network)
    optimizer = ELEMENTWISE["adamw"](network.parameters())
    Projection(named_tensors(network), held).attach([optimizer])
    for i in range(6):
        between = copies(network)
        pull(network).backward()
        assert all(torch.equal(tensor, between[name]) for name, tensor in named_tensors(network).items())
        if i % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
            assert_in_span(held, before, named_tensors(network), 1e-9)


# Tensors that do not train


def test_a_tensor_that_needs_no_gradient_stays():
    network, held = two_producers()
    network.left.requires_grad_(False)
    (group, units, _), span = held[0], basis_of(13, 9)
    before = copies(network)
    optimizer = ELEMENTWISE["sgd"]([p for p in network.parameters() if p.requires_grad])
    Projection(named_tensors(network), [(group, units, span)]).attach([optimizer])
    train(network, optimizer, loss=partial(pull_of, names=["right.weight", "right.bias", "head.weight"]))
    assert torch.equal(network.left.weight, before["left.weight"])
    assert_in_span([(group, units, span)], before, named_tensors(network), 1e-6)


def pull_of(network, names):
    return sum(((network.get_parameter(name) - drawn(*network.get_parameter(name).shape)) ** 2).sum() for name in names)


def test_a_tensor_that_needs_no_gradient_stays_where_the_others_diverge():
    network, held = two_producers()
    network.left.requires_grad_(False)
    network.left.weight.flatten()[::2] = -0.0
    before = copies(network)
    optimizer = torch.optim.SGD(network.right.parameters(), lr=0.1)
    Projection(named_tensors(network), [(*held[0][:2], basis_of(13, 9))]).attach([optimizer])
    train(network, optimizer, steps=1, loss=lambda n: (n.right.weight * float("inf")).sum())
    assert not network.right.weight[0].isfinite().all()
    assert torch.equal(network.left.weight, before["left.weight"])
    assert torch.equal(network.left.weight.signbit(), before["left.weight"].signbit())


def test_a_sub_space_that_lets_nothing_train_is_refused():
    network, held = two_producers()
    network.left.requires_grad_(False)
    with pytest.raises(ContinualError, match=r"no direction of the sub-space of 'left' leaves left.weight alone"):
        Projection(named_tensors(network), held)
    network.requires_grad_(False)
    Projection(named_tensors(network), held)


def test_a_tensor_that_comes_to_train_is_held_with_the_others():
    network, held = two_producers()
    held = [(*held[0][:2], basis_of(13, 9))]
    network.left.requires_grad_(False)
    before = copies(network)
    optimizer = ELEMENTWISE["sgd"](network.parameters())
    Projection(named_tensors(network), held).attach([optimizer])
    train(network, optimizer, steps=2, loss=partial(pull_of, names=["right.weight"]))
    assert torch.equal(network.left.weight, before["left.weight"])
    network.left.requires_grad_(True)
    train(network, optimizer, steps=2)
    assert (network.left.weight[0] - before["left.weight"][0]).norm() > 1e-2
    assert_in_span(held, before, named_tensors(network), 1e-9)


def test_weights_that_are_buffers_stay():
    network = FixedFeatures()
    (group,) = trace(network, torch.randn(1, 6)).groups
    held, before = [(group, torch.arange(3), basis_of(6, 4))], copies(network)
    optimizer = ELEMENTWISE["sgd"](network.parameters())
    Projection(named_tensors(network), held).attach([optimizer])
    train(network, optimizer, loss=lambda n: pull(n, torch.float32))
    assert torch.equal(network.fixed, before["fixed"])
    assert_in_span(held, before, named_tensors(network), 1e-5)


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [networks.cnn, networks.resnet, networks.transposed_grouped])
def test_low_precision_leaves_the_sub_space_by_rounding_alone(make, dtype):
    network, structure = network_of(make, dtype)
    held, before = holding(network, structure), copies(network)
    optimizer = ELEMENTWISE["sgd"](network.parameters())
    Projection(named_tensors(network), held).attach([optimizer])
    train(network, optimizer, loss=lambda n: pull(n, torch.float32))
    assert_in_span(held, before, named_tensors(network), 0.02)
    for group, units, basis in held:
        start, now = (group.weights(t).double()[units] for t in (before, named_tensors(network)))
        span = torch.linalg.qr(basis.double()).Q
        outside = (now - start) - (now - start) @ span @ span.T
        assert (outside.norm(dim=1) <= torch.finfo(dtype).eps * now.norm(dim=1)).all()
    assert all(tensor.dtype in (dtype, torch.int64) for tensor in named_tensors(network).values())


def test_a_group_of_several_types():
    network, held = two_producers(torch.float32)
    network.left.bfloat16()
    network.right.double()
    before = copies(network)
    optimizer = ELEMENTWISE["adamw"](network.parameters())
    Projection(named_tensors(network), held).attach([optimizer])
    train(network, optimizer)
    assert [layer.weight.dtype for layer in (network.left, network.right)] == [torch.bfloat16, torch.float64]
    assert_in_span(held, before, named_tensors(network), 0.01)


def test_steps_under_autocast_are_projected_in_full():
    """Manual optimisation steps inside the precision plugin's autocast."""
    network, held = two_producers(torch.float32)
    before = copies(network)
    optimizer = ELEMENTWISE["adamw"](network.parameters())
    Projection(named_tensors(network), held).attach([optimizer])
    with torch.autocast("cpu", torch.bfloat16):
        train(network, optimizer, steps=20)
    assert_in_span(held, before, named_tensors(network), 1e-5)


def test_many_steps_neither_leave_the_sub_space_nor_shrink_what_was_added():
    network, held = two_producers(torch.float32)
    (group, units, basis), tensors = held[0], named_tensors(network)
    before = copies(network)
    optimizer = ELEMENTWISE["sgd"](network.parameters())
    off = basis * (1 - 1e-4)  # orthonormal up to rounding
    Projection(tensors, [(group, units, off)]).attach([optimizer])
    train(network, optimizer, steps=20)
    added = (group.weights(tensors) - group.weights(before))[units]
    optimizer.param_groups[0]["lr"] = 0.0
    train(network, optimizer, steps=1000)
    assert_in_span(held, before, tensors, 1e-5)
    torch.testing.assert_close((group.weights(tensors) - group.weights(before))[units], added, rtol=0, atol=1e-5)


# Alone and with others


def test_the_freezer_has_the_last_word():
    network, structure = network_of(networks.cnn)
    held, before = holding(network, structure), copies(network)
    marks = entries_of(held, before, ["weight", "bias"])
    optimizer = ELEMENTWISE["adamw"](network.parameters())
    Projection(named_tensors(network), held).attach([optimizer])
    with Freezer(network, {name: ~mark for name, mark in marks.items()}).attach([optimizer]):
        train(network, optimizer)
    assert_in_span(held, before, named_tensors(network), 1e-9)
    for name, tensor in named_tensors(network).items():
        assert torch.equal(tensor[~marks[name]], before[name][~marks[name]])


def test_values_written_after_it_was_made_count_as_added():
    network, held = two_producers()
    before = copies(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    Projection(named_tensors(network), held).attach([optimizer])
    with torch.no_grad():
        network.left.weight.mul_(3.0)
        network.right.bias.fill_(7.0)
    train(network, optimizer, steps=1)
    assert_in_span(held, before, named_tensors(network), 1e-9)
    assert torch.equal(network.right.bias[held[0][1]], before["right.bias"][held[0][1]])


def test_nothing_is_held_where_no_unit_is_named():
    network, held = two_producers()
    plain, _ = two_producers()
    nothing = [(held[0][0], torch.zeros(0, dtype=torch.int64), held[0][2])]
    optimizers = [ELEMENTWISE["adamw"](n.parameters()) for n in (network, plain)]
    Projection(named_tensors(network), nothing).attach(optimizers[:1])
    for n, optimizer in zip((network, plain), optimizers, strict=True):
        train(n, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), plain.parameters(), strict=True))


def test_no_hook_is_left():
    network, held = two_producers()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (network.left, network.right)]
    projection = Projection(named_tensors(network), held).attach(optimizers)
    assert [len(optimizer._optimizer_step_post_hooks) for optimizer in optimizers] == [1, 1]
    projection.attach(optimizers[:1])
    projection.detach()
    projection.detach()
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in optimizers)
    before = copies(network)
    train(network, *optimizers)
    assert all((network.left.weight != before["left.weight"]).flatten())
