"""What predicts is unpacked once, and anew whenever what is kept has changed."""

import copy

import pytest
import torch
from clouds import Net, clouds, loaders, points
from learning import fit, three
from torch import nn
from torch.nn import functional

from lightning_cf import Classifier, ContinualError, ContinualModule, Task, TaskInferenceCallback
from lightning_cf.learner.inferring import inference_of
from lightning_cf.learner.keeping import keep_ledger, state_of
from lightning_cf.learner.predicting import predict_any
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.task_inference import Cumulative
from lightning_cf.task_inference.forgetting import forgotten

pytestmark = pytest.mark.filterwarnings("ignore:.*and so it is with random weights", "ignore:.*no claim within")

X, _ = points([0, 1, 7, 3, 2, 5], count=60, seed=5)


def sequence():
    return [clouds("a", [0, 1]), clouds("b", [7, 3]), clouds("c", [2, 5])]


def learn(module, task):
    fit(module, task, [*three(max_claim=0.3), TaskInferenceCallback("lda")], 3)


def anew(module):
    """The module's predictions with everything unpacked again."""
    other = copy.deepcopy(module)
    keep_ledger(other, NeuronLedger.from_state_dict(module.ledger.state_dict()))
    return other.predict(X)


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def module():
    made = ContinualModule(Net(64))
    for task in sequence():
        made.add_task(task)
    for task in sequence()[:2]:
        learn(made, task)
    made.predict(X)
    return made


def test_a_module_that_nothing_happened_to_unpacks_nothing(module):
    before = module.ledger.read
    assert before is not None
    module.predict(X[:1])
    assert module.ledger.read is before


def test_a_further_task_a_forgotten_one_and_older_weights(module):
    older, before = copy.deepcopy(module.state_dict()), module.predict(X)
    learn(module, sequence()[2])
    after = module.predict(X)
    assert 2 in after.tasks and same(after, anew(module))
    module.forget(sequence()[1])
    assert 1 not in module.predict(X).tasks and same(module.predict(X), anew(module))
    module.load_state_dict(older)
    assert same(module.predict(X), before)


class TwoHeads(Classifier):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(12, 64), nn.ReLU()))
        self.first, self.second = nn.Linear(64, 2), nn.Linear(64, 2)

    def forward(self, x):
        hidden = self.network(x)
        return torch.cat([self.first(hidden), self.second(hidden)], dim=1)


def shifted(strategy, **options):
    """A module that knows two tasks, and whose first head has two columns more now, and their task."""
    torch.manual_seed(0)
    module = TwoHeads()
    for task in (clouds("0-1", [0, 1]), clouds("2-3", [2, 3])):
        fit(module, task, [*three(max_claim=0.3), TaskInferenceCallback(strategy, **options)], 3)
    before = predict_any(module, POINTS)
    narrow, module.first = module.first, nn.Linear(64, 4)
    with torch.no_grad():
        module.first.weight[:2], module.first.bias[:2] = narrow.weight, narrow.bias
    module.training_step = lambda batch, batch_idx: functional.cross_entropy(module(batch[0])[:, 2:4], batch[1] - 4)
    data, evaluate = loaders(*points([4, 5])), lambda network, batch: (network(batch[0])[:, 2:4], batch[1] - 4)
    return module, Task("4-5", data, outputs=[2, 3], evaluate=evaluate), before


POINTS, LABELS = points([0, 1, 2, 3], count=100, seed=5)


@pytest.mark.parametrize("strategy", ["lda", "ridge", "lda_units", "subspaces", "joint"])
def test_columns_that_shift_are_read_where_they_stand_now(strategy):
    module, task, before = shifted(strategy)
    fit(module, task, [*three(max_claim=0.3), TaskInferenceCallback(strategy)], 2)
    assert state_of(module).ledger.reserved["2-3"] == [4, 5]
    found = predict_any(module, POINTS)
    assert torch.equal(found.tasks, before.tasks) and torch.equal(found.classes, before.classes)
    torch.testing.assert_close(found.scores, before.scores, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.probabilities[:, :4], before.probabilities[:, :4], rtol=1e-3, atol=1e-3)
    assert strategy == "joint" or float((found.classes == LABELS).float().mean()) > 0.9


def test_what_a_task_added_is_taken_away_after_its_columns_shifted():
    module, task, _ = shifted("lda", apart=True)
    fit(module, task, [*three(max_claim=0.3), TaskInferenceCallback("lda", apart=True)], 2)
    left = forgotten(inference_of(state_of(module).ledger), "0-1")
    assert left.shared["lda"]["sums.classes"].tolist() == [4, 5]


class Counted(Cumulative):
    """Keeps its classes by number and cannot follow them."""

    name = "counted"

    def add(self, shared, seen, sites, columns):
        return {"counts": shared.get("counts", torch.zeros(9)) + columns.bincount(minlength=9)}

    def outputs(self, shared, seen, sites, columns):
        return shared["counts"][columns].expand(len(seen.outputs), -1)


def test_a_strategy_that_cannot_follow_is_refused_before_the_first_step():
    module, task, _ = shifted(Counted())
    before = copy.deepcopy(state_of(module).ledger.state_dict())
    with pytest.raises(ContinualError, match=r"counted: outputs have other numbers now.*renumbered\(kept, at\)"):
        fit(module, task, [*three(max_claim=0.3), TaskInferenceCallback(Counted())], 2)
    assert state_of(module).ledger.state_dict()["reserved"] == before["reserved"]


def test_an_error_of_the_network_s_own_stays(module):
    module.a.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(TypeError("of its own")))
    with pytest.raises(TypeError, match="of its own"):
        module.predict(X)
