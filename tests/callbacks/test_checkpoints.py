"""Weights and ledger belong together, whatever is loaded between tasks, and in another process."""

import copy
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from learning import classifier, fit, own_logits, quiet_trainer, tasks, three, weights
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from torch import nn
from torch.nn.utils import prune

from lightning_cf import (
    Classifier,
    ContinualError,
    ContinualModule,
    LedgerWarning,
    MaskedGradientCallback,
    NeuronLedger,
    PartitionCallback,
    SequentialTaskRunner,
    keep_ledger,
)
from lightning_cf.learner.keeping import state_of
from lightning_cf.models import MLP
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.tracing.trace import trace
from lightning_cf.ownership.fingerprints import differences
from lightning_cf.ownership.ledger_state import CHECKPOINT_KEY
from lightning_cf.ownership.traces import rows_cut_off

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no claim within the budget"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),  # a ModelCheckpoint
]


class Logged(Classifier):
    """Its score falls from epoch to epoch, so that the best one is the first."""

    def __init__(self, lr=0.003, hidden=32):
        super().__init__(MLP(shape=(1, 8, 8), classes=10, hidden=(hidden, hidden)))
        self.lr = lr

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def on_train_epoch_end(self):
        self.log("falling", -float(self.current_epoch))

    def test_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("acc", (logits.argmax(1) == batch[1]).float().mean())
        self.log("seen", (logits > -1e30).sum(1).float().mean())

    def validation_step(self, batch, batch_idx):
        self.test_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


@cache
def once(wrap, epochs, **options):
    """A module that learned the first of two tasks, and the folder with a checkpoint of every epoch."""
    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    module = ContinualModule(Logged()) if wrap else Logged()
    keep = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, monitor="falling", mode="max", **options)
    fit(module, tasks(1)[0], [*three(), keep], epochs=epochs, enable_checkpointing=True)
    return module, folder


def learned(folder, *, wrap=False, epochs=4, **options):
    """A copy of it, with its checkpoints in a folder, and both tasks; the first one's partition is in epoch 1."""
    module, files = once(wrap, epochs, **options)
    shutil.copytree(files, folder, dirs_exist_ok=True)
    return copy.deepcopy(module), *tasks(2)


def phases(module):
    return [(entry.name, entry.phase) for entry in module._continual_state.ledger.tasks]


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[name], x) for name, x in after.items())


# A checkpoint from before the partition comes back


@pytest.mark.parametrize(
    ("kind", "run"),
    [*(("plain", run) for run in ("test", "validate", "predict")), ("wrapped", "predict"), ("weights only", "predict")],
)
def test_an_evaluation_of_an_older_checkpoint_leaves_the_module_what_it_was(kind, run, tmp_path):
    module, first, second = learned(tmp_path, wrap=kind == "wrapped", save_weights_only=kind == "weights only")
    before, logits = weights(module), own_logits(module, first)
    old = tmp_path / "epoch=0.ckpt"
    data = {"dataloaders": first.test_dataloader()} if run == "predict" else {"datamodule": first, "verbose": False}
    with pytest.warns(LedgerWarning, match=r"epoch=0\.ckpt' holds .*task '0-1'"):
        found = getattr(quiet_trainer(callbacks=three()), run)(module, ckpt_path=old, **data)
    assert same(before, weights(module))
    assert phases(module) == [("0-1", "sealed")]
    assert not module._load_state_dict_pre_hooks
    other = Logged()
    other.load_state_dict(torch.load(old, weights_only=True)["state_dict"])
    if run == "predict":  # the checkpoint is what was evaluated
        x, _ = next(iter(first.test_dataloader()))
        assert torch.equal(found[0], other(x))
    fit(module, second, three(), epochs=2)
    assert torch.equal(own_logits(module, first), logits)
    assert phases(module) == [("0-1", "sealed"), ("2-3", "sealed")]


@pytest.mark.parametrize("wrap", [False, True])
def test_an_evaluation_of_the_latest_checkpoint_says_nothing(wrap, tmp_path):
    module, first, _ = learned(tmp_path, wrap=wrap)
    before = weights(module)
    quiet_trainer(callbacks=three()).test(module, datamodule=first, ckpt_path=tmp_path / "epoch=3.ckpt", verbose=False)
    assert same(before, weights(module))
    fresh = ContinualModule(Logged()) if wrap else Logged()
    quiet_trainer(callbacks=three()).test(fresh, datamodule=first, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert same(torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"], weights(fresh))


def test_a_trainer_without_our_callbacks_is_told_what_it_takes_back(tmp_path):
    module, first, second = learned(tmp_path, wrap=True)
    module.installs_callbacks = False
    with pytest.warns(LedgerWarning, match=r"epoch=0\.ckpt' is older than .*: it takes back '0-1', weights and ledger"):
        quiet_trainer().test(module, datamodule=first, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    with pytest.raises(ContinualError, match="'0-1' was never partitioned"):  # what came back belongs together
        fit(module, second, three(), epochs=1)


@pytest.mark.parametrize("wrap", [False, True])
def test_the_best_one_is_tested_by_the_trainer_of_the_fit(wrap, tmp_path):
    torch.manual_seed(0)
    module, (first, second) = ContinualModule(Logged()) if wrap else Logged(), tasks(2)
    keep = ModelCheckpoint(dirpath=tmp_path, monitor="falling", mode="max")
    trainer = fit(module, first, [*three(), keep], epochs=6, enable_checkpointing=True)
    before = weights(module)
    with pytest.warns(
        LedgerWarning, match=rf"{re.escape(keep.best_model_path)}' holds task '0-1' as it was before its seal"
    ):
        trainer.test(module, datamodule=first, ckpt_path="best", verbose=False)
    assert same(before, weights(module))
    fit(module, second, three(), epochs=2)
    assert phases(module) == [("0-1", "sealed"), ("2-3", "sealed")]


def test_an_exception_in_such_an_evaluation_puts_back_too(tmp_path):
    module, first, _ = learned(tmp_path)
    before = weights(module)

    def fails(batch, batch_idx):
        raise KeyError("in the middle")

    module.test_step = fails
    with pytest.warns(LedgerWarning), pytest.raises(KeyError):
        quiet_trainer(callbacks=three()).test(module, datamodule=first, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(before, weights(module))
    assert not module._load_state_dict_pre_hooks


@pytest.mark.parametrize("wrap", [False, True])
def test_a_task_does_not_start_from_a_checkpoint_that_loses_another(wrap, tmp_path):
    module, _, second = learned(tmp_path, wrap=wrap)
    before = weights(module)
    trainer = quiet_trainer(max_epochs=6, callbacks=three())
    with pytest.raises(ContinualError, match=r"epoch=1.ckpt' holds task '0-1' as it was before its .* task '2-3'"):
        trainer.fit(module, datamodule=second, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert same(before, weights(module))
    assert phases(module) == [("0-1", "sealed")]
    fit(module, second, three(), epochs=2)
    assert phases(module) == [("0-1", "sealed"), ("2-3", "sealed")]


@pytest.mark.parametrize("wrap", [False, True])
def test_a_task_that_goes_on_from_before_its_partition_may_do_so(wrap, tmp_path):
    module, first, _ = learned(tmp_path, wrap=wrap)
    quiet_trainer(max_epochs=4, callbacks=three()).fit(
        module, datamodule=first, ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True
    )
    assert phases(module) == [("0-1", "sealed")]
    assert module._continual_state.ledger.fingerprints.keys() == {"0-1"}


@pytest.mark.parametrize("wrap", [False, True])
def test_a_new_process_is_told_which_checkpoint_was_never_partitioned(wrap, tmp_path):
    _, _, second = learned(tmp_path, wrap=wrap)
    fresh = ContinualModule(Logged()) if wrap else Logged()
    with pytest.raises(ContinualError, match=r"'0-1' was never partitioned.*read from .*epoch=0\.ckpt"):
        quiet_trainer(max_epochs=6, callbacks=three()).fit(
            fresh, datamodule=second, ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True
        )


def test_the_best_checkpoint_is_one_from_the_partition_on(tmp_path):
    torch.manual_seed(0)
    module, first = Logged(), tasks(1)[0]
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=2, monitor="falling", mode="max")
    fit(module, first, [*three(), keep], epochs=6, enable_checkpointing=True)
    # Of epochs 0 to 5 the first three learned; the third one's score is of before the partition at its end.
    assert keep.best_model_path.endswith("epoch=3.ckpt")
    assert float(keep.best_model_score) == -3.0
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["epoch=3", "epoch=4"]
    assert NeuronLedger.from_checkpoint(keep.best_model_path).tasks[0].phase == "invariance"


def test_the_best_checkpoint_of_a_fit_that_ends_with_its_partition_holds_the_claim(tmp_path):
    torch.manual_seed(0)
    module, first = Logged(), tasks(1)[0]
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", monitor="falling", mode="max")
    fit(module, first, [*three(after=1.0), keep], epochs=3, enable_checkpointing=True)
    assert NeuronLedger.from_checkpoint(keep.best_model_path).tasks[0].phase == "invariance"
    quiet_trainer(callbacks=three()).test(module, datamodule=first, ckpt_path=keep.best_model_path, verbose=False)
    assert phases(module) == [("0-1", "invariance")]


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.parametrize("finder", ["rate", "size"])
def test_finders_that_save_and_load_within_a_fit_go_on(finder, tmp_path):
    module, first, second = learned(tmp_path)
    logits = own_logits(module, first)
    callback = (
        LearningRateFinder(num_training_steps=5) if finder == "rate" else BatchSizeFinder(max_trials=1, init_val=16)
    )
    for order in ([callback, *three()], [*three(), callback]):
        other = copy.deepcopy(module)
        if finder == "size":
            second.batch_size = 32
        fit(other, second, order, epochs=2, default_root_dir=tmp_path)
        assert torch.equal(own_logits(other, first), logits)
        assert phases(other) == [("0-1", "sealed"), ("2-3", "sealed")]
        assert other._continual_state.ledger.origin == ""


# Weights and ledger that do not belong together


def test_weights_that_were_rolled_back_behind_the_ledger_are_refused(tmp_path):
    module, _, second = learned(tmp_path)
    module.load_state_dict(torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"])
    with pytest.raises(ContinualError, match=r"weights are not those that the ledger.*'network\..*task '0-1' left"):
        fit(module, second, three(), epochs=2)


def test_a_ledger_that_is_kept_on_other_weights_is_refused_by_name(tmp_path):
    _, _, second = learned(tmp_path)
    other = Logged()
    keep_ledger(other, NeuronLedger.from_checkpoint(tmp_path / "epoch=3.ckpt"))
    with pytest.raises(ContinualError, match=r"ledger of .*epoch=3\.ckpt was made for: 'network\."):
        fit(other, second, three(), epochs=2)


@pytest.mark.parametrize("convert", [nn.Module.double, nn.Module.bfloat16, lambda m: m.bfloat16().float()])
def test_what_another_precision_rounds_does_not_count(convert, tmp_path):
    module, _, _ = learned(tmp_path)
    ledger = state_of(module).ledger
    assert not differences(ledger, named_tensors(convert(module)))
    with torch.no_grad():
        module.network[1].weight.mul_(1.05)
    assert differences(ledger, named_tensors(module))[0].tensors == ["network.1.weight"]


def test_weights_that_changed_a_little_between_fits_are_told(tmp_path):
    module, _, second = learned(tmp_path)
    with torch.no_grad():
        module.network[1].weight.mul_(1.05)
    with pytest.warns(LedgerWarning, match=r"task '0-1' owns, by .*: 'network\.1\.weight'\. "):
        fit(module, second, three(), epochs=2)
    assert not differences(state_of(module).ledger, named_tensors(module))  # from now on they are what they are


def test_a_fit_that_was_interrupted_goes_on_without_a_word(tmp_path):
    module, _, second = learned(tmp_path)

    class Fail(ModelCheckpoint):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                raise KeyError("in INVARIANCE")

    with pytest.raises(KeyError):
        fit(module, second, [*three(), Fail(dirpath=tmp_path)], epochs=4, enable_checkpointing=True)
    assert phases(module)[-1] == ("2-3", "invariance")
    fit(module, second, three(), epochs=2)
    assert phases(module)[-1] == ("2-3", "sealed")


# Another process, another module: the plain class


def test_a_plain_module_without_its_ledger_is_told(tmp_path):
    _, _, second = learned(tmp_path)
    other = Logged()
    other.load_state_dict(torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)["state_dict"])
    with pytest.warns(LedgerWarning, match=r"rows of 'network\.\d\.weight' are cut off .*ledger=PATH.*keep_ledger"):
        fit(other, second, three(), epochs=2)


def test_a_run_with_a_module_without_its_ledger_is_told(tmp_path):
    learned(tmp_path / "first")
    other = Logged.load_from_checkpoint(tmp_path / "first" / "epoch=3.ckpt", weights_only=True)
    runner = SequentialTaskRunner(
        other, tasks(3)[1:], trainer=quiet_trainer, task_inference=None, root=tmp_path / "run"
    )
    with pytest.warns(LedgerWarning, match="Tasks seem to have been learned here before"):
        runner.start()
    with pytest.raises(ContinualError, match=r"PartitionCallback\(ledger='a\.ckpt'\) cannot be taken up"):
        SequentialTaskRunner(other, tasks(2), partition=PartitionCallback(ledger="a.ckpt"), root=tmp_path / "run")


@pytest.mark.parametrize("given", ["partition", "masking", "keep_ledger"])
def test_a_plain_module_takes_up_the_ledger_of_a_checkpoint(given, tmp_path):
    module, first, second = learned(tmp_path)
    path = tmp_path / "epoch=3.ckpt"
    logits = own_logits(module, first)
    other = Logged.load_from_checkpoint(path, weights_only=True)
    callbacks = three()
    if given == "partition":
        callbacks[0] = PartitionCallback(after=0.5, ledger=path)
    elif given == "masking":
        callbacks[2] = MaskedGradientCallback(ledger=str(path))
    else:
        keep_ledger(other, NeuronLedger.from_checkpoint(path))
    fit(other, second, callbacks, epochs=4)
    assert phases(other) == [("0-1", "sealed"), ("2-3", "sealed")]
    assert torch.equal(own_logits(other, first), logits)


def test_a_ledger_given_again_is_no_matter_but_one_that_knows_more_is_refused(tmp_path):
    module, first, second = learned(tmp_path)
    path = tmp_path / "epoch=3.ckpt"
    callbacks = [PartitionCallback(after=0.5, ledger=path), *three()[1:]]
    fit(module, second, callbacks, epochs=2)
    assert phases(module) == [("0-1", "sealed"), ("2-3", "sealed")]
    other = Logged()
    fit(other, second, three(), epochs=2)
    with pytest.raises(ContinualError, match=r"epoch=3\.ckpt'\) knows more of task '0-1' than the ledger that Logged"):
        fit(other, first, callbacks, epochs=2)


@pytest.mark.parametrize(("name", "says"), [("nowhere.ckpt", "is no file"), ("noise.ckpt", "no checkpoint")])
def test_a_ledger_that_cannot_be_read_is_refused(name, says, tmp_path):
    (tmp_path / "noise.ckpt").write_bytes(b"noise")
    with pytest.raises(ContinualError, match=f"{name} .*{says}|{name} {says}"):
        fit(Logged(), tasks()[0], [PartitionCallback(ledger=tmp_path / name)], epochs=1)


def zeros(change):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        change(module)
    return module


FRESH = {
    "nothing": lambda m: None,
    "a layer of zeros": lambda m: nn.init.zeros_(m[4].weight),
    "identity": lambda m: nn.init.eye_(m[2].weight),
    "triangle": lambda m: m[2].weight.tril_(),
    "sparse": lambda m: nn.init.sparse_(m[2].weight, 0.3),
    "dead units": lambda m: m[2].weight[:, :5].zero_(),
    "dead rows": lambda m: m[2].weight[:5].zero_(),
    "pruned": lambda m: prune.remove(prune.random_unstructured(m[2], "weight", 0.5), "weight"),
    "blocks": lambda m: m[2].weight.mul_(torch.block_diag(torch.ones(8, 8), torch.ones(8, 8))),
}


@pytest.mark.parametrize("name", FRESH)
def test_zeros_of_other_origin_are_no_trace_of_tasks(name):
    module = zeros(FRESH[name])
    assert rows_cut_off(trace(module, torch.ones(2, 6)), named_tensors(module)) is None


@pytest.mark.parametrize("network", ["mlp", "cnn", pytest.param("resnet", marks=pytest.mark.slow)])
def test_traces_are_found_after_each_task_and_not_before(network):
    module, sequence = classifier(network), tasks(2)
    for number, task in enumerate(sequence):
        fit(module, task, three(max_claim=0.4), epochs=2)
        assert rows_cut_off(state_of(module).structure, named_tensors(module)) is not None, number
    fresh = classifier(network)
    assert rows_cut_off(state_of(module).structure, named_tensors(fresh)) is None


def test_checkpoints_hold_what_weights_are_known_by(tmp_path):
    module, _, _ = learned(tmp_path)
    ledger = NeuronLedger.from_state_dict(torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)[CHECKPOINT_KEY])
    found = ledger.fingerprints["0-1"]
    assert {"network.1.weight", "network.3.weight", "network.5.weight"} <= found.keys()
    for name, sample in found.items():
        assert torch.equal(named_tensors(module)[name].flatten()[sample["places"]], sample["values"])
    assert not NeuronLedger.from_checkpoint(tmp_path / "epoch=0.ckpt").fingerprints


# Evaluation in a new process


@pytest.mark.parametrize(
    ("way", "run"), [("ledger", "test"), ("ledger", "validate"), ("ckpt_path", "test"), ("wrapped", "test")]
)
def test_a_task_is_tested_on_its_own_outputs_in_a_new_process_too(way, run, tmp_path):
    module, first, second = learned(tmp_path)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="both")
    fit(module, second, [*three(), keep], epochs=4, enable_checkpointing=True)
    path = tmp_path / "both.ckpt"
    evaluate = {"datamodule": first, "verbose": False}
    (here,) = getattr(quiet_trainer(callbacks=three()), run)(module, **evaluate)
    if way == "wrapped":
        other = type(ContinualModule(Logged())).load_from_checkpoint(path, weights_only=True)
    else:
        other = Logged() if way == "ckpt_path" else Logged.load_from_checkpoint(path, weights_only=True)
    masking = MaskedGradientCallback(ledger=path if way == "ledger" else None)
    load = {"ckpt_path": path} if way == "ckpt_path" else {}
    (there,) = getattr(quiet_trainer(callbacks=[masking]), run)(other, **evaluate, **load)
    assert there == here
    assert there["seen"] == 2
