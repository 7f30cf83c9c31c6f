"""A task that is forgotten on purpose: weights, ledger and what infers tasks are as if it had never been there."""

import pytest
import torch
from clouds import Net, clouds, points
from learning import fit, three
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, Dataset

from lightning_cf import ContinualError, ContinualModule, Task, TaskInferenceCallback
from lightning_cf.learner.inferring import inference_of
from lightning_cf.network.forward import named_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*and so it is with random weights", "ignore:.*no claim within")

CLASSES = {"a": [0, 1], "b": [7, 3], "c": [2, 5]}


def sequence(*names):
    return {name: clouds(name, CLASSES[name]) for name in names}


def learned(tasks, strategy="lda", **options):
    module = ContinualModule(Net(64))
    for task in tasks.values():
        module.add_task(task)
    for task in tasks.values():
        learn(module, task, strategy, **options)
    return module


def learn(module, task, strategy="lda", **options):
    fit(module, task, [*three(max_claim=0.3), TaskInferenceCallback(strategy, **options)], 4)


@torch.no_grad()
def outputs(module, name, x):
    return module.eval()(x)[:, module.outputs_of(name)]


def shared(module, strategy="lda"):
    return inference_of(module.ledger).shared[strategy]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("apart", [False, True])
def test_a_task_between_others_leaves_nothing_and_changes_nothing(apart):
    tasks = sequence("a", "b", "c")
    module, never = learned(tasks, apart=apart), learned(sequence("a", "c"), apart=apart)
    x, y = points([0, 1, 2, 5], count=400, seed=5)
    before = {name: outputs(module, name, x) for name in "ac"}
    module.forget("b" if apart else tasks["b"])
    assert all(torch.equal(outputs(module, name, x), found) for name, found in before.items())
    assert same(shared(module), shared(never))
    found = module.predict(x)
    assert float((found.classes == y).float().mean()) > 0.9
    assert set(found.tasks.tolist()) <= {0, 2, -1}  # numbers of the others stay
    assert found.probabilities[:, [7, 3]].eq(0).all()
    with pytest.raises(ContinualError, match="'b'"):
        module.outputs_of("b")


def test_it_can_be_learned_again_like_any_other():
    tasks = sequence("a", "b", "c")
    module = learned(tasks)
    capacity = module.ledger.capacity()
    freed = module.forget(tasks["c"])
    assert all(count > 0 for count in freed.values())  # nobody reads the last task's units
    assert all(share > capacity[group] for group, share in module.ledger.capacity().items())
    x, y = points([0, 1, 7, 3, 2, 5], count=600, seed=5)
    before = {name: outputs(module, name, x) for name in "ab"}
    again = clouds("c", CLASSES["c"])
    module.add_task(again)
    learn(module, again)
    assert all(torch.equal(outputs(module, name, x), found) for name, found in before.items())
    assert float((module.predict(x).classes == y).float().mean()) > 0.9


def test_every_task_may_go():
    tasks = sequence("a", "b")
    module = learned(tasks)
    module.forget(tasks["a"])
    module.forget(tasks["b"])
    assert module.ledger.tasks == []
    assert set(module.ledger.capacity().values()) == {1.0}
    with pytest.raises(ContinualError, match="knows no task that it could infer"):
        module.predict(torch.zeros(2, 8))
    again = clouds("a", CLASSES["a"])
    module.add_task(again)
    learn(module, again)
    x, y = points([0, 1], count=200, seed=5)
    assert float((module.predict(x).classes == y).float().mean()) > 0.9


def test_units_that_others_are_told_by_stay():
    tasks = sequence("a", "b", "c")
    module = learned(tasks, "lda_units")
    x, _ = points([2, 5, 7, 3], count=400, seed=5)
    freed = module.forget(tasks["a"])
    assert not any(freed.values())
    before = module.predict(x)
    more = clouds("d", [4, 6])
    module.add_task(more)
    learn(module, more, "lda_units")
    assert any(module.forget(more).values())
    assert torch.equal(module.predict(x).scores, before.scores)
    module.forget(tasks["b"])  # to which they had passed
    x, y = points([2, 5], count=200, seed=5)
    assert float((module.predict(x).probabilities[:, :-1].argmax(dim=1) == y).float().mean()) > 0.95


class Noisy(Dataset):
    """Points that are other ones each time they are read."""

    def __init__(self, classes):
        self.x, self.y = points(classes, count=200, seed=1)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, place):
        return self.x[place] + 0.1 * torch.randn(self.x.shape[1:]), int(self.y[place])


def test_data_that_change_are_told_and_kept_apart_they_need_not_be_read():
    def noisy(name):
        loaders = {"train": DataLoader(Noisy(CLASSES[name]), 20, shuffle=True)}
        return Task(name, {**loaders, "val": DataLoader(Noisy(CLASSES[name]), 50)}, classes=CLASSES[name])

    tasks = {name: noisy(name) for name in "ab"}
    module = learned(tasks)
    before = {name: value.clone() for name, value in named_tensors(module).items()}
    for wrong, message in ((tasks["a"], "these are not the samples that the task added"), ("a", "was not kept apart")):
        with pytest.raises(ContinualError, match=message):
            module.forget(wrong)
    assert [entry.name for entry in module.ledger.tasks] == ["a", "b"]
    assert same(before, named_tensors(module))
    module = learned({name: noisy(name) for name in "ab"}, apart=True)
    module.forget("a")
    assert shared(module)["order"].tolist() == [3, 7]


def test_what_is_kept_apart_is_counted_and_survives_a_checkpoint():
    plain, apart = learned(sequence("a", "b")), learned(sequence("a", "b"), apart=True)
    a, b = (inference_of(module.ledger) for module in (plain, apart))
    sums = sum(value.numel() for name, value in a.shared["lda"].items() if name.startswith("sums."))
    assert b.stored_floats() - a.stored_floats() > sums
    other = ContinualModule(Net(64))
    other.load_state_dict(apart.state_dict())
    assert inference_of(other.ledger).apart


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("z", "forget: no task 'z' is known that could be forgotten; known: a, b."),
        (7, "ContinualModule: task must be the Task that is to be forgotten, or its name, got"),
        (None, "ContinualModule: task must be the Task that is to be forgotten, or its name, got"),
    ],
)
def test_what_cannot_be_forgotten_is_said(given, message):
    module = learned(sequence("a", "b"), "subspaces")
    with pytest.raises(ContinualError) as error:
        module.forget(given)
    assert message in str(error.value)
    assert module.forget("a")  # nothing is shared, so the name will do
    with pytest.raises(ContinualError, match="known: none"):
        ContinualModule(Net(64)).forget("a")


def test_within_a_fit_nothing_is_forgotten():
    module, again = learned(sequence("a", "b"), "subspaces"), clouds("c", CLASSES["c"])
    module.add_task(again)

    class Forgets(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.forget("a")

    with pytest.raises(ContinualError, match="task 'a' cannot be forgotten within a fit"):
        fit(module, again, [*three(max_claim=0.3), TaskInferenceCallback("subspaces"), Forgets()], 1)


def test_the_next_first_task_goes_on_as_it_is_where_the_first_was_forgotten():
    """Its seal comes later; what all tasks share still looks at what it looked at."""
    tasks, x = sequence("a", "b"), points([7, 3], count=200, seed=5)[0]
    module = ContinualModule(Net(64))
    for task in tasks.values():
        module.add_task(task)
        fit(module, task, [*three(max_claim=0.3, after=1.0), TaskInferenceCallback("lda")], 4)
    assert module.ledger.phase == "invariance"
    module.forget(tasks["a"])
    before, kept = module.predict(x), shared(module)
    learn(module, tasks["b"])
    assert module.ledger.tasks[-1].phase == "sealed"
    assert same(shared(module), kept)
    assert torch.equal(module.predict(x).scores, before.scores)
