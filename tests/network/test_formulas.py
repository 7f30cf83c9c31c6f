"""Norms that a forward pass writes out, as published classes do: taken by owners."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from learning import fit, own_logits, score, tasks, three
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from lightning_cf import StructureError
from lightning_cf.errors import StructureWarning
from lightning_cf.exactness.check import check_exact
from lightning_cf.learner.keeping import state_of
from lightning_cf.network.tracing.trace import trace
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE
from lightning_cf.ownership.nested_norms import Nesting, nested_layer_norm, nested_rms_norm
from lightning_cf.ownership.owner_aware_norms import make_owner_aware

WIDTH, EPS = 12, 1e-6


class Written(nn.Module):
    """A norm by a formula ``formula(module, x)``, with a scale and a shift."""

    def __init__(self, formula):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.randn(WIDTH))
        self.formula = formula

    def forward(self, x):
        return self.formula(self, x)


# As published


def llama(net, x):
    kind, x = x.dtype, x.to(torch.float32)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return net.weight * x.to(kind)


def gemma(net, x):
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1.0 + net.weight.float())).type_as(x)


def normalized(net, x):
    return F.normalize(x, dim=-1) * WIDTH**0.5 * net.weight


def by_length(net, x):
    return x / (x.norm(2, dim=-1, keepdim=True) * WIDTH**-0.5 + EPS) * net.weight


def by_sum(net, x):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS) * net.weight


def bert(net, x):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return net.weight * (x - mean) / torch.sqrt(variance + EPS) + net.bias


def annotated(net, x):
    mean, spread = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return net.weight * (x - mean) / (spread + EPS) + net.bias


def without_dims(net, x):
    mean, variance = x.mean(dim=-1).unsqueeze(-1), x.var(dim=-1, unbiased=False)[..., None]
    return (x - mean) / torch.sqrt(variance + EPS) * net.weight + net.bias


def both_at_once(net, x):
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return torch.addcmul(net.bias, (x - mean) * torch.rsqrt(variance + EPS), net.weight)


def in_place(net, x):
    x = x - x.mean(axis=-1, keepdim=True)
    x /= x.square().mean(-1, True).add_(EPS).sqrt_()
    return x.mul_(net.weight).add_(net.bias)


def spread_out(net, x):
    mean = x.mean(-1, keepdim=True).expand_as(x)
    return (x - mean) / (x.var(-1, keepdim=True, unbiased=False).expand(*x.shape) + EPS).sqrt() * net.weight + net.bias


def channels(net, x):
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    return net.weight[:, None, None] * (x - mean) / torch.sqrt(variance + EPS) + net.bias[:, None, None]


def response(net, x):
    size = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
    return net.weight[:, None, None] * x * (size / (size.mean(dim=1, keepdim=True) + EPS)) + x


ROOT_MEAN_SQUARE = {f.__name__: f for f in (llama, normalized, by_length, by_sum)}
LAYER = {f.__name__: f for f in (bert, without_dims, both_at_once, in_place, spread_out)}
LAST = ROOT_MEAN_SQUARE | LAYER | {f.__name__: f for f in (gemma, annotated)}
CHANNELS = {f.__name__: f for f in (channels, response)}
OWNERS = torch.tensor([0, 0, 1, FREE, 1, 0, FREE, FREE, 2, 2, FREE, 1])


def drawn(owner, x, axis):
    """Other numbers where an owner may not read."""
    later = (owner < OWNERS) | (OWNERS == FREE)
    return torch.where(later.reshape(-1, *[1] * (-1 - axis)), 3 * torch.randn_like(x), x)


@pytest.mark.parametrize("name", [*LAST, *CHANNELS])
def test_a_formula_is_recognised_and_taken_by_owners(name):
    torch.manual_seed(0)
    formula = (LAST | CHANNELS)[name]
    if name in LAST:
        norm, axis, x = Written(formula), -1, torch.randn(5, 7, WIDTH)
        net, example = nn.Sequential(nn.Linear(5, WIDTH), norm, nn.Linear(WIDTH, 9)), torch.randn(4, 6, 5)
    else:
        norm, axis, x = Written(formula), -3, torch.randn(5, WIDTH, 3, 4)
        net, example = nn.Sequential(nn.Conv2d(1, WIDTH, 3), norm, nn.Conv2d(WIDTH, 9, 3)), torch.randn(4, 1, 8, 8)
    structure = trace(net, example)
    assert [group.size for group in structure.groups] == [WIDTH]
    assert structure.mixings == ()
    assert {use.role for use in structure.entries["1.weight"]} == {"scale"}
    units = structure.norms["1"]
    assert units.flatten().tolist() == list(range(WIDTH))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_exact(net, structure, NeuronLedger.for_structure(structure), example)

    plain = norm(x)
    make_owner_aware(norm, {"": torch.zeros_like(units)})
    assert torch.equal(norm(x), plain)  # one owner: the module's own result
    make_owner_aware(norm, {"": OWNERS.reshape(units.shape)})
    found = norm(x)
    for owner in (0, 1, 2):
        own = (owner == OWNERS).nonzero().flatten()
        other = norm(drawn(torch.tensor(owner), x, axis))
        assert torch.equal(other.index_select(axis, own), found.index_select(axis, own))
    free = (OWNERS == FREE).nonzero().flatten()
    assert torch.equal(found.index_select(axis, free), plain.index_select(axis, free))
    make_owner_aware(norm, {})
    assert torch.equal(norm(x), plain)


@pytest.mark.parametrize("name", ROOT_MEAN_SQUARE | LAYER)
def test_it_is_the_norm_of_torch_by_owners(name):
    torch.manual_seed(0)
    norm, x = Written(LAST[name]).double(), torch.randn(5, WIDTH, dtype=torch.float64)
    x = x.float() if name == "llama" else x  # which computes in single precision
    make_owner_aware(norm, {"": OWNERS[None]})
    if name in ROOT_MEAN_SQUARE:
        wanted = nested_rms_norm(x, Nesting(OWNERS), norm.weight, EPS)
    else:
        wanted = nested_layer_norm(x, Nesting(OWNERS), norm.weight, norm.bias, EPS)
    torch.testing.assert_close(norm(x), wanted, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_a_single_owned_unit_spreads_by_nothing():
    norm = Written(annotated)
    make_owner_aware(norm, {"": torch.tensor([[0, *[FREE] * 11]])})
    x = torch.randn(3, WIDTH, requires_grad=True)
    out = norm(x)
    assert torch.equal(out[:, 0], norm.bias[0].expand(3))
    out.sum().backward()
    assert bool(x.grad.isfinite().all())


def test_what_a_task_owns_stays_bitwise_when_free_units_are_claimed():
    norm, x, owner, before = Written(bert), torch.randn(6, WIDTH), torch.full((WIDTH,), FREE), {}
    for task in range(4):
        owner[3 * task : 3 * task + 3] = task
        make_owner_aware(norm, {"": owner[None]})
        after = norm(x)
        for known, values in before.items():
            assert torch.equal(after[:, owner == known], values)
        before[task] = after[:, owner == task]


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_under_autocast_and_in_low_precision(precision):
    norm, x = Written(llama), torch.randn(4, WIDTH)
    plain = norm(x.to(precision)).dtype
    make_owner_aware(norm, {"": OWNERS[None]})
    assert norm(x.to(precision)).dtype == plain
    with torch.autocast("cpu", torch.bfloat16):
        other = norm(drawn(torch.tensor(1), x, -1))
        assert torch.equal(other[:, OWNERS == 1], norm(x)[:, OWNERS == 1])


def test_it_copies_and_pickles_by_its_plain_class():
    norm, x = Written(llama), torch.randn(4, WIDTH)
    make_owner_aware(norm, {"": OWNERS[None]})
    for copied in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(copied(x), norm(x))


def test_dropout_within_leaves_a_trained_norm_trainable():
    norm, x = Written(lambda net, x: llama(net, F.dropout(x, 0.5, net.training))), torch.randn(4, WIDTH)
    make_owner_aware(norm, {"": OWNERS[None]})
    norm.train()(x).sum().backward()
    assert norm.weight.grad is not None


def test_compiled_code_takes_them_and_layers_by_owners_too():
    script = """
import torch
from torch import nn
from lightning_cf.ownership.owner_aware_norms import make_owner_aware

class Norm(nn.Module):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), Norm()

    def forward(self, x):
        return self.layer(x - x.mean(-1, keepdim=True)) + self.norm(x)

owners, x = torch.tensor([0, 0, 0, 1, 1, -1, -1, -1]), torch.randn(4, 8)
for net, owned in ((Norm(), {"": owners[None]}), (Block(), {"": owners[None, None], "norm": owners[None]})):
    make_owner_aware(net, owned)
    torch.testing.assert_close(torch.compile(net, backend="eager")(x), net(x))
layer = nn.LayerNorm(8)  # one that is no formula
make_owner_aware(layer, {"": owners})
assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
"""
    subprocess.run([sys.executable, "-c", script], check=True)  # without the tests' checks of annotations


# Beside other things in a forward pass


def rms(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def unit_length(x):
    return F.normalize(x, dim=-1)


def centred(x):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS)


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH), norm
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x) * self.scale)))


class Inline(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.norm = nn.Linear(8, WIDTH), norm
        self.blocks = nn.ModuleList(Block(norm) for _ in range(2))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x):
        x = self.first(x.flatten(1).unflatten(1, (-1, 8)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).transpose(1, 2).mean(-1))  # over tokens, along the last axis too


@pytest.mark.parametrize("norm", [rms, unit_length, centred])
def test_a_norm_among_other_things_is_taken_by_owners(norm):
    torch.manual_seed(0)
    net, x = Inline(norm), torch.randn(4, 1, 8, 8)
    structure = trace(net, x)
    assert [group.size for group in structure.groups] == [WIDTH, 20, 20]
    assert list(structure.norms) == ["blocks.0", "blocks.1", ""]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_exact(net, structure, NeuronLedger.for_structure(structure), x)
    plain = net(x)
    make_owner_aware(net, {path: torch.zeros_like(units) for path, units in structure.norms.items()})
    torch.testing.assert_close(net(x), plain)
    # with as many tokens as units the mean over tokens stays one over tokens
    wide = torch.randn(4, WIDTH, 8)
    make_owner_aware(net, {})
    plain = net(wide)
    make_owner_aware(net, {path: OWNERS.reshape(units.shape) for path, units in structure.norms.items()})
    assert net(wide).shape == plain.shape


def test_one_that_cannot_be_taken_by_owners_is_named_with_the_way_out():
    def flat(x):
        return x * torch.rsqrt(x.pow(2).mean(-1) + EPS)[..., None]

    net, x = Inline(flat), torch.randn(4, 1, 8, 8)
    structure = trace(net, x)
    ledger = NeuronLedger.for_structure(structure)
    ledger.whole = [group.name for group in structure.groups if group.size == 1]
    with pytest.warns(StructureWarning, match=r"'aten\.mean' in module 'blocks\.0' .*keepdim=True.* module of its own"):
        check_exact(net, structure, ledger, x)


class Formula(nn.Module):
    def __init__(self, formula):
        super().__init__()
        self.formula = formula

    def forward(self, x):
        return self.formula(x)


class Apart(nn.Module):
    """Two layers and a head around a norm, which runs in the forward pass, a method, or a module of its own."""

    def __init__(self, formula):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.formula, self.norm = formula, Formula(formula)

    def features(self, x):
        return torch.relu(self.second(torch.relu(self.first(x))))

    def normed(self, x):
        return self.formula(self.features(x))

    def forward(self, x):
        return self.head(self.normed(x))


APART = {
    "normalize": lambda x: F.normalize(x, dim=1),
    "layer norm": lambda x: F.layer_norm(x, (WIDTH,)),
    "root mean square norm": lambda x: F.rms_norm(x, (WIDTH,)),
    "group norm": lambda x: F.group_norm(x, 3),
    "written out": lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + EPS).sqrt(),
}


def checked(net, forward):
    """How many units the hidden layers have, where exact isolation holds."""
    example = torch.randn(8, 5)
    structure = trace(net, example, forward)
    ledger = NeuronLedger.for_structure(structure)
    ledger.whole = [group.name for group in structure.groups if group.size == 1]
    check_exact(net, structure, ledger, example, forward)
    return [group.size for group in structure.groups]


@pytest.mark.parametrize("name", APART)
def test_a_norm_that_runs_outside_of_forward_makes_its_units_one_and_the_way_out_is_said(name):
    net = Apart(APART[name])
    outside = [lambda net, x: net.head(net.normed(x)), lambda net, x: net.head(net.formula(net.features(x)))]
    for run in outside:
        with pytest.warns(StructureWarning, match="in code outside of a module's forward mixes .* within a module's"):
            assert checked(net, run) == [WIDTH, 1]
    within = [lambda net, x: net.forward(x), lambda net, x: net.head(net.norm(net.features(x)))]
    for run in within:
        assert checked(net, run) == [WIDTH, WIDTH]


@pytest.mark.parametrize(
    "formula",
    [
        lambda net, x: torch.cat([x.mean(-1, keepdim=True), x[..., 1:]], -1),  # the mean itself goes on
        lambda net, x: x.mean(-1)[..., None],
        lambda net, x: x.mul_(torch.rsqrt(x.pow(2).mean(-1, keepdim=True))),  # writes over what it is given
        lambda net, x: x - x.mean(-1, keepdim=True) + (x.abs() * net.weight).cumsum(-1) * 0,
    ],
    ids=["returned", "alone", "over its input", "beside another mixing"],
)
def test_what_does_more_than_a_norm_unites_its_units_as_ever(formula):
    structure = trace(nn.Sequential(nn.Linear(5, WIDTH), Written(formula), nn.LazyLinear(4)), torch.randn(4, 5))
    assert [group.size for group in structure.groups] == [1]


# Three tasks


class Own(LightningModule):
    """A module whose own forward pass holds the layers and a norm by hand."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 32)
        self.norm, self.head = Rms(32), nn.Linear(32, 10)

    def forward(self, x):
        x = F.gelu(self.first(x.flatten(1)))
        x = x + F.gelu(self.second(self.norm(x)))
        return self.head(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Rms(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


@pytest.mark.filterwarnings("ignore:.*no claim within the budget")
def test_three_tasks_stay_bitwise_what_they_were():
    torch.manual_seed(0)
    module, after, scores = Own(), [], []
    for task in tasks():
        fit(module, task, three(), epochs=4)
        after.append(own_logits(module, task))
        scores.append(score(module, task))
    for task, logits in zip(tasks(), after, strict=True):
        assert torch.equal(own_logits(module, task), logits), task.name
    assert min(scores) >= 0.7, scores
    assert set(state_of(module).ledger.norms) == {"", "norm"}
    assert state_of(module).ledger.whole == []


@pytest.mark.parametrize("formula", [lambda net, x: rms(x), lambda net, x: F.normalize(x, dim=-1)])
def test_a_norm_over_the_outputs_is_refused(formula):
    with pytest.raises(StructureError, match="outputs mix the columns"):
        trace(nn.Sequential(nn.Linear(5, WIDTH), Written(formula)), torch.randn(4, 5))
