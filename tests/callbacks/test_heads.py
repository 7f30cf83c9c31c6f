"""Heads that train over changed inputs: their loss joins in one backward pass, and they leave no trace."""

import warnings

import numpy as np
import pytest
import torch
from learning import classifier, fit, images, inferred, quiet_trainer, tasks, three
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_cf import Classifier, ContinualError, SequentialTaskRunner, Task, TaskInferenceCallback
from lightning_cf.callbacks.heads import aside
from lightning_cf.learner.inferring import inference_of, view_of
from lightning_cf.learner.keeping import state_of
from lightning_cf.models import MLP
from lightning_cf.network.forward import eval_mode, named_tensors
from lightning_cf.task_inference import STRATEGIES, Sites, View, read
from lightning_cf.task_inference.trained import trained_heads
from lightning_cf.task_inference.variants import VARIANTS, differs, strange
from lightning_cf.tasks.contexts import seeded
from lightning_cf.utilities.randomness import keyed_generator

pytestmark = pytest.mark.filterwarnings("ignore:.*no claim within the budget")


class Own(LightningModule):
    """A network with dropout and a norm, whose training step is its own."""

    def __init__(self, dropout=0.0, norm=False):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(64, 12), *([nn.BatchNorm1d(12)] if norm else []), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.Linear(12, 10), nn.ReLU(), nn.Dropout(dropout), nn.Linear(10, 10))
        self.drawn = []  # not from random, of which the type checks of these tests draw

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.drawn.append((torch.rand(1).item(), np.random.rand()))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Manual(Own):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


def still():
    """A task whose batches come in one order."""
    data = images().train.of_classes([0, 1])
    loader = DataLoader(TensorDataset(data.images, data.labels), 32)
    return Task("still", {"train": loader, "val": loader}, classes=[0, 1])


class Halving(Own):
    """Writes into its batch."""

    def training_step(self, batch, batch_idx):
        batch[0].div_(2)
        return super().training_step(batch, batch_idx)


def test_a_head_over_changed_inputs_gets_the_batch_as_it_came():
    seen = []

    def evaluate(module, batch):
        if torch.is_grad_enabled():
            seen.append(batch[0][:32].clone())
        return module(batch[0].div_(2)), batch[1]

    task = still()
    task.evaluate = evaluate
    steps(Halving(), task, "neither")
    (x,) = seen
    assert torch.equal(x, task.data.train_dataloader().dataset.tensors[0][:32])


def steps(module, task, strategy, count=1, **options):
    """The tensors after some batches of LEARN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callbacks = [*three(after=1.0)[1:], *([] if strategy is None else [TaskInferenceCallback(strategy)])]
        torch.manual_seed(2)
        np.random.seed(2)
        quiet_trainer(max_steps=count, callbacks=callbacks, **options).fit(module, datamodule=task)
    return {name: tensor.detach().clone() for name, tensor in named_tensors(module).items()}


def expected(task, name, dropout):
    """One step with the head's loss written out: over the batch and all that is made of it, in eval mode."""
    learned, module = Own(dropout), Own(dropout)
    steps(learned, task, name)  # for its structure and ledger
    state = state_of(learned)
    sites = Sites.of(module, state.structure, state.ledger, task.name)
    (strategy,) = trained_heads([STRATEGIES[name]])
    with seeded(0, task.name, "task inference"):
        found = view_of(module, task, sites, task.train_dataloader(), 2000)
    fitted = strategy.begin(*found, 2, 1.0, torch.Generator())
    fitted = {key: value.requires_grad_() for key, value in fitted.items()}
    x, y = next(iter(task.train_dataloader()))
    generator = keyed_generator(0, task.name, "task inference", "learn", 0, 0)
    others = {n: strange(x, generator) if n == "strange" else VARIANTS[n](x) for n in strategy.changes}

    def view(x):
        return View.of(read(module, [sites], lambda: module(x), keep_graph=True), sites)

    with eval_mode(module):
        views = {n: view(other) for n, other in others.items()}
        if "strange" in others:
            views["strange"] = views["strange"].part(differs(x, others["strange"]))
        seen = view(x)
        joined = View(seen.inputs, seen.hidden, seen.logits, seen.own, seen.chain, views)
        loss = 3.0 * strategy.share * strategy.loss(fitted, joined, y - task.classes[0])
    torch.manual_seed(2)
    shown = module(x).masked_fill(~torch.isin(torch.arange(10), torch.tensor(task.classes)), torch.finfo().min)
    (F.cross_entropy(shown, y) + loss).backward()
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if key.startswith("network.6"):
                parameter.grad[2:] = 0
            parameter -= 0.1 * parameter.grad
    return {key: tensor.detach() for key, tensor in named_tensors(module).items()}


@pytest.mark.parametrize("kind", [Own, Manual])
@pytest.mark.parametrize("name", ["neither", "rotations"])
def test_the_loss_over_changed_inputs_joins_the_modules_own(kind, name):
    task = still()
    found = steps(kind(), task, name)
    for key, tensor in expected(task, name, 0.0).items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["neither", "rotations"])
def test_the_gradient_reaches_the_tasks_hidden_units(name):
    task = still()
    found, plain = steps(Own(), task, name, 2), steps(Own(), task, None, 2)  # a head of zeros has no gradient yet
    assert all(not torch.equal(found[key], plain[key]) for key in ("network.1.weight", "network.3.weight"))


@pytest.mark.parametrize("name", ["neither", "rotations"])
def test_neither_buffers_nor_the_users_generators_notice(name):
    """With a norm and with dropout: the first step's own pass is the same as without a head."""
    found = []
    for strategy in (None, name):
        module = Own(dropout=0.5, norm=True)
        tensors = steps(module, still(), strategy, 1)
        found.append((tensors["network.2.running_mean"], tensors["network.2.num_batches_tracked"], module.drawn))
    for a, b in zip(found[0][:2], found[1][:2], strict=True):
        assert torch.equal(a, b)
    assert found[0][2] == found[1][2]


def test_a_pass_aside_writes_nothing():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))
            self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout()

        def forward(self, x):
            self.calls += 1
            return self.drop(self.norm(x)) + torch.rand(1)

    net, x = Counting(), torch.randn(4, 3)
    buffers, state = dict(net.named_buffers()), torch.get_rng_state()
    with aside(net):
        assert not net.norm.training
        net(x)
    assert net.norm.training
    assert all(net.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert float(net.calls) == 0
    assert int(net.norm.num_batches_tracked) == 0
    assert torch.equal(torch.get_rng_state(), state)


def learned(strategy, sequence, module, epochs=6, **options):
    return inferred(module, sequence, strategy, epochs, **options)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("neither", {}),
        ("rotations", {}),
        pytest.param("neither", {"precision": "bf16-mixed"}, marks=pytest.mark.slow),
        ("rotations", {"precision": "bf16-true"}),
    ],
)
def test_they_tell_tasks_apart_and_name_none(strategy, options):
    sequence = tasks(2)
    module = learned(strategy, sequence, classifier(), 12, **options)
    found = [module.predict(next(iter(task.test_dataloader()))[0]) for task in sequence]
    told = [float((f.tasks[f.tasks >= 0] == n).float().mean()) for n, f in enumerate(found)]
    assert min(told) > 0.6
    assert inference_of(module.ledger).training == {}


@pytest.mark.parametrize("strategy", ["neither", "rotations"])
def test_accumulated_batches_train_too(strategy):
    found = steps(Own(), still(), strategy, 2, accumulate_grad_batches=2)
    plain = steps(Own(), still(), None, 2, accumulate_grad_batches=2)
    assert not torch.equal(found["network.1.weight"], plain["network.1.weight"])
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())


def test_two_passes_a_step_work():
    class Twice(Own):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1]) + F.cross_entropy(self(batch[0]), batch[1])

    found = steps(Twice(norm=True), still(), "neither", 3)
    assert all(bool(tensor.float().isfinite().all()) for tensor in found.values())


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body = nn.Embedding(17, 6), nn.Linear(6, 24)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.body(self.embedding(x).mean(1)).relu())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.body, self.head = nn.GRU(8, 12, batch_first=True), nn.Linear(12, 24), nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.body(self.gru(x)[0][:, -1]).relu())


def media():
    x = images().train
    tokens = (16 * x.images).long().flatten(1)
    return {"tokens": (Tokens, tokens, x.labels), "series": (Recurrent, x.images[:, 0], x.labels)}


@pytest.mark.parametrize("medium", ["tokens", "series"])
def test_neither_knows_no_medium(medium):
    kind, x, labels = media()[medium]
    torch.manual_seed(0)
    net = Own()
    net.network = kind()
    sequence = []
    for number, classes in enumerate([[0, 1], [2, 3]]):
        chosen = torch.isin(labels, torch.tensor(classes))
        loader = DataLoader(TensorDataset(x[chosen], labels[chosen]), 32)
        sequence.append(Task(f"t{number}", {"train": loader, "val": loader}, classes=classes))
    module = learned("neither", sequence, net, 3)
    (_, second) = inference_of(module.ledger).tasks
    assert bool((second.fitted["neither"]["weight"] != 0).any())
    assert module.predict(x[:5]).classes.shape == (5,)


def test_what_they_need_is_refused_where_it_is_not_there():
    x, y = torch.randn(64, 1, 6, 8), torch.arange(64) % 2

    def task(*tensors):
        loader = DataLoader(TensorDataset(*tensors), 16)
        return Task("odd", {"train": loader, "val": loader}, classes=[0, 1], evaluate=lambda m, b: (m(b[0]), b[-1]))

    class Three(Own):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[-1])

    with pytest.raises(ContinualError, match=r"=rotations: it needs .input, label. pairs.*last two dimensions.*=auto"):
        fit(
            Classifier(MLP(shape=(1, 6, 8), classes=10, hidden=(12,))),
            task(x, y),
            [*three(), TaskInferenceCallback("rotations")],
            1,
        )
    images_ = torch.randn(64, 1, 8, 8)
    for name in ("neither", "neither_mahalanobis"):
        with pytest.raises(ContinualError, match=rf"={name}: it needs .*pairs.*'odd' does not have"):
            fit(Three(), task(images_, y, y), [*three(), TaskInferenceCallback(name)], 1)


def test_a_head_that_no_batch_trains_says_so():
    class Twice(Own):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self(torch.cat([x, x])), torch.cat([y, y]))

    with pytest.warns(UserWarning, match="the head of neither was never trained"):
        fit(Twice(), still(), [*three(after=1.0), TaskInferenceCallback("neither")], 1)


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_bitwise(tmp_path):
    def runner(root):
        options = {"trainer": quiet_trainer, "epochs": 3, "invariance_epochs": 2, "task_inference": "neither"}
        return SequentialTaskRunner(classifier(), tasks(2), root=root, **options)

    whole = runner(tmp_path / "whole").run()
    for stop in (1, 3):
        first = runner(tmp_path / str(stop))
        phase = first.phase

        def until(name, step, phase=phase, first=first, stop=stop):
            if len(first.progress.finished) == stop:
                raise KeyboardInterrupt
            phase(name, step)

        first.phase = until
        with pytest.raises(KeyboardInterrupt):
            first.run()
        again = runner(tmp_path / str(stop)).run()
        assert again.weights_sha256 == whole.weights_sha256
        assert again.class_incremental == whole.class_incremental
