"""What a network computes with beside its weights: buffers, however they are written, and what is neither."""

import copy
import warnings

import pytest
import torch
from clouds import INPUTS, Net, clouds, fit, loaders, outputs, points
from torch import nn
from torch.nn import functional as F

from lightning_cf import (
    ContinualError,
    FrozenWarning,
    LedgerWarning,
    Task,
)


class Shifted(Net):
    """Shifts its input, and scales what it gives, by buffers that training writes."""

    def __init__(self, write):
        super().__init__()
        self.write = write
        self.register_buffer("mean", torch.zeros(INPUTS))
        self.register_buffer("kept", torch.ones(INPUTS, dtype=torch.bool))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        return super().forward((x - self.mean) * self.kept) * (1 + self.step / 10)

    def training_step(self, batch, batch_idx):
        self.write(self, batch[0])
        return super().training_step(batch, batch_idx)


def another_tensor(net, x):
    net.mean = 0.9 * net.mean + 0.1 * x.mean(dim=0)


def in_place(net, x):
    net.mean.mul_(0.9).add_(x.mean(dim=0), alpha=0.1)


def whole_numbers(net, x):
    net.step += 1


def truths(net, x):
    net.kept.copy_(torch.arange(INPUTS) % 5 != net.trainer.current_epoch)


def the_batch_itself(net, x):
    net.mean = x[0]


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no claim within the budget",
    "ignore:You passed in a `val_dataloader`",
    "ignore:`LightningModule.configure_optimizers` returned `None`",
)


@pytest.mark.parametrize("write", [another_tensor, in_place, whole_numbers, truths, the_batch_itself])
def test_buffers_that_training_writes_stay_as_the_first_task_left_them(write):
    module, (first, second) = Shifted(write), (clouds("a", [0, 1]), clouds("b", [2, 3]))
    data = second.train_dataloader().dataset.tensors[0].clone()
    fit(module, first)
    before, left = outputs(module), {name: x.clone() for name, x in module.named_buffers()}
    assert any(bool((x != y).any()) for x, y in zip(left.values(), Shifted(write).buffers(), strict=True))  # it trained
    with pytest.warns(FrozenWarning, match="Training writes '(mean|kept|step)', with which earlier tasks compute"):
        fit(module, second)
    assert torch.equal(outputs(module), before)
    for name, x in module.named_buffers():
        assert torch.equal(x, left[name]), name
    assert torch.equal(second.train_dataloader().dataset.tensors[0], data)


def changed(module, name, large):
    with torch.no_grad():
        if name in ("mean", "shift"):
            getattr(module, name).mul_(1.02 if not large else 1.0).add_(5.0 if large else 0.0)
        elif name == "kept":
            module.kept[: 9 if large else 1] = False
        else:
            module.step += 1


class Moved(Shifted):
    """Has a parameter that is part of no unit, too."""

    def __init__(self):
        super().__init__(lambda net, x: None)
        self.mean.fill_(1.0)
        self.shift = nn.Parameter(torch.ones(INPUTS))

    def forward(self, x):
        return super().forward(x - self.shift)


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("name", ["mean", "kept", "step", "shift"])
def test_what_has_no_unit_and_was_changed_between_fits_is_refused(name, large):
    module = Moved()
    fit(module, clouds("a", [0, 1]), epochs=2)
    changed(module, name, large)
    with pytest.raises(
        ContinualError, match=f"'{name}' of Moved changed since the last fit.*before the first task only"
    ):
        fit(module, clouds("b", [2, 3]), epochs=2)


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("name", ["mean", "kept", "step", "shift"])
def test_it_is_found_in_another_process_too(name, large):
    module = Moved()
    fit(module, clouds("a", [0, 1]), epochs=2)
    module = copy.deepcopy(module)  # knows no more than its ledger, as a process that loads a checkpoint
    changed(module, name, large)
    if (large and name != "kept") or name == "step":  # by how far all that the task owns has moved
        way_out = "load both from the same checkpoint" if name == "shift" else "before the first task only"
        with pytest.raises(ContinualError, match=f"not those that the ledger was made for: '{name}'.*{way_out}"):
            fit(module, clouds("b", [2, 3]), epochs=2)
    else:
        with pytest.warns(LedgerWarning, match=f"Since the last fit something changed weights.*'{name}'"):
            fit(module, clouds("b", [2, 3]), epochs=2)


class Tabled(Net):
    """Statistics of each task's data in a row of its own, which setup() writes, and a head a task."""

    def __init__(self):
        super().__init__()
        self.register_buffer("means", torch.zeros(3, INPUTS))
        self.scales = nn.Parameter(torch.ones(3, INPUTS))
        self.heads = nn.ModuleDict({name: nn.Linear(32, 2) for name in "abc"})
        self.c = nn.Identity()

    def forward(self, x, name):
        row = "abc".index(name)
        return self.heads[name](super().forward((x - self.means[row]) * self.scales[row]))

    def setup(self, stage):
        row = "abc".index(self.trainer.datamodule.name)
        self.means[row] = self.trainer.datamodule.train_dataloader().dataset.tensors[0].mean(dim=0)
        self.scales.data[row] = 1.5

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0], self.trainer.datamodule.name), batch[1])


@pytest.mark.parametrize("again", [lambda module: module, copy.deepcopy])
def test_rows_that_no_earlier_task_reads_may_be_written_between_fits(again):
    module, seen = Tabled(), {}
    for number, name in enumerate("abc"):
        x, y = points([2 * number, 2 * number + 1])
        task = Task(name, loaders(x, y - 2 * number), evaluate=lambda net, b, name=name: (net(b[0], name), b[1]))
        module = again(module)
        fit(module, task, epochs=2)
        seen[name] = module(x, name).detach()
        for known, before in seen.items():
            at = 2 * "abc".index(known)
            assert torch.equal(module(points([at, at + 1])[0], known), before)


class Centred(Net):
    """A plain tensor, which nothing registers."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(INPUTS)

    def forward(self, x):
        return super().forward(x - self.mean)

    def training_step(self, batch, batch_idx):
        self.mean = 0.9 * self.mean + 0.1 * batch[0].mean(dim=0)
        return super().training_step(batch, batch_idx)


class Annealed(Net):
    """A number."""

    temperature = 1.0

    def forward(self, x):
        return super().forward(x) * self.temperature

    def on_train_batch_end(self, *args):
        self.temperature *= 0.97


class Listed(Net):
    """A layer in a list, which the optimiser is given."""

    def __init__(self):
        super().__init__()
        self.more = [nn.Linear(INPUTS, INPUTS)]

    def forward(self, x):
        return super().forward(self.more[0](x))

    def configure_optimizers(self):
        return torch.optim.Adam([*self.parameters(), *self.more[0].parameters()], lr=0.006)


class Branching(Net):
    """A branch that comes with the second task's fit."""

    def forward(self, x):
        return super().forward(x) + (self.branch(x) if "branch" in self._modules else 0)

    def on_fit_start(self):
        if self.trainer.datamodule.name == "b":
            self.branch = nn.Linear(INPUTS, 10)


@pytest.mark.parametrize("kind", [Centred, Annealed, Listed, Branching])
def test_what_nothing_holds_is_said_where_earlier_tasks_give_something_else(kind):
    module = kind()
    with warnings.catch_warnings(record=True) as before:
        warnings.simplefilter("always")
        fit(module, clouds("a", [0, 1]))
    assert not [w for w in before if issubclass(w.category, FrozenWarning)]
    with pytest.warns(FrozenWarning, match="earlier tasks .*give something else than before this task") as said:
        fit(module, clouds("b", [2, 3]))
    assert len([w for w in said if issubclass(w.category, FrozenWarning)]) == 1


class Rebinding(Net):
    """Puts new parameters in the place of the old ones, as meta-learning writes an update."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        for layer in (self.a, self.b, self.c):
            gradients = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
            for (name, p), gradient in zip([*layer.named_parameters()], gradients, strict=True):
                setattr(layer, name, nn.Parameter((p - 0.05 * gradient).detach()))

    def configure_optimizers(self):
        return None


def test_parameters_in_whose_place_others_were_put_are_put_back():
    module = Rebinding()
    with pytest.warns(FrozenWarning, match="zero for good: they were put back"):
        fit(module, clouds("a", [0, 1]))
    before = outputs(module)
    with pytest.warns(FrozenWarning, match="they were put back"):
        fit(module, clouds("b", [2, 3]))
    assert torch.equal(outputs(module), before)


class Ready(Net):
    """Takes statistics of the first batch that it sees."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(INPUTS))
        self.ready, self.first = False, None

    def forward(self, x):
        if not self.ready:
            self.mean.copy_(x.mean(dim=0))
            self.ready, self.size = True, len(x)
        return super().forward(x - self.mean)

    def training_step(self, batch, batch_idx):
        self.first = batch[0].mean(dim=0) if self.first is None else self.first
        return super().training_step(batch, batch_idx)


def test_what_is_built_at_the_first_pass_is_built_in_training():
    module = Ready()
    fit(module, clouds("a", [0, 1]), epochs=1)
    assert torch.equal(module.mean, module.first)
    assert module.size == 32
