"""Strategies that keep state over tasks: what each task adds, and which strategy predicts."""

import pytest
import torch
from clouds import Net, clouds, points
from learning import fit, three

from lightning_cf import ContinualError, ContinualModule, ContinualWarning, TaskInferenceCallback
from lightning_cf.learner.accumulating import shown
from lightning_cf.learner.inferring import inference_of
from lightning_cf.task_inference import Cumulative, Known, Readout, Sites, TaskInference, register
from lightning_cf.task_inference.accumulated import Accumulated
from lightning_cf.task_inference.accumulated.sums import unpacked
from lightning_cf.task_inference.cumulative import task_scores
from lightning_cf.task_inference.features.base import Values, inner
from lightning_cf.task_inference.forgetting import forgotten
from lightning_cf.task_inference.gathering import gather
from lightning_cf.task_inference.lineup import Lineup
from lightning_cf.task_inference.prediction import Inferred
from lightning_cf.tasks.training_batches import training_batches

pytestmark = pytest.mark.filterwarnings("ignore:.*and so it is with random weights", "ignore:.*no claim within")


class NearestMean(Cumulative):
    """The distance of the input to the mean of each class."""

    name = "nearest_mean"

    def add(self, shared, seen, sites, columns):
        shared = {"sums": torch.zeros(10, seen.x.shape[1]), "counts": torch.zeros(10), **shared}
        shared["sums"] = shared["sums"].index_add(0, columns, seen.x)
        shared["counts"] = shared["counts"] + columns.bincount(minlength=10)
        return shared

    def outputs(self, shared, seen, sites, columns):
        return -torch.cdist(seen.x, shared["sums"][columns] / shared["counts"][columns, None])


def sequence(*names):
    classes = {"a": [0, 1], "b": [7, 3], "c": [2, 5]}
    return [clouds(name, classes[name]) for name in names]


def learned(tasks, strategy, **options):
    module = ContinualModule(Net(64))
    for task in tasks:
        module.add_task(task)
    for task in tasks:
        fit(module, task, [*three(max_claim=0.3), TaskInferenceCallback(strategy, **options)], 4)
    return module


@pytest.mark.parametrize("strategy", [NearestMean(), "lda", "ridge"], ids=["own", "lda", "ridge"])
def test_all_classes_of_all_tasks_are_compared(strategy):
    module = learned(sequence("a", "b", "c"), strategy)
    x, y = points([0, 1, 7, 3, 2, 5], count=600, seed=5)
    found = module.predict(x)
    assert float((found.probabilities[:, :-1].argmax(dim=1) == y).float().mean()) > 0.95
    alone = module.predict(x[:1])
    torch.testing.assert_close(alone.probabilities, found.probabilities[:1], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def orders():
    return [inference_of(learned(sequence(*names), "lda").ledger).shared["lda"] for names in ("abc", "acb")]


def test_the_order_of_later_tasks_changes_not_a_bit(orders):
    one, other = orders
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_what_is_kept_is_that_of_every_training_sample(orders):
    sums = unpacked(inner(orders[0], "sums"))
    assert sums.classes == [0, 1, 2, 3, 5, 7]
    assert sums.counts.tolist() == [100] * 6


def test_a_budget_bounds_what_is_kept():
    module = learned(sequence("a", "b"), "lda", budget=5000)
    inference = inference_of(module.ledger)
    assert 1000 < inference.stored_floats() <= 5000


def test_each_of_several_may_have_a_budget_of_its_own():
    small, large = Accumulated("small", budget=2000), Accumulated("large", budget=5000)
    module = learned(sequence("a", "b"), [small, large])
    kept = [inference_of(module.ledger).stored_floats(name) for name in ("small", "large")]
    assert 500 < kept[0] <= 2000 < kept[1] <= 5000


@pytest.mark.parametrize(("strategy", "budget"), [("lda", 30), (Accumulated("wide", features=Values()), 100)])
def test_a_budget_that_cannot_be_kept_is_told(strategy, budget):
    with pytest.warns(ContinualWarning, match=rf"keeps [\d,]+ numbers, more than budget={budget}:"):
        learned(sequence("a"), strategy, budget=budget)


class Spoiled(NearestMean):
    """Divides by what there is none of."""

    def close(self, shared):
        return {**shared, "sums": shared["sums"] / shared["counts"][:, None]}


def test_what_is_kept_holds_numbers_alone():
    with pytest.raises(
        ContinualError, match=r"nearest_mean: .*what it keeps of all tasks holds values that are not num"
    ):
        learned(sequence("a"), Spoiled())


def test_a_task_that_was_claimed_and_then_sealed_counts_once():
    module, (task, other) = ContinualModule(Net(64)), sequence("a", "b")
    for each in (task, other):
        module.add_task(each)
    for each in (task, task, other, other):  # the second fit of each is its INVARIANCE
        fit(module, each, [*three(after=1.0), TaskInferenceCallback("lda")], 3)
    sums = unpacked(inner(inference_of(module.ledger).shared["lda"], "sums"))
    assert sums.counts.tolist() == [100] * 4


def test_scores_are_probabilities_of_tasks():
    outputs, places = torch.randn(5, 4), torch.arange(4)
    scores = task_scores(
        outputs, Lineup(places, places, torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 3]), (2, 1, 1))
    )
    torch.testing.assert_close(scores.exp().sum(dim=1), torch.ones(5))
    torch.testing.assert_close(scores[:, 1], outputs.log_softmax(dim=1)[:, 2])


class Told(TaskInference):
    """Strategies that tell so many of a hundred held-out samples' task."""

    def infer(self, readout, strategy=None):
        right = {"lda": self.right[0], "subspaces": self.right[1]}[strategy]
        scores = torch.nn.functional.one_hot((torch.arange(100) < right).long(), 2).float()
        return Inferred(scores, scores, scores.long(), scores)


@pytest.mark.parametrize(
    ("right", "first"), [((90, 95), "lda"), ((80, 95), "subspaces"), ((95, 80), "lda"), ((0, 100), "subspaces")]
)
def test_held_out_data_say_which_predicts_where_it_is_no_chance(right, first):
    known = [Known(name, [0], Sites(None, (), {}, torch.tensor([0]))) for name in "ab"]
    inference = Told(("lda", "subspaces"), known, votes={})
    inference.right = right
    inference.elect([Readout(None, {}, torch.zeros(100, 2), {})])
    assert inference.strategies[0] == first
    assert TaskInference.from_state_dict(inference.state_dict()).votes == {
        "lda": right[0],
        "subspaces": right[1],
        "": 100,
    }
    fixed = Told(("lda", "subspaces"), known)
    fixed.right = (0, 100)
    fixed.elect([Readout(None, {}, torch.zeros(100, 2), {})])
    assert fixed.strategies == ("lda", "subspaces")


def kept_of(*names):
    """What is known after some tasks, and how to read a task's data again."""
    tasks = sequence(*names)
    module = learned(tasks, "lda")
    inference = inference_of(module.ledger)

    def training(name):
        task = next(task for task in tasks if task.name == name)
        known = next(known for known in inference.tasks if known.name == name)
        return lambda sites: shown(module, task, known, (), sites, training_batches(module, task, ordered=True))

    return inference, training


def test_a_task_that_is_forgotten_was_never_there():
    inference, training = kept_of("a", "b", "c")
    left = forgotten(inference, "b", training("b"))
    assert [known.name for known in left.tasks] == ["a", "c"]
    other, _ = kept_of("a", "c")
    assert left.shared["lda"].keys() == other.shared["lda"].keys()
    assert all(torch.equal(left.shared["lda"][name], value) for name, value in other.shared["lda"].items())
    assert inference.shared["lda"]["sums.counts"].tolist() == [100] * 6  # it stays as it is
    without = forgotten(left, "a", training("a"))  # whose units features may look at all the same
    assert unpacked(inner(without.shared["lda"], "sums")).classes == [2, 5]
    assert TaskInference.from_state_dict(without.state_dict()).looks is not None
    assert forgotten(without, "c", training("c")).shared == {}


def test_what_cannot_be_forgotten_is_said():
    inference, training = kept_of("a", "b")
    with pytest.raises(ContinualError, match="no task 'z' is known that could be forgotten; known are a, b"):
        forgotten(inference, "z", training("a"))
    module = learned(sequence("a", "b"), NearestMean())
    with pytest.raises(ContinualError, match="nearest_mean: what a task added cannot be taken away"):
        forgotten(inference_of(module.ledger), "a", lambda sites: [])


class Failing(NearestMean):
    """Fails on the second batch."""

    name = "failing"

    def add(self, shared, seen, sites, columns):
        if shared:
            raise RuntimeError("a second batch")
        return super().add(shared, seen, sites, columns)

    def begin(self, seen, sites, generator, budget):
        return {"sums": torch.zeros(10, seen.x.shape[1]), "counts": torch.zeros(10)}


def test_data_are_read_once_for_all_strategies_and_one_that_fails_stops_no_other():
    register(Failing())
    x, y = points([0, 1], count=60)
    known, read = Known("a", [0, 1], Sites(None, (), {}, torch.arange(2))), []
    inference = TaskInference(("lda", "failing", "ridge"), votes={})

    def batches(what, labelled):
        def given(*_):
            read.append(what)
            for part, label in zip(x.split(20), y.split(20), strict=True):
                seen = Readout(None, {}, torch.zeros(20, 2), {}, x=part)
                yield (seen, label) if labelled else seen

        return given

    with pytest.warns(ContinualWarning, match="failing is left out from here on.*a second batch"):
        gather(inference, known, batches("training", True), batches("held out", False))
    assert read == ["training", "held out"]
    assert inference.strategies == ("lda", "ridge")
    assert inference.shared.keys() == known.calibration.keys() == {"lda", "ridge"}
    sums = [unpacked(inner(inference.shared[name], "sums")) for name in ("lda", "ridge")]
    assert torch.equal(sums[0].gram, sums[1].gram)
    assert sums[0].counts.tolist() == [30, 30]
