"""Settings that people have in their projects: modules, optimisers, Trainers and callbacks of theirs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, callbacks
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

GROUPS = ("optimisers", "loop", "precision", "averaging", "callbacks", "data", "module")


class Net(LightningModule):
    """A user's classifier of 8 x 8 images.

    Args:
        optimizer: makes an optimiser from parameters.
        scheduler: what goes beside it in ``configure_optimizers``, from the optimiser.
        norm: a layer behind the first one, from its width.
    """

    def __init__(self, optimizer=None, scheduler=None, norm=None):
        super().__init__()
        self.make_optimizer = optimizer or partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
        self.make_scheduler = scheduler
        between = [] if norm is None else [norm(24)]
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), *between, nn.ReLU(), nn.Linear(24, 20), nn.Dropout(0.1), nn.ReLU()
        )
        self.head = nn.Linear(20, 6)

    def forward(self, x):
        return self.head(self.body(x))

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        return optimizer if self.make_scheduler is None else {"optimizer": optimizer, **self.make_scheduler(optimizer)}


class Silent(Net):
    """Logs nothing: torch.compile does not follow Lightning's self.log."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        pass


class InnerCompiled(Silent):
    """Compiles its network itself."""

    def __init__(self, **options):
        super().__init__(**options)
        self.body = torch.compile(self.body, backend="eager")


class Manual(Net):
    """One optimiser by hand: accumulates two batches and clips."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            optimizer = self.optimizers()
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()


class Several(Manual):
    """Two optimisers in turn, each toggled."""

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self):
        made = torch.optim.AdamW(self.body.parameters(), lr=0.01), torch.optim.SGD(self.head.parameters(), lr=0.1)
        return list(made), [lr_scheduler.ExponentialLR(optimizer, 0.95) for optimizer in made]


class Own(Manual):
    """An optimiser that Lightning never hears of."""

    def configure_optimizers(self):
        self.own = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)

    def training_step(self, batch, batch_idx):
        self.own.zero_grad()
        self.manual_backward(self.loss(batch))
        self.own.step()


class ByHand(Manual):
    """No optimiser at all: every parameter decays, and follows its gradient."""

    def configure_optimizers(self):
        pass

    def training_step(self, batch, batch_idx):
        self.zero_grad()
        self.manual_backward(self.loss(batch))
        for parameter in self.parameters():
            parameter.data.mul_(0.99).sub_(0.1 * parameter.grad)


class Closures(Manual):
    """L-BFGS by hand."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


class Skipping(Net):
    """Leaves out every third batch."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 3 == 2 else super().training_step(batch, batch_idx)


class Overriding(Net):
    """Hooks of its own around the optimiser: a warm-up, gradients that stay tensors, clipping of its own."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1, (self.trainer.global_step + 1) / 4)
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")


class Grouped(Net):
    """Biases without weight decay, the head with a rate of its own, parameters by name as AdamW likes them."""

    def configure_optimizers(self):
        body = [p for name, p in self.body.named_parameters() if "bias" not in name]
        biases = [p for name, p in self.body.named_parameters() if "bias" in name]
        groups = [
            {"params": body, "weight_decay": 0.2},
            {"params": biases, "weight_decay": 0.0},
            {"params": list(self.head.parameters()), "lr": 0.03},
        ]
        return torch.optim.AdamW(groups, lr=0.01)


class Muon(Net):
    """Muon for the matrices of the body."""

    def configure_optimizers(self):
        return torch.optim.Muon([p for p in self.body.parameters() if p.ndim == 2], lr=0.05, weight_decay=0.1)


class Configuring(Net):
    """Brings callbacks of its own."""

    def configure_callbacks(self):
        return [callbacks.EarlyStopping("train_loss", patience=10), callbacks.LearningRateMonitor()]


class Late(Net):
    """Makes its layers in configure_model."""

    def __init__(self, **options):
        super().__init__(**options)
        del self.body

    def configure_model(self):
        if not hasattr(self, "body"):
            with torch.random.fork_rng():
                torch.manual_seed(7)
                self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU())


class Checkpointing(Net):
    """Computes activations again in the backward pass."""

    def forward(self, x):
        hidden = torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)
        return self.head(hidden)


class Regularised(Net):
    """Reads its weights in the loss."""

    def loss(self, batch):
        return super().loss(batch) + 0.01 * sum(p.abs().sum() for p in self.parameters())


class Tunable(Net):
    """Has a learning rate that can be found."""

    def __init__(self, **options):
        super().__init__(**options)
        self.rate = 0.01

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.1)


class Noisy(Net):
    """Changes gradients in a hook of its own, after the backward pass."""

    def on_after_backward(self):
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


class Finetuning(callbacks.BaseFinetuning):
    """Freezes the body, and unfreezes it in the second epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.body, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, initial_denom_lr=1)


class Lion(torch.optim.Optimizer):
    """A user's optimiser: the sign of a running mean of gradients, and weight decay."""

    def __init__(self, params, lr=0.003):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    mean.lerp_(p.grad, 0.1)
                    p.mul_(1 - 0.1 * group["lr"]).sub_(mean.sign(), alpha=group["lr"])
        return loss


class OwnAverage(Callback):
    """A user's average of weights, put in place at the end of a fit."""

    def on_train_start(self, trainer, pl_module):
        self.average = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, *_):
        for average, p in zip(self.average, pl_module.parameters(), strict=True):
            average.lerp_(p.detach(), 0.3)

    def on_train_end(self, trainer, pl_module):
        for average, p in zip(self.average, pl_module.parameters(), strict=True):
            p.data.copy_(average)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a user has.

    Attributes:
        name: what it is called.
        group: the kind of setting, for the documentation.
        module: makes the LightningModule.
        trainer: keywords for the Trainer, made anew for each one.
        callbacks: the user's, made anew for each Trainer.
        compiled: the backend with which the module is compiled, if it is.
        refused: part of the error where it cannot work.
        warns: part of the warning where something was put back.
        tolerance: by how much free weights may differ from the reference: nothing.
        reference: whether a reference without this package can run under the setting.
        note: for the documentation.
    """

    name: str
    group: str
    module: Callable[[], LightningModule] = Net
    trainer: Callable[[], dict[str, Any]] = dict
    callbacks: Callable[[], list[Callback]] = list
    compiled: str | None = None
    refused: str | None = None
    warns: str | None = None
    tolerance: float = 0.0
    reference: bool = True
    note: str = ""


def optimizer(name, kind, **options):
    return Setting(name=name, group="optimisers", module=partial(Net, optimizer=partial(kind, **options)))


def scheduler(name, make, **options):
    def configure(optimizer):
        return {"lr_scheduler": {"scheduler": make(optimizer), **options}}

    return Setting(name=name, group="optimisers", module=partial(Net, scheduler=configure))


def trainer(name, group="loop", **options):
    return Setting(name=name, group=group, trainer=lambda: options)


def beside(name, make, group="callbacks", **more):
    return Setting(name=name, group=group, callbacks=lambda: [make()], **more)


def scaled():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=2)  # so that some steps are left out
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler=scaler)}


optim = torch.optim
SETTINGS = [
    optimizer(
        "SGD, momentum, Nesterov, weight decay", optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    optimizer("Adam, AMSGrad", optim.Adam, lr=0.01, weight_decay=0.1, amsgrad=True),
    optimizer("AdamW", optim.AdamW, lr=0.01, weight_decay=0.5, foreach=False),
    optimizer("AdamW, foreach", optim.AdamW, lr=0.01, weight_decay=0.5, foreach=True),
    optimizer("AdamW, fused", optim.AdamW, lr=0.01, weight_decay=0.5, fused=True),
    optimizer("SGD, fused", optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    optimizer("RMSprop, centred", optim.RMSprop, lr=0.003, momentum=0.5, centered=True, weight_decay=0.1),
    optimizer("Adagrad", optim.Adagrad, lr=0.03, weight_decay=0.1),
    optimizer("Adadelta", optim.Adadelta, lr=1.0, weight_decay=0.1),
    optimizer("Adamax", optim.Adamax, lr=0.01, weight_decay=0.1),
    optimizer("NAdam", optim.NAdam, lr=0.01, weight_decay=0.1),
    optimizer("RAdam", optim.RAdam, lr=0.01, weight_decay=0.1),
    optimizer("Rprop", optim.Rprop, lr=0.01),
    optimizer("ASGD", optim.ASGD, lr=0.05, weight_decay=0.1),
    optimizer("Adafactor", optim.Adafactor, lr=0.05),
    optimizer("L-BFGS", optim.LBFGS, lr=0.1, max_iter=4),
    optimizer("an optimiser of one's own (Lion)", Lion),
    Setting(name="Muon", group="optimisers", module=Muon),
    Setting(name="parameter groups", group="optimisers", module=Grouped),
    scheduler("StepLR, each epoch", partial(lr_scheduler.StepLR, step_size=1, gamma=0.5)),
    scheduler("OneCycleLR, each step", partial(lr_scheduler.OneCycleLR, max_lr=0.02, total_steps=60), interval="step"),
    scheduler(
        "ReduceLROnPlateau", partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5), monitor="val_loss"
    ),
    Setting(name="two optimisers, toggled, with schedulers", group="optimisers", module=Several),
    # loop
    trainer("clipping by norm", gradient_clip_val=0.1),
    trainer("clipping by value", gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    trainer("accumulation", accumulate_grad_batches=3),
    beside("accumulation that changes", lambda: callbacks.GradientAccumulationScheduler({0: 2, 2: 1}), group="loop"),
    trainer("max_steps", max_steps=20),
    trainer("max_time", max_time={"hours": 1}),
    trainer("val_check_interval", val_check_interval=2),
    trainer("check_val_every_n_epoch", check_val_every_n_epoch=2, num_sanity_val_steps=1),
    trainer("detect_anomaly", detect_anomaly=True),
    trainer("deterministic", deterministic=True),
    trainer("inference_mode=False", inference_mode=False),
    trainer(
        "barebones", barebones=True, enable_progress_bar=None, enable_model_summary=None, enable_checkpointing=None
    ),
    trainer("profiler", profiler="simple"),
    Setting(name="manual optimisation, accumulation, clipping", group="loop", module=Manual),
    Setting(
        name="manual optimisation with L-BFGS",
        group="loop",
        module=partial(Closures, optimizer=partial(optim.LBFGS, lr=0.1, max_iter=3)),
    ),
    Setting(name="manual optimisation, an optimiser of one's own", group="loop", module=Own),
    Setting(name="manual optimisation without an optimiser", group="loop", module=ByHand),
    Setting(name="training_step that returns None", group="loop", module=Skipping),
    Setting(name="optimizer_step and its kin overridden", group="loop", module=Overriding),
    Setting(
        name="ddp, one process",
        group="loop",
        trainer=lambda: {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 1},
        note="works, with several processes too",
    ),
    # precision
    trainer("bf16-mixed", "precision", precision="bf16-mixed"),
    Setting(name="16-mixed with a scaler", group="precision", trainer=scaled),
    trainer("bf16-true", "precision", precision="bf16-true"),
    trainer("64-true", "precision", precision="64-true"),
    Setting(name="torch.compile of the LightningModule", group="precision", module=Silent, compiled="eager"),
    Setting(
        name="torch.compile of it, with BatchNorm",
        group="precision",
        module=partial(Silent, norm=nn.BatchNorm1d),
        compiled="eager",
    ),
    Setting(name="torch.compile within the module", group="precision", module=InnerCompiled),
    Setting(
        name="torch.compile within it, with BatchNorm",
        group="precision",
        module=partial(InnerCompiled, norm=nn.BatchNorm1d),
    ),
    # averages
    beside("EMAWeightAveraging", lambda: callbacks.EMAWeightAveraging(decay=0.8), "averaging"),
    beside("WeightAveraging", callbacks.WeightAveraging, "averaging"),
    beside(
        "WeightAveraging, with BatchNorm",
        callbacks.WeightAveraging,
        "averaging",
        module=partial(Net, norm=nn.BatchNorm1d),
    ),
    beside("StochasticWeightAveraging", lambda: callbacks.StochasticWeightAveraging(0.01, 1), "averaging"),
    beside(
        "StochasticWeightAveraging, with BatchNorm",
        lambda: callbacks.StochasticWeightAveraging(0.01, 1),
        "averaging",
        module=partial(Net, norm=nn.BatchNorm1d),
        refused="computes all BatchNorm statistics anew",
    ),
    beside(
        "an average of one's own",
        OwnAverage,
        "averaging",
        warns="Something else than an optimiser's step changed",
        note="what it changes in earlier tasks' units is put back, with a warning",
    ),
    # callbacks
    beside("EarlyStopping", lambda: callbacks.EarlyStopping("val_loss", min_delta=10.0, patience=3)),
    Setting(
        name="ModelCheckpoint",
        group="callbacks",
        callbacks=lambda: [callbacks.ModelCheckpoint(monitor="val_loss", save_last=True, every_n_train_steps=2)],
        trainer=lambda: {"enable_checkpointing": True},
    ),
    beside("LambdaCallback", lambda: callbacks.LambdaCallback(on_train_batch_end=lambda *_: torch.rand(1))),
    beside(
        "BaseFinetuning, layers unfrozen on the way",
        Finetuning,
        module=partial(Net, optimizer=lambda p: optim.AdamW([q for q in p if q.requires_grad], lr=0.01)),
    ),
    beside(
        "LearningRateFinder",
        lambda: callbacks.LearningRateFinder(num_training_steps=5, attr_name="rate", update_attr=True),
        module=Tunable,
    ),
    beside("BatchSizeFinder", lambda: callbacks.BatchSizeFinder(max_trials=1, steps_per_trial=1)),
    beside("Timer", callbacks.Timer),
    beside(
        "ModelPruning", lambda: callbacks.ModelPruning("l1_unstructured", amount=0.2), refused="sets weights to zero"
    ),
    # data
    trainer("fast_dev_run", "data", fast_dev_run=2),
    trainer("overfit_batches", "data", overfit_batches=2),
    trainer("limit_train_batches, limit_val_batches", "data", limit_train_batches=0.5, limit_val_batches=1),
    trainer("no validation", "data", limit_val_batches=0),
    trainer("reload_dataloaders_every_n_epochs", "data", reload_dataloaders_every_n_epochs=1),
    # the module's own
    Setting(name="configure_callbacks", group="module", module=Configuring),
    Setting(name="configure_model", group="module", module=Late),
    Setting(name="activation checkpointing", group="module", module=Checkpointing),
    Setting(name="weights in the loss (L1)", group="module", module=Regularised),
    Setting(name="on_after_backward changes gradients", group="module", module=Noisy),
    Setting(name="BatchNorm", group="module", module=partial(Net, norm=nn.BatchNorm1d)),
    Setting(name="LayerNorm", group="module", module=partial(Net, norm=nn.LayerNorm), tolerance=1e-5),
]
"""Every setting; several processes are in tests/cli/test_cli.py."""
