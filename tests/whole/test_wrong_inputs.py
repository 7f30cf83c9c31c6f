"""What a user can get wrong in Python and on the command line is refused by name, before the first step."""

import shlex
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import wrong_inputs
from commands import here
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelPruning, Timer
from small_project import *  # noqa: F403  # the expressions of the table name what it imports, too
from small_project import NUMBERS, STEPS, Net, X, Y, loader, net, over, quiet, task
from torch import nn
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import BinaryAccuracy

import lightning_cf
from lightning_cf import (
    Classifier,
    ContinualError,
    ContinualModule,
    InvarianceCallback,
    MaskedGradientCallback,
    PartitionCallback,
    SequentialTaskRunner,
    TaskInferenceCallback,
)
from lightning_cf.models import CNN, MLP, ResNet
from lightning_cf.partition.options import PartitionOptions
from lightning_cf.task_inference import features  # noqa: F401

pytestmark = [
    pytest.mark.usefixtures("unchecked", "somewhere"),
    pytest.mark.filterwarnings("ignore:.*no claim within the budget"),
    pytest.mark.filterwarnings("ignore:.*none of its training data can be held out"),
]


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader


class Silent(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = MLP(shape=(8,), classes=4, hidden=(12,))

    def forward(self, x):
        return self.network(x)


class NoOptimizer(Silent):
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def returning(what):
    class Returning(Net):
        def forward(self, x):
            return what

    return Returning(MLP(shape=(8,), classes=4))


def batch():
    return X[:8], Y[:8]


def start(**changes):
    usual = {"tasks": [task()], "trainer": quiet, "epochs": 1, "invariance_epochs": 1, "root": f"run{next(NUMBERS)}"}
    options = {"module": net(), **usual, **changes}
    runner = SequentialTaskRunner(**options)
    runner.start()
    runner.run()
    return runner


def fit(source):
    callbacks = [PartitionCallback(after=0.5), InvarianceCallback(), MaskedGradientCallback()]
    given = {"datamodule" if isinstance(source, LightningDataModule) else "train_dataloaders": source}
    quiet(max_epochs=2, callbacks=callbacks).fit(net(), **given)


def known():
    module = ContinualModule(net())
    module.add_task(task())
    return module


@cache
def trained():
    callbacks = [PartitionCallback(after=0.5), InvarianceCallback(), MaskedGradientCallback()]
    module = known()
    trainer = quiet(max_epochs=2, callbacks=[*callbacks, TaskInferenceCallback("statistics")])
    trainer.fit(module, datamodule=task())
    STEPS.clear()
    return module


def saved(what):
    path = f"saved{next(NUMBERS)}.pt"
    torch.save(what, path)
    return path


NAMES = {  # of the table's expressions
    **{name: getattr(lightning_cf, name) for name in lightning_cf.__all__},
    **{made.__name__: made for made in (BinaryAccuracy, CNN, MeanSquaredError, MetricCollection, ModelPruning, ResNet)},
    **{made.__name__: made for made in (PartitionOptions, Path, Timer)},
    "np": np,
    **globals(),
    "text_file": "file.txt",
    "folder": "folder",
}


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A folder with what the inputs name, and the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "folder").mkdir()
    for name, text in (("tasks/mine", "a: [1\nb: }"), ("broken/one", "5")):
        (tmp_path / "broken" / name).parent.mkdir(parents=True)
        (tmp_path / "broken" / f"{name}.yaml").write_text(text)
    STEPS.clear()


PYTHON = [
    *wrong_inputs.CONSTRUCT,
    *wrong_inputs.TASK,
    *wrong_inputs.RUNNER,
    *wrong_inputs.RECORDS,
    *wrong_inputs.FITS,
]


@pytest.mark.parametrize(("expression", "sentence"), PYTHON, ids=[case[0] for case in PYTHON])
def test_python_refuses_it_by_name_before_the_first_step(expression, sentence):
    with pytest.raises((ContinualError, MisconfigurationException)) as refused:
        eval(expression, NAMES)
    assert sentence in " ".join(str(refused.value).split())
    assert not STEPS


@pytest.mark.parametrize(("line", "sentence"), wrong_inputs.COMMANDS, ids=[case[0] for case in wrong_inputs.COMMANDS])
def test_the_command_line_refuses_it_in_one_line(line, sentence, monkeypatch, capsys):
    monkeypatch.setattr(Classifier, "optimizer_step", lambda *arguments, **options: STEPS.append(1))
    arguments = shlex.split(line)
    if not any(argument.startswith(("run=", "hydra.run.dir=")) for argument in arguments):
        arguments.append("run=run")
    arguments += [] if "compare" in line else ["compare=false"]
    before = sorted(Path().iterdir())
    status, _, errors = here(monkeypatch, capsys, *arguments)
    assert status == 1
    assert errors.startswith("lightning-cf: error: ") and errors.count("\n") == 1
    assert sentence in errors
    assert not STEPS
    assert not any(Path().rglob("result.json"))
    if line.startswith("run="):
        assert sorted(Path().iterdir()) == before  # an empty name is not the current folder


def test_there_are_hundreds_of_them_each_once():
    cases = [case[0] for case in PYTHON + wrong_inputs.COMMANDS]
    assert len(set(cases)) == len(cases) > 400


RIGHT = [
    "task(metric=BinaryAccuracy())",
    "Task('a', {'train': loader, 'val': None, 'test': None}, classes=[0, 1])",
    "Task('a', data, classes=(0, 1), evaluate=lambda module, batch, *more: (module(batch[0]), batch[1]))",
    "Noise(scale=np.float32(0.5))",
    "InvarianceCallback(perturbation=lambda vectors, generator: vectors, seed=np.int64(3))",
    "PartitionCallback(max_claim=np.float64(0.5))",
    "Mixture([Noise(), Ablate()], weights=torch.tensor([1.0, 2.0]))",
    "start(callbacks=Timer())",
    "start(callbacks=None, root=Path('run'))",
    "start(tasks=(task(name) for name in 'ab'), module=net(), epochs=1)",
    "start(trainer=lambda **options: quiet(**options))",
    "start(trainer=partial(quiet, fast_dev_run=True))",
    "start(tasks=[over(X.double())], trainer=partial(quiet, precision='64-true'))",
    "start(tasks=[Task('a', {'train': loader, 'val': None, 'test': None}, classes=[0, 1])])",
]


@pytest.mark.parametrize("expression", RIGHT)
def test_what_is_only_unusual_is_taken(expression):
    assert eval(expression, NAMES) is not None


class Converting(Net):
    """A training step that converts by itself."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0].float(), batch[1]), batch_idx)


def test_a_training_step_that_converts_its_inputs_itself_is_not_refused():
    module = Converting(MLP(shape=(8,), classes=4, hidden=(12, 12)))
    runner = start(module=module, tasks=[over(X.double())])
    assert len(STEPS) == 2 * 5
    assert runner.progress.finished[-1] == "score a"


def test_a_task_of_another_precision_is_refused_before_an_earlier_one_trains():
    with pytest.raises(ContinualError, match="Task 'b': its inputs are float64, the weights float32"):
        start(tasks=[task(), over(X.double(), name="b")])
    assert not STEPS


def test_a_perturbation_that_cannot_work_on_a_layer_is_found_before_the_first_step():
    def failing(vectors, generator):
        raise RuntimeError("no such layer")

    with pytest.raises(ContinualError, match="failing> fails on this network: no such layer"):
        start(invariance=InvarianceCallback(perturbation=failing), isolation="perturb")
    assert not STEPS
