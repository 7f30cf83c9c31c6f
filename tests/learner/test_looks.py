"""What forward passes and `evaluate=` do besides predicting, while we look: each look is as if it were the only one."""

from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import toys
from torch import nn
from torch.distributions import Distribution, Normal
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_cf import Task
from lightning_cf.network.forward import fresh, in_precision_of
from lightning_cf.tasks.reading import empty
from lightning_cf.tasks.targets import finite

pytestmark = pytest.mark.filterwarnings("ignore:.*no claim within the budget")


def fitted(net, collate=None, evaluate=None):
    """Two tasks, one after another; that the first one's outputs stay."""
    seen = []
    for name, classes in (("a", [0, 1]), ("b", [2, 3])):
        dataset = TensorDataset(*toys.numbers(48, classes))
        loaders = {stage: DataLoader(dataset, 16, collate_fn=collate) for stage in ("train", "val")}
        toys.fit(net, Task(name, loaders, classes=classes, evaluate=evaluate), max_epochs=2)
        seen.append(net.eval().net(toys.numbers()[0])[:, :2].detach())
        net.train()
    assert torch.equal(*seen)


class Named(toys.Net):
    def training_step(self, batch, batch_idx):
        return self.loss(self(batch.pop("x")), batch.pop("labels"))

    validation_step = training_step


class Encoding(UserDict):
    """As tokenizers give: no dict, which moves itself."""

    def to(self, device):
        self.data = {name: x.to(device) for name, x in self.data.items()}
        return self


def pops(net, batch):
    labels = batch.pop("labels")
    return net(batch.pop("x")), labels


def writes(net, batch):
    batch["x"] /= 2
    return net(batch["x"]), batch["labels"]


@pytest.mark.parametrize("evaluate", [pops, writes])
@pytest.mark.parametrize("kind", [dict, Encoding])
def test_evaluate_may_take_from_its_batch_and_write_into_it(kind, evaluate):
    def collate(samples):
        x, labels = zip(*samples, strict=True)
        return kind(x=torch.stack(x), labels=torch.stack(labels))

    fitted(Named(), collate, evaluate)


@dataclass
class Record:
    x: torch.Tensor
    labels: torch.Tensor


class Movable:
    """What moves itself."""

    def __init__(self, x, labels):
        self.x, self.labels = x, labels

    def to(self, device):
        return Movable(self.x.to(device), self.labels.to(device))


class Attributes(toys.Net):
    def training_step(self, batch, batch_idx):
        batch.x -= 1
        return self.loss(self(batch.x), batch.labels)

    validation_step = None


def takes(net, batch):
    batch.x -= 1
    x = batch.x
    del batch.x
    return net(x), batch.labels


@pytest.mark.parametrize("kind", [Record, Movable, SimpleNamespace])
def test_evaluate_may_take_from_an_object_and_write_into_it(kind):
    def collate(samples):
        x, labels = zip(*samples, strict=True)
        return kind(x=torch.stack(x), labels=torch.stack(labels))

    fitted(Attributes(), collate, takes)


def test_what_an_object_keeps_is_converted_and_looked_at_as_a_pair_is():
    batch = Record(torch.ones(3, 6, dtype=torch.float64), torch.tensor([0, 1, 1]))
    assert in_precision_of(toys.Net(), batch).x.dtype == torch.float32
    assert finite(batch)
    batch.x[0] = torch.nan
    assert not finite(batch)
    assert empty(Record(torch.ones(0, 6), torch.ones(0)))


class Rooted(Movable):
    """Leads back to itself, as a tree whose nodes know their parent does."""

    def __init__(self, x, labels):
        super().__init__(x, labels)
        self.nodes = [SimpleNamespace(parent=self)]

    def to(self, device):
        return Rooted(self.x.to(device), self.labels.to(device))


class Uncopied(Movable):
    """Takes no copy, as what holds a lock or a file does not."""

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot be copied")

    def to(self, device):
        return self


@pytest.mark.parametrize("kind", [Rooted, Uncopied])
def test_an_object_that_leads_back_to_itself_or_takes_no_copy_may_be_a_batch(kind):
    class Reads(toys.Net):
        def training_step(self, batch, batch_idx):
            return self.loss(self(batch.x), batch.labels)

        validation_step = None

    def collate(samples):
        x, labels = zip(*samples, strict=True)
        return kind(torch.stack(x), torch.stack(labels))

    fitted(Reads(), collate, lambda net, batch: (net(batch.x), batch.labels))
    batch = kind(torch.ones(2), torch.ones(2))
    twin = fresh(batch)
    assert (twin is batch) == (kind is Uncopied)
    assert kind is Uncopied or twin.nodes[0].parent is twin


def test_evaluate_may_pop_from_a_list():
    fitted(
        toys.Net(),
        lambda samples: [torch.stack(x) for x in zip(*samples, strict=True)],
        lambda net, batch: (net(batch[0]), batch.pop()),
    )


def test_a_forward_pass_may_write_into_its_input():
    class InPlace(toys.Net):
        def forward(self, x):
            x -= 1
            return self.net(x)

    fitted(InPlace())


class AroundScripted(nn.Module):
    """A norm of its own after a scripted layer."""

    def __init__(self):
        super().__init__()
        self.before, self.weight = torch.jit.script(nn.ReLU()), nn.Parameter(torch.ones(16))

    def forward(self, x):
        return F.layer_norm(self.before(x), (16,), self.weight)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "layer",
    [
        lambda: torch.jit.script(nn.Sequential(nn.ReLU(), nn.Dropout(0.1))),
        lambda: torch.jit.trace(nn.ReLU(), torch.zeros(2, 16)),
        lambda: torch.jit.script(nn.BatchNorm1d(16)),
        AroundScripted,
    ],
    ids=["scripted", "traced", "buffers", "around"],
)
def test_a_scripted_layer_that_takes_no_hooks_is_run_as_it_is(layer):
    net = toys.Net()
    net.net = nn.Sequential(nn.Linear(6, 16), layer(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    fitted(net)


class Logging(toys.Net):
    """Logs in every pass whether it trains."""

    def forward(self, x):
        self.log_dict({"sum": x.sum(), "trains": float(self.training)}, on_step=False, on_epoch=True)
        return self.net(x)

    validation_step = None


def logs(net, batch):
    predictions = net(batch[0])
    net.log("mean", predictions.mean())
    return predictions, batch[1]


@pytest.mark.parametrize("evaluate", [None, logs])
def test_what_a_forward_pass_or_evaluate_logs_is_of_the_users_loop_alone(evaluate):
    net = Logging()
    fitted(net, evaluate=evaluate)
    assert "log" not in vars(net)
    assert net.trainer.callback_metrics.keys() == {"sum", "trains"}
    assert net.trainer.callback_metrics["trains"] == 1


class Drawn(nn.Module):
    """Draws what it computes with from a distribution, whose arguments torch looks at where nobody says otherwise."""

    def __init__(self):
        super().__init__()
        self.mean, self.spread, self.head = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x):
        spread = F.softplus(self.spread(x)) + 1e-3
        drawn = Normal(self.mean(x), spread)
        return self.head(drawn.rsample() if self.training else drawn.mean + 0 * drawn.rsample())


def test_distributions_in_a_forward_pass_read_nothing_into_python():
    before, net = Distribution._validate_args, toys.Net()
    net.net = Drawn()
    fitted(net)
    assert before
    assert Distribution._validate_args
