"""A weight that is used at several places: in parts, transposed, in other tasks' ways; earlier tasks stay bitwise."""

import pytest
import torch
from clouds import INPUTS, clouds, loaders, points
from learning import fit, three
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from lightning_cf import ContinualError, ContinualModule, LeakError, LedgerWarning, Task
from lightning_cf.learner.keeping import state_of
from lightning_cf.network.tracing import assembly

pytestmark = pytest.mark.filterwarnings("ignore:.*no claim within")


class Shared(LightningModule):
    """A network of a user's own, whose forward is a function of its layers."""

    def __init__(self, run, seed=0, **layers):
        super().__init__()
        torch.manual_seed(seed)
        self.run, self.net = run, nn.ModuleDict(layers)

    def forward(self, x):
        return self.run(self.net, x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.005, weight_decay=0.1)


def embedded(seed):
    layers = {"e": nn.Embedding(64, 24), "l": nn.Linear(24, 24), "o": nn.Linear(24, 64, bias=False)}
    layers["o"].weight = layers["e"].weight

    def run(n, x):
        tokens = (2 * x).long().clamp(-2, 2) + 2 + 5 * torch.arange(INPUTS)
        return n.h(F.relu(n.o(F.relu(n.l(n.e(tokens).mean(1))))))

    return Shared(run, seed, **layers, h=nn.Linear(64, 10))


def folded_back(seed):
    def run(n, x):
        return n.h(F.relu(F.relu(n.m(F.relu(n.a(x)))) @ n.a.weight))

    return Shared(run, seed, a=nn.Linear(INPUTS, 32), m=nn.Linear(32, 32), h=nn.Linear(INPUTS, 10))


def convolved_back(seed):
    def run(n, x):
        inside = F.relu(n.m(F.relu(n.a(n.i(x[:, None])))))
        return n.h(F.relu(F.conv_transpose1d(inside, n.a.weight, padding=1)).flatten(1))

    layers = {"i": nn.Conv1d(1, 4, 1), "a": nn.Conv1d(4, 24, 3, padding=1), "m": nn.Conv1d(24, 24, 1)}
    return Shared(run, seed, **layers, h=nn.Linear(4 * INPUTS, 10))


def in_parts(seed):
    def run(n, x):
        z, w = F.relu(n.i(x)), n.p.weight
        parts = F.linear(z[:, :16], w[:, :16]), F.linear(z[:, 16:], w[:, 16:])
        return n.h(torch.cat([*map(F.relu, parts), F.relu(n.p(z))], 1))

    return Shared(run, seed, i=nn.Linear(INPUTS, 32), p=nn.Linear(32, 32), h=nn.Linear(96, 10))


def one_row(seed):
    def run(n, x):
        z = F.relu(n.i(x))
        return n.h(F.relu(n.p(z) + F.linear(z, n.p.weight[:1])))

    return Shared(run, seed, i=nn.Linear(INPUTS, 32), p=nn.Linear(32, 32), h=nn.Linear(32, 10))


SEQUENCE = {"a": [0, 1], "b": [2, 3], "c": [4, 5]}
X, _ = points(range(6), count=60, seed=5)


@torch.no_grad()
def shown(module, classes):
    return module.eval()(X)[:, classes].clone()


@pytest.mark.parametrize("make", [embedded, folded_back, convolved_back, in_parts, one_row])
@pytest.mark.parametrize("seed", [0, 1])
def test_earlier_tasks_stay_bitwise(make, seed):
    module, before = make(seed), {}
    for name, classes in SEQUENCE.items():
        fit(module.train(), clouds(name, classes), three(), 3)
        for earlier, found in before.items():
            assert torch.equal(shown(module, SEQUENCE[earlier]), found)
        before[name] = shown(module, classes)


def test_what_an_entry_computes_shares_its_fate_with_what_it_reads_where_it_is_transposed():
    module = folded_back(0)
    fit(module, clouds("a", [0, 1]), three(), 2)
    groups = {group.size: group.layers for group in state_of(module).structure.groups}
    assert groups == {32: ("net.a", "net.m"), INPUTS: ("net.a",)}


def test_parts_of_a_layer_compute_its_units():
    module = in_parts(0)
    fit(module, clouds("a", [0, 1]), three(), 2)
    assert sorted(group.size for group in state_of(module).structure.groups) == [32, 32]


def test_a_claim_that_would_cut_what_earlier_tasks_compute_with_is_refused(monkeypatch):
    """Whatever the trace did not see: nothing is cut silently."""
    monkeypatch.setattr(assembly, "unite_shared_layers", lambda units, uses: None)
    module = folded_back(0)
    fit(module, clouds("a", [0, 1]), three(), 2)
    before = shown(module, [0, 1])
    with pytest.raises(LeakError, match=r"'net\.a\.weight' is used at several places, and the claim of task 'b' would"):
        fit(module.train(), clouds("b", [2, 3]), three(), 2)
    assert torch.equal(shown(module, [0, 1]), before)


class InTurn(Shared):
    """Trains in the way of the task of now; its forward pass stays."""

    way = None

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.way[0](self.net, batch[0]), batch[1])


def head(n, k, z):
    return n[f"h{k}"](F.relu(z))


def run_a(n, x):
    return head(n, 0, n.p(F.relu(n.i(x))))


def run_half(n, x):
    return head(n, 1, F.linear(F.relu(n.i(x))[:, :16], n.p.weight[:, :16], n.p.bias))


def run_back(n, x):
    return head(n, 1, F.linear(F.relu(n.i(x)), n.p.weight.T))


def run_turned(n, x):
    return head(n, 2, n.p(F.relu(n.i(x)).flip(1)))


def ways(known, *runs):
    module = InTurn(runs[0], i=nn.Linear(INPUTS, 32), p=nn.Linear(32, 32), h0=nn.Linear(32, 2), h1=nn.Linear(32, 2))
    module.net["h2"] = nn.Linear(32, 2)
    module = ContinualModule(module) if known else module
    sequence = [
        Task(
            str(k),
            loaders(*(part if part.ndim > 1 else part % 2 for part in points([2 * k, 2 * k + 1]))),
            classes=[0, 1],
            evaluate=lambda module, batch, run=run: (run(module.net, batch[0]), batch[1]),
        )
        for k, run in enumerate(runs)
    ]
    for task in sequence if known else ():
        module.add_task(task)
    before = []
    for task, run in zip(sequence, runs, strict=True):
        module.way = (run,)
        fit(module.train(), task, three(), 3)
        with torch.no_grad():
            found = [each(module.eval().net, X).clone() for each in runs[: len(before) + 1]]
        assert all(torch.equal(a, b) for a, b in zip(before, found[:-1], strict=True))
        before = found


@pytest.mark.filterwarnings("ignore:No task is inferred")
@pytest.mark.parametrize("known", [False, True])
def test_tasks_that_use_parts_of_a_layer_stay_bitwise(known):
    ways(known, run_a, run_half, run_turned)


@pytest.mark.filterwarnings("ignore:No task is inferred")
def test_a_task_that_uses_a_layer_transposed_is_told_of_in_advance():
    with pytest.raises(ContinualError, match=r"'net\.i', 'net\.p' would share one fate.* or uses a weight transposed"):
        ways(False, run_a, run_back, run_turned)
    ways(True, run_a, run_back, run_turned)


def run_reshaped(n, x):
    z = F.relu(n.i(x))
    return head(n, 1, F.linear(z, n.p.weight.reshape(16, 64)[:, :32]).repeat(1, 2))


@pytest.mark.filterwarnings("ignore:No task is inferred")
def test_a_task_that_reshapes_a_layer_leaves_its_units_apart():
    ways(True, run_a, run_reshaped)


def test_a_layer_that_earlier_tasks_ran_and_that_runs_no_more_is_told():
    module = ContinualModule(Shared(run_a, i=nn.Linear(INPUTS, 32), p=nn.Linear(32, 32), h0=nn.Linear(32, 4)))
    first, second = clouds("a", [0, 1]), clouds("b", [2, 3])
    for task in (first, second):
        module.add_task(task)
    fit(module, first, three(), 2)
    module.run = lambda n, x: head(n, 0, n.i(x))
    with pytest.raises(LedgerWarning, match=r"units of earlier tasks in layer 'net\.p' give something else"):
        fit(module.train(), second, three(), 2)
