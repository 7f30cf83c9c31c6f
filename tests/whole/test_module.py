import copy
from typing import ClassVar

import pytest
import torch
from learning import classifier, fit, images, own_logits, quiet_trainer, score, tasks, three, weights
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_cf import (
    Classifier,
    ContinualError,
    ContinualModule,
    NeuronLedger,
    PartitionCallback,
    Task,
    keep_ledger,
)
from lightning_cf.data import permuted_tasks
from lightning_cf.learner.keeping import state_of
from lightning_cf.models import MLP

pytestmark = pytest.mark.filterwarnings("ignore:.*no claim within the budget")


class Remembering(Classifier):
    """A user's module with hyperparameters and hooks of its own."""

    def __init__(self, hidden=48):
        super().__init__(MLP(shape=(1, 8, 8), classes=10, hidden=(hidden,)))
        self.save_hyperparameters()

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = 1


def test_the_module_itself_is_wrapped():
    net = classifier()
    names = list(net.state_dict())
    module = ContinualModule(net)
    assert module is net
    assert isinstance(module, Classifier)
    assert ContinualModule(module) is module
    assert [name for name in module.state_dict() if name != "_extra_state"] == names


def test_a_plain_network_is_refused():
    with pytest.raises(ContinualError, match=r"got Linear; .*Classifier"):
        ContinualModule(nn.Linear(2, 2))


def test_a_fit_installs_the_callbacks_and_leaves_those_given():
    module, (task, *_) = ContinualModule(classifier()), tasks()
    mine = PartitionCallback(after=0.5)
    trainer = fit(module, task, [mine], epochs=2)
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert sorted(n for n in names if n.endswith(("GradientCallback", "ceCallback", "PartitionCallback"))) == [
        "InvarianceCallback",
        "MaskedGradientCallback",
        "PartitionCallback",
        "TaskInferenceCallback",
    ]
    assert mine in trainer.callbacks
    assert module.ledger.tasks[-1].phase == "sealed"


def test_wrapped_and_plain_modules_learn_bitwise_the_same():
    results = []
    for wrap in (False, True):
        module = ContinualModule(classifier()) if wrap else classifier()
        for task in tasks(2):
            torch.manual_seed(3)
            fit(module, task, three(), epochs=4)
        results.append(weights(module))
    assert all(torch.equal(results[0][name], tensor) for name, tensor in results[1].items())


def test_checkpoints_load_into_the_plain_and_the_wrapped_class(tmp_path):
    module, sequence = ContinualModule(Remembering()), permuted_tasks(images(), count=2, batch_size=32)
    for number, task in enumerate(sequence):
        keep = ModelCheckpoint(dirpath=tmp_path, filename=f"task{number}")
        fit(module, task, [*three(), keep], epochs=2, enable_checkpointing=True)
    path = tmp_path / "task1.ckpt"
    other = type(module).load_from_checkpoint(path, weights_only=True)
    assert isinstance(other, ContinualModule)
    assert other.ledger.state_dict()["reserved"] == module.ledger.state_dict()["reserved"]
    assert all(torch.equal(weights(other)[name], tensor) for name, tensor in weights(module).items())
    plain = Remembering.load_from_checkpoint(tmp_path / "task0.ckpt", weights_only=True)
    assert not isinstance(plain, ContinualModule)
    assert torch.load(path, weights_only=True)["mine"] == 1


def test_state_dicts_carry_the_ledger():
    module, (task, *_) = ContinualModule(classifier()), tasks()
    fit(module, task, three(), epochs=2)
    other = ContinualModule(classifier(seed=4))
    other.load_state_dict(module.state_dict())
    assert other.ledger.state_dict()["tasks"] == module.ledger.state_dict()["tasks"]
    plain = weights(classifier(seed=5))  # whole without a ledger, strictly
    assert other.load_state_dict(plain) == ([], [])
    assert all(torch.equal(x, plain[name]) for name, x in weights(other).items())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(dict([*plain.items()][1:]))


def test_a_copy_keeps_the_ledger_of_its_own():
    module, (first, second, _) = classifier(), tasks()
    fit(module, first, three(), epochs=2)
    other = copy.deepcopy(module)
    fit(other, second, three(), epochs=2)
    assert [entry.name for entry in state_of(module).ledger.tasks] == ["0-1"]
    assert [entry.name for entry in state_of(other).ledger.tasks] == ["0-1", "2-3"]
    assert torch.equal(own_logits(other, first), own_logits(module, first))


def test_classes_that_return_get_columns_of_their_own():
    module, sequence = ContinualModule(classifier()), permuted_tasks(images(), count=3)
    logits = []
    for task in sequence:
        fit(module, task, three(max_claim=0.34), epochs=10)
        logits.append(own_logits(module, task))
    assert module.network[-1].out_features == 30
    assert [module.ledger.reserved[task.name] for task in sequence] == [
        list(range(start, start + 10)) for start in (0, 10, 20)
    ]
    for task, before in zip(sequence, logits, strict=True):
        torch.testing.assert_close(own_logits(module, task), before, rtol=1e-5, atol=1e-5)
        assert score(module, task) > 0.8


def test_a_class_beyond_the_head_is_an_error_though_columns_can_be_added():
    module, (first, *_) = ContinualModule(classifier()), tasks()
    with pytest.raises(ContinualError, match=r"'far' needs output 16, but the output head has 10 columns"):
        fit(module, Task("far", first.data, classes=[0, 1], outputs=[16, 17]), [], epochs=1)


def test_testing_a_task_shows_its_outputs():
    class Tested(Classifier):
        def test_step(self, batch, batch_idx):
            self.log("seen", float((self(batch[0]) > -1e30).sum(dim=1).float().mean()))

    module, (task, *_) = Tested(MLP(shape=(1, 8, 8), classes=10, hidden=(48,))), tasks()
    callbacks = three()
    fit(module, task, callbacks, epochs=2)
    (found,) = quiet_trainer(callbacks=callbacks).test(module, datamodule=task, verbose=False)
    assert found["seen"] == 2
    assert module(torch.zeros(1, 1, 8, 8)).min() > -1e30


class Busy(Classifier):
    """A user's module: manual optimisation, hooks, logging, hyperparameters."""

    def __init__(self, hidden=48, lr=0.01):
        super().__init__(MLP(shape=(1, 8, 8), classes=10, hidden=(hidden,)))
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.calls = []

    def on_fit_start(self):
        self.calls.append("on_fit_start")

    def on_train_epoch_end(self):
        self.calls.append("on_train_epoch_end")

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        optimizer.step()
        self.log("mine", loss, on_epoch=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def test_hooks_logging_hyperparameters_and_manual_optimisation_go_on_in_a_wrapped_module():
    results = []
    for wrap in (lambda module: module, ContinualModule):
        torch.manual_seed(0)
        module = wrap(Busy(lr=0.02))
        for task in tasks(2):
            torch.manual_seed(3)
            trainer = fit(module, task, three(), epochs=4)
        assert module.calls == 2 * ["on_fit_start", *4 * ["on_train_epoch_end"]]
        assert float(trainer.callback_metrics["mine"]) < 1
        assert dict(module.hparams) == {"hidden": 48, "lr": 0.02}
        results.append(weights(module))
    assert all(torch.equal(results[0][name], tensor) for name, tensor in results[1].items())


def saved(module, path):
    """The checkpoint of a module's fit on its first task."""
    task, *_ = tasks()
    keep = ModelCheckpoint(dirpath=path, filename="task")
    fit(module, task, [*three(), keep], epochs=4, enable_checkpointing=True)
    return path / "task.ckpt"


@pytest.mark.parametrize("written", ["plain", "wrapped"])
@pytest.mark.parametrize("read", ["plain", "wrapped"])
def test_checkpoints_go_both_ways_with_hyperparameters_and_ledger(written, read, tmp_path):
    torch.manual_seed(0)
    module = Busy(hidden=40, lr=0.02)
    module = ContinualModule(module) if written == "wrapped" else module
    path = saved(module, tmp_path)
    kind = Busy if read == "plain" else type(ContinualModule(Busy()))
    other = kind.load_from_checkpoint(path, weights_only=True)
    assert isinstance(other, ContinualModule) == (read == "wrapped")
    assert dict(other.hparams) == {"hidden": 40, "lr": 0.02}
    assert all(torch.equal(weights(other)[name], tensor) for name, tensor in weights(module).items())
    if read == "plain":
        keep_ledger(other, NeuronLedger.from_checkpoint(path))
    first, second, _ = tasks()
    logits = own_logits(module, first)
    fit(other, second, three(), epochs=4)
    assert torch.equal(own_logits(other, first), logits)
    assert [entry.name for entry in state_of(other).ledger.tasks] == ["0-1", "2-3"]


class Scripted(LightningModule):
    """A user's module with a property that scripting is to leave alone."""

    __jit_unused_properties__: ClassVar = [*LightningModule.__jit_unused_properties__, "mine"]

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    @property
    def mine(self):
        return {self: object()}

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.003)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("method", ["script", "trace"])
def test_a_wrapped_module_becomes_torchscript_before_and_after_a_fit(method):
    module, (task, *_) = ContinualModule(Scripted()), tasks()
    x = torch.randn(3, 1, 8, 8)
    for fits in range(2):
        if fits:
            fit(module, task, three(), epochs=2)
        scripted = module.to_torchscript(method=method, example_inputs=x[:2])
        assert torch.equal(scripted(x), module.eval()(x))
