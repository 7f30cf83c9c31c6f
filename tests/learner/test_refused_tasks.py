"""A task that was refused leaves nothing behind: once it is corrected, it is met as if for the first time."""

from functools import partial

import pytest
import torch
from clouds import Net, loaders, points
from learning import fit, quiet_trainer, three
from torch import nn
from torch.nn import functional as F

from lightning_cf import ContinualError, ContinualModule, SequentialTaskRunner, Task
from lightning_cf.learner.keeping import ledger_of

pytestmark = pytest.mark.filterwarnings("ignore")


def cloud(name, classes, data, **options):
    return Task(name, loaders(*points(data)), classes=classes, **options)


def refused(module, task, match):
    with pytest.raises(ContinualError, match=match):
        fit(module, task, three(), epochs=2)


@pytest.mark.parametrize("wrap", [lambda net: net, ContinualModule])
def test_a_corrected_task_gets_the_outputs_of_its_own_classes(wrap):
    module = wrap(Net())
    refused(module, cloud("a", [0, 1], [2, 3]), r"declares classes \[0, 1\]")
    fit(module, cloud("a", [2, 3], [2, 3]), three(), epochs=2)
    refused(module, cloud("b", [6, 7], [4, 5]), r"declares classes \[6, 7\]")
    fit(module, cloud("b", [4, 5], [4, 5]), three(), epochs=2)
    ledger = ledger_of(module)
    assert ledger.reserved == {"a": [2, 3], "b": [4, 5]}
    assert [(task.name, task.classes) for task in ledger.tasks] == [("a", [2, 3]), ("b", [4, 5])]
    assert ledger.outputs.tolist() == [-1, -1, 0, 0, 1, 1, -1, -1, -1, -1]


def test_a_refused_task_makes_place_for_one_of_another_name():
    module = Net()
    refused(module, cloud("a", [4, 5, 6], [4, 5, 7]), "holds label 7")
    fit(module, cloud("first", [4, 5, 7], [4, 5, 7]), three(), epochs=2)
    assert ledger_of(module).reserved == {"first": [4, 5, 7]}


class Failing(Net):
    """Fails in its fourth step."""

    def training_step(self, batch, batch_idx):
        if self.global_step == 3:
            raise RuntimeError("mine")
        return super().training_step(batch, batch_idx)


def test_a_task_that_has_learned_may_still_be_corrected_and_one_that_has_claimed_may_not():
    module = Failing()
    with pytest.raises(RuntimeError, match="mine"):
        fit(module, cloud("a", [3, 2], [2, 3]), three(), epochs=2)
    module.__class__ = Net
    fit(module, cloud("a", [2, 3], [2, 3]), three(), epochs=2)
    assert ledger_of(module).reserved == {"a": [2, 3]}
    ledger_of(module).tasks[-1].phase = "invariance"
    refused(module, cloud("a", [3, 2], [2, 3]), r"was partitioned with classes=\[2, 3\], not \[3, 2\]")


class Headed(Net):
    """A head a task."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({"a": nn.Linear(32, 2), "b": nn.Linear(32, 2)})
        self.c = nn.Identity()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.heads[self.trainer.datamodule.name](self(x)), y)


def headed(name, **options):
    x, y = points([0, 1] if name == "a" else [2, 3])
    evaluate = {"a": lambda n, b: (n.heads["a"](n(b[0])), b[1]), "b": lambda n, b: (n.heads["b"](n(b[0])), b[1])}
    return Task(name, loaders(x, y - int(y.min())), evaluate=evaluate[name], **options)


def test_what_was_refused_once_is_refused_again_and_the_corrected_one_is_not():
    module = Headed()
    fit(module, headed("a", classes=[0, 1]), three(), epochs=2)
    for _ in range(2):
        refused(module, headed("b", outputs=[0, 1]), r"says outputs=\[0, 1\], which are outputs of another head")
    before = [p.detach().clone() for p in module.heads["a"].parameters()]
    fit(module, headed("b", classes=[0, 1]), three(), epochs=2)
    assert ledger_of(module).reserved == {"a": [0, 1], "b": [2, 3]}
    assert all(torch.equal(p, q) for p, q in zip(module.heads["a"].parameters(), before, strict=True))


def test_a_learned_task_keeps_its_outputs_whatever_one_of_its_name_says():
    module = ContinualModule(Net())
    for name, classes in (("a", [2, 3]), ("b", [4, 5])):
        fit(module, cloud(name, classes, classes), three(), epochs=2)
    module.ledger.seal()
    for name in "ab":
        refused(module, cloud(name, [6, 7], [6, 7]), "was learned before and its units are sealed")
    assert module.ledger.reserved == {"a": [2, 3], "b": [4, 5]}


def run(module, tasks, root, **options):
    make = partial(quiet_trainer, logger=False)
    SequentialTaskRunner(module, tasks, trainer=make, epochs=1, invariance_epochs=1, root=root, **options).run()


def misjudged(name, classes, data):
    """A task whose validation labels are of another one."""
    train, val = loaders(*points(classes)), loaders(*points(data))
    return Task(name, {"train": train["train"], "val": val["val"]}, classes=classes)


@pytest.mark.parametrize("wrap", [lambda net: net, ContinualModule])
def test_a_refused_runner_leaves_its_module_as_it_was(wrap, tmp_path):
    module = wrap(Net())
    with pytest.raises(ContinualError, match="holds label 5"):
        run(module, [cloud("a", [0, 1], [0, 1]), misjudged("b", [0, 1], [0, 5])], tmp_path, isolation="perturb")
    assert ledger_of(module) is None
    assert module.c.weight.shape == (10, 32)
    fit(module, cloud("first", [4, 5], [4, 5]), three(), epochs=1)
    ledger = ledger_of(module)
    assert ledger.isolation == "exact"
    assert ledger.reserved == {"first": [4, 5]}


def test_a_refused_runner_leaves_what_was_learned_before(tmp_path):
    module = Net()
    fit(module, cloud("a", [0, 1], [0, 1]), three(), epochs=1)
    with pytest.raises(ContinualError, match="holds label 5"):
        run(module, [cloud("b", [2, 3], [2, 3]), misjudged("c", [6, 7], [6, 5])], tmp_path)
    ledger = ledger_of(module)
    assert ledger.reserved == {"a": [0, 1]}
    assert [task.name for task in ledger.tasks] == ["a"]


def test_fits_after_a_refused_runner_install_what_they_installed(tmp_path):
    wrapped, plain = ContinualModule(Net()), Net()
    for module in (wrapped, plain):
        with pytest.raises(ContinualError, match="holds label"):
            run(module, [misjudged("a", [0, 1], [6, 5])], tmp_path)
        fit(module, cloud("a", [0, 1], [0, 1]), [], epochs=1)
    assert [task.name for task in ledger_of(wrapped).tasks] == ["a"]
    assert ledger_of(plain) is None
    fit(ContinualModule(plain), cloud("a", [0, 1], [0, 1]), [], epochs=1)
    assert [task.name for task in ledger_of(plain).tasks] == ["a"]
