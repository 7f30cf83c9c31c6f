"""Training that diverges stops with step and layer named, before anything is stored; what was sealed stays bitwise."""

import logging
import os
import subprocess
import sys
import warnings
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from learning import images, quiet_trainer
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, LambdaCallback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_cf import (
    ContinualError,
    DivergenceError,
    DivergenceWarning,
    InvarianceCallback,
    MaskedGradientCallback,
    PartitionCallback,
    SequentialTaskRunner,
    Task,
    TaskInferenceCallback,
)
from lightning_cf.callbacks.fit_watch import Watch
from lightning_cf.learner.inferring import inference_of
from lightning_cf.learner.keeping import state_of
from lightning_cf.network.finite import not_finite
from lightning_cf.network.forward import named_tensors
from lightning_cf.sequence.stored_state import _CONTENT
from lightning_cf.utilities.content import content_sha256

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no claim within the budget"),
    pytest.mark.filterwarnings("ignore:.*:lightning.fabric.utilities.warnings.PossibleUserWarning"),
]

NAN, INF = float("nan"), float("inf")
ADAMW = partial(torch.optim.AdamW, lr=0.005)


def task(name, classes, count=96):
    def loader(part, count):
        chosen = part.of_classes(classes)
        return DataLoader(TensorDataset(chosen.images[:count], chosen.labels[:count]), 16)

    return Task(name, {"train": loader(images().train, count), "val": loader(images().val, 48)}, classes=classes)


class Rows(nn.Module):
    """An image as a sequence of its rows."""

    def __init__(self, layer, width):
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(8, width), layer, nn.Linear(width, 6)

    def forward(self, x):
        found = self.layer(self.embed(x.squeeze(1)))
        return self.head((found[0] if isinstance(found, tuple) else found).mean(1))


class Block(nn.Module):
    """A residual block with a LayerNorm."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def plain(norm=nn.Identity):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), norm(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 6)
    )


def convolutions():
    layers = nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.BatchNorm2d(12), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 6))


NETWORKS = {
    "plain": plain,
    "BatchNorm": partial(plain, nn.BatchNorm1d),
    "LayerNorm": partial(plain, nn.LayerNorm),
    "convolutions": convolutions,
    "LSTM": lambda: Rows(nn.LSTM(16, 16, batch_first=True), 16),
    "residual block": lambda: Rows(Block(16), 16),
}


class Net(LightningModule):
    """A user's classifier that meets a fault in one of its steps."""

    def __init__(self, network="plain", optimizer=ADAMW, fault=None, at=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = NETWORKS[network]()
        self.optimizer, self.fault, self.at, self.batches = optimizer, fault, at, 0

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        x, y = batch
        hit = self.fault is not None and self.batches == self.at
        self.batches += 1
        if hit and self.fault == "nan pixel":
            x = x.clone()
            x[3].view(-1)[17] = NAN
        loss = F.cross_entropy(self(x), y)
        if hit and self.fault == "loss times inf":
            loss = loss * INF
        if hit and self.fault == "loss plus inf":
            loss = loss + INF
        if hit and self.fault == "loss times 1e30":
            loss = loss * 1e30
        if hit and self.fault == "log of 0":
            loss = loss - (loss * 0).log()
        if hit and self.fault == "loss divided by 0":
            loss = (loss - loss) / (loss - loss)
        return loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class ByDict(Net):
    def training_step(self, batch, batch_idx):
        return {"loss": self.loss(batch), "more": 1}


class Manual(Net):
    """Steps by hand and returns nothing."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Hidden(Net):
    """Steps by hand, behind Lightning's back; the loss is returned, or nothing is."""

    automatic_optimization = False
    tells = True

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        optimizer.step()
        return loss if self.tells else None


class TwoOptimizers(Manual):
    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        parameters = list(self.parameters())
        return [ADAMW(parameters[:3]), torch.optim.SGD(parameters[3:], lr=0.05)]


def fit(module, data, callbacks, epochs=4, **options):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        warnings.filterwarnings("ignore", message=".*Error detected in|.*Anomaly Detection")  # torch's, on anomalies
        trainer = quiet_trainer(max_epochs=epochs, callbacks=callbacks, **options)
        trainer.fit(module, datamodule=data)
    return trainer


def three(after=0.5, **options):
    options = {"max_claim": 0.3, "tolerance": 0.5, **options}
    return [PartitionCallback(after=after, **options), InvarianceCallback(), MaskedGradientCallback()]


FIRST, SECOND = ("zero-one", [0, 1]), ("two-three", [2, 3])


def learned(kind=Net, *, callbacks=three, **options):
    """A module that owns its first task: a copy of one that tests share."""
    fresh, isolation = kind(**options), getattr(callbacks, "keywords", {}).get("isolation", "exact")
    module = deepcopy(_owning(kind, tuple(sorted((k, v) for k, v in options.items() if k == "network")), isolation))
    module.optimizer, module.fault, module.at, module.batches = fresh.optimizer, fresh.fault, fresh.at, 0
    torch.manual_seed(0)
    return module


@cache
def _owning(kind, options, isolation):
    module = kind(**dict(options))
    module.optimizer, module.fault = ADAMW, None
    fit(module, task(*FIRST), three(isolation=isolation))
    assert state_of(module).ledger.tasks[-1].phase == "sealed"
    return module


def copy(module):
    return {name: x.detach().clone() for name, x in named_tensors(module).items()}


def same(module, before):
    return [name for name, x in named_tensors(module).items() if not torch.equal(x, before[name])] == []


@torch.no_grad()
def logits(module, known=FIRST):
    module.eval()
    found = torch.cat([module(x) for x, _ in task(*known).data.val_dataloader()])[:, known[1]]
    module.train()
    return found


FAULTS = ["nan pixel", "loss times inf", "log of 0", "loss divided by 0"]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("fault", ["nan pixel", pytest.param("log of 0", marks=pytest.mark.slow)])
def test_a_fit_that_diverges_while_it_learns_leaves_the_network_as_it_was(network, fault):
    module = learned(network=network, fault=fault, at=4)
    before, owned = copy(module), logits(module)
    first = next(name for name, _ in module.net.named_parameters()).rpartition(".")[0]
    with pytest.raises(DivergenceError, match=rf"step 5 \(global_step 4, epoch 0, batch 4\).*layer 'net.{first}'"):
        fit(module, task(*SECOND), three())
    assert same(module, before)
    assert torch.equal(logits(module), owned)
    assert [entry.phase for entry in state_of(module).ledger.tasks] == ["sealed", "learn"]
    assert state_of(module).safe is None
    fit(module, task(*SECOND), three())  # the fault is over
    assert [entry.phase for entry in state_of(module).ledger.tasks] == ["sealed", "sealed"]
    assert torch.equal(logits(module), owned)


@pytest.mark.parametrize("isolation", ["exact", "perturb"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fit_that_diverges_in_invariance_goes_back_to_its_partition(fault, isolation):
    module = learned(network="BatchNorm", fault=fault, at=16, callbacks=partial(three, isolation=isolation))
    kept = []

    class Keep(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            kept.append(copy(pl_module))

    owned = logits(module)
    with pytest.raises(DivergenceError, match=r"'two-three' \(invariance\).* step 17 .*batch 4"):
        fit(module, task(*SECOND), [*three(isolation=isolation), Keep()])
    assert same(module, kept[2])
    assert isolation == "perturb" or torch.equal(logits(module), owned)
    assert state_of(module).ledger.tasks[-1].phase == "invariance"
    assert state_of(module).disturbance is None
    fit(module, task(*SECOND), three(isolation=isolation), epochs=2)
    assert state_of(module).ledger.tasks[-1].phase == "sealed"
    assert not_finite(named_tensors(module)) == []


@pytest.mark.parametrize("kind", [ByDict, Manual, Hidden, TwoOptimizers])
@pytest.mark.parametrize("at", [3, 23])  # the last batch of the last epoch
def test_any_loop_stops_at_the_step(kind, at):
    module = learned(kind, fault="nan pixel", at=at)
    phases = [entry.phase for entry in state_of(module).ledger.tasks]
    with pytest.raises(DivergenceError, match=rf"epoch {at // 6}, batch {at % 6}\).*layer 'net\.1'"):
        fit(module, task(*SECOND), three(after=1.0))
    assert [entry.phase for entry in state_of(module).ledger.tasks] == [*phases, "learn"]
    assert not_finite(named_tensors(module)) == []


def test_a_loop_that_shows_no_loss_stops_at_the_end_of_the_epoch():
    module = learned(Hidden, fault="nan pixel", at=3)
    module.tells, before = False, copy(module)
    with pytest.raises(DivergenceError, match=r"at or before step 6 \(epoch 0\)"):
        fit(module, task(*SECOND), three())
    assert same(module, before)


class Bare(Hidden):
    """Steps the bare optimiser, so that Lightning counts no steps; shows no loss."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


def test_a_loop_whose_steps_nobody_counts_is_told_by_its_batch_and_sealed_by_its_fit():
    module = learned(Bare, fault="nan pixel", at=3)
    before = copy(module)
    with pytest.raises(DivergenceError, match=r"at or before batch 5 \(epoch 0\)"):
        fit(module, task(*SECOND), three())
    assert same(module, before)
    fit(module, task(*SECOND), three())  # INVARIANCE trained, though no step was counted since the partition
    assert [entry.phase for entry in state_of(module).ledger.tasks] == ["sealed", "sealed"]


@pytest.mark.parametrize(
    "callback",
    [PartitionCallback, InvarianceCallback, MaskedGradientCallback, partial(TaskInferenceCallback, "energy")],
    ids=["partition", "invariance", "masking", "inference"],
)
def test_each_callback_alone_stops_it(callback):
    module = Net(fault="nan pixel", at=2)
    with pytest.raises(DivergenceError, match=r"step 3 .* the loss is nan; .*layer 'net\.1'"):
        fit(module, task(*FIRST), [callback()])
    assert not_finite(named_tensors(module)) == []


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=1e9),
        partial(torch.optim.AdamW, lr=1e9, weight_decay=0.1),
        partial(torch.optim.AdamW, lr=0.01, weight_decay=INF),
        partial(torch.optim.LBFGS, lr=1e30),
    ],
    ids=["SGD, lr=1e9", "AdamW, lr=1e9", "weight_decay=inf", "L-BFGS"],
)
def test_an_optimiser_that_diverges_is_stopped(optimizer):
    module = learned(network="BatchNorm", optimizer=optimizer)
    before, owned = copy(module), logits(module)
    with pytest.raises(DivergenceError, match=r"'two-three' \(learn\) diverged at .*layer 'net\."):
        fit(module, task(*SECOND), three(after=1.0), epochs=40)
    assert same(module, before)
    assert torch.equal(logits(module), owned)


def test_weights_that_broke_before_the_loss_showed_it_are_told_so():
    module = learned(optimizer=partial(torch.optim.SGD, lr=INF))
    with pytest.raises(DivergenceError, match=r"at or before step 1; the loss of step 2 .* was the first"):
        fit(module, task(*SECOND), three())


def test_the_step_that_took_a_bad_gradient_up_is_named_by_its_batch():
    module = learned(fault="nan pixel", at=7)
    with pytest.raises(DivergenceError, match=r"step 3 \(global_step 2, epoch 1, batch 1\)"):
        fit(module, task(*SECOND), three(), accumulate_grad_batches=3)


class OnDevice(Watch):
    """Looks now and then only, as where each look would wait for a GPU."""

    def __init__(self, *args):
        super().__init__(*args)
        self.on_device, self.at_once = True, False


@pytest.mark.parametrize(("at", "looked"), [(2, 6), (7, 12), (23, 24)])
def test_where_it_looks_now_and_then_the_first_step_is_named_all_the_same(at, looked, monkeypatch):
    monkeypatch.setattr("lightning_cf.callbacks.divergence.Watch", OnDevice)
    module = learned(fault="nan pixel", at=at)
    owned = logits(module)
    with pytest.raises(DivergenceError, match=rf"step {at + 1} .*batch {at % 6}\): the loss is not finite; .*'net\.1'"):
        fit(module, task(*SECOND), three())
    assert module.batches == looked  # at the end of the epoch
    assert torch.equal(logits(module), owned)
    mended = learned(Mending, fault="nan pixel", at=at)
    fit(mended, task(*SECOND), three())
    assert state_of(mended).ledger.tasks[-1].phase == "sealed"


def test_a_loss_that_alone_is_not_finite_is_said_so():
    module = learned(fault="loss plus inf", at=2)
    before = copy(module)
    with pytest.raises(DivergenceError, match=r"step 3 .* the loss is inf; weights and gradients are finite"):
        fit(module, task(*SECOND), three())
    assert same(module, before)


# What may go on


class Mending(Net):
    """Leaves gradients that are not finite out."""

    def on_after_backward(self):
        for p in self.parameters():
            if p.grad is not None:
                p.grad.nan_to_num_(0.0, 0.0, 0.0)


class Skipping(Manual):
    """Takes no step where the loss is none."""

    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        if loss.isfinite():
            self.optimizers().step()
        return loss


@pytest.mark.parametrize(
    ("kind", "fault"), [(Mending, "nan pixel"), (Skipping, "nan pixel"), (Skipping, "loss plus inf")]
)
def test_whoever_handles_it_goes_on(kind, fault):
    module = learned(kind, fault=fault, at=4)
    owned = logits(module)
    fit(module, task(*SECOND), three())
    assert state_of(module).ledger.tasks[-1].phase == "sealed"
    assert torch.equal(logits(module), owned)
    assert not_finite(named_tensors(module)) == []


def scaled():
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=2))


def test_steps_that_a_scaler_skips_go_on():
    module = learned(fault="nan pixel", at=4)
    fit(module, task(*SECOND), three(), plugins=scaled())
    assert state_of(module).ledger.tasks[-1].phase == "sealed"
    assert not_finite(named_tensors(module)) == []


def test_losses_that_are_never_finite_stop_though_every_step_is_skipped():
    module = Net(fault="nan pixel")
    module.at = type("Always", (int,), {"__eq__": lambda self, other: True, "__hash__": int.__hash__})()
    with pytest.raises(DivergenceError, match="none of the last 102 losses is finite"):
        fit(module, task(*FIRST), [MaskedGradientCallback()], epochs=30, plugins=scaled())


def test_a_validation_loss_alone_stops_nothing():
    class Odd(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self(batch[0] * NAN), batch[1]))

    found = []
    for kind in (Net, Odd):
        module = learned(kind, network="BatchNorm")
        fit(module, task(*SECOND), three())
        found.append(copy(module))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_masks_and_bounds_may_be_infinite():
    class Masked(Net):
        def __init__(self, **options):
            super().__init__(**options)
            self.register_buffer("mask", torch.tensor([0.0] * 6))
            self.register_buffer("unused", torch.full((3, 3), -INF).triu(1))
            self.register_buffer("cache", torch.full((2,), NAN))

        def forward(self, x):
            return self.net(x) + self.mask

    module = Masked()
    for known in (FIRST, SECOND):
        fit(module, task(*known), three())
    assert [entry.phase for entry in state_of(module).ledger.tasks] == ["sealed", "sealed"]


# However it ends


class Stop(Callback):
    """Ends the fit in its own way when the loss is none; stands before ours."""

    def __init__(self, exception):
        self.exception = exception

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if pl_module.batches > 5:
            raise self.exception


@pytest.mark.parametrize("exception", [RuntimeError("mine"), KeyboardInterrupt()], ids=["exception", "Ctrl-C"])
@pytest.mark.parametrize("isolation", ["exact", "perturb"])
def test_a_fit_that_another_exception_ends_is_put_back_too(exception, isolation):
    module = learned(network="BatchNorm", fault="nan pixel", at=5, callbacks=partial(three, isolation=isolation))
    before = copy(module)
    told = pytest.warns(DivergenceWarning, match=r"ended by .* first in layer 'net\.\d.* again what it was")
    with told, pytest.raises((RuntimeError, SystemExit)):
        fit(module, task(*SECOND), [Stop(exception), *three(isolation=isolation)])
    assert same(module, before)


def test_anomaly_detection_leaves_no_statistics_behind():
    module = learned(network="BatchNorm", fault="nan pixel", at=5)
    before, owned = copy(module), logits(module)
    with (
        pytest.warns(DivergenceWarning, match="ended by RuntimeError"),
        pytest.raises(RuntimeError, match="nan values"),
    ):
        fit(module, task(*SECOND), three(), detect_anomaly=True)
    assert same(module, before)
    assert torch.equal(logits(module), owned)


def test_a_finite_network_is_left_as_an_exception_found_it():
    module = learned()
    before = copy(module)
    with pytest.raises(RuntimeError, match="mine"):
        fit(module, task(*SECOND), [Stop(RuntimeError("mine")), *three()])
    assert not same(module, before)


def test_early_stopping_for_a_loss_that_is_none_claims_nothing():
    class Logging(Hidden):
        tells = False

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.log("train_loss", NAN if self.batches > 4 else 0.0)

    module = learned(Logging, fault="nan pixel", at=4)
    before = copy(module)
    stop = EarlyStopping("train_loss", check_finite=True, check_on_train_epoch_end=True)
    with pytest.raises(DivergenceError, match="at or before step 6"):
        fit(module, task(*SECOND), [stop, *three(after=1.0)])
    assert same(module, before)
    assert state_of(module).ledger.tasks[-1].phase == "learn"


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("kind", [Net, Hidden])
def test_no_checkpoint_holds_it(kind, weights_only, tmp_path):
    module = learned(kind, network="BatchNorm", fault="nan pixel", at=8)
    store = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, save_weights_only=weights_only)
    with pytest.raises(DivergenceError):
        fit(module, task(*SECOND), [store, *three()], enable_checkpointing=True)
    found = [torch.load(path, weights_only=True)["state_dict"] for path in tmp_path.glob("*.ckpt")]
    assert len(found) == 8
    assert all(not_finite(weights) == [] for weights in found)


def test_an_average_of_weights_that_broke_is_not_taken():
    module = learned(fault="nan pixel", at=22)
    owned = logits(module)
    with pytest.raises(DivergenceError, match="step 23"):
        fit(module, task(*SECOND), [EMAWeightAveraging(), *three()])
    assert torch.equal(logits(module), owned)
    assert not_finite(named_tensors(module)) == []


# What is loaded so


def test_free_units_that_were_loaded_so_are_drawn_anew():
    module = learned(network="BatchNorm")
    owned, ledger = logits(module), state_of(module).ledger
    free = (ledger.owners["net.1"] == -1).nonzero().flatten()
    with torch.no_grad():
        module.net[1].weight[free[0]] = NAN
        module.net[2].running_var[free[1]] = INF
        module.net[2].bias[free[2]] = -INF
    before = copy(module)
    assert bool(logits(module).isnan().any())
    with pytest.warns(DivergenceWarning, match=r"free units are not finite.*layer 'net\.1'.*drawn anew"):
        fit(module, task(*SECOND), three(), epochs=1, limit_train_batches=0)
    assert torch.equal(logits(module), owned)
    for name, x in named_tensors(module).items():
        assert torch.equal(x[before[name].isfinite()], before[name][before[name].isfinite()])
        assert bool(x.isfinite().all())


@pytest.mark.parametrize("hook", ["on_fit_start", "on_validation_end", "on_train_start"])
def test_what_breaks_between_the_fits_start_and_its_first_step_is_drawn_anew(hook):
    """Else it would be taken for what the phase began with."""

    def spoil(trainer, module):
        if not trainer.global_step:
            module.net[1].weight.data[free] = NAN

    module = learned()
    owned, free = logits(module), (state_of(module).ledger.owners["net.1"] == -1).nonzero().flatten()[0]
    with pytest.warns(DivergenceWarning, match=r"free units are not finite.*layer 'net\.1'.*drawn anew"):
        fit(module, task(*SECOND), [LambdaCallback(**{hook: spoil}), *three()], epochs=1)
    assert torch.equal(logits(module), owned)


def test_what_a_task_owns_and_was_loaded_so_is_refused():
    module = learned()
    unit = int((state_of(module).ledger.owners["net.4"] == 0).nonzero()[0])
    module.net[4].weight.data[unit, 0] = NAN
    with pytest.raises(DivergenceError, match=r"before the first step, in what its tasks own: layer 'net\.4'"):
        fit(module, task(*SECOND), three())


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_first_task_does_not_begin_so(value):
    module = Net(network="BatchNorm")
    module.net[4].weight.data[0, 0] = value
    with pytest.raises(ContinualError, match=r"net\.4"):
        fit(module, task(*FIRST), three())


# What is judged and kept


class Undefined(MulticlassAccuracy):
    """A metric that is none once some units are cut."""

    def __init__(self):
        super().__init__(6, average="micro")
        self.times = 0

    def compute(self):
        Undefined.times += 1
        return torch.tensor(NAN) if Undefined.times > Undefined.allowed else super().compute()


@pytest.mark.parametrize("isolation", ["exact", "perturb"])
@pytest.mark.parametrize("allowed", [1, 2], ids=["before the partition", "after it"])  # the first is before training
def test_no_claim_is_judged_by_a_score_that_is_none(allowed, isolation):
    module = learned(callbacks=partial(three, isolation=isolation))
    known = task(*SECOND)
    known.metric, Undefined.times, Undefined.allowed = Undefined(), 0, allowed
    owners = {name: owner.clone() for name, owner in state_of(module).ledger.owners.items()}
    kept = []

    class Keep(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            kept.append(copy(pl_module))

    with pytest.raises(ContinualError, match="'two-three': its Undefined is nan on the data that judges its partition"):
        fit(module, known, [Keep(), *three(isolation=isolation)])
    state = state_of(module)
    assert same(module, kept[-1])
    assert [entry.phase for entry in state.ledger.tasks] == ["sealed", "learn"]
    assert all(torch.equal(owner, owners[name]) for name, owner in state.ledger.owners.items())
    assert {record["task"] for record in state.ledger.records} == {"zero-one"}
    fit(module, task(*SECOND), three(isolation=isolation))
    assert state.ledger.tasks[-1].phase == "sealed"


class LeavingOut(Net):
    """Leaves out samples that are not finite."""

    def training_step(self, batch, batch_idx):
        fine = batch[0].flatten(1).isfinite().all(1)
        return self.loss((batch[0][fine], batch[1][fine]))


def spoiled(known):
    """The same task with three samples that are not finite in its training data."""
    images, labels = known.data.train_dataloader().dataset.tensors
    images = images.clone()
    for sample, value in ((3, NAN), (20, INF), (40, -INF)):
        images[sample].view(-1)[30] = value
    loaders = {"train": DataLoader(TensorDataset(images, labels), 16), "val": known.data.val_dataloader()}
    return Task(known.name, loaders, classes=known.classes)


@pytest.mark.parametrize("strategy", ["subspaces", "mahalanobis", "input_gaussian", "reconstruction_logits"])
def test_samples_that_are_not_finite_are_left_out_of_what_is_kept(strategy):
    module = LeavingOut()
    ours = [*three(), TaskInferenceCallback(strategy)]
    with pytest.warns(DivergenceWarning) as caught:
        fit(module, spoiled(task(*FIRST)), ours)
    told = [str(warning.message) for warning in caught if warning.category is DivergenceWarning]
    assert any("of its training data, 3 of 96 inputs of layer 'net.4' are not finite" in text for text in told)
    assert any("3 of 96 samples are not finite in what the network shows" in text for text in told)
    assert not_finite(named_tensors(module)) == []
    kept = inference_of(state_of(module).ledger).tasks[0]
    assert not_finite({**kept.fitted[strategy], "calibration": kept.calibration[strategy]}) == []


def test_a_batch_that_holds_it_is_said_to():
    module = learned()
    with pytest.raises(DivergenceError, match=r"step 1 .* the loss is nan; its batch holds numbers that are not fin"):
        fit(module, spoiled(task(*SECOND)), three())


# The runner


def runner(root, module, **options):
    options = {"epochs": 2, "invariance_epochs": 2, "task_inference": None, **options}
    options = {"partition": PartitionCallback(max_claim=0.3, tolerance=0.5), "trainer": quiet_trainer, **options}
    sequence = [task(*FIRST), task(*SECOND)]
    return SequentialTaskRunner(module, sequence, root=root, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "at", "phase"),
    [
        ("partition", 3, "learn zero-one"),
        ("partition", 28, "learn two-three"),
        ("partition", 40, "invariance two-three"),
        ("finetune", 47, "learn two-three"),
        ("joint", 20, "joint"),
    ],
)
def test_a_run_stores_no_phase_that_diverged_and_goes_on_from_the_one_before(method, at, phase, tmp_path):
    expected = runner(tmp_path / "whole", Net(network="BatchNorm"), method=method).run()
    module = Net(network="BatchNorm", fault="nan pixel", at=at)
    with pytest.raises(DivergenceError, match=r"layer 'net\.1'"):
        runner(tmp_path / "run", module, method=method).run()
    kept = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert phase not in kept["progress"]["finished"]
    assert not_finite({n: x for n, x in kept["module"].items() if isinstance(x, torch.Tensor)}) == []
    for path in (tmp_path / "run").rglob("*.ckpt"):
        assert not_finite(torch.load(path, weights_only=True)["state_dict"]) == []
    healthy = Net(network="BatchNorm")
    result = runner(tmp_path / "run", healthy, method=method, allow=["hyperparameters"]).run()
    assert result.weights_sha256 == expected.weights_sha256


def test_a_folder_that_holds_it_is_refused_by_name(tmp_path):
    runner(tmp_path, Net(network="BatchNorm"), method="joint").run()
    path = tmp_path / "state.pt"
    kept = torch.load(path, weights_only=True)
    kept["module"]["net.2.running_var"][1] = NAN
    torch.save({**kept, "checksum": content_sha256({key: kept[key] for key in _CONTENT})}, path)
    with pytest.raises(
        ContinualError, match=r"state\.pt holds .* layer 'net\.2' .* diverged in phase 'score' or before"
    ):
        runner(tmp_path, Net(network="BatchNorm"), method="joint").run()


def test_a_run_does_not_begin_with_it(tmp_path):
    module = Net()
    module.net[1].weight.data[0, 0] = NAN
    with pytest.raises(ContinualError, match=r"net\.1"):
        runner(tmp_path, module).run()
    assert not list(tmp_path.glob("*.pt"))


SCRIPT = """
import sys, logging, warnings
import torch
warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
from lightning.pytorch import Callback
from test_divergence import *

class Spoil(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == self.step:
            batch[0][0].view(-1)[3] = NAN

for step in (1, 10):
    module = Net(network="BatchNorm")
    try:
        fit(module, task(*FIRST), [Spoil(step), *three()], accelerator="cpu", devices=2, strategy="ddp")
    except DivergenceError as error:
        bad = not_finite(named_tensors(module))
        print(f"rank {module.global_rank} {bad}: {error}", flush=True)
"""


@pytest.mark.slow
def test_all_processes_stop_alike(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    path = f"{Path(__file__).parents[1]}:{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300, check=False
    )
    text = done.stdout + done.stderr
    for rank in (0, 1):
        assert text.count(f"rank {rank} []: Training of task 'zero-one'") == 2, text[-2000:]
    for step in (1, 10):
        assert text.count(f"global_step {step}, epoch {step // 3}") == 2


def test_an_optimiser_that_overflows_while_the_weights_stay_finite_is_told_once():
    """As Adam's squares of large gradients do: what they belong to trains no more."""
    module = Net(optimizer=partial(torch.optim.Adam, lr=0.005), fault="loss times 1e30", at=3)
    words = r"what the optimiser keeps of them is not, first of net\.\d\.\w+ \(exp_avg_sq\)"
    with pytest.warns(DivergenceWarning, match=words) as heard:
        fit(module, task(*FIRST), three())
    assert len([w for w in heard if issubclass(w.category, DivergenceWarning)]) == 1


class Leap(Callback):
    """One step at another rate."""

    def __init__(self, at, rate):
        self.at, self.rate = at, rate

    def _set(self, trainer, rate):
        for group in trainer.optimizers[0].param_groups:
            group["lr"], self.rate = rate, group["lr"]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at:
            self._set(trainer, self.rate)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at + 1:
            self._set(trainer, self.rate)


@pytest.mark.parametrize("network", ["plain", "convolutions", pytest.param("residual block", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("at", "phase"), [(11, "learn"), (23, "invariance")])
def test_a_last_step_that_leaves_finite_weights_which_overflow_stops_it(network, at, phase):
    """Else zero times infinity is what earlier tasks give."""
    module = learned(network=network)
    owned = logits(module)
    with pytest.raises(
        DivergenceError, match=rf"\({phase}\) diverged at or before step {at + 1} .*finite, but so large"
    ):
        fit(module, task(*SECOND), [*three(), Leap(at, 1e20)])
    assert torch.equal(logits(module), owned)
    assert state_of(module).ledger.tasks[-1].phase == phase
    fit(module, task(*SECOND), three())
    assert state_of(module).ledger.tasks[-1].phase == "sealed"
    assert torch.equal(logits(module), owned)


def test_the_last_step_is_looked_at_without_partitions():
    module = learned()
    owned = logits(module)
    with pytest.raises(DivergenceError, match=r"finite, but so large that layer .net\.4. overflows"):
        fit(module, task(*SECOND), [MaskedGradientCallback(), Leap(23, 1e20)])
    assert torch.equal(logits(module), owned)


def test_layers_that_give_infinite_numbers_on_purpose_stop_nothing():
    class Mask(torch.nn.Module):
        def forward(self, x):
            return x.new_tensor([0.0, -INF]).repeat(x.shape[-1] // 2)

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mask, self.head = nn.Linear(64, 24), Mask(), nn.Linear(24, 6)

        def forward(self, x):
            x = self.first(x.flatten(1))
            return self.head(x.sigmoid() * (self.mask(x) == 0))

    module = Net()
    module.net = Masked()
    fit(module, task(*FIRST), three())
    assert state_of(module).ledger.tasks[-1].phase == "sealed"


def test_masked_outputs_that_a_scale_makes_infinite_stop_nothing():
    class Scaled(Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return self.net(x) * self.scale.exp()

    module = learned(Scaled)
    owned = logits(module)
    fit(module, task(*SECOND), three())
    assert float(module.scale.detach()) > 0
    assert state_of(module).ledger.tasks[-1].phase == "sealed"
    assert torch.equal(logits(module), owned)


@pytest.mark.filterwarnings("ignore:.*goes on with what allow= lets differ")
@pytest.mark.parametrize("method", ["partition", pytest.param("finetune", marks=pytest.mark.slow), "joint"])
def test_a_run_whose_last_step_overflows_stores_no_such_phase(method, tmp_path):
    class Leaps(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if self.batches == self.at:
                self.trainer.optimizers[0].param_groups[0]["lr"] = 1e20

    with pytest.raises(DivergenceError, match="finite, but so large"):
        runner(tmp_path, Leaps(at=47), method=method).run()
    result = runner(tmp_path, Leaps(), method=method, allow=["hyperparameters"]).run()
    assert result.accuracy.matrix[-1].min() > 0.5
