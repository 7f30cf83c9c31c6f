"""What somebody with a loop of their own is told names what is there in it, beside what a Trainer's callbacks have."""

import pytest
import torch
from torch import nn

import lightning_cf.functional as cf
from lightning_cf import ContinualError, FrozenWarning, LearnedSubspace, StructureError

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def begun(*, sealed=False):
    """A network with a task that is being learned, or that was."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 2))
    units = cf.trace(net, X)
    ledger = cf.new_ledger(units)
    ledger.begin("a", outputs=[0, 1] if sealed else [0])
    if sealed:
        cf.claim(net, units, ledger, batches=[X], score=lambda: 1.0)
        cf.seal(net, units, ledger)
    return net, units, ledger


def train(net, steps=5):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        net(X).square().sum().backward()
        optimizer.step()


def refused(kind, message):
    return pytest.raises(kind, match=message)


def test_a_measure_by_updates_is_told_where_the_start_goes_and_works_with_it():
    net, units, ledger = begun()
    start = {name: value.detach().clone() for name, value in net.named_parameters()}
    train(net)
    given = {"batches": [X], "score": lambda: 1.0, "options": cf.PartitionOptions(measure="update")}
    with refused(ContinualError, r"Add PartitionCallback .*give claim\(start=\.\.\.\) clones of them by name"):
        cf.claim(net, units, ledger, **given)
    assert cf.claim(net, units, ledger, start=start, **given).groups[0].partition.non_redundant.any()


def test_a_score_that_is_no_number_points_to_the_score():
    net, units, ledger = begun()
    with refused(ContinualError, r"scores nan before its partition.* evaluate=, or the score= of claim"):
        cf.claim(net, units, ledger, batches=[X], score=lambda: float("nan"))


def test_a_head_that_is_too_narrow_is_widened_as_the_message_says():
    net, units, ledger = begun(sealed=True)
    before, narrow = net(X), net[2]
    with refused(ContinualError, r"has 2 columns .*in a loop of your own trace it again and call ledger.add_outputs"):
        ledger.begin("b", outputs=[2, 3])
    net[2] = nn.Linear(20, 4)
    with torch.no_grad():
        net[2].weight[:2], net[2].bias[:2] = narrow.weight, narrow.bias
    units = cf.trace(net, X)
    ledger.add_outputs(2)
    ledger.begin("b", outputs=[2, 3])
    with cf.hold(net, units, ledger):
        train(net)
    cf.claim(net, units, ledger, batches=[X], score=lambda: 1.0)
    cf.seal(net, units, ledger)
    assert torch.equal(net(X)[:, :2], before)


def test_a_task_after_one_without_a_claim_is_told_to_claim():
    _, _, ledger = begun()
    with refused(ContinualError, r"\(PartitionCallback, after=\.\.\., or claim\(\.\.\.\) in a loop of your own\)"):
        ledger.begin("b", outputs=[1])


def test_a_ledger_of_another_network_is_told_to_belong_to_what_was_traced():
    net, units, _ = begun()
    other = cf.new_ledger(cf.trace(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), X))
    with refused(ContinualError, r"Take the ledger and what trace\(\.\.\.\) found of one network\..*ContinualModule"):
        cf.check(net, units, other, X)


def test_a_ledger_saved_by_hand_is_read_as_the_message_says(tmp_path):
    net, _, ledger = begun()
    torch.save({"net": net.state_dict(), "ledger": ledger.state_dict()}, tmp_path / "mine.pt")
    with refused(ContinualError, r"holds no ledger: .*saved by yourself, goes to NeuronLedger.from_state_dict"):
        cf.NeuronLedger.from_checkpoint(tmp_path / "mine.pt")
    state = torch.load(tmp_path / "mine.pt", weights_only=True)["ledger"]
    assert cf.NeuronLedger.from_state_dict(state).tasks == ledger.tasks


def test_a_head_that_cannot_be_shown_alone_is_told_to_do_without_show():
    net, x = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 1)), torch.rand(4, 1, 2, 2)
    units = cf.trace(net, x)
    ledger = cf.new_ledger(units)
    ledger.begin("a", outputs=[0])
    with refused(ContinualError, r"mask_outputs=False\) to do without, in a loop of your own .* instead of show"):
        cf.show(net, units, ledger)


def test_a_sub_space_that_only_a_callback_learns_names_those_that_need_no_learning():
    net, units, ledger = begun()
    cf.claim(net, units, ledger, batches=[X], score=lambda: 1.0)
    cf.seal(net, units, ledger)
    ledger.begin("b", outputs=[1])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with refused(
        ContinualError, "in a loop of your own, where nothing learns one, use RandomSubspace or GivenSubspace"
    ):
        cf.hold(net, units, ledger, subspace=LearnedSubspace(), optimizers=[optimizer]).__enter__()


def test_weights_that_something_else_moved_are_told_of_without_a_fit():
    net, units, ledger = begun()
    cf.claim(net, units, ledger, batches=[X], score=lambda: 1.0)
    cf.seal(net, units, ledger)
    ledger.begin("b", outputs=[1])
    with pytest.warns(FrozenWarning, match="what else writes weights: a hook, an average of weights"):  # noqa: SIM117
        with cf.hold(net, units, ledger):
            net[0].weight.data.add_(1.0)


class Branching(nn.Module):
    """Runs one of two layers, by its input."""

    def __init__(self):
        super().__init__()
        self.low, self.high, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x, both=False):
        if both:
            return self.head(torch.where(x.sum(1, keepdim=True) > 0, self.high(x), self.low(x)).relu())
        return self.head((self.high if x.sum() > 0 else self.low)(x).relu())


class Summed(nn.Module):
    """Adds the columns of its head two by two, unless it is to give them as they are."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x, plain=False):
        found = self.head(self.first(x).relu())
        return found if plain else found[:, :2] + found[:, 2:]


@pytest.mark.parametrize(
    ("net", "forward", "message"),
    [
        (
            Branching(),
            lambda net, x: net(x, both=True),
            r"run them all for the trace \(evaluate= of a Task, forward= of",
        ),
        (
            Summed(),
            lambda net, x: net(x, plain=True),
            r"say how to run the network so \(evaluate= of a Task, forward= of",
        ),
    ],
    ids=["branches", "sums"],
)
def test_a_network_that_has_to_be_run_otherwise_is_told_of_forward_and_works_with_it(net, forward, message):
    def checked(*how):
        units = cf.trace(net, X, *how)
        cf.check(net, units, cf.new_ledger(units), X, *how)

    with refused(StructureError, message):
        checked()
    checked(forward)
