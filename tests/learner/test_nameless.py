"""Forward passes that need to be told which task it is: nobody is led to think that the task can be found without."""

import pytest
import torch
from clouds import loaders, points
from lightning.pytorch import LightningModule
from test_rehearsal import Net, fit, three
from torch import nn
from torch.nn import functional as F

from lightning_cf import ContinualError, ContinualModule, ContinualWarning, Task, TaskInferenceCallback
from lightning_cf.learner.inferring import inference_of
from lightning_cf.learner.keeping import state_of

pytestmark = pytest.mark.filterwarnings("ignore:.*no claim within the budget")


class Told(Net):
    """Adds a task's own vector to its first features; its layers are all tasks'."""

    def __init__(self):
        super().__init__()
        self.code = nn.Embedding(2, self.a.out_features)

    def run_as(self, name, x):
        return self.c(F.relu(self.b(F.relu(self.a(x) + self.code(torch.tensor("ab".index(name)))))))

    def forward(self, x, name="a", scale=None):
        return self.run_as(name, x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.run_as(self.trainer.datamodule.name, batch[0]), batch[1])


def learned(module, evaluate):
    module = ContinualModule(module)
    tasks = [
        Task(
            name,
            loaders(*points(classes)),
            classes=classes,
            evaluate=lambda m, b, name=name: (evaluate(m, b, name), b[1]),
        )
        for name, classes in (("a", [0, 1]), ("b", [7, 3]))
    ]
    for task in tasks:
        module.add_task(task)
    for task in tasks:
        fit(module, task, [*three(max_claim=0.3), TaskInferenceCallback("statistics")], 2)
    return [known.name for known in inference_of(state_of(module).ledger).tasks]


def test_a_task_whose_forward_pass_is_told_it_is_left_out_with_the_reason():
    with pytest.warns(
        ContinualWarning, match=r"Task 'b' will not be inferred: its evaluate= tells the forward pass more"
    ):
        assert learned(Told(), lambda m, b, name: m(b[0], name=name)) == ["a"]


def test_what_it_is_told_beside_counts_only_where_outputs_hang_on_it():
    assert learned(Told(), lambda m, b, name: m(b[0], scale=True)) == ["a", "b"]
    assert learned(Told(), lambda m, b, name: m(b[0] / 2)) == ["a", "b"]  # the input prepared


def test_another_method_than_forward_that_gives_other_outputs_is_said():
    with pytest.warns(ContinualWarning, match=r"^Task 'b': its evaluate= does not run forward, which gives other outp"):
        learned(Told(), lambda m, b, name: m.run_as(name, b[0]))


def test_a_module_without_a_forward_pass_predicts_with_a_sentence():
    class Without(Told):
        forward = LightningModule.forward

    module = ContinualModule(Without())
    task = Task("a", loaders(*points([0, 1])), classes=[0, 1], evaluate=lambda m, b: (m.run_as("a", b[0]), b[1]))
    fit(module, task, [*three(max_claim=0.3), TaskInferenceCallback("statistics")], 1)
    with pytest.raises(ContinualError, match=r"run the forward pass, but ContinualWithout has none\. Define forward"):
        module.predict(points([0, 1])[0])


class Headed(Net):
    """Has a head a task, and takes the task's name."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(self.b.out_features, 2) for name in "ab"})

    def forward(self, x, name):
        return self.heads[name](F.relu(self.b(F.relu(self.a(x)))))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0], self.trainer.datamodule.name), batch[1])


def test_heads_by_the_tasks_name_are_left_out_and_predicted_with_a_sentence():
    module = ContinualModule(Headed())
    for name, classes in (("a", [0, 1]), ("b", [2, 3])):
        x, y = points(classes)
        task = Task(
            name,
            loaders(x, y - min(classes)),
            classes=[0, 1],
            evaluate=lambda m, b, name=name: (m(b[0], name), b[1]),
        )
        callbacks = [*three(max_claim=0.3), TaskInferenceCallback("statistics")]
        if name == "a":
            fit(module, task, callbacks, 1)
        else:
            with pytest.warns(ContinualWarning, match=r"Task 'b' will not be inferred: its evaluate= tells"):
                fit(module, task, callbacks, 1)
    with pytest.raises(ContinualError, match=r"missing a required argument: 'name'\. Give all"):
        module.predict(points([0, 1])[0])
