"""What is frozen stays bitwise still and what is free trains as it would alone, whatever a project has.

The reference is obvious and knows nothing of this package: a module of the same class, in which every weight is
``torch.where(frozen, value, parameter)``, trained by a plain Trainer under the same setting.
"""

import warnings

import pytest
import setting_table
import torch
from learning import images, quiet_trainer
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from settings import SETTINGS, Net
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader, TensorDataset

from lightning_cf import (
    ContinualError,
    FrozenWarning,
    InvarianceCallback,
    MaskedGradientCallback,
    PartitionCallback,
    Task,
)
from lightning_cf.learner.keeping import state_of
from lightning_cf.ownership.levels import FREE

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("always::lightning_cf.errors.FrozenWarning"),
]

FAST = {
    "SGD, momentum, Nesterov, weight decay", "AdamW, fused", "L-BFGS", "Muon", "clipping by norm", "accumulation",
    "two optimisers, toggled, with schedulers", "manual optimisation without an optimiser", "bf16-mixed",
    "16-mixed with a scaler", "EMAWeightAveraging", "an average of one's own", "EarlyStopping", "ModelPruning",
    "BaseFinetuning, layers unfrozen on the way", "fast_dev_run", "BatchNorm", "LayerNorm",
}  # fmt: skip
"""Run by default; all others are left to .ci/run."""


def each(settings):
    return [pytest.param(s, id=s.name, marks=[] if s.name in FAST else [pytest.mark.slow]) for s in settings]


class Digits(LightningDataModule):
    """Some images of two digits."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.batch_size = classes, 16

    def loader(self, part, count):
        chosen = part.of_classes(self.classes)
        return DataLoader(TensorDataset(chosen.images[:count], chosen.labels[:count]), batch_size=self.batch_size)

    def train_dataloader(self):
        return self.loader(images().train, 96)

    def val_dataloader(self):
        return self.loader(images().val, 48)


def task(name, classes):
    return Task(name, Digits(classes), classes=classes)


def fit(setting, module, data, callbacks, **options):
    torch.manual_seed(5)
    options = {"max_epochs": 4, "enable_checkpointing": False, "logger": False, **options, **setting.trainer()}
    if "max_steps" in options:
        options["max_epochs"] = -1
    if any(type(c).__name__ == "LearningRateMonitor" for c in module.configure_callbacks()):
        options["logger"] = True
    if any("Checkpoint" in type(c).__name__ or "Finder" in type(c).__name__ for c in callbacks):
        options["enable_checkpointing"] = True
    trainer = quiet_trainer(**{**options, "callbacks": callbacks})
    compiled = module if setting.compiled is None else torch.compile(module, backend=setting.compiled)
    trainer.fit(compiled, datamodule=data)
    return trainer


def learn(setting, module, data):
    """Fits a task with the three callbacks until it is sealed: the fit that a user would write."""
    for _ in range(3):
        ours = [PartitionCallback(after=0.5, max_claim=0.4), InvarianceCallback(), MaskedGradientCallback()]
        fit(setting, module, data, [*setting.callbacks(), *ours])
        if state_of(module).ledger.tasks[-1].phase == "sealed":
            return
    raise AssertionError("the task was never sealed")


def tensors(module):
    """Parameters and buffers under the names that they have in a module that nobody compiled."""
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {plain(name): tensor for name, tensor in found.items()}


def plain(name):
    return name.replace("_orig_mod.", "")


def snapshot(module):
    return {name: tensor.detach().clone() for name, tensor in tensors(module).items()}


def owned_rows(module, outputs):
    """For each Linear by name, which rows may not move while a later task with these outputs learns."""
    ledger = state_of(module).ledger
    rows = {plain(name): owner >= 0 for name, owner in ledger.owners.items()}
    rows["head"] = torch.tensor([column not in outputs for column in range(6)])
    return rows


def unclaimed(module, outputs):
    """For each weight and bias, what may not move in INVARIANCE: all but claimed rows, and what these read no more."""
    ledger = state_of(module).ledger
    task = len(ledger.tasks) - 1
    owners = {plain(name): owner for name, owner in ledger.owners.items()}
    rows = {name: owner != task for name, owner in owners.items()} | {"head": owned_rows(module, outputs)["head"]}
    masks = {f"{name}.{leaf}": held for name, held in rows.items() for leaf in ("weight", "bias")}
    first, second = owners.values()
    for name, source in zip([*rows][1:], (first, second), strict=True):
        masks[f"{name}.weight"] = rows[name][:, None] | (source == FREE)
    return masks


# The reference


class Held(nn.Module):
    """A weight of which some rows, or entries, are constants."""

    def __init__(self, held, value):
        super().__init__()
        self.held = held if held.ndim == value.ndim else held.reshape(-1, *[1] * (value.ndim - 1))
        self.value = value.detach().clone()

    def forward(self, weight):
        return torch.where(self.held, self.value, weight)


class HeldBatchNorm(nn.BatchNorm1d):
    """Some channels are normalised by their running statistics."""

    def forward(self, x):
        before = self.running_mean.clone(), self.running_var.clone()
        plain = super().forward(x)
        if not self.training:
            return plain
        with torch.no_grad():
            self.running_mean.data.copy_(torch.where(self.rows, before[0], self.running_mean))
            self.running_var.data.copy_(torch.where(self.rows, before[1], self.running_var))
        return torch.where(self.rows, F.batch_norm(x, *before, self.weight, self.bias, False, 0, self.eps), plain)


class HeldLayerNorm(nn.LayerNorm):
    """Some units are normalised among themselves, the others with all."""

    def forward(self, x):
        inside = F.layer_norm(x[:, self.rows], (int(self.rows.sum()),), eps=self.eps)
        outside = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        joined = outside.clone()
        joined[:, self.rows] = inside
        return joined * self.weight + self.bias


HELD_NORMS = {nn.BatchNorm1d: HeldBatchNorm, nn.LayerNorm: HeldLayerNorm}


def reference_of(setting, module, outputs, held):
    """A module of the user's own class with the same weights, some of them constants, that shows some outputs."""
    other = setting.module()
    other.configure_model()
    state = {name: tensor for name, tensor in module.state_dict().items() if name != "_extra_state"}
    other.to(next(module.parameters()).dtype)
    other.load_state_dict(state)
    for path, layer in [(plain(path), layer) for path, layer in other.named_modules()]:
        if type(layer) in HELD_NORMS:
            layer.__class__, layer.rows = HELD_NORMS[type(layer)], held["body.1"]
            for name in ("weight", "bias"):
                parametrize.register_parametrization(layer, name, Held(layer.rows, getattr(layer, name)), unsafe=True)
        elif isinstance(layer, nn.Linear):
            for name in ("weight", "bias"):
                mask = held.get(f"{path}.{name}", held.get(path))
                parametrize.register_parametrization(layer, name, Held(mask, getattr(layer, name)), unsafe=True)
    hidden = torch.tensor([column not in outputs for column in range(6)])
    other.head.register_forward_hook(lambda layer, x, y: y.masked_fill(hidden, torch.finfo(y.dtype).min))
    return other


def value_of(reference, name):
    """A weight, or a buffer, of the reference as its forward pass uses it."""
    path, _, leaf = name.rpartition(".")
    return getattr({plain(path): module for path, module in reference.named_modules()}[path], leaf)


# Hooks


def census(module):
    """Every hook that is somewhere now."""
    found = {"optimisers": (len(_global_optimizer_post_hooks), len(_global_optimizer_pre_hooks))}
    for path, child in module.named_modules():
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        found[path] = [len(getattr(child, kind)) for kind in kinds], type(child).__name__
    for name, parameter in module.named_parameters():
        found[name] = len(parameter._post_accumulate_grad_hooks or ()), len(parameter._backward_hooks or ())
    return found


def assert_frozen(module, before, rows):
    for name, layer_rows in rows.items():
        for leaf in ("weight", "bias"):
            path = f"{name}.{leaf}"
            now, then = tensors(module)[path].detach(), before[path]
            assert torch.equal(now[layer_rows], then[layer_rows].to(now.dtype)), path


FIRST, SECOND = ("zero-one", [0, 1]), ("two-three", [2, 3])
WORKING = [s for s in SETTINGS if s.refused is None]


@pytest.mark.parametrize("setting", each(WORKING))
def test_the_second_task_trains_as_the_reference_and_moves_nothing_else(
    setting, tmp_path, monkeypatch, record_property, unchecked
):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = setting.module()
    module.configure_model()
    clean = census(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learn(setting, module, task(*FIRST))
    logits = own_logits(module, FIRST)
    assert {k: v[0] for k, v in census(module).items()} == {k: v[0] for k, v in clean.items()}
    before, rows = snapshot(module), owned_rows(module, SECOND[1])
    reference = reference_of(setting, module, SECOND[1], rows)
    assert all(0 < int(r.sum()) < len(r) for r in rows.values())
    here = census(module)
    with warnings.catch_warnings(record=True) as more:
        warnings.simplefilter("always")
        fit(setting, module, task(*SECOND), [*setting.callbacks(), MaskedGradientCallback()])
    assert census(module) == here
    found = [str(w.message) for w in [*caught, *more] if issubclass(w.category, FrozenWarning)]
    assert bool(found) == (setting.warns is not None)
    assert all(setting.warns in message for message in found)
    assert_frozen(module, before, rows)
    assert torch.equal(own_logits(module, FIRST), logits)
    fit(setting, reference, task(*SECOND).data, setting.callbacks())
    assert_equal(module, reference, setting.tolerance)
    moved = [name for name, now in tensors(module).items() if not torch.equal(now, before[name])]
    assert "body.1.weight" in moved
    row = setting_table.row(setting)
    record_property("setting", row)
    assert setting_table.documented(setting.name) == row, "the table is stale: pytest ... --write-tables"


ALIKE = {
    "Adam, AMSGrad", "AdamW", "RMSprop, centred", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam",
    "StepLR, each epoch", "OneCycleLR, each step",
}  # fmt: skip
"""Step entry by entry as others do that retrain below; the test above asks them what they do to owned entries."""
RETRAINED = [
    s
    for s in WORKING
    if s.group in ("optimisers", "precision", "averaging")
    and s.warns is None
    and "Norm" not in s.name
    and s.name not in ("ReduceLROnPlateau", "StochasticWeightAveraging", "L-BFGS")  # the last one has converged by then
    and s.name not in ALIKE
]
"""What comes to a fit in which the claimed units train; norms by owners have tests of their own."""


@pytest.mark.parametrize("setting", each(RETRAINED))
def test_claimed_units_retrain_as_the_reference_and_nothing_else_moves(setting, tmp_path, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = setting.module()
    learn(setting, module, task(*FIRST))
    ours = [PartitionCallback(after=1.0, max_claim=0.4), MaskedGradientCallback()]
    fit(setting, module, task(*SECOND), [*setting.callbacks(), *ours])
    assert state_of(module).ledger.tasks[-1].phase == "invariance"
    held = unclaimed(module, SECOND[1])
    before, reference = snapshot(module), reference_of(setting, module, SECOND[1], held)
    fit(setting, module, task(*SECOND), [*setting.callbacks(), InvarianceCallback(), MaskedGradientCallback()])
    for name, mask in held.items():
        mask = mask if mask.ndim == before[name].ndim else mask.reshape(-1, *[1] * (before[name].ndim - 1))
        mask = mask.expand(before[name].shape)
        assert torch.equal(tensors(module)[name][mask], before[name][mask]), name
        assert bool((~mask).any())
    fit(setting, reference, task(*SECOND).data, setting.callbacks())
    assert_equal(module, reference, setting.tolerance)
    assert not torch.equal(tensors(module)["body.1.weight"], before["body.1.weight"])


AVERAGING = [s for s in WORKING if s.group == "averaging"]


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["exact", "perturb"])
@pytest.mark.parametrize("setting", AVERAGING, ids=lambda s: s.name)
def test_averages_may_stand_behind_ours(setting, isolation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module, logits = setting.module(), None
    for known in (FIRST, SECOND):
        if known is SECOND:
            before, rows, logits = snapshot(module), owned_rows(module, SECOND[1]), own_logits(module, FIRST)
        partition = PartitionCallback(after=0.5, max_claim=0.4, isolation=isolation)
        fit(
            setting,
            module,
            task(*known),
            [partition, InvarianceCallback(), MaskedGradientCallback(), *setting.callbacks()],
        )
    assert_frozen(module, before, rows if isolation == "exact" else {k: v for k, v in rows.items() if k != "head"})
    if isolation == "exact":
        assert torch.equal(own_logits(module, FIRST), logits)
    assert state_of(module).ledger.tasks[-1].phase == "sealed"


def assert_equal(module, reference, tolerance):
    for name, now in tensors(module).items():
        if now.is_floating_point():
            torch.testing.assert_close(now.detach(), value_of(reference, name), rtol=tolerance, atol=tolerance)


@torch.no_grad()
def own_logits(module, known):
    """The logits of a task's own outputs on its validation data."""
    module.eval()
    found = [module(x.to(module.dtype)) for x, _ in Digits(known[1]).val_dataloader()]
    module.train()
    return torch.cat(found)[:, known[1]]


REFUSED = [s for s in SETTINGS if s.refused is not None]


@pytest.mark.parametrize("setting", each(REFUSED))
def test_what_cannot_work_is_refused_before_anything_moves(setting, tmp_path, monkeypatch, record_property):
    monkeypatch.chdir(tmp_path)
    module = setting.module()
    before, clean = snapshot(module), census(module)
    ours = [PartitionCallback(after=0.5), InvarianceCallback(), MaskedGradientCallback()]
    with pytest.raises(ContinualError, match=setting.refused) as refusal:
        fit(setting, module, task(*FIRST), [*setting.callbacks(), *ours])
    assert census(module) == clean
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(module).items())
    row = setting_table.row(setting, str(refusal.value))
    record_property("setting", row)
    assert setting_table.documented(setting.name) == row, "the table is stale: pytest ... --write-tables"


# Exceptions and Ctrl-C


class Stop(Callback):
    """Raises in the middle of a fit, at a hook of one's choice."""

    def __init__(self, hook, exception, at=3):
        self.left, self.exception = at, exception
        setattr(self, hook, self.stop)

    def stop(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise self.exception


def interrupted(setting, module, callbacks):
    """A fit that ends by an exception, which Lightning may turn into the end of the program."""
    try:
        fit(setting, module, task(*SECOND), callbacks)
    except (RuntimeError, KeyboardInterrupt, SystemExit):
        return
    raise AssertionError("the fit went on to its end")


@pytest.mark.parametrize("isolation", ["exact", pytest.param("perturb", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end", "on_validation_batch_start"]
)
@pytest.mark.parametrize(
    ("phase", "exception"),
    [
        pytest.param("learn", KeyboardInterrupt(), id="learn, Ctrl-C"),
        pytest.param("invariance", RuntimeError("mine"), id="invariance, exception"),
        pytest.param("learn", RuntimeError("mine"), id="learn, exception", marks=pytest.mark.slow),
        pytest.param("invariance", KeyboardInterrupt(), id="invariance, Ctrl-C", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_left_of_a_fit_that_was_interrupted(phase, hook, isolation, exception, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setting, module = SETTINGS[0], Net()
    options = {"isolation": isolation, "max_claim": 0.4}

    def ours(after):
        return [PartitionCallback(after=after, **options), InvarianceCallback(), MaskedGradientCallback()]

    fit(setting, module, task(*FIRST), ours(0.5))
    if phase == "invariance":
        fit(setting, module, task(*SECOND), ours(1.0))
    before, clean = snapshot(module), census(module)
    owned = {name: owner == 0 for name, owner in state_of(module).ledger.owners.items()}
    owned["head"] = torch.tensor([True, True, False, False, False, False])
    interrupted(setting, module, [Stop(hook, exception), *ours(0.5)])
    assert {name: v for name, v in census(module).items() if name != "optimisers"} == {
        name: v for name, v in clean.items() if name != "optimisers"
    }
    assert len(_global_optimizer_post_hooks) == 0
    assert_frozen(module, before, owned)
    assert state_of(module).disturbance is None
    for _ in range(2):  # and it goes on
        if state_of(module).ledger.tasks[-1].phase != "sealed":
            fit(setting, module, task(*SECOND), ours(0.5))
    assert_frozen(module, before, owned)
    assert [entry.phase for entry in state_of(module).ledger.tasks] == ["sealed", "sealed"]


def test_a_step_that_was_interrupted_in_its_middle_leaves_frozen_entries_as_they_were(tmp_path, monkeypatch):
    class Broken(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(1)
            raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    module = Net()
    learn(SETTINGS[0], module, task(*FIRST))
    before, rows = snapshot(module), owned_rows(module, SECOND[1])
    module.make_optimizer = Broken
    interrupted(SETTINGS[0], module, [MaskedGradientCallback()])
    assert_frozen(module, before, rows)
    assert not torch.equal(tensors(module)["head.weight"], before["head.weight"])


def test_every_fast_setting_exists():
    names = [setting.name for setting in SETTINGS]
    assert len(set(names)) == len(names) > 40
    assert set(names) >= FAST
