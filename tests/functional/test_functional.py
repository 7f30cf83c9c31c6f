import copy
import warnings
from functools import partial

import pytest
import torch
from learning import quiet_trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from toys import Net, loader, numbers

import lightning_cf.functional as cf
from lightning_cf import (
    ContinualError,
    DivergenceError,
    FrozenWarning,
    InvarianceCallback,
    MaskedGradientCallback,
    Noise,
    PartitionCallback,
    RandomSubspace,
    StructureError,
    Task,
)
from lightning_cf.learner.keeping import state_of

# Digits, in pairs


def digits(classes):
    data = load_digits()
    x = torch.tensor(data.data / 16, dtype=torch.float32)
    y = torch.tensor(data.target)
    chosen = torch.isin(y, torch.tensor(classes))
    x, y = x[chosen], y[chosen]
    return DataLoader(TensorDataset(x[::2], y[::2]), 32), (x[1::2], y[1::2])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 6))


def accuracy(net, data, columns):
    x, y = data
    return float((net(x)[:, columns].argmax(1) == y - columns[0]).float().mean())


def train(net, batches, columns, optimizer, epochs=8):
    for _ in range(epochs):
        for x, y in batches:

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x)[:, columns], y - columns[0])
                loss.backward()
                if not isinstance(optimizer, torch.optim.LBFGS):
                    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                return loss

            optimizer.step(closure)


OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.003, weight_decay=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "lbfgs": partial(torch.optim.LBFGS, max_iter=3, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_three_tasks_in_a_plain_loop_stay_bitwise_what_they_were(optimizer):
    net, seen, scores = network(), [], []
    x = digits([0, 1])[1][0]
    units = cf.trace(net, x[:16])
    ledger = cf.new_ledger(units)
    cf.check(net, units, ledger, x[:16])
    for name, columns in {"a": [0, 1], "b": [2, 3], "c": [4, 5]}.items():
        batches, held_out = digits(columns)
        ledger.begin(name, outputs=columns)
        with cf.hold(net, units, ledger):
            train(net, batches, columns, OPTIMIZERS[optimizer](net.parameters()))
        outcome = cf.claim(
            net, units, ledger, batches=batches, score=lambda d=held_out, c=columns: accuracy(net, d, c), tasks_left=3
        )
        assert outcome.accuracy > 0.9 or optimizer == "lbfgs"
        with cf.hold(net, units, ledger):
            train(net, batches, columns, OPTIMIZERS[optimizer](net.parameters()), epochs=2)
        cf.seal(net, units, ledger)
        scores.append(accuracy(net, held_out, columns))
        seen.append((columns, held_out[0], net(held_out[0])[:, columns]))
        assert all(torch.equal(net(x)[:, columns], before) for columns, x, before in seen)
    assert min(scores) > 0.9 or optimizer == "lbfgs"  # 0.98 to 1.0 on seeds 0 to 3; in batches L-BFGS wanders
    assert 0 < min(ledger.capacity().values()) < 1


# The callbacks are the same


@pytest.mark.parametrize("isolation", ["exact", "perturb"])
def test_a_claim_is_that_of_the_callbacks_bit_for_bit(isolation):
    by_callbacks, plain = Net(), Net()
    data = {"train": loader(), "val": loader()}
    task = Task("a", data, classes=[0, 1])
    callbacks = [PartitionCallback(after=0, isolation=isolation, seed=3), MaskedGradientCallback()]
    for group in (by_callbacks, plain):
        group.configure_optimizers = lambda net=group: torch.optim.SGD(net.parameters(), lr=0.0)
    quiet_trainer(max_epochs=1, callbacks=callbacks).fit(by_callbacks, datamodule=task)

    x, y = numbers()
    units = cf.trace(plain, x[:16], isolation=isolation)
    ledger = cf.new_ledger(units, isolation=isolation)
    ledger.begin("a", outputs=[0, 1])
    with cf.show(plain, units, ledger):
        found = cf.claim(
            plain,
            units,
            ledger,
            batches=loader(),
            score=lambda: float((plain(x).argmax(1) == y).float().mean()),
            seed=3,
        )
    cf.seal(plain, units, ledger, seed=3)
    theirs = state_of(by_callbacks).ledger
    assert {n: o.tolist() for n, o in ledger.owners.items()} == {n: o.tolist() for n, o in theirs.owners.items()}
    assert [r["ablation_accuracy"] for r in theirs.records] == [found.ablation_accuracy]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, by_callbacks.state_dict()[name]), name


def test_a_network_that_callbacks_trained_goes_on_in_a_plain_loop():
    net = Net()
    first = Task("a", {"train": loader(), "val": loader()}, classes=[0, 1])
    callbacks = [PartitionCallback(after=0.5), InvarianceCallback(), MaskedGradientCallback()]
    quiet_trainer(max_epochs=4, callbacks=callbacks).fit(net, datamodule=first)
    state, x = state_of(net), numbers()[0]
    net.eval()
    before = net(x)[:, :2]
    state.ledger.begin("b", outputs=[2, 3])
    with cf.hold(net, state.structure, state.ledger):
        train(net, loader(classes=(2, 3)), [2, 3], torch.optim.Adam(net.parameters(), lr=0.01))
    assert torch.equal(net(x)[:, :2], before)


# Holding


def learned(isolation="exact", seal=True):
    """A network with a first task, and what belongs to it."""
    net = network()
    batches, held_out = digits([0, 1])
    units = cf.trace(net, held_out[0][:16], isolation=isolation)
    ledger = cf.new_ledger(units, isolation=isolation)
    ledger.begin("a", outputs=[0, 1])
    with cf.hold(net, units, ledger):
        train(net, batches, [0, 1], torch.optim.Adam(net.parameters(), lr=0.003), epochs=3)
    cf.claim(net, units, ledger, batches=batches, score=lambda: accuracy(net, held_out, [0, 1]))
    if seal:
        cf.seal(net, units, ledger)
    return net, units, ledger, held_out


def test_a_step_after_the_ledger_changed_within_a_hold_is_refused_and_renewed():
    net, units, ledger, _ = learned()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ledger.begin("b", outputs=[2, 3])
    batches, held_out = digits([2, 3])
    with cf.hold(net, units, ledger) as held:
        train(net, batches, [2, 3], optimizer, epochs=1)
        cf.claim(net, units, ledger, batches=batches, score=lambda: accuracy(net, held_out, [2, 3]))
        with pytest.raises(ContinualError, match="The ledger changed while entries were held"):
            train(net, batches, [2, 3], optimizer, epochs=1)
        held.renew([optimizer])
        train(net, batches, [2, 3], optimizer, epochs=1)


def test_other_networks_of_the_process_are_left_alone():
    net, units, ledger, _ = learned()
    ledger.begin("b", outputs=[2, 3])
    other = copy.deepcopy(net)
    with cf.hold(net, units, ledger):
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1, weight_decay=0.1)
        before = other[0].weight.detach().clone()
        other(torch.randn(4, 64)).sum().backward()
        optimizer.step()
    assert bool((other[0].weight != before).any(dim=1).all())


def test_what_moves_otherwise_is_put_back_with_a_warning():
    net, units, ledger, (x, _) = learned()
    before = net(x)[:, :2]
    ledger.begin("b", outputs=[2, 3])
    with pytest.warns(FrozenWarning, match="Something else than an optimiser's step changed entries of '0.weight'"):  # noqa: SIM117
        with cf.hold(net, units, ledger):
            net[0].weight.data.add_(1.0)
    assert torch.equal(net(x)[:, :2], before)


def test_an_exception_leaves_what_is_owned_as_it_was():
    net, units, ledger, (x, _) = learned()
    before = net(x)[:, :2]
    ledger.begin("b", outputs=[2, 3])

    def training():
        with cf.hold(net, units, ledger):
            net[0].weight.data.add_(1.0)
            fails()

    with pytest.raises(RuntimeError, match="mine"):
        training()
    assert torch.equal(net(x)[:, :2], before)
    assert not net[0].weight._backward_hooks
    assert not net[0].weight._post_accumulate_grad_hooks


def test_a_subspace_holds_what_a_later_task_adds():
    net, units, ledger, _ = learned()
    subspace = RandomSubspace(dimensions=3, seed=1)
    ledger.begin("b", outputs=[2, 3])
    before, optimizer = net[0].weight.detach().clone(), torch.optim.Adam(net.parameters(), lr=0.01)
    with pytest.raises(ContinualError, match="give it optimizers"):
        cf.hold(net, units, ledger, subspace=subspace)
    with cf.hold(net, units, ledger, subspace=subspace, optimizers=[optimizer]):
        train(net, digits([2, 3])[0], [2, 3], optimizer, epochs=1)
    added = (net[0].weight.detach() - before).double()
    assert int((torch.linalg.svdvals(added) > 1e-4 * added.norm()).sum()) == 3


# Claiming


def begun():
    net = network()
    batches, held_out = digits([0, 1])
    units = cf.trace(net, held_out[0][:16])
    ledger = cf.new_ledger(units)
    ledger.begin("a", outputs=[0, 1])
    train(net, batches, [0, 1], torch.optim.Adam(net.parameters(), lr=0.003), epochs=2)
    return net, units, ledger, batches, held_out


def as_dicts(batches):
    return [{"pixels": x, "label": y} for x, y in batches]


@pytest.mark.parametrize(
    ("given", "forward"),
    [
        (list, None),
        (iter, None),
        (lambda batches: (x for x, _ in batches), None),
        (lambda batches: [x.double() for x, _ in batches], None),
        (lambda batches: [[x, y] for x, y in batches], None),
        (as_dicts, lambda net, batch: net(batch["pixels"])),
    ],
    ids=["pairs", "iterator", "inputs", "double", "lists", "dicts"],
)
def test_batches_are_any_iterable_of_inputs_or_pairs(given, forward):
    found = []
    for batches in (lambda x: x, given):
        net, units, ledger, loaded, held_out = begun()
        options = {} if forward is None or batches is not given else {"forward": forward}
        cf.claim(net, units, ledger, batches=batches(loaded), score=partial(accuracy, net, held_out, [0, 1]), **options)
        found.append((net.state_dict(), ledger.owners))
    (weights, owners), (others, other_owners) = found
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    assert all(torch.equal(value, other_owners[name]) for name, value in owners.items())


def test_a_score_may_set_the_mode_and_give_a_tensor():
    net = nn.Sequential(nn.Linear(64, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 6))
    batches, (x, y) = digits([0, 1])
    units = cf.trace(net, x[:16])
    ledger = cf.new_ledger(units)
    ledger.begin("a", outputs=[0, 1])
    train(net, batches, [0, 1], torch.optim.Adam(net.parameters(), lr=0.003), epochs=2)

    def score():
        net.eval()
        found = (net(x)[:, :2].argmax(1) == y).float().mean()
        net.train()
        return found

    statistics = net[1].running_mean.clone()
    cf.claim(net, units, ledger, batches=batches, score=score)
    assert net.training
    assert torch.equal(net[1].running_mean, statistics)


def fails():
    raise RuntimeError("mine")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"batches": []}, ContinualError, "batches gives no samples"),
        ({"batches": [torch.empty(0, 64)]}, ContinualError, "batches gives no samples"),
        ({"batches": torch.rand(8, 64)}, ContinualError, r"such as \[x\] or a DataLoader, got a Tensor"),
        (
            {"batches": (torch.rand(8, 64), torch.zeros(8))},
            ContinualError,
            r"a list of pairs is meant: batches=\[\(x, y\)\]",
        ),
        ({"score": 0.9}, ContinualError, "score must be a function"),
        ({"tasks_left": "2"}, ContinualError, "tasks_left must be a whole number"),
        ({"higher_is_better": "min"}, ContinualError, "higher_is_better must be"),
        ({"forward": None}, ContinualError, "forward must be a function"),
        ({"batches": 3}, ContinualError, "batches must be an iterable of batches, .* got a int"),
        ({"score": lambda: "high"}, ContinualError, "score must give one number, such as an accuracy; got 'high'"),
        ({"score": lambda: True}, ContinualError, "score must give one number"),
        ({"score": lambda: torch.ones(2)}, ContinualError, "score must give one number"),
        ({"score": lambda: float("nan")}, ContinualError, "scores nan before its partition"),
        ({"score": fails}, RuntimeError, "mine"),
        ({"options": {"threshold": 0.5}}, ContinualError, "options must be PartitionOptions"),
        ({"options": cf.PartitionOptions(exclude=["5"])}, ContinualError, "exclude names '5'"),
        ({"options": cf.PartitionOptions(measure="update")}, ContinualError, "measure='update' compares"),
    ],
)
def test_what_cannot_be_claimed_by_is_refused_and_leaves_all_as_it_was(changed, error, message):
    net, units, ledger, batches, held_out = begun()
    before, owners = copy.deepcopy(net.state_dict()), copy.deepcopy(ledger.owners)
    given = {"batches": batches, "score": lambda: accuracy(net, held_out, [0, 1])} | changed
    with pytest.raises(error, match=message):
        cf.claim(net, units, ledger, **given)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, owners[name]) for name, value in ledger.owners.items())
    assert ledger.current.phase == "learn"


def test_a_network_that_diverged_is_neither_claimed_nor_sealed():
    net, units, ledger, batches, held_out = begun()
    kept = net[2].weight.data[3, 4].clone()
    net[2].weight.data[3, 4] = torch.nan
    score = partial(accuracy, net, held_out, [0, 1])
    with pytest.raises(DivergenceError, match=r"Task 'a' cannot be partitioned: .* layer '2'"):
        cf.claim(net, units, ledger, batches=batches, score=score)
    net[2].weight.data[3, 4] = kept
    cf.claim(net, units, ledger, batches=batches, score=score)
    net[2].weight.data[3, 4] = torch.nan
    with pytest.raises(DivergenceError, match="Task 'a' cannot be sealed"):
        cf.seal(net, units, ledger)
    assert ledger.current.phase == "invariance"


def test_the_order_of_the_steps_is_asked_for():
    net, units, ledger, batches, _ = begun()
    with pytest.raises(ContinualError, match="has no claim yet"), cf.perturb(net, units, ledger, 0):
        pass
    with pytest.raises(ContinualError, match="task 'a' has no claim yet, so nothing would protect it"):
        cf.seal(net, units, ledger)
    cf.claim(net, units, ledger, batches=batches, score=lambda: 1.0)
    cf.seal(net, units, ledger)
    with pytest.raises(ContinualError, match="hold: no task is being learned"), cf.hold(net, units, ledger):
        pass
    for step in (
        lambda: cf.claim(net, units, ledger, batches=batches, score=lambda: 1.0),
        lambda: cf.seal(net, units, ledger),
    ):
        with pytest.raises(ContinualError, match=r"no task is being learned; ledger.begin\(name"):
            step()
    with pytest.raises(ContinualError, match="its units are sealed"):
        ledger.begin("a", outputs=[2])
    with pytest.raises(ContinualError, match="both have output 1"):
        ledger.begin("b", outputs=[1, 2])
    with pytest.raises(ContinualError, match="no outputs are set aside"):
        ledger.begin("b")


def test_a_network_that_exact_isolation_does_not_hold_on_is_refused_before_training():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            hidden = self.first(x)
            return self.head(self.second(hidden * float(hidden.abs().sum())))

    net, x = Mixed(), torch.rand(8, 64)
    units = cf.trace(net, x)
    ledger = cf.new_ledger(units)
    with pytest.raises(StructureError, match=r"reads values of units of .* into Python"):
        cf.check(net, units, ledger, x)
    cf.check(net, units, cf.new_ledger(units, isolation="perturb"), x)


# Sealing, perturbing, showing


def test_free_units_start_afresh_by_the_seed():
    nets = []
    for seed in (0, 0, 1):
        net, units, ledger, _ = learned(seal=False)
        before = net[0].weight.detach().clone()
        cf.seal(net, units, ledger, seed=seed)
        free = ledger.owners[units.groups[0].name] == -1
        assert torch.equal(net[0].weight[~free], before[~free])
        assert not bool((net[0].weight[free] == before[free]).all(dim=1).any())
        nets.append(net[0].weight)
    assert torch.equal(nets[0], nets[1])
    assert not torch.equal(nets[0], nets[2])


@pytest.mark.parametrize("isolation", ["exact", "perturb"])
def test_redundant_units_are_perturbed_for_a_step(isolation):
    net, units, ledger, (x, _) = learned(isolation, seal=False)
    before, free = net[0].weight.detach().clone(), ledger.owners[units.groups[0].name] == -1
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with cf.hold(net, units, ledger), cf.perturb(net, units, ledger, 0, "a", 7, perturbation=Noise(scale=0.5)):
        moved = (net[0].weight != before).any(dim=1)
        assert torch.equal(moved, free & (isolation == "perturb"))
        net(x)[:, :2].square().sum().backward()
        optimizer.step()
    after = net[0].weight.detach()
    assert torch.equal(after[free], before[free])
    assert not torch.equal(after[~free], before[~free])


def test_a_task_is_shown_alone_at_its_classes():
    net, units, ledger, (x, _) = learned()
    plain = net(x)
    with cf.show(net, units, ledger, "a"):
        shown = net(x)
    assert torch.equal(shown[:, :2], plain[:, :2])
    assert bool((shown[:, 2:] == torch.finfo(shown.dtype).min).all())
    with cf.show(net, units, ledger, "a", classes=[3, 4]):
        assert torch.equal(net(x)[:, 3:5], plain[:, :2])
    assert torch.equal(net(x), plain)
    with pytest.raises(ContinualError, match="no task is being learned; name one"):
        cf.show(net, units, ledger)
    with pytest.raises(ContinualError, match="No outputs are set aside for a task 'b'"):
        cf.show(net, units, ledger, "b")
    with pytest.raises(ContinualError, match=r"which classes=\[0\] cannot place"):
        cf.show(net, units, ledger, "a", classes=[0])


def test_nothing_is_said_of_a_network_on_which_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learned()


# What does not belong together


def train_outside(net):
    train(net, digits([2, 3])[0], [2, 3], torch.optim.SGD(net.parameters(), lr=0.1), epochs=1)


def other_weights(net):
    net.load_state_dict(network().state_dict())


@pytest.mark.parametrize("change", [train_outside, other_weights])
def test_weights_that_are_not_those_of_a_sealed_task_are_refused(change):
    net, units, ledger, held_out = learned()
    ledger.begin("b", outputs=[2, 3])
    change(net)
    message = "are not what task 'a' was sealed with"
    with pytest.raises(ContinualError, match=message), cf.hold(net, units, ledger):
        pass
    with pytest.raises(ContinualError, match=message):
        cf.claim(net, units, ledger, batches=digits([2, 3])[0], score=lambda: accuracy(net, held_out, [2, 3]))


def test_statistics_that_a_forward_pass_moved_are_refused():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 6))
    batches, (x, y) = digits([0, 1])
    units = cf.trace(net, x[:16])
    ledger = cf.new_ledger(units)
    ledger.begin("a", outputs=[0, 1])
    with cf.hold(net, units, ledger):
        train(net, batches, [0, 1], torch.optim.Adam(net.parameters(), lr=0.003), epochs=2)
    cf.claim(net, units, ledger, batches=batches, score=lambda: accuracy(net, (x, y), [0, 1]))
    cf.seal(net, units, ledger)
    accuracy(net, (x, y), [0, 1])  # in train mode
    ledger.begin("b", outputs=[2, 3])
    with pytest.raises(ContinualError, match=r"moved by a forward pass in train mode \(call net.eval\(\)"):
        cf.hold(net, units, ledger).__enter__()


def prune(net):
    nn.utils.prune.random_unstructured(net[0], "weight", 0.5)


def assign(net):
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [assign, prune])
def test_tensors_that_are_replaced_while_they_are_held_are_told_before_a_step(change):
    net, units, ledger, (x, _) = learned()
    before = net(x)[:, :2]
    ledger.begin("b", outputs=[2, 3])

    def training():
        with cf.hold(net, units, ledger):
            change(net)
            train(net, digits([2, 3])[0], [2, 3], torch.optim.SGD(net.parameters(), lr=0.1), epochs=1)

    with pytest.raises(ContinualError, match="was replaced while it was held"):
        training()
    assert change is prune or torch.equal(net(x)[:, :2], before)


def test_a_network_that_becomes_another_precision_is_let_go_whole():
    net, units, ledger, _ = learned()
    ledger.begin("b", outputs=[2, 3])

    def training():
        with cf.hold(net, units, ledger):
            net.double()
            fails()

    with pytest.raises(RuntimeError, match="mine"):
        training()
    assert not net[0].weight._post_accumulate_grad_hooks


def test_a_hold_holds_once():
    net, units, ledger, _ = learned()
    ledger.begin("b", outputs=[2, 3])
    with cf.hold(net, units, ledger) as held, pytest.raises(ContinualError, match="this one holds already"):
        held.__enter__()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, units, ledger: cf.hold(net, ledger, units).__enter__(), "structure must be what trace"),
        (lambda net, units, ledger: cf.hold(None, units, ledger).__enter__(), "module must be the network"),
        (
            lambda net, units, ledger: cf.check(nn.Linear(64, 6), units, ledger, torch.rand(2, 64)),
            "the structure knows",
        ),
        (lambda net, units, ledger: cf.hold(nn.DataParallel(net), units, ledger).__enter__(), "not one that wraps it"),
        (lambda net, units, ledger: cf.new_ledger(None), "structure must be what trace"),
        (lambda net, units, ledger: cf.trace(lambda x: x, torch.rand(2, 64)), "module must be the network"),
        (lambda net, units, ledger: cf.trace(net, torch.rand(2, 64), isolation="pertub"), "isolation must be one of"),
        (lambda net, units, ledger: cf.perturb(net, units, ledger).__enter__(), "perturb: give a key"),
        (lambda net, units, ledger: cf.seal(net, units, ledger, seed=-1), "seed must be"),
    ],
)
def test_what_does_not_belong_together_is_named(call, message):
    net, units, ledger, _ = learned()
    ledger.begin("b", outputs=[2, 3])
    with pytest.raises(ContinualError, match=message):
        call(net, units, ledger)
