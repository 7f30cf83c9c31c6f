from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.optimizer import _global_optimizer_post_hooks

from lightning_cf.network.kept_entries import KeptEntries
from lightning_cf.ownership.freezing import Freezer

ELEMENTWISE = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": partial(torch.optim.Adam, lr=0.1, weight_decay=0.1, amsgrad=True),
    "adamw": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5, foreach=False),
    "adamw foreach": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5, foreach=True),
    "adamw fused": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5, fused=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1, momentum=0.9, centered=True, weight_decay=0.1),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1, weight_decay=0.1),
    "nadam": partial(torch.optim.NAdam, lr=0.1, weight_decay=0.1),
}
OPTIMIZERS = {
    **ELEMENTWISE,
    "lbfgs": partial(torch.optim.LBFGS, lr=0.1, max_iter=4),
    "muon": partial(torch.optim.Muon, lr=0.1, weight_decay=0.1),
    "adafactor": partial(torch.optim.Adafactor, lr=0.1, weight_decay=0.1),
}
MASKS = {
    "rows": torch.tensor([[True], [False], [True], [True], [False], [False]]),
    "columns": torch.tensor([[False, True, True, False]]),
    "entries": torch.arange(24).reshape(6, 4) % 5 < 2,
    "whole": torch.ones(1, 1, dtype=torch.bool),
}


@pytest.fixture(autouse=True)
def _let_go():
    """Some tests attach and leave; the hook on all optimisers would go on."""
    yield
    _global_optimizer_post_hooks.clear()


class Weight(nn.Module):
    """One parameter, pulled towards the number one."""

    def __init__(self, values):
        super().__init__()
        self.weight = nn.Parameter(values.clone())

    def loss(self):
        return (torch.where(self.weight.isfinite(), self.weight - 1, 0) ** 2).sum()


def values(shape=(6, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def train(module, optimizer, steps=5):
    def closure():
        optimizer.zero_grad()
        loss = module.loss()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("mask", MASKS)
def test_frozen_entries_stay_bitwise_and_free_ones_move(kind, mask):
    module, frozen = Weight(values()), MASKS[mask].expand(6, 4)
    optimizer = OPTIMIZERS[kind](module.parameters())
    with Freezer(module, {"weight": MASKS[mask]}).attach([optimizer]):
        train(module, optimizer)
    assert torch.equal(module.weight[frozen], values()[frozen])
    assert (module.weight[~frozen] != values()[~frozen]).all()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("mask", ["rows", "entries"])
def test_frozen_entries_that_are_not_finite_stay_bitwise(kind, mask):
    frozen = MASKS[mask].expand(6, 4)
    strange = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 1e-45])
    start = torch.where(frozen, strange[torch.arange(24).reshape(6, 4) % 5], values())
    module = Weight(start)
    optimizer = OPTIMIZERS[kind](module.parameters())
    with Freezer(module, {"weight": MASKS[mask]}).attach([optimizer]):
        train(module, optimizer)
    assert torch.equal(module.weight.view(torch.int32)[frozen], start.view(torch.int32)[frozen])


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize("mask", ["rows", "columns", "entries"])
def test_free_entries_move_as_if_they_were_alone(kind, mask):
    free = ~MASKS[mask].expand(6, 4)
    module, alone = Weight(values()), Weight(values()[free])
    optimizer, reference = (ELEMENTWISE[kind](m.parameters()) for m in (module, alone))
    with Freezer(module, {"weight": MASKS[mask]}).attach([optimizer]):
        train(module, optimizer)
    train(alone, reference)
    torch.testing.assert_close(module.weight[free], alone.weight, rtol=1e-6, atol=1e-7)


def test_several_optimizers_and_parameters():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    masks = {"0.weight": torch.tensor([[True], [False], [True], [False]]), "1.bias": torch.tensor([False, True])}
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5) for layer in module]
    with Freezer(module, masks).attach(optimizers):
        for _ in range(3):
            module(torch.ones(1, 3)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for name, tensor in module.named_parameters():
        stayed = (tensor == before[name]).reshape(len(tensor), -1).all(dim=1)
        assert stayed.tolist() == masks.get(name, torch.zeros(len(tensor), dtype=torch.bool)).flatten().tolist()


def test_clipping_and_accumulation_see_only_live_gradients():
    module, free = Weight(values()), ~MASKS["entries"]
    pull = torch.where(free, 3.0, float("inf"))
    with Freezer(module, {"weight": MASKS["entries"]}).attach([]):
        for _ in range(2):
            (module.weight * pull).sum().backward()
        assert (module.weight.grad[free] == 6).all()
        assert (module.weight.grad[~free] == 0).all()
        assert clip_grad_norm_(module.parameters(), 1.0) == pytest.approx((36 * int(free.sum())) ** 0.5)


def test_gradients_written_anew_are_zeroed_on_request():
    module = Weight(values())
    freezer = Freezer(module, {"weight": MASKS["rows"]}).attach([])
    freezer.zero_gradients()
    module.weight.grad = torch.ones(6, 4)
    freezer.zero_gradients()
    assert module.weight.grad.sum(dim=1).tolist() == [0, 4, 0, 0, 4, 4]


@pytest.mark.parametrize("mask", MASKS)
def test_optimizer_state_of_frozen_entries_is_zeroed_on_request(mask):
    module, frozen = Weight(values()), MASKS[mask].expand(6, 4)
    optimizer = torch.optim.Adam(module.parameters())
    train(module, optimizer, steps=2)
    before = {key: value.clone() for key, value in optimizer.state[module.weight].items()}
    Freezer(module, {"weight": MASKS[mask]}).attach([optimizer]).zero_optimizer_state()
    after = optimizer.state[module.weight]
    assert after["step"] == 2
    for key in ("exp_avg", "exp_avg_sq"):
        assert (after[key][frozen] == 0).all()
        assert torch.equal(after[key][~frozen], before[key][~frozen])


def test_a_mask_of_fewer_axes_broadcasts_as_tensors_do():
    module = Weight(values())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with Freezer(module, {"weight": torch.tensor([True, False, False, True])}).attach([optimizer]):
        train(module, optimizer)
    assert (module.weight == values()).tolist() == [[True, False, False, True]] * 6


def test_a_parameter_without_gradient_may_be_frozen():
    module = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 1))
    before = module[0].weight.clone()
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.5)
    with Freezer(module, {"0.weight": torch.ones(1, 1, dtype=torch.bool)}).attach([optimizer]):
        module(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert torch.equal(module[0].weight, before)


def test_a_parameter_that_is_unfrozen_later_has_no_gradient_where_it_is_held():
    module = nn.Linear(3, 3).requires_grad_(False)
    with Freezer(module, {"weight": torch.tensor([[True], [False], [True]])}).attach([]):
        module.requires_grad_(True)
        module(torch.ones(1, 3)).sum().backward()
    assert module.weight.grad.tolist() == [[0] * 3, [1] * 3, [0] * 3]


@pytest.mark.parametrize("mask", MASKS)
def test_sparse_gradients_are_zero_where_entries_are_held(mask):
    table, plain = (nn.Embedding(6, 4, sparse=True) for _ in range(2))
    before, frozen = table.weight.detach().clone(), MASKS[mask].expand(6, 4)
    plain.load_state_dict(table.state_dict())
    optimizers = [torch.optim.SparseAdam(list(t.parameters()), lr=0.1) for t in (table, plain)]
    with Freezer(table, {"weight": MASKS[mask]}).attach(optimizers[:1]):
        for t, optimizer in zip((table, plain), optimizers, strict=True):
            t(torch.tensor([[1, 1, 4], [0, 1, 3]])).square().sum().backward()
            optimizer.step()
        assert (table.weight.grad.to_dense()[frozen] == 0).all()
    assert torch.equal(table.weight[frozen], before[frozen])
    assert torch.equal(table.weight[~frozen], plain.weight[~frozen])


def test_optimisers_that_nobody_told_of_are_held_too():
    module = Weight(values())
    with Freezer(module, {"weight": MASKS["rows"]}).attach([]):
        train(module, torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5))
    assert (module.weight == values()).all(dim=1).tolist() == MASKS["rows"].flatten().tolist()


def flattened(module):
    """Views of the parameters' memory, as optimisers that keep everything in one piece step them."""
    return [parameter.data.view(-1) for parameter in module.parameters()]


class Master(torch.optim.AdamW):
    """Steps copies in double precision, and writes them into the parameters."""

    def __init__(self, params, **options):
        self.originals = list(params)
        super().__init__([p.detach().double().requires_grad_() for p in self.originals], **options)

    def step(self, closure=None):
        for copy, original in zip(self.param_groups[0]["params"], self.originals, strict=True):
            copy.grad = original.grad.double()
        super().step()
        for copy, original in zip(self.param_groups[0]["params"], self.originals, strict=True):
            original.data.copy_(copy.detach())


def test_an_optimiser_of_views_that_nobody_told_of_is_held_too():
    module, optimizer = Weight(values()), None
    with Freezer(module, {"weight": MASKS["rows"]}).attach([]):
        (view,) = flattened(module)
        optimizer = torch.optim.AdamW([view], lr=0.1, weight_decay=0.5)
        view.grad = torch.ones(24)
        optimizer.step()
    assert (module.weight == values()).all(dim=1).tolist() == MASKS["rows"].flatten().tolist()


def test_an_optimiser_that_is_told_of_is_held_whatever_it_steps():
    module = Weight(values())
    optimizer = Master(module.parameters(), lr=0.1, weight_decay=0.5)
    with Freezer(module, {"weight": MASKS["rows"]}).attach([optimizer]):
        module.loss().backward()
        optimizer.step()
    assert (module.weight == values()).all(dim=1).tolist() == MASKS["rows"].flatten().tolist()


@pytest.mark.parametrize("told", [True, False])
def test_optimisers_of_something_else_put_nothing_back(told):
    module, other = Weight(values()), Weight(values())
    optimizer, foreign = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, other))
    with Freezer(module, {"weight": MASKS["rows"]}).attach([optimizer] if told else []):
        module.weight.data.add_(1)
        train(other, foreign)
        assert torch.equal(module.weight, values() + 1)
        train(module, optimizer, steps=1)
    assert (module.weight == values()).all(dim=1).tolist() == MASKS["rows"].flatten().tolist()


class Passed:
    """Something that changes one tensor for a while."""

    lasts = True

    def __init__(self, tensor):
        self.tensor = tensor

    def changes(self, tensor):
        return tensor is self.tensor


@pytest.mark.parametrize("mask", MASKS)
def test_what_passes_is_put_back_while_it_lasts_and_no_longer(mask):
    module, frozen = nn.ModuleList([Weight(values()), Weight(values())]), MASKS[mask].expand(6, 4)
    freezer = Freezer(module, {"0.weight": MASKS[mask], "1.weight": MASKS[mask]}).attach([])
    with freezer:
        for part in module:
            part.weight.data.add_(1)
        passing = Passed(module[0].weight)
        freezer.save_meanwhile(passing)
        module[0].weight.data.add_(1)
        freezer.restore()
        assert torch.equal(module[0].weight[frozen], values()[frozen] + 1)
        assert torch.equal(module[1].weight[frozen], values()[frozen])
        passing.lasts = False
        freezer.restore()
        assert torch.equal(module[0].weight[frozen], values()[frozen])


@pytest.mark.parametrize("mask", MASKS)
def test_entries_that_moved_are_told_and_put_back(mask):
    module, frozen = Weight(values()), MASKS[mask].expand(6, 4)
    (entries,) = Freezer(module, {"weight": MASKS[mask]}).entries
    entries.save()
    module.weight.data[~frozen] += 1
    assert not entries.moved()
    row, column = frozen.nonzero()[0]
    module.weight.data[row, column] = float("nan")
    assert entries.moved()
    entries.restore()
    assert not entries.moved()
    assert torch.equal(module.weight[frozen], values()[frozen])


# BatchNorm


def norm(dims=2, **options):
    layer = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](4, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    return layer


def shifted(dims, seed=0):
    shape = (8, 4) if dims == 1 else (8, 4, *[3] * dims)
    return 5 + 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CHANNELS = torch.tensor([True, False, True, False])
NORM_MASKS = dict.fromkeys(["weight", "bias", "running_mean", "running_var"], CHANNELS) | {
    "num_batches_tracked": torch.tensor(False)
}
OPTIONS = [{}, {"affine": False}, {"momentum": None}, {"momentum": 1.0}]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_frozen_channel_trains_as_it_is_evaluated(dims, options):
    layer, x = norm(dims, **options), shifted(dims)
    evaluated = layer.eval()(x)
    plain = norm(dims, **options).train()
    with Freezer(layer, NORM_MASKS).attach([]):
        trained = layer.train()(x)
        assert torch.equal(trained[:, CHANNELS], evaluated[:, CHANNELS])
        assert torch.equal(trained[:, ~CHANNELS], plain(x)[:, ~CHANNELS])
        assert torch.equal(layer.eval()(x)[:, CHANNELS], evaluated[:, CHANNELS])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_statistics_of_frozen_channels_stay_and_those_of_free_ones_move(options):
    layer, plain, start = norm(**options), norm(**options), norm(**options)
    with Freezer(layer, NORM_MASKS).attach([]):
        for step in range(3):
            layer(shifted(2, step))
            plain(shifted(2, step))
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(layer, name)[CHANNELS], getattr(start, name)[CHANNELS])
        assert torch.equal(getattr(layer, name)[~CHANNELS], getattr(plain, name)[~CHANNELS])
        assert (getattr(layer, name)[~CHANNELS] != getattr(start, name)[~CHANNELS]).all()


def test_gradients_of_free_channels_are_those_of_a_plain_norm():
    layer, plain = norm(), norm()
    inputs = [shifted(2).requires_grad_() for _ in range(2)]
    with Freezer(layer, NORM_MASKS).attach([]):
        for module, x in zip((layer, plain), inputs, strict=True):
            module(x).tanh().sum().backward()
    torch.testing.assert_close(inputs[0].grad[:, ~CHANNELS], inputs[1].grad[:, ~CHANNELS])
    torch.testing.assert_close(layer.weight.grad[~CHANNELS], plain.weight.grad[~CHANNELS])
    assert (layer.weight.grad[CHANNELS] == 0).all()


def test_gradients_through_a_frozen_channel_are_those_of_eval_mode():
    layer, evaluated = norm(), norm().eval()
    inputs = [shifted(2).requires_grad_() for _ in range(2)]
    with Freezer(layer, NORM_MASKS).attach([]):
        for module, x in zip((layer, evaluated), inputs, strict=True):
            module(x).tanh().sum().backward()
    torch.testing.assert_close(inputs[0].grad[:, CHANNELS], inputs[1].grad[:, CHANNELS])


def test_backward_works_through_a_norm_that_ran_twice():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), norm())
    masks = {f"1.{name}": mask for name, mask in NORM_MASKS.items()}
    with Freezer(network, masks).attach([]):
        (network(torch.randn(8, 3, 2, 2)).sum() + network(torch.randn(8, 3, 2, 2)).square().sum()).backward()
    assert network[0].weight.grad.isfinite().all()


def test_a_norm_takes_its_input_by_name():
    layer, x = norm(), shifted(2)
    evaluated = layer.eval()(x)
    with Freezer(layer, NORM_MASKS).attach([]):
        assert torch.equal(layer.train()(input=x)[:, CHANNELS], evaluated[:, CHANNELS])


def test_a_norm_without_a_mask_is_free():
    layer, plain = norm(), norm()
    with Freezer(layer, {"weight": CHANNELS}).attach([]):
        assert torch.equal(layer(shifted(2)), plain(shifted(2)))


# Hooks


def hooks(module, optimizer):
    parameters = [parameter._post_accumulate_grad_hooks or {} for parameter in module.parameters()]
    steps = [optimizer._optimizer_step_post_hooks, _global_optimizer_post_hooks]
    return [*parameters, *[child._forward_hooks for child in module.modules()], *steps]


@pytest.mark.parametrize("leave", ["detach", "with", "exception"])
def test_no_hook_is_left(leave):
    module = nn.Sequential(nn.Conv2d(3, 4, 1), norm())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    masks = {"0.weight": CHANNELS[:, None, None, None], **{f"1.{name}": mask for name, mask in NORM_MASKS.items()}}
    freezer = Freezer(module, masks).attach([optimizer])
    assert sum(map(len, hooks(module, optimizer))) == 3 + 1 + 1
    if leave == "detach":
        freezer.detach()
        freezer.detach()
    elif leave == "with":
        with freezer:
            pass
    else:
        with pytest.raises(KeyError), freezer:
            raise KeyError
    assert not any(hooks(module, optimizer))


def test_an_empty_mask_hooks_nothing_but_the_optimizer():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), norm())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    masks = {name: torch.zeros((1,) * tensor.ndim, dtype=torch.bool) for name, tensor in module.state_dict().items()}
    with Freezer(module, masks).attach([optimizer]):
        assert sum(map(len, hooks(module, optimizer))) == 1


def test_attaching_again_remembers_the_values_of_now():
    module = Weight(values())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    freezer = Freezer(module, {"weight": MASKS["rows"]})
    with freezer.attach([optimizer]):
        train(module, optimizer, steps=1)
    module.weight.data.fill_(7)
    with freezer.attach([optimizer]):
        train(module, optimizer, steps=1)
    assert (module.weight == 7).all(dim=1).tolist() == MASKS["rows"].flatten().tolist()


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (4, 2, 3), (4, 2)])
def test_entries_of_a_mask_over_two_axes_are_held_along_the_others(shape):
    """As a grouped transposed convolution has: its inputs and its outputs lie along axes of their own."""
    parameter = nn.Parameter(torch.randn(shape))
    mask = torch.tensor([[True, False], [False, False], [True, True], [False, True]])
    entries = KeptEntries(parameter, mask.reshape(4, 2, *[1] * (len(shape) - 2)))
    entries.save()
    assert not entries.moved()
    with torch.no_grad():
        parameter[1] += 1
    assert not entries.moved()
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter[2, 1] += 1
    assert entries.moved()
    entries.restore()
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_mask_that_varies_along_one_axis_is_kept_as_rows_of_it(axis):
    parameter = nn.Parameter(torch.randn(4, 6, 3, 3))
    held = torch.arange(parameter.shape[axis]) % 2 == 0
    mask = held.reshape(-1, *[1] * (3 - axis)).expand(parameter.shape if axis == 0 else (4, 6, 1, 1))
    entries = KeptEntries(parameter, mask)
    entries.save()
    assert entries.saved.numel() == parameter.numel() // 2
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(1.0)
    entries.restore()
    assert torch.equal(parameter, torch.where(mask, before, torch.ones(())))
